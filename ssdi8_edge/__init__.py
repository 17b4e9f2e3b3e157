"""Quantize Mamba-2 with SSDi8 and run it on NVIDIA Jetson Orin."""

import sys

from ssdi8_edge.ground.shipped import shipped

__version__ = "0.1.0"

# The host runs the files that run on boards: `runtime` is the package in jetson/. It goes to the
# front, since something else of that name may be installed.
if (_jetson := str(shipped("jetson"))) not in sys.path:
    sys.path.insert(0, _jetson)
