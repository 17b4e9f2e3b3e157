"""JSON that every reader takes: no NaN, no infinity, no half characters."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

# Key beside a number that is null since JSON has no word for it: field -> "inf", "-inf" or "nan".
NOT_FINITE = "not_finite"


def to_json(value: Any, indent: int | None = 2) -> str:
    """`value` as JSON in ASCII; on one line without `indent`.

    An infinite number or NaN becomes null, and the object that it lies in says under "not_finite"
    what it was: {"perplexity": null, "not_finite": {"perplexity": "inf"}}.
    """
    separators = (",", ":") if indent is None else None
    return json.dumps(json_safe(value), indent=indent, separators=separators, allow_nan=False)


def json_safe(value: Any) -> Any:
    """What `to_json` writes, as dicts, lists, texts and numbers."""
    if isinstance(value, Mapping):
        safe = {json_safe(key): json_safe(each) for key, each in value.items()}
        odd = dict(found for key, each in value.items() for found in _not_finite(str(key), each))
        return {**safe, NOT_FINITE: odd} if odd else safe
    if isinstance(value, (list, tuple)):
        return [json_safe(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, str):
        # The bytes of a file name that are no UTF-8 come as halves of characters.
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    return value


def number_of(record: Mapping[str, Any], field: str) -> Any:
    """`record[field]` as it was before `to_json`; None where it is absent."""
    value, odd = record.get(field), record.get(NOT_FINITE)
    if value is None and isinstance(odd, Mapping) and odd.get(field) in ("inf", "-inf", "nan"):
        return float(odd[field])
    return value


def _not_finite(name: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, float) and not math.isfinite(value):
        yield name, str(value)
    elif isinstance(value, (list, tuple)):
        for i, each in enumerate(value):
            yield from _not_finite(f"{name}[{i}]", each)
