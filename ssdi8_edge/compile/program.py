"""The program: the recorded calls of a graph as data, for a runtime that has no ONNX parser.

A call that has a kernel is written with the fields of its parameter struct, as the op itself fills
them. So a runtime knows neither ops nor models: it evaluates sizes, places tensors and calls.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch

from runtime.files import PROGRAM_SCHEMA
from ssdi8_edge.ops.kernel_call import Call
from ssdi8_edge.ops.kernel_header import abi_version, parameter_structs
from ssdi8_edge.ops.op import Attributes, GraphValue, Op
from ssdi8_edge.ops.sizes import Size, symbol

DTYPES = {
    torch.int8: "int8",
    torch.int32: "int32",
    torch.int64: "int64",
    torch.float16: "fp16",
    torch.float32: "fp32",
}
_FIELD_TYPES = {ctypes.c_void_p: "pointer", ctypes.c_int32: "int32", ctypes.c_float: "float"}


class RecordedCall(Call):
    """A call on values of a graph: outputs are values without a name, and nothing runs."""

    variant = 0  # the launcher chooses
    launched: str | None = None

    def empty(self, shape: tuple[Any, ...], dtype: torch.dtype) -> GraphValue:
        """An output that `Program.record` names."""
        graph = next(v.graph for v in vars(self).values() if isinstance(v, GraphValue))
        return GraphValue("", graph, dtype, shape)

    def next_state(self, state: GraphValue) -> GraphValue:
        """Another value: where it lies is the runtime's choice."""
        return self.empty(state.shape or (), state.dtype or torch.float16)

    def whole_number(self, scalar: GraphValue) -> Size:
        """The symbol that has the input's name."""
        return symbol(scalar.name)

    def launch(self, launcher: str) -> None:
        """Remember which; an op launches one kernel."""
        assert self.launched is None
        self.launched = launcher


class Program:
    """Collects calls in their order; `data` is what program.json holds."""

    def __init__(self) -> None:
        self._inputs: dict[str, Any] = {}
        self._outputs: dict[str, str] = {}
        self._values: dict[str, Any] = {}
        self._calls: list[dict[str, Any]] = []

    def input(self, value: GraphValue) -> None:
        """A tensor that the runtime gives."""
        self._inputs[value.name] = _kind(value)

    def output(self, value: GraphValue, name: str) -> None:
        """A tensor that the runtime takes, which it knows by `name`."""
        self._outputs[name] = value.name

    def record(
        self,
        op: Op,
        inputs: Sequence[GraphValue],
        attributes: Attributes,
        outputs: Sequence[GraphValue],
    ) -> tuple[GraphValue, ...]:
        """One call; returns its outputs with their types and shapes, where there is a kernel.

        An op without a kernel has none, and neither have those that read what it made.
        """
        launch, made = None, tuple(outputs)
        if op.kernel is not None and all(value.shape is not None for value in inputs):
            given = dict(zip(op.inputs, inputs, strict=False))
            absent = dict.fromkeys(op.inputs[len(inputs) :])
            call = RecordedCall(**given, **absent, **attributes)
            returned = op.kernel(call)
            typed = returned if isinstance(returned, tuple) else (returned,)
            names = {id(t): v.name for t, v in zip(typed, outputs, strict=True)}
            launch = _launch(call, names)
            made = tuple(
                GraphValue(v.name, v.graph, t.dtype, t.shape)
                for t, v in zip(typed, outputs, strict=True)
            )
        self._values |= {value.name: _kind(value) for value in made}
        self._calls.append(
            {
                "name": made[0].name.rpartition(".")[0],
                "op": op.name,
                "attributes": dict(attributes),
                "inputs": [value.name for value in inputs],
                "outputs": [value.name for value in made],
                "launch": launch,
            }
        )
        return made

    def data(self) -> dict[str, Any]:
        """The program, JSON-safe.

        Returns:
            schema, abi: of this form, and SSDI8_ABI_VERSION of the kernels.
            inputs, values: name -> dtype and shape, of what the runtime gives and of what calls
                make. A size is a number or a text: factors with * between them, each a number, a
                symbol, or a symbol/number, rounded up. Symbols are `batch`, `tokens`, and the
                names of inputs () that are read as a size. null: an op without a kernel made it.
            outputs: as the runtime knows them -> the value.
            calls: in order: name, op, attributes, inputs (weights by their names in the weights
                file), outputs, and launch: kernel, and field -> name of a tensor, size or number;
                null where the op has no kernel.
            structs: kernel -> the fields of its parameters, in order, and their types; scratch
                memory is the field `workspace`.
        """
        kernels = {call["launch"]["kernel"] for call in self._calls if call["launch"]}
        return {
            "schema": PROGRAM_SCHEMA,
            "abi": abi_version(),
            "inputs": self._inputs,
            "outputs": self._outputs,
            "values": self._values,
            "calls": self._calls,
            "structs": {kernel: _struct(kernel) for kernel in sorted(kernels)},
        }


def _kind(value: GraphValue) -> dict[str, Any] | None:
    if value.dtype is None or value.shape is None:
        return None
    return {"dtype": DTYPES[value.dtype], "shape": [_size(size) for size in value.shape]}


def _size(size: Any) -> int | str:
    return str(size) if isinstance(size, Size) else int(size)


def _launch(call: RecordedCall, names: dict[int, str]) -> dict[str, Any]:
    assert call.launched is not None
    fields = {}
    for field, value in call.fields(parameter_structs()[call.launched]).items():
        if isinstance(value, GraphValue):
            value = names.get(id(value), value.name)
        fields[field] = str(value) if isinstance(value, Size) else value
    return {"kernel": call.launched, "fields": fields}


def _struct(kernel: str) -> dict[str, str]:
    fields = parameter_structs()[kernel]._fields_
    return {field[0]: _FIELD_TYPES[field[1]] for field in fields}
