"""program.json: the calls that compute a model, with all that a kernel is given.

`ssdi8_edge/compile/program.py` writes it and says what stands there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from runtime.bundle import Bundle
from runtime.files import PROGRAM, PROGRAM_SCHEMA
from runtime.problems import BundleProblem

DTYPES: Mapping[str, np.dtype] = {
    "int8": np.dtype(np.int8),
    "int32": np.dtype(np.int32),
    "int64": np.dtype(np.int64),
    "fp16": np.dtype(np.float16),
    "fp32": np.dtype(np.float32),
}
PACK_AGAIN = "pack the bundle again"


@dataclass(frozen=True)
class Shape:
    """What a program leaves open: sequences, tokens of each, and how many of them get logits."""

    batch: int
    tokens: int
    keep: int

    def value(self, size: int | str) -> int:
        """Of a size as a program writes it: factors, some of them divided and rounded up."""
        if isinstance(size, int):
            return size
        symbols = {"batch": self.batch, "tokens": self.tokens, "logits_to_keep": self.keep}
        product = 1
        for factor in size.split("*"):
            name, _, by = factor.partition("/")
            value = symbols[name] if name in symbols else int(name)
            product *= -(-value // int(by)) if by else value
        return product


@dataclass(frozen=True)
class Tensor:
    """What a call makes or the runtime gives; some of its sizes are open."""

    dtype: np.dtype
    sizes: tuple[int | str, ...]

    def nbytes(self, shape: Shape) -> int:
        """With the open sizes of `shape`."""
        return math.prod(map(shape.value, self.sizes)) * self.dtype.itemsize


@dataclass(frozen=True)
class Launch:
    """One call: the kernel, its pointers by the names of tensors, and its other fields."""

    name: str  # of the call, as profiles show it
    kernel: str
    tensors: Mapping[str, str]  # field -> tensor
    numbers: Mapping[str, int | float]
    sizes: Mapping[str, str]  # field -> an open size
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Program:
    """Calls in their order; every tensor is an input, made by a call, or a weight."""

    abi: int
    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, str]  # as the manifest names them, and logits -> tensor
    values: Mapping[str, Tensor]
    launches: tuple[Launch, ...]
    structs: Mapping[str, Mapping[str, str]]  # kernel -> field -> "pointer", "int32" or "float"

    @property
    def weights(self) -> list[str]:
        """Tensors that lie in the weights file, in the order of their first use."""
        used = (name for launch in self.launches for name in launch.tensors.values())
        return [n for n in dict.fromkeys(used) if n not in self.inputs and n not in self.values]


def read_program(bundle: Bundle) -> Program:
    """The program of a bundle.

    Raises:
        BundleProblem: it has none, of another schema or cut short; an op of it has no kernel.
    """
    path = bundle.path(PROGRAM)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["schema"] != PROGRAM_SCHEMA:
            raise BundleProblem(
                f"{path} has schema {data['schema']!r} and this script reads {PROGRAM_SCHEMA}",
                PACK_AGAIN,
            )
        for call in data["calls"]:
            if call["launch"] is None:
                raise BundleProblem(
                    f"{bundle.name} needs the op {call['op']}, for which there is no CUDA kernel",
                    "run it with --backend onnxruntime, on the CPU",
                )
        return Program(
            abi=int(data["abi"]),
            inputs=_tensors(data["inputs"]),
            outputs=dict(data["outputs"]),
            values=_tensors(data["values"]),
            launches=tuple(_launch(call, data["structs"]) for call in data["calls"]),
            structs=data["structs"],
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BundleProblem(f"{path} is not a program ({error!r})", PACK_AGAIN) from error


def _tensors(kinds: Mapping[str, Any]) -> dict[str, Tensor]:
    return {n: Tensor(DTYPES[kind["dtype"]], tuple(kind["shape"])) for n, kind in kinds.items()}


def _launch(call: Mapping[str, Any], structs: Mapping[str, Any]) -> Launch:
    """The call, its fields sorted by what they are."""
    kernel, fields = call["launch"]["kernel"], call["launch"]["fields"]
    types = structs[kernel]
    plain = {name: value for name, value in fields.items() if types[name] != "pointer"}
    return Launch(
        name=call["name"],
        kernel=kernel,
        tensors={n: v for n, v in fields.items() if types[n] == "pointer" and v is not None},
        numbers={name: value for name, value in plain.items() if not isinstance(value, str)},
        sizes={name: value for name, value in plain.items() if isinstance(value, str)},
        outputs=tuple(call["outputs"]),
    )
