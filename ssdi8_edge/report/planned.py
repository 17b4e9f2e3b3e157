"""Plans as `plan --json` writes them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from ssdi8_edge.boards.points.records import Text

Seconds = Annotated[float, Field(gt=0)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


class _Memory(_Part):
    weights: int
    total: int


class _Room(_Part):
    free: int | None


class _Work(_Part):
    seconds: Seconds | None


class Planned(_Part):
    """What a report shows of a plan; bytes and seconds, each None where the plan did not know."""

    kind: Literal["plan"]
    model: Text
    method: Text
    target: Text
    prompt_tokens: int
    memory: _Memory
    room: _Room
    fits: bool | None
    prompt: _Work
    token: _Work
    assumptions: list[Text]
