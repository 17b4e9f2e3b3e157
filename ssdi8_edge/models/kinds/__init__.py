"""The kinds of blocks: one module each. Adding a kind is adding its module here."""

from __future__ import annotations

import importlib
import pkgutil

from ssdi8_edge.ground.errors import CheckpointError
from ssdi8_edge.models.block import Block


def kind_named(name: str) -> type[Block]:
    """The kind of that name.

    Raises:
        CheckpointError: this version has none.
    """
    known = sorted(module.name for module in pkgutil.iter_modules(__path__))
    if name not in known:
        raise CheckpointError(
            f"a block is of the unknown kind {name!r};", f"this version knows {', '.join(known)}."
        )
    module = importlib.import_module(f"{__name__}.{name}")
    return next(
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Block) and vars(value).get("kind") == name
    )
