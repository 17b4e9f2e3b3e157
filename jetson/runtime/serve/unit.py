"""A unit file for systemd that keeps the server running; it is printed, and never installed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from runtime.bundle import Bundle

UNIT = """\
# To keep it as a service of this user:
#     {command} > ~/.config/systemd/user/ssdi8-edge.service
#     systemctl --user daemon-reload && systemctl --user enable --now ssdi8-edge
#     loginctl enable-linger    # also while this user is not logged in
[Unit]
Description=ssdi8-edge serves {name}
After=network.target

[Service]
ExecStart={start}
Restart=on-failure
TimeoutStopSec=20
NoNewPrivileges=true
PrivateTmp=true
ProtectSystem=full

[Install]
WantedBy=default.target
"""


def unit_file(bundle: Bundle, python: str, command: Sequence[str]) -> str:
    """The text of the unit.

    Args:
        python: the interpreter that runs the script.
        command: sys.argv of the call that asked for it, whose options it takes over.
    """
    words = [python, str(Path(command[0]).resolve()), *command[1:]]
    start = [_quoted(word) for word in words if word != "--print-unit"]
    return UNIT.format(
        command=" ".join([_quoted(word) for word in words]),
        name=_one_line(bundle.name),
        start=" ".join(start),
    )


def _one_line(text: str) -> str:
    return "".join(c for c in text if c.isprintable()).replace("%", "%%")


def _quoted(word: str) -> str:
    """As systemd reads it: quotes, escapes, and neither its specifiers nor variables."""
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{escaped}"'
