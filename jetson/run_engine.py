"""Runs, measures, verifies or describes the bundle that this file lies in.

    python run_engine.py --prompt "The Jetson is"     text to stdout, timings to stderr
    python run_engine.py --interactive                a chat, or what you type, continued
    python run_engine.py --bench                      one JSON line per prompt length
    python run_engine.py --profile                    time of each layer and module
    python run_engine.py --verify                     hashes, then golden vectors; exit code 0 or 1
    python run_engine.py --info                       what the bundle is and where it was made

With --debug a failure shows where it happened.

Needs Python 3.10 and numpy; prompts need tokenizers, chats jinja2. The first engine of the bundle
that is ready runs it: TensorRT, where build_engine.py has built an engine, needs tensorrt and
pycuda; the kernels need the library that setup.sh builds; the portable graph needs onnxruntime.
Exit codes: 0 ok, 1 the bundle ran and failed, 2 something does not fit, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import NoReturn

BUNDLE_FOLDER = Path(__file__).resolve().parent
INTERRUPTED = 130  # what a shell reports for a program that Ctrl-C ended


def start(program: str, command_line: str) -> NoReturn:
    """Run `command_line` of runtime.command_line and exit with what it returns.

    It is imported here, where Ctrl-C and a missing numpy are already answered.
    """
    arguments = sys.argv[1:]
    try:
        from runtime import failures

        failures.take_debug(arguments)
        failures.quiet_libraries(program)
        import runtime.command_line

        sys.exit(getattr(runtime.command_line, command_line)(arguments, BUNDLE_FOLDER))
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # for a second one
        print(file=sys.stderr)
        sys.exit(INTERRUPTED)
    except Exception as error:
        remedies = {
            "numpy": f"install it with: {sys.executable} -m pip install numpy",
            "runtime": "copy the whole bundle, this script works only inside it",
        }
        module = (getattr(error, "name", None) or "").partition(".")[0]
        if isinstance(error, ModuleNotFoundError) and module in remedies:
            print(f"{program}: {error}; {remedies[module]}.", file=sys.stderr)
            sys.exit(2)
        failures.show_traceback(error)
        failure = failures.explain(error, "loading the runtime")
        print(f"{program}: {failure.sentence}", file=sys.stderr)
        sys.exit(failure.exit_code)


if __name__ == "__main__":
    start("run_engine", "run")
