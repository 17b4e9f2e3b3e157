"""A plan: one model, one method, one target; what it takes, whether it fits, how fast it can be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ssdi8_edge.ground.errors import UsageError
from ssdi8_edge.models.description import Description
from ssdi8_edge.plan.bounds import ASSUMPTIONS, Bounds, bounds_of
from ssdi8_edge.plan.measured import Beside
from ssdi8_edge.plan.memory import Memory, Room, memory_of, room_of
from ssdi8_edge.plan.quantizing import host_peak
from ssdi8_edge.recipes.recipe import QuantConfig
from ssdi8_edge.targets import Target

PROMPT_TOKENS = 1024


@dataclass(frozen=True)
class Plan:
    """What is known before anything is built.

    Attributes:
        model: its name.
        context: tokens of a conversation; None where no state grows with them.
        host_peak: bytes of host memory while the model is quantized on a CPU.
        lacks: what keeps the target from running it, whatever its memory; None: nothing.
        measured: points of the same model, method and target.
    """

    model: str
    method: str
    target: str
    context: int | None
    parallel: int
    memory: Memory
    room: Room
    bounds: Bounds
    host_peak: int
    board_source: str
    lacks: str | None
    measured: tuple[Beside, ...] = ()

    @property
    def fits(self) -> bool | None:
        """Whether the model runs there, as far as memory goes; None: not known."""
        return None if self.room.free is None else self.memory.total <= self.room.free

    @property
    def build_lacks(self) -> int | None:
        """Bytes that building the engine may need beyond free memory; None: not known."""
        return None if self.room.free is None else max(0, self.memory.engine_build - self.room.free)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: bytes and seconds."""
        bounds = self.bounds
        return {
            "kind": "plan",
            "schema": 1,
            "model": self.model,
            "method": self.method,
            "target": self.target,
            "context": self.context,
            "parallel": self.parallel,
            "memory": self.memory.to_dict(),
            "room": self.room.to_dict(),
            "fits": self.fits,
            "build_lacks": self.build_lacks,
            "host_peak": self.host_peak,
            "prompt_tokens": bounds.prompt_tokens,
            "prompt": bounds.prompt.to_dict(),
            "token": bounds.token.to_dict(),
            "tokens_per_s": bounds.tokens_per_s,
            "lacks": self.lacks,
            "assumptions": [*ASSUMPTIONS],
            "board_source": self.board_source,
            "measured": [each.to_dict() for each in self.measured],
        }


def make_plan(
    name: str,
    model: Description,
    recipe: QuantConfig,
    target: Target,
    *,
    parallel: int = 1,
    prompt_tokens: int | None = None,
    room: Room | None = None,
) -> Plan:
    """Plan `model`, as `outline` or a checkpoint describes it.

    Args:
        prompt_tokens: of the prompt to bound; None takes `PROMPT_TOKENS`, or what the context has
            room for.
        room: of a board that was asked; None takes the target's.

    Raises:
        UsageError: no op computes the recipe; the context has no room for the prompt and a token.
    """
    recipe.require_exportable()
    adapted = model.adapted(recipe).with_context(target.context)
    context = target.context if adapted.grows(recipe) else None
    prompt = prompt_tokens or min(PROMPT_TOKENS, (context or PROMPT_TOKENS + 1) - 1)
    if context is not None and prompt >= context:
        raise UsageError(
            f"a context of {context} tokens has no room for a prompt of {prompt} and a token;",
            "give a shorter --prompt or a longer --context.",
        )
    memory = memory_of(adapted, recipe, target, parallel)
    kernels = target.on_gpu and recipe.quantized
    return Plan(
        model=name,
        method=recipe.name,
        target=target.name,
        context=context,
        parallel=parallel,
        memory=memory,
        room=room or room_of(target),
        bounds=bounds_of(adapted, recipe, target, memory, prompt, parallel),
        host_peak=host_peak(model, recipe),
        board_source=target.board.source if target.board else "",
        lacks=adapted.misfit() if kernels else None,
    )
