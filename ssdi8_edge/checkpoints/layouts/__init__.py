"""The layouts of checkpoints: one module each. Adding a layout is adding its module here."""

from __future__ import annotations

import importlib
import pkgutil

from ssdi8_edge.checkpoints.layout import Layout


def layouts() -> list[Layout]:
    """In the order in which they are asked whether they recognise a config.json."""
    modules = [
        importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__)
    ]
    found = {v.name: v for m in modules for v in vars(m).values() if isinstance(v, Layout)}
    return sorted(found.values(), key=lambda layout: (layout.fallback, layout.name))
