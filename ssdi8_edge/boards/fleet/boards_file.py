"""The file of `--fleet`: which boards there are.

[[board]]
host = "me@orin-1"      # as --host takes it
target = "orin-nx"      # the bundles that fit it; without it all do
tags = ["lab"]          # what --tag chooses by
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ssdi8_edge.boards.link.address import parse_address
from ssdi8_edge.boards.link.hosts import THIS_MACHINE
from ssdi8_edge.ground.errors import UsageError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Name = Annotated[str, Field(min_length=1)]


class FleetBoard(BaseModel):
    """One board. `target`: the only one whose bundles it takes; None: any."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    host: Name
    target: Name | None = None
    tags: tuple[Name, ...] = ()

    def misfit(self, target: str) -> UsageError:
        """What there is to say of a bundle for another `target`."""
        return UsageError(
            f"{self.host} takes bundles for {self.target}, and this one is for {target};",
            "build one for it, or leave it out by --tag.",
        )


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")

    board: Annotated[list[FleetBoard], Field(min_length=1)]


def read_fleet(path: Path, tags: Sequence[str] = ()) -> list[FleetBoard]:
    """The boards of a file that have one of `tags`; without any, all.

    Raises:
        UsageError: the file cannot be read, names a board twice or no such host, or none is left.
    """
    try:
        fields = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror});", "name a file.") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{path} is no TOML file ({error});", "correct it.") from error
    try:
        boards = _File.model_validate(fields).board
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UsageError(f"{path}: {key}: {first['msg']};", "correct it.") from error
    seen = set()
    for board in boards:
        if board.host != THIS_MACHINE:
            parse_address(board.host)
        if board.host in seen:
            raise UsageError(f"{path} names {board.host} twice;", "leave one out.")
        seen.add(board.host)
    chosen = [board for board in boards if not tags or {*tags} & {*board.tags}]
    if not chosen:
        known = ", ".join(sorted({tag for board in boards for tag in board.tags})) or "none"
        raise UsageError(
            f"no board of {path} has a tag {' or '.join(tags)};", f"its tags are: {known}."
        )
    return chosen
