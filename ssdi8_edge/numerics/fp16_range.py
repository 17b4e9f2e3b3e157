"""What FP16 holds: a tensor that does not fit is named, with its layer and a remedy.

The residual stream, states inside SSD and scales are FP32. What passes from one linear layer or op
to the next is FP16, and so are the embedding, lm_head and the linears of the FP16 baseline.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from ssdi8_edge.ground.errors import CheckpointError

LARGEST = 65504.0
IN_FP32 = "only `evaluate CHECKPOINT`, which computes in FP32, takes this model."


def all_finite(value: Tensor) -> bool:
    """Whether no value is NaN or infinite; `aminmax` passes both on, and is many times faster than
    `isfinite`, which makes a copy."""
    return not value.numel() or bool(torch.stack(torch.aminmax(value)).isfinite().all())


def to_fp16(value: Tensor, name: str, remedy: str) -> Tensor:
    """`value`, finite, rounded to FP16; `name` says which tensor it is.

    Raises:
        CheckpointError: it holds values that FP16 cannot.
    """
    rounded = value.half()
    if all_finite(rounded):
        return rounded
    beyond = rounded.isinf()
    first = beyond.nonzero()[0].tolist()
    count = int(beyond.sum())
    raise CheckpointError(
        f"tensor {name} holds {count} value{'s' if count > 1 else ''} beyond {LARGEST:g}, the end "
        f"of FP16, in which it is kept; the first is {value[tuple(first)].item():g} at {first}",
        remedy,
    )


class RangeWatch:
    """Looks at FP16 tensors of a model while it computes on tensors.

    Attributes:
        method: that the model was quantized by.
        scope: which layer computes, as `layers.{i}`.
        remedy: what the user can do about a value beyond FP16 in the tensor of a name.
        tell: is handed the sentence; None raises it.
    """

    def __init__(
        self, method: str, remedy: Callable[[str], str], tell: Callable[[str], None] | None
    ) -> None:
        self.method, self.remedy, self.tell, self.scope = method, remedy, tell, "the model"

    def see(self, name: str, value: Tensor) -> None:
        """Raises CheckpointError, or tells: `value`, the tensor `name`, has left FP16."""
        if not all_finite(value):
            error = CheckpointError(
                f"{self.scope}: {name} goes beyond {LARGEST:g}, the end of FP16, in which method "
                f"{self.method} keeps it",
                self.remedy(name),
            )
            if self.tell is None:
                raise error
            self.tell(str(error))


_watch: ContextVar[RangeWatch | None] = ContextVar("range_watch", default=None)


@contextmanager
def watched(
    method: str, remedy: Callable[[str], str], tell: Callable[[str], None] | None = None
) -> Iterator[RangeWatch]:
    """Inside, every tensor that goes through `see` is looked at."""
    watch = RangeWatch(method, remedy, tell)
    token = _watch.set(watch)
    try:
        yield watch
    finally:
        _watch.reset(token)


def enter(scope: str) -> None:
    """Says which layer computes from here on, if anyone watches."""
    watch = _watch.get()
    if watch is not None:
        watch.scope = scope


def see(name: str, value: Any) -> Any:
    """`value`, looked at if anyone watches and it is a tensor (and not a value of a graph)."""
    watch = _watch.get()
    if watch is not None and isinstance(value, Tensor):
        watch.see(name, value)
    return value
