"""What an op is: one name, a torch reference, an ONNX function body, and a CUDA kernel.

Calling an op on torch tensors computes its reference, or runs its CUDA kernel where the tensors are
on a GPU and the kernel library is built. Calling it on `GraphValue`s appends one node to the graph
under construction. So the data flow of the model is written once, in
`models`, and the exported graph cannot differ from what was evaluated.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

from ssdi8_edge.ops.kernel_call import Kernel
from ssdi8_edge.ops.kernel_library import kernel_for

DOMAIN = "ssdi8"

# "cpu": exact on any CPU under onnxruntime: FP64 inside an op, MatMulInteger for linears.
# "tensorrt": what NVIDIA's parser accepts: no FP64, linears as Q/DQ + MatMul. For its checks only,
# and for the ops that have no plugin.
BodyForm = Literal["cpu", "tensorrt"]
Attributes = Mapping[str, Any]  # values are int, float or str
Body = Callable[[Attributes, BodyForm], str]


class Emitter(Protocol):
    """Where nodes go; implemented by `compile.export.GraphBuilder`."""

    def emit(
        self, op: Op, inputs: tuple[GraphValue, ...], attributes: Attributes
    ) -> tuple[GraphValue, ...]: ...


@dataclass(frozen=True)
class GraphValue:
    """A tensor of the graph under construction.

    Attributes:
        dtype, shape: as kernel calls see them, sizes being numbers or `sizes.Size`; None where an
            op without a kernel made it.
    """

    name: str
    graph: Emitter
    dtype: torch.dtype | None = None
    shape: tuple[Any, ...] | None = None

    def contiguous(self) -> GraphValue:
        """Itself: a tensor of a graph is dense."""
        return self


@dataclass(frozen=True)
class Op:
    """One op of `OPS`, which finds them.

    The schema is the signature of the reference: its positional parameters are the inputs (one with
    a default may be left out by the recipe), its keyword-only parameters the attributes.

    Attributes:
        name: ONNX op type, unique over all domains (old TensorRT parsers ignore the domain).
        outputs: names of the outputs.
        reference: the torch function; its docstring is the specification.
        body: ONNX statements computing `outputs` from the inputs.
        kernel: what runs it on a GPU, given the reference's arguments by name; None: the reference.
        in_torch: what runs it on tensors of a GPU all the same, where code of torch's is as good.
        plugin: TensorRT runs it as a plugin of the same name, which an op without a kernel does not
            have yet; otherwise the body is inlined.
        part: of a model, that profiles and reports add its time to; "": none but itself.
    """

    name: str
    outputs: tuple[str, ...]
    reference: Callable[..., Any]
    body: Body
    kernel: Kernel | None = None
    in_torch: Callable[..., Any] | None = None
    plugin: bool = True
    part: str = ""

    @functools.cached_property
    def _parameters(self) -> list[inspect.Parameter]:
        return list(inspect.signature(self.reference).parameters.values())

    @property
    def inputs(self) -> tuple[str, ...]:
        """Formal input names, in order."""
        return tuple(p.name for p in self._parameters if p.kind is not p.KEYWORD_ONLY)

    @property
    def attributes(self) -> tuple[str, ...]:
        """Attribute names; each node carries all of them."""
        return tuple(p.name for p in self._parameters if p.kind is p.KEYWORD_ONLY)

    def __call__(self, *inputs: Any, **attributes: Any) -> Any:
        if isinstance(inputs[0], GraphValue):
            outputs = inputs[0].graph.emit(self, inputs, attributes)
            return outputs if len(outputs) > 1 else outputs[0]
        kernel = self.runnable_kernel() if inputs[0].is_cuda else None
        run = self.reference if kernel is None else self.in_torch or kernel
        return run(*inputs, **attributes)

    def runnable_kernel(self, variant: int = 0) -> Callable[..., Any] | None:
        """The kernel as a function like the reference, if it can run here: see `kernel_for`."""
        return kernel_for(self.kernel, self.reference, variant)

    def function_text(
        self, n_inputs: int, attributes: Attributes, form: BodyForm, opset: int
    ) -> str:
        """The op as an ONNX function in the textual syntax of `onnx.parser`."""
        inputs = ", ".join(self.inputs[:n_inputs])
        declared = f" <{', '.join(self.attributes)}>" if self.attributes else ""
        imports = f'"" : {opset}, "{DOMAIN}" : 1'
        return (
            f'<opset_import: [{imports}], domain: "{DOMAIN}">\n'
            f"{self.name}{declared} ({inputs}) => ({', '.join(self.outputs)})\n"
            f"{{\n{self.body(attributes, form)}\n}}"
        )
