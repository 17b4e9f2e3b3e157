"""Targets: where a model will run is one TOML file, shipped in profiles/ or the user's own."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ssdi8_edge.ground.errors import UsageError
from ssdi8_edge.ground.shipped import shipped

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# min, opt, max of one TensorRT optimization profile
Range = Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=3, max_length=3)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Board(_Strict):
    """What a board has: memory shared by CPU and GPU in GB, SMs with all TPCs powered.

    The other fields are for planning, each None where nobody said:

    Attributes:
        free_mib: memory in MiB that a system without a desktop leaves to programs.
        bandwidth_gb_s: of the memory, in its fastest power mode, in 10⁹ bytes a second.
        gpu_mhz: of the GPU in that mode.
        source: where these three come from.
    """

    compute_capability: str
    memory_gb: float = Field(gt=0)
    sms: int = Field(ge=1)
    free_mib: int | None = Field(default=None, gt=0)
    bandwidth_gb_s: float | None = Field(default=None, gt=0)
    gpu_mhz: float | None = Field(default=None, gt=0)
    source: str = ""


class Engine(_Strict):
    """Shapes of the prefill profile (the decode profile is tokens = 1), and scratch memory."""

    batch: Range
    tokens: Range
    workspace_mb: int = Field(ge=0)

    @model_validator(mode="after")
    def _ordered(self) -> Engine:
        for name in ("batch", "tokens"):
            low, best, high = getattr(self, name)
            if not low <= best <= high:
                raise ValueError(f"{name} must rise: min <= opt <= max")
        return self


class Target(_Strict):
    """One profile file.

    Attributes:
        engines: what may execute the model there; the first that is ready does.
        where: "board" is reached over SSH; "here" is this machine.
        context: tokens that a sequence may have, prompt and answer together, where a model has
            attention; it takes memory for all of them.
    """

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    about: str
    engines: Annotated[list[Literal["tensorrt", "kernels", "onnxruntime"]], Field(min_length=1)]
    where: Literal["board", "here"]
    context: int = Field(default=4096, ge=1)
    board: Board | None = None
    engine: Engine

    @property
    def on_gpu(self) -> bool:
        """Whether our kernels run there, under one of the engines."""
        return self.engines != ["onnxruntime"]

    @property
    def max_tokens(self) -> int:
        """Longest piece of a prompt that one call takes."""
        return self.engine.tokens[2]

    def to_dict(self) -> dict[str, Any]:
        """As the manifest carries it to the board, which has no TOML reader."""
        return {**self.model_dump(), "max_tokens": self.max_tokens}


def target_names() -> list[str]:
    """Names of the shipped targets."""
    return sorted(path.stem for path in shipped("profiles").glob("*.toml"))


def load_target(name_or_path: str) -> Target:
    """A shipped target by name, or the user's own TOML file.

    Raises:
        UsageError: no such target; the file is not TOML; a key is missing, unknown or out of range.
    """
    path = Path(name_or_path).expanduser()
    if path.suffix != ".toml":
        path = shipped("profiles") / f"{name_or_path}.toml"
        if name_or_path not in target_names():
            raise UsageError(
                f"unknown target {name_or_path!r};",
                f"known: {', '.join(target_names())}; or name a .toml file of your own.",
            )
    try:
        fields = tomllib.loads(path.read_text(encoding="utf-8"))
        return Target(**fields)
    except OSError as error:
        raise UsageError(
            f"cannot read target file {path}: {error.strerror};", "name an existing .toml file."
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not a TOML file: {error};", "mend that line.") from error
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "its values"
        raise UsageError(
            f"{path}: {key}: {first['msg']};",
            "compare with a file that `ssdi8-edge targets` lists.",
        ) from error
