"""Paths that a user names."""

from __future__ import annotations

from pathlib import Path

from ssdi8_edge.ground.errors import UsageError


def expanded(path: Path | str) -> Path:
    """`path` with ~ and ~user replaced, which a shell leaves in --option=~/file.

    Raises:
        UsageError: there is no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UsageError(f"there is no home folder for {path};", "write the whole path.") from error


def text_input(path: Path, what: str) -> Path:
    """`path`, expanded, if a text can be read from it, also twice.

    Args:
        what: the text is, for the message.

    Raises:
        UsageError: it is missing, a folder, a pipe or a device, or cannot be read.
    """
    path = expanded(path)
    remedy = "name a text file."
    try:
        if path.is_dir():
            raise UsageError(f"{what} {path} is a folder;", remedy)
        if path.exists() and not path.is_file():
            raise UsageError(f"{what} {path} is a pipe or a device;", remedy)
        if path.is_symlink() and not path.exists():
            raise UsageError(f"{what} {path} is a link to nothing;", remedy)
        path.open("rb").close()
    except FileNotFoundError as error:
        raise UsageError(f"{what} {path} does not exist;", remedy) from error
    except OSError as error:
        raise UsageError(f"cannot read {what} {path}: {error.strerror};", remedy) from error
    return path
