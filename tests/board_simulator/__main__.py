"""Start a simulated board and say how to reach it."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import tempfile
import threading
from pathlib import Path

from .machine import make_board
from .server import SshServer


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.board_simulator", description=__doc__)
    parser.add_argument("--folder", type=Path, help="for its files (default: a temporary one)")
    parser.add_argument("--port", type=int, help="(default: a free one)")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # so that the server ends, too
    with tempfile.TemporaryDirectory(prefix="simulated-board-") as scratch:
        folder = (options.folder or Path(scratch)).resolve()
        server = SshServer(folder / "ssh", environment=make_board(folder), port=options.port)
        server.restart_after(folder / "root/reboot")
        with server:
            print("A simulated Orin NX; nothing it reports was measured. Ctrl-C ends it.")
            print("Add this to ~/.ssh/config:\n")
            print(server.client_config("simulated-board", UserKnownHostsFile=f"{folder}/known"))
            print("ssdi8-edge doctor --host simulated-board --accept-new-host-key", flush=True)
            with contextlib.suppress(KeyboardInterrupt):
                threading.Event().wait()


if __name__ == "__main__":
    main()
