"""A Jetson for readers and tests that have none: an OpenSSH server and a folder of fakes.

    python -m tests.board_simulator        (from the root of the repository)

starts a server on this machine that only you can log in to and that answers like an Orin NX of 16
GB: `nvpmodel`, `tegrastats`, `jetson_clocks` and `sudo` on its PATH are scripts, and
SSDI8_BOARD_ROOT names a folder that stands for the board's /etc, /proc and /sys. Whatever reads
board facts takes that prefix and marks what it reports with `"simulated": true`. There is no GPU
and no TensorRT in it: bundles for `host-cpu` run, at the speed of this machine.
"""
