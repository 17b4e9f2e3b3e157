"""What an op gives its CUDA kernel: arguments by name, to which sizes and outputs are added.

An op says it once, in its `_kernel`. `kernel_library` runs such a call on torch tensors,
`compile.program` writes it down for a runtime that has no torch.
"""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from ssdi8_edge.ground.errors import Ssdi8Error
from ssdi8_edge.ops.kernel_header import number_of

# Fields of a struct whose names differ from the reference's arguments.
_ARGUMENT_OF_FIELD = {"d_skip": "D", "a_rate": "A"}
WORKSPACE = "workspace"  # the field of scratch memory


class Call(SimpleNamespace, ABC):
    """One call; its attributes are the fields of the kernel's parameter struct.

    A tensor has a dtype and a shape, whose sizes may be `sizes.Size`.
    """

    def require(self, dtype: torch.dtype, **shapes: tuple[Any, ...]) -> None:
        """Check what a pointer cannot tell, type and shape, and make the named tensors contiguous.

        Raises:
            Ssdi8Error: one differs.
        """
        for name, shape in shapes.items():
            tensor = getattr(self, name)
            if tensor.dtype is not dtype or tuple(tensor.shape) != shape:
                raise Ssdi8Error(
                    f"CUDA kernel: {name} is {tensor.dtype} {tuple(tensor.shape)},"
                    f" {dtype} {shape} is expected."
                )
            setattr(self, name, tensor.contiguous())

    def fields(self, struct: type[ctypes.Structure]) -> dict[str, Any]:
        """Field of `struct` -> a tensor, None, or a number; the scratch memory is left out."""
        names = [field[0] for field in struct._fields_ if field[0] != WORKSPACE]
        values = {name: getattr(self, _ARGUMENT_OF_FIELD.get(name, name)) for name in names}
        return {n: number_of(n, v) if isinstance(v, str) else v for n, v in values.items()}

    @abstractmethod
    def empty(self, shape: tuple[Any, ...], dtype: torch.dtype) -> Any:
        """An output, not written yet."""

    @abstractmethod
    def next_state(self, state: Any) -> Any:
        """Where a kernel writes the state that follows `state`."""

    @abstractmethod
    def whole_number(self, scalar: Any) -> Any:
        """The value of an input () of whole numbers, which is a size."""

    @abstractmethod
    def launch(self, launcher: str) -> None:
        """Have ssdi8_`launcher` called with the fields, which are all there now."""


# What an op does with its call: check, make outputs, `launch`, return the outputs.
Kernel = Callable[[Call], Any]
