"""Runs, verifies or describes the bundle that this file lies in.

    python run_engine.py --prompt "The Jetson is"     text to stdout, timings to stderr
    python run_engine.py --verify                     hashes, then golden vectors; exit code 0 or 1
    python run_engine.py --info                       what the bundle is and where it was made

Needs Python 3.10, numpy and onnxruntime; prompts need tokenizers. Exit codes: 0 ok, 1 the bundle
ran and failed, 2 something does not fit, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import sys
from pathlib import Path

BUNDLE_FOLDER = Path(__file__).resolve().parent


def main() -> int:
    """Import the runtime where Ctrl-C and a missing numpy are already answered, then run it."""
    try:
        from runtime.command_line import run
    except ModuleNotFoundError as error:
        remedies = {
            "numpy": f"install it with: {sys.executable} -m pip install numpy",
            "runtime": "copy the whole bundle, this script works only inside it",
        }
        module = (error.name or "").partition(".")[0]
        if module not in remedies:
            raise
        print(f"run_engine: {error}; {remedies[module]}.", file=sys.stderr)
        return 2
    return run(sys.argv[1:], BUNDLE_FOLDER)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print(file=sys.stderr)
        sys.exit(130)
