"""Plans as tables of text: terminal, Markdown and report show the same cells."""

from __future__ import annotations

from collections.abc import Sequence

from ssdi8_edge.ground.decimals import percent
from ssdi8_edge.plan.bounds import ASSUMPTIONS
from ssdi8_edge.plan.plan import Plan

UNKNOWN = "unknown"
MEMORY = (
    *("target", "method", "weights", "embedding", "states", "cache", "activations", "in all"),
    *("free", "engine build", "runs there"),
)
SPEED = ("target", "method", "a token moves", "a token takes", "tokens/s", "a prompt takes")
MEASURED = (
    *("target", "method", "board", "source", "prompt", "first token", "of its bound"),
    *("a token", "of its bound"),
)


def memory_cells(plans: Sequence[Plan]) -> list[list[str]]:
    """Rows below `MEMORY`, sizes in MB; what runs has CUDA, TensorRT and Python in it."""
    return [
        [
            plan.target,
            plan.method,
            _mb(plan.memory.blocks + plan.memory.head),
            _mb(plan.memory.embedding),
            _mb(plan.memory.states),
            _mb(plan.memory.cache),
            _mb(plan.memory.activations),
            _mb(plan.memory.total),
            _mb(plan.room.free),
            _mb(plan.memory.engine_build) if plan.memory.engine_build else "",
            verdict(plan),
        ]
        for plan in plans
    ]


def speed_cells(plans: Sequence[Plan]) -> list[list[str]]:
    """Rows below `SPEED`: bounds."""
    rows = []
    for plan in plans:
        token, prompt = plan.bounds.token, plan.bounds.prompt
        most = plan.bounds.tokens_per_s
        rows.append(
            [
                plan.target,
                plan.method,
                f"{token.bytes / 1e6:.0f} MB",
                _ms(token.seconds, token.limit),
                UNKNOWN if most is None else f"{most:.1f}",
                _ms(prompt.seconds, prompt.limit),
            ]
        )
    return rows


def measured_cells(plans: Sequence[Plan]) -> list[list[str]]:
    """Rows below `MEASURED`: a share is the bound over what was measured."""
    return [
        [
            plan.target,
            plan.method,
            f"{each.board}, {each.mode}" if each.mode else each.board,
            "simulated" if each.simulated else "measured",
            str(each.length),
            *(_ms_alone(each.ttft_s), _share(each.prompt_share)),
            *(_ms_alone(each.tpot_s), _share(each.token_share)),
        ]
        for plan in plans
        for each in plan.measured
    ]


def verdict(plan: Plan) -> str:
    """Whether it runs there."""
    if plan.fits is None:
        return UNKNOWN
    if not plan.fits:
        return f"no: {plan.memory.largest} take {_mb(max(plan.memory.parts.values()))}"
    return "fits, but no kernels yet" if plan.lacks else "yes"


def notes(plans: Sequence[Plan]) -> list[str]:
    """What the tables do not say: quantizing, building, what the numbers rest on."""
    said = [
        f"quantizing by {method} on a CPU takes about {peak / 1e9:.1f} GB of this machine's memory"
        for method, peak in {plan.method: plan.host_peak for plan in plans}.items()
    ]
    if any(plan.fits and plan.build_lacks for plan in plans):
        said.append("where building an engine takes more than is free, give the board as much swap")
    said += [f"no kernels yet: {why}" for why in dict.fromkeys(p.lacks for p in plans) if why]
    said += [f"bounds, no forecasts: {each}" for each in ASSUMPTIONS]
    said += [
        "activations are a bound by their lives; scratch memory of kernels comes on top",
        "the peak of building an engine is a rule of thumb; nothing here was measured on a board",
    ]
    sources = {plan.target: " ".join(plan.board_source.split()) for plan in plans}
    return said + [f"{target}: {source}" for target, source in sources.items() if source]


def _mb(nbytes: int | None) -> str:
    return UNKNOWN if nbytes is None else f"{nbytes / 1e6:.0f} MB"


def _ms_alone(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.1f} ms"


def _share(share: float | None) -> str:
    return "" if share is None else percent(share, 0)


def _ms(seconds: float | None, limit: str | None) -> str:
    return UNKNOWN if seconds is None else f"{seconds * 1e3:.1f} ms ({limit})"
