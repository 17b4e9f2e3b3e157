"""What Python reads from `kernels.h`, and libraries that were built from another one."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import kernel_emulator
import pytest

from ssdi8_edge.ground.errors import Ssdi8Error
from ssdi8_edge.numerics.formats import Gate, InputRotation, Rotation, Rounding, Scaling
from ssdi8_edge.ops import OPS, baseline, kernel_library
from ssdi8_edge.ops.activation import Activation
from ssdi8_edge.ops.kernel_header import abi_version, number_of, parameter_structs
from ssdi8_edge.ops.op import Op

CHOICES = [
    ("gate", get_args(Gate)),
    ("rotation", {*get_args(Rotation), *get_args(InputRotation)}),
    ("rounding", get_args(Rounding)),
    ("scaling", get_args(Scaling)),
    ("activation", get_args(Activation)),
]


@pytest.mark.parametrize(("field", "choices"), CHOICES)
def test_every_choice_has_a_number_of_its_own(field: str, choices: Any) -> None:
    """An op hands over the choice by name; the numbers are the enum's."""
    numbers = [number_of(field, choice) for choice in choices]
    assert sorted(numbers) == list(range(len(numbers)))


def test_a_choice_that_the_header_lacks_is_an_error() -> None:
    with pytest.raises(KeyError, match="SSDI8_ROUNDING_DOWN"):
        number_of("rounding", "down")


def test_structs_are_those_of_the_ops_with_a_kernel() -> None:
    """Every attribute that a plugin's kernel needs is a field of the op's struct."""
    by_op = {struct.__name__[:-6]: struct for struct in parameter_structs().values()}
    plugins = {name for name, op in OPS.items() if op.plugin and op.kernel}
    others = {name for name, op in OPS.items() if op.kernel} - plugins
    baseline_ops = {op.name for op in vars(baseline).values() if isinstance(op, Op)}
    named = {f"Ssdi8{'Fp16' if name in baseline_ops else ''}{name}" for name in others}
    assert by_op.keys() == plugins | named
    for name in plugins:
        assert set(OPS[name].attributes) <= {field[0] for field in by_op[name]._fields_}


@pytest.fixture
def uncached() -> Iterator[None]:
    kernel_library.load.cache_clear()
    yield
    kernel_library.load.cache_clear()


@pytest.mark.skipif(kernel_emulator.COMPILER is None, reason="no g++")
def test_a_library_of_another_abi_is_refused(tmp_path: Path, uncached: None) -> None:
    """By the number that the header states; it is written down nowhere else."""
    source, library = tmp_path / "old.cpp", tmp_path / "old.so"
    source.write_text(
        'extern "C" int ssdi8_abi_version() { return 1; }\n'
        'extern "C" const char* ssdi8_last_error() { return ""; }\n'
    )
    command = [str(kernel_emulator.COMPILER), "-shared", "-fPIC", str(source), "-o", str(library)]
    subprocess.run(command, check=True)
    with pytest.raises(Ssdi8Error, match=f"old\\.so has ABI version 1, not {abi_version()}"):
        kernel_library.load(library)
