"""What can be computed, by name. Adding an op is adding it to a module here."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator

from ssdi8_edge.ops.op import Op


def _found() -> Iterator[Op]:
    for module in pkgutil.walk_packages(__path__, f"{__name__}."):
        for value in vars(importlib.import_module(module.name)).values():
            if isinstance(value, Op):
                yield value


OPS: dict[str, Op] = {}
for _op in _found():
    if OPS.setdefault(_op.name, _op) is not _op:
        raise ValueError(f"there are two ops {_op.name}")
