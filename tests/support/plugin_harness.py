"""Builds libssdi8_plugins.so and calls its plugins through plugin_harness.cpp, as TensorRT would.

`SSDI8_PLUGINS` names a folder with both libraries already built; else they are built with the
TensorRT headers that CMake finds (`TENSORRT_ROOT` names them), for the GPU at hand if there is one.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from ctypes import POINTER, c_char_p, c_int32, c_int64, c_uint64, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

PLUGINS = Path(__file__).parents[2] / "plugins"
LIBRARY = "libssdi8_plugins.so"
HARNESS = "libssdi8_plugin_harness.so"
MAX_AXES = 8
MAX_FIELDS = 32

Value = int | float | str | bytes
Form = tuple[str, tuple[int, ...]]  # type name and shape of a tensor
TYPE_NAMES = {
    torch.float32: "FP32",
    torch.float16: "FP16",
    torch.int8: "INT8",
    torch.int64: "INT64",
}
TORCH_TYPES = {name: dtype for dtype, name in TYPE_NAMES.items()}


def forms(tensors: Any) -> list[Form]:
    """Of one tensor or several."""
    tensors = (tensors,) if isinstance(tensors, torch.Tensor) else tensors
    return [(TYPE_NAMES[t.dtype], tuple(t.shape)) for t in tensors]


# ------------------------------------------------------------------------------------------------
# Building
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Libraries:
    plugins: Path
    harness: Path


def _run(*command: str | Path) -> str:
    result = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def _build(folder: Path) -> Libraries:
    """Build both libraries in `folder`, or skip the test that asks and say what is missing."""
    if prebuilt := os.environ.get("SSDI8_PLUGINS"):
        return Libraries(Path(prebuilt) / LIBRARY, Path(prebuilt) / HARNESS)
    for tool in ("nvcc", "cmake", "c++"):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool}, which building the TensorRT plugins needs")
    architecture = "87-virtual"  # nothing will run it: PTX alone is quicker to make
    if torch.cuda.is_available():
        architecture = "{}{}-real".format(*torch.cuda.get_device_capability())
    options = [f"-DCMAKE_CUDA_ARCHITECTURES={architecture}", "-DSSDI8_BUILD_HARNESS=ON"]
    if root := os.environ.get("TENSORRT_ROOT"):
        options.append(f"-DTENSORRT_ROOT={root}")
    configured = _run("cmake", "-S", PLUGINS, "-B", folder, *options)
    if "TensorRT plugins: headers in" not in configured:
        pytest.skip("no TensorRT headers: TENSORRT_ROOT can name the folder of include/NvInfer.h")
    jobs = str(os.cpu_count() or 1)
    targets = ("ssdi8_plugins", "ssdi8_plugin_harness")
    _run("cmake", "--build", folder, "--parallel", jobs, "--target", *targets)
    return Libraries(folder / LIBRARY, folder / HARNESS)


# ------------------------------------------------------------------------------------------------
# Mirrors of plugin_harness.cpp
# ------------------------------------------------------------------------------------------------


class Field(ctypes.Structure):
    _fields_ = (("name", c_char_p), ("data", c_void_p), ("type", c_int32), ("length", c_int32))


class Described(ctypes.Structure):
    _fields_ = (
        ("type", c_int32),
        ("format", c_int32),
        ("n_dims", c_int32),
        ("dims", c_int64 * MAX_AXES),
    )


def _declare(library: ctypes.CDLL) -> ctypes.CDLL:
    tensors, fields = POINTER(Described), POINTER(Field)
    call = (c_void_p, tensors, c_int32, c_int32)  # plugin, tensors, inputs, outputs
    numbers, addresses = POINTER(c_int32), POINTER(c_void_p)
    signatures: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "open": (c_int32, (c_char_p,)),
        "creator": (c_char_p, (c_int32,)),
        "messages": (c_char_p, ()),
        "clear_messages": (None, ()),
        "number": (c_int32, (c_char_p,)),
        "field_names": (c_int32, (c_char_p, fields, c_int32)),
        "create": (c_void_p, (c_char_p, fields, c_int32, c_int32)),
        "create_without_fields": (c_void_p, (c_char_p,)),
        "clone": (c_void_p, (c_void_p,)),
        "attach": (c_void_p, (c_void_p,)),
        "destroy": (None, (c_void_p,)),
        "name": (c_char_p, (c_void_p,)),
        "n_outputs": (c_int32, (c_void_p,)),
        "output_types": (c_int32, (c_void_p, numbers, c_int32, numbers, c_int32)),
        "output_shapes": (c_int32, (c_void_p, tensors, c_int32, tensors, c_int32)),
        "supports": (c_int32, (c_void_p, c_int32, tensors, c_int32, c_int32)),
        "configure": (c_int32, call),
        "workspace": (c_uint64, call),
        "serialized_fields": (c_int32, (c_void_p, fields, c_int32)),
        "on_shape_change": (c_int32, call),
        "enqueue": (c_int32, (*call, addresses, addresses, c_void_p, c_void_p)),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, f"harness_{name}")
        function.restype, function.argtypes = result, arguments
    return library


# ------------------------------------------------------------------------------------------------
# Calling
# ------------------------------------------------------------------------------------------------


class Harness:
    """The plugin library, opened as TensorRT opens it."""

    def __init__(self, libraries: Libraries) -> None:
        self.library = libraries.plugins
        self.c = _declare(ctypes.CDLL(str(libraries.harness)))
        count = self.c.harness_open(str(libraries.plugins).encode())
        assert count > 0, self.messages()
        self.creators = [self.c.harness_creator(i).decode() for i in range(count)]

    def number(self, name: str) -> int:
        """An enumerator of the headers."""
        value = self.c.harness_number(name.encode())
        assert value >= 0, name
        return int(value)

    @property
    def version(self) -> tuple[int, int]:
        """Major and minor version of the TensorRT headers."""
        return self.number("major version"), self.number("minor version")

    def messages(self) -> str:
        """What the library has logged since the last call."""
        text = (self.c.harness_messages() or b"").decode()
        self.c.harness_clear_messages()
        return text

    def field(self, name: str | None, value: Value, **changes: Any) -> Field:
        """A field as NVIDIA's parser makes it from a node's attribute; `changes` spoil it."""
        if isinstance(value, (str, bytes)):
            text = value.encode() if isinstance(value, str) else value
            data: Any = ctypes.create_string_buffer(text, max(len(text), 1))
            kind, length = "text field", len(text)
        else:
            kind = "float field" if isinstance(value, float) else "int field"
            data = ctypes.c_float(value) if isinstance(value, float) else c_int32(value)
            length = 1
        settings = {"data": ctypes.addressof(data), "type": self.number(kind), "length": length}
        field = Field(name=None if name is None else name.encode(), **{**settings, **changes})
        field.kept = data  # the struct holds its address alone
        return field

    def field_names(self, op: str) -> dict[str, int]:
        """Name -> type of the fields that the creator asks parsers for."""
        fields = (Field * MAX_FIELDS)()
        count = self.c.harness_field_names(op.encode(), fields, MAX_FIELDS)
        return {f.name.decode(): f.type for f in fields[:count]}

    def create(
        self, op: str, fields: dict[str, Value] | Sequence[Field], runtime: bool = False
    ) -> Plugin | None:
        """A plugin from its creator, in the build or the runtime phase; None if it is refused."""
        if isinstance(fields, dict):
            fields = [self.field(name, value) for name, value in fields.items()]
        array = (Field * len(fields))(*fields)
        address = self.c.harness_create(op.encode(), array, len(fields), int(runtime))
        return Plugin(self, address) if address else None


@functools.cache
def open_plugins() -> Harness:
    """The plugin library, built once for all tests; skips where it cannot be built."""
    folder = Path(tempfile.mkdtemp(prefix="ssdi8-plugins-"))
    atexit.register(shutil.rmtree, folder)
    return Harness(_build(folder))


class Plugin:
    """One plugin object; freed with this one."""

    def __init__(self, harness: Harness, address: int) -> None:
        self._harness, self._c, self._address = harness, harness.c, address

    def __del__(self) -> None:
        self._c.harness_destroy(self._address)

    @property
    def name(self) -> str:
        return str(self._c.harness_name(self._address).decode())

    @property
    def n_outputs(self) -> int:
        return int(self._c.harness_n_outputs(self._address))

    def clone(self) -> Plugin:
        return Plugin(self._harness, self._c.harness_clone(self._address))

    def attach(self) -> Plugin:
        """The clone that an execution context gets."""
        return Plugin(self._harness, self._c.harness_attach(self._address))

    def serialized(self) -> dict[str, Value]:
        """The fields that go into an engine."""
        fields = (Field * MAX_FIELDS)()
        count = self._c.harness_serialized_fields(self._address, fields, MAX_FIELDS)
        return {f.name.decode(): self._value(f) for f in fields[:count]}

    def _value(self, field: Field) -> Value:
        if field.type == self._harness.number("text field"):
            return ctypes.string_at(field.data, field.length).decode()
        assert field.length == 1
        is_float = field.type == self._harness.number("float field")
        kind = ctypes.c_float if is_float else c_int32
        value: Value = ctypes.cast(field.data, POINTER(kind))[0]
        return value

    def describe(self, forms: Sequence[Form], formats: Sequence[int] | None = None) -> Any:
        """Descriptors of tensors of these types and shapes, linear unless `formats` says else."""
        array = (Described * len(forms))()
        for i, (kind, shape) in enumerate(forms):
            array[i].type = self._harness.number(kind) if isinstance(kind, str) else kind
            array[i].format = formats[i] if formats else self._harness.number("linear")
            array[i].n_dims = len(shape)
            array[i].dims[: len(shape)] = shape
        return array

    def output_forms(self, inputs: Sequence[Form]) -> list[Form] | None:
        """Types and shapes of the outputs; None if the plugin refuses these inputs."""
        described, n = self.describe(inputs), self.n_outputs
        types, outputs = (c_int32 * n)(), (Described * n)()
        given = (c_int32 * len(inputs))(*(d.type for d in described))
        if self._c.harness_output_types(self._address, given, len(inputs), types, n):
            return None
        if self._c.harness_output_shapes(self._address, described, len(inputs), outputs, n):
            return None
        names = {self._harness.number(name): name for name in TYPE_NAMES.values()}
        return [
            (names[kind], tuple(d.dims[: d.n_dims])) for kind, d in zip(types, outputs, strict=True)
        ]

    def supports(self, position: int, described: Any, n_inputs: int) -> bool:
        n = (self._address, position, described, n_inputs, len(described) - n_inputs)
        return bool(self._c.harness_supports(*n))

    def _call(self, inputs: Sequence[Form], outputs: Sequence[Form]) -> tuple[Any, ...]:
        described = self.describe([*inputs, *outputs])
        return self._address, described, len(inputs), len(outputs)

    def configure(self, inputs: Sequence[Form], outputs: Sequence[Form]) -> bool:
        """configurePlugin with a profile from 1 to these shapes."""
        return self._c.harness_configure(*self._call(inputs, outputs)) == 0

    def workspace(self, inputs: Sequence[Form], outputs: Sequence[Form]) -> int:
        """Bytes of scratch memory for a profile up to these shapes."""
        return int(self._c.harness_workspace(*self._call(inputs, outputs)))

    def on_shape_change(self, inputs: Sequence[Form], outputs: Sequence[Form]) -> bool:
        return self._c.harness_on_shape_change(*self._call(inputs, outputs)) == 0

    def enqueue(
        self,
        inputs: Sequence[Form],
        outputs: Sequence[Form],
        input_addresses: Sequence[int],
        output_addresses: Sequence[int],
        workspace: int | None,
        stream: int,
    ) -> bool:
        reads = (c_void_p * len(inputs))(*input_addresses)
        writes = (c_void_p * len(outputs))(*output_addresses)
        call = self._call(inputs, outputs)
        return self._c.harness_enqueue(*call, reads, writes, workspace, stream) == 0
