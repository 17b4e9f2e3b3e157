"""What does not fit, and the nearest choice that does."""

from __future__ import annotations

from collections.abc import Iterator

from ssdi8_edge.ground.errors import UsageError
from ssdi8_edge.models.description import Description
from ssdi8_edge.plan.plan import Plan, make_plan
from ssdi8_edge.recipes.presets import METHODS
from ssdi8_edge.recipes.recipe import QuantConfig
from ssdi8_edge.targets import Target, load_target, target_names

LEAST_CONTEXT = 1024
SMALLEST_METHOD = "edge-w4a8"


def require_fitting(plan: Plan, model: Description, recipe: QuantConfig, target: Target) -> None:
    """Before anything is built or brought.

    Raises:
        UsageError: the model does not fit where it is to run; names the largest part of it, and
            the nearest choice that fits.
    """
    if plan.fits is not False:
        return
    memory, free = plan.memory, plan.room.free
    assert free is not None
    largest = max(memory.parts.values())
    raise UsageError(
        f"{plan.model} by {plan.method} takes {_gb(memory.total)} while it runs, most of it "
        f"{memory.largest} ({_gb(largest)}), and {target.name} has {_gb(free)} free "
        f"({plan.room.source});",
        f"{_remedy(plan, model, recipe, target)}; --force goes on all the same.",
    )


def _remedy(plan: Plan, model: Description, recipe: QuantConfig, target: Target) -> str:
    for words, other, place, parallel in _nearest(plan, recipe, target):
        # A board that was asked is the one board there is; another target has its own room.
        room = plan.room if place.name == target.name else None
        tried = make_plan(plan.model, model, other, place, parallel=parallel, room=room)
        if tried.fits:
            return words
    return "no target has room for it: take a smaller model"


def _nearest(
    plan: Plan, recipe: QuantConfig, target: Target
) -> Iterator[tuple[str, QuantConfig, Target, int]]:
    """Other choices in words, those first that change least."""
    if plan.parallel > 1:
        yield "give --parallel 1", recipe, target, 1
    if plan.context is not None:
        context = plan.context // 2
        while context >= LEAST_CONTEXT:
            shorter = target.model_copy(update={"context": context})
            yield f"give --context {context}", recipe, shorter, plan.parallel
            context //= 2
    smaller = METHODS[SMALLEST_METHOD]
    if recipe.linear != smaller.linear:
        yield f"give --method {smaller.name}", smaller, target, plan.parallel
    larger = [load_target(name) for name in target_names()]
    for other in sorted(larger, key=lambda each: each.board.memory_gb if each.board else 0.0):
        if other.board and other.engines == target.engines:
            yield f"give --target {other.name}", recipe, other, plan.parallel


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB"


def with_context(target: Target, tokens: int | None) -> Target:
    """The target with another context; None keeps its own."""
    return target if tokens is None else target.model_copy(update={"context": tokens})
