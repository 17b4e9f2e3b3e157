"""Entry point of the command, and of `python -m ssdi8_edge`."""

from __future__ import annotations

import io
import signal
import sys


def main() -> None:
    """Ctrl-C while the libraries load simply ends the process: nothing has begun by then."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A console without UTF-8 shall not end a command.
            stream.reconfigure(errors="backslashreplace")
    # These need nothing that is installed.
    from runtime import failures
    from ssdi8_edge.ground.failures import as_ours

    failures.take_debug(sys.argv)
    failures.quiet_libraries("ssdi8-edge")
    try:
        from ssdi8_edge import cli
    except Exception as error:
        failures.show_traceback(error)
        found = as_ours(error, "loading the command line")
        print(f"ssdi8-edge: {found}", file=sys.stderr)
        sys.exit(found.exit_code)
    cli.main()


if __name__ == "__main__":
    main()
