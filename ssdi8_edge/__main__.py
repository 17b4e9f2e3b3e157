"""Entry point of the command, and of `python -m ssdi8_edge`."""

from __future__ import annotations

import signal


def main() -> None:
    """Ctrl-C while the libraries load simply ends the process: nothing has begun by then."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from ssdi8_edge import cli

    cli.main()


if __name__ == "__main__":
    main()
