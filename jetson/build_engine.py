"""Builds the TensorRT engine of the bundle that this file lies in, for the GPU of this machine.

    python build_engine.py                    into engine/ inside the bundle
    python build_engine.py --workspace-mb 256 --timing-cache ~/timing.cache

An engine runs only on the GPU and the TensorRT version that built it, so this runs on the board. It
needs Python 3.10, numpy and JetPack's tensorrt, 10.3 or newer; setup.sh builds the plugins first.
Exit codes: 0 built, or an engine that fits was kept; 1 TensorRT could not build it; 2 something
does not fit.
"""

from __future__ import annotations

import sys

try:
    from run_engine import start
except ModuleNotFoundError:
    print(
        "build_engine: run_engine.py is not beside this script; copy the whole bundle.",
        file=sys.stderr,
    )
    sys.exit(2)

if __name__ == "__main__":
    start("build_engine", "run_build")
