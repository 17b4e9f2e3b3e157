"""Quantize Mamba-2 with SSDi8 and run it on NVIDIA Jetson Orin."""

__version__ = "0.1.0"
