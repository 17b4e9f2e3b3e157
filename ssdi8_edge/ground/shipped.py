"""Where the folders lie that travel with the package."""

from __future__ import annotations

from pathlib import Path


def shipped(name: str) -> Path:
    """`jetson`, `plugins` or `profiles`: inside the installed package, or in the source tree."""
    package = Path(__file__).parents[1]
    installed = package / "share" / name
    return installed if installed.is_dir() else package.parent / name
