"""Fields of the TensorRT plugins: taken, stored, and refused with a sentence that says why."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from plugin_calls import PLUGIN_OPS, valid_fields
from plugin_harness import Harness, Value, open_plugins

from ssdi8_edge.ops import OPS

# Their output is the input of a linear layer, which is always INT8.
INPUTS = tuple(
    f"Ssdi8{name}" for name in ("RmsNorm", "RmsNormGated", "NormThenGate", "Activation", "Quantize")
)
FIELD_CASES = [(op, name) for op in PLUGIN_OPS for name in OPS[op].attributes]


@pytest.fixture(scope="module")
def plugins() -> Harness:
    return open_plugins()


@pytest.fixture
def harness(plugins: Harness) -> Iterator[Harness]:
    """Every refusal is explained, and nothing that succeeds complains."""
    yield plugins
    assert plugins.messages() == ""


@pytest.mark.parametrize("op", PLUGIN_OPS)
def test_field_names_are_the_attributes(harness: Harness, op: str) -> None:
    kinds = {int: "int field", float: "float field", str: "text field"}
    wanted = {name: harness.number(kinds[type(v)]) for name, v in valid_fields(op).items()}
    assert harness.field_names(op) == wanted


@pytest.mark.parametrize("op", PLUGIN_OPS)
def test_serialized_fields_make_the_same_plugin(harness: Harness, op: str) -> None:
    """Through an engine and back; a copy outlives its original."""
    fields = valid_fields(op)
    plugin = harness.create(op, fields)
    assert plugin is not None, harness.messages()
    stored = plugin.serialized()
    assert stored == {k: np.float32(v) if isinstance(v, float) else v for k, v in fields.items()}
    again = harness.create(op, stored, runtime=True)
    assert again is not None and again.serialized() == stored
    copies = [plugin.clone(), plugin.attach(), again.clone().clone()]
    del plugin, again
    for copy in copies:
        assert copy.name == op
        assert copy.serialized() == stored


@pytest.mark.parametrize(
    ("op", "change"),
    [
        *((op, {"scaling": scaling}) for op in INPUTS for scaling in ("static", "dynamic")),
        *((op, {"rounding": "half_away"}) for op in (*INPUTS, "Ssdi8SsdScan")),
        ("Ssdi8SsdScan", {"gate": "q0.7", "scaling": "static"}),
        ("Ssdi8SsdScan", {"scaling": "static"}),
        ("Ssdi8SsdScan", {"scaling": "none"}),
        ("Ssdi8SsdScan", {"dt_max": float("inf")}),
    ],
)
def test_every_choice_round_trips(harness: Harness, op: str, change: dict[str, Value]) -> None:
    plugin = harness.create(op, {**valid_fields(op), **change})
    assert plugin is not None, harness.messages()
    stored = plugin.serialized()
    assert {name: stored[name] for name in change} == change


def refused(harness: Harness, op: str, fields: Any, *words: str) -> None:
    assert harness.create(op, fields) is None
    message = harness.messages()
    assert message.startswith(f"{op}: ") and message.count("\n") == 1
    for word in words:
        assert word in message, message


def spoiled(harness: Harness, op: str, name: str, value: Value, **changes: Any) -> list[Any]:
    """The valid fields of an op, with one of them replaced."""
    fields = {**valid_fields(op), name: value}
    return [harness.field(k, v, **(changes if k == name else {})) for k, v in fields.items()]


@pytest.mark.parametrize(("op", "name"), FIELD_CASES)
def test_missing_doubled_and_malformed_fields(harness: Harness, op: str, name: str) -> None:
    fields = valid_fields(op)
    value = fields[name]
    without = {k: v for k, v in fields.items() if k != name}
    refused(harness, op, without, f"field {name} is missing")
    twice = [harness.field(k, v) for k, v in [*fields.items(), (name, value)]]
    refused(harness, op, twice, f"field {name} is given twice")
    right = harness.field_names(op)[name]
    for kind in ("int", "float", "text", "double", "long", "unknown"):
        number = harness.number(f"{kind} field")
        if number != right:
            refused(harness, op, spoiled(harness, op, name, value, type=number), name, "not")
    refused(harness, op, spoiled(harness, op, name, value, type=-1), name)
    refused(harness, op, spoiled(harness, op, name, value, length=0), name, "0 values")
    refused(harness, op, spoiled(harness, op, name, value, length=-1), name, "-1 values")
    refused(harness, op, spoiled(harness, op, name, value, data=None), name)
    if not isinstance(value, str):
        refused(harness, op, spoiled(harness, op, name, value, length=2), name, "2 values")


@pytest.mark.parametrize(("op", "name"), FIELD_CASES)
def test_values_out_of_range(harness: Harness, op: str, name: str) -> None:
    value = valid_fields(op)[name]
    bad: list[Value]
    if isinstance(value, str):
        bad = ["", "half", value.upper(), f"{value} ", f"{value}\0\0", "x" * 5000, "%s%n", "\0"]
        bad += ["none"] if name == "scaling" and op in INPUTS else []
    elif isinstance(value, float):
        bad = [float("nan"), -1.0, float("-inf")]
        bad += [2.0, float("inf")] if name == "eps" else []
        bad += [float("inf")] if name == "dt_min" else []
    else:
        bad = [-1, -(2**31), 2**31 - 1, 2**24 + 1]
        bad += [] if name.endswith("column") else [0]
        bad += [1] if name == "d_conv" else []
    for v in bad:
        refused(harness, op, spoiled(harness, op, name, v), f"field {name} ", "not")


@pytest.mark.parametrize(
    ("op", "changes", "words"),
    [
        ("Ssdi8CausalConv1d", {"conv_dim": 1536}, "conv_dim 1536 is not d_inner 1536"),
        ("Ssdi8CausalConv1d", {"conv_dim": 1537}, "conv_dim 1537"),
        ("Ssdi8CausalConv1d", {"ngroups": 3}, "ngroups 3"),
        ("Ssdi8RmsNormGated", {"ngroups": 7}, "not a multiple of ngroups 7"),
        ("Ssdi8NormThenGate", {"ngroups": 7}, "not a multiple of ngroups 7"),
        ("Ssdi8Attention", {"n_kv_heads": 5}, "n_heads 12 is not a multiple of n_kv_heads 5"),
        ("Ssdi8ChunkCumsum", {"dt_min": 1.0, "dt_max": 0.5}, "dt_min 1 is above dt_max 0.5"),
        ("Ssdi8ChunkState", {"ngroups": 7}, "nheads 24 is not a multiple of ngroups 7"),
        ("Ssdi8ChunkState", {"gate": "q0.7"}, "gate q0.7 needs scaling static"),
        ("Ssdi8StatePassing", {"gate": "q0.7"}, "gate q0.7 needs scaling static"),
        ("Ssdi8ChunkScan", {"ngroups": 7}, "ngroups 7"),
        ("Ssdi8SsdScan", {"ngroups": 7}, "ngroups 7"),
        ("Ssdi8SsdScan", {"gate": "q0.7"}, "gate q0.7"),
        ("Ssdi8SsdScan", {"dt_min": 1.0, "dt_max": 0.5}, "dt_min 1"),
    ],
)
def test_fields_that_contradict_each_other(
    harness: Harness, op: str, changes: dict[str, Value], words: str
) -> None:
    refused(harness, op, {**valid_fields(op), **changes}, words)


@pytest.mark.parametrize("value", [b"\xff\xfe", b"half\neven", b"half\0even", b"\x1b[2J", "é" * 40])
def test_what_a_message_quotes_is_one_line_of_ascii(harness: Harness, value: Value) -> None:
    """Loggers in Python take UTF-8 alone; and a file must not write on a terminal as it likes."""
    fields = spoiled(harness, "Ssdi8RmsNorm", "rounding", value)
    assert harness.create("Ssdi8RmsNorm", fields) is None
    message = harness.messages()
    assert message.isascii() and message.removesuffix("\n").isprintable()
    assert "field rounding is " in message


def test_odd_collections(harness: Harness) -> None:
    """Fields that nobody asked for do no harm; no list at all is refused."""
    fields = [harness.field(k, v) for k, v in valid_fields("Ssdi8RmsNorm").items()]
    extra = [harness.field("color", 3), harness.field(None, 1), harness.field("", "")]
    assert harness.create("Ssdi8RmsNorm", [*extra, *fields]) is not None
    ended = spoiled(harness, "Ssdi8RmsNorm", "rounding", "half_away\0")
    plugin = harness.create("Ssdi8RmsNorm", ended)
    assert plugin is not None and plugin.serialized()["rounding"] == "half_away"
    assert harness.c.harness_create_without_fields(b"Ssdi8RmsNorm") is None
    assert "there is no list of fields" in harness.messages()
    assert harness.c.harness_create(b"Ssdi8RmsNorm", None, 0, 0) is None
    assert "field eps is missing" in harness.messages()
