"""Whether a board is again as it was before a sweep: what was read there before and afterwards."""

from __future__ import annotations

from dataclasses import dataclass

from ssdi8_edge.boards.facts.power_modes import Mode
from ssdi8_edge.boards.sweep.interpret import State

AS_BEFORE = "power mode and clocks are as they were before"
LOOK = "sudo nvpmodel -q and sudo jetson_clocks --show tell there"


@dataclass(frozen=True)
class Before:
    """A board before it was changed; each None where it did not tell.

    Attributes:
        mode: id of the power mode.
        clocks: limits, as `power_modes.clock_limits` gives them.
    """

    mode: int | None
    clocks: tuple[str, ...] | None

    @classmethod
    def of(cls, state: State) -> Before:
        """As a board tells it."""
        return cls(state.mode.id if state.mode else None, state.clocks)


def verdict(before: Before, now: State, why: str = "") -> str:
    """A sentence about a board, from what it tells now: `AS_BEFORE` or what is otherwise.

    Args:
        why: the reason, where putting back failed.
    """
    mode, clocks = _mode(before, now), _clocks(before, now)
    if not mode and not clocks:
        return AS_BEFORE
    reason = f" (why: {why})" if why else ""
    if mode:  # its clocks are another mode's, too
        return mode + reason
    assert now.mode is not None
    return f"the power mode is {now.mode.name} as before; {clocks}{reason}"


def unknown(before: Before | None, state: State | None) -> str:
    """The sentence where nothing could be read afterwards."""
    was = _named(before.mode, state) if before and state and before.mode is not None else ""
    return (
        "whether power mode and clocks were put back is not known; the board does so by itself "
        f"where it can, and the next sweep looks{f'; the mode was {was}' if was else ''}; {LOOK}"
    )


def _mode(before: Before, now: State) -> str:
    """Empty where it is as before."""
    was = _named(before.mode, now) if before.mode is not None else ""
    if now.mode is None:
        return f"the power mode cannot be read{f', it was {was}' if was else ''} ({LOOK})"
    if not was:
        return f"the power mode is {now.mode.name}, and what it was before is not known" + (
            f" (sudo nvpmodel -m {default.id} sets the board's default, {default.name})"
            if (default := now.modes.default)
            else ""
        )
    if now.mode.id != before.mode:
        return (
            f"the power mode is {now.mode.name} and NOT {was} as before (sweep again, or set it "
            f"there: sudo nvpmodel -m {before.mode})"
        )
    return ""


def _clocks(before: Before, now: State) -> str:
    """Empty where they are as before."""
    if before.clocks is None or now.clocks is None:
        return "the clocks cannot be compared with those before (sudo jetson_clocks --show)"
    changed = sorted({line.split()[0] for line in {*before.clocks} ^ {*now.clocks}})
    if changed:
        return f"the clocks of {', '.join(changed)} are NOT as before (sweep again, or reboot)"
    return ""


def _named(number: int | None, state: State) -> str:
    known: Mode | None = next((mode for mode in state.modes.modes if mode.id == number), None)
    return known.name if known else f"mode {number}"
