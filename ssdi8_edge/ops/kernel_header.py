"""Reads `plugins/kernels/kernels.h`: ABI number, parameter structs, the numbers of choices.

The header is the one truth for both languages: nothing of it is repeated here.
"""

from __future__ import annotations

import ctypes
import functools
import re
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
# In a source tree and in an installed package.
PLUGIN_FOLDERS = (_PACKAGE.parent / "plugins", _PACKAGE / "share" / "plugins")
_C_TYPES = {"int32_t": ctypes.c_int32, "float": ctypes.c_float}


@functools.cache
def _text() -> str:
    """The header without its comments."""
    header = next(f / "kernels" / "kernels.h" for f in PLUGIN_FOLDERS if f.is_dir())
    return re.sub(r"//[^\n]*", "", header.read_text())


@functools.cache
def abi_version() -> int:
    """SSDI8_ABI_VERSION."""
    found = re.search(r"#define SSDI8_ABI_VERSION (\d+)", _text())
    assert found is not None
    return int(found[1])


@functools.cache
def parameter_structs() -> dict[str, type[ctypes.Structure]]:
    """The structs by launcher: "rms_norm" -> the mirror of Ssdi8RmsNormParams."""
    text = _text()
    bodies = {name: body for body, name in re.findall(r"struct \w+ \{([^}]*)\} (\w+);", text)}
    structs = {}
    for launcher, name in re.findall(r"int ssdi8_(\w+)\(const (\w+)\* params, void\*", text):
        fields = [
            (field, ctypes.c_void_p if "*" in kind else _C_TYPES[kind.strip()])
            for kind, field in re.findall(r"([\w ]+\*?) (\w+);", bodies[name])
        ]
        structs[launcher] = type(name, (ctypes.Structure,), {"_fields_": fields})
    return structs


@functools.cache
def _constants() -> dict[str, int]:
    """Of all enums, by their names."""
    enums = re.findall(r"enum \{([^}]*)\}", _text())
    return {name: int(n) for body in enums for name, n in re.findall(r"(\w+) = (\d+)", body)}


def number_of(field: str, choice: str) -> int:
    """The number of a choice that an op names: ("gate", "q0.7") -> SSDI8_GATE_Q0_7.

    Raises:
        KeyError: the header has no such choice.
    """
    return _constants()[f"SSDI8_{field}_{choice}".upper().replace(".", "_")]
