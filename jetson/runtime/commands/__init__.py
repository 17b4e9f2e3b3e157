"""One file per command of run_engine.py, and `build`, the command of build_engine.py."""
