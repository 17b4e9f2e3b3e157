"""What holds of every op in `OPS`."""

from __future__ import annotations

from pathlib import Path

from ssdi8_edge.ops import OPS
from ssdi8_edge.ops.baseline import BASELINE_OPS
from ssdi8_edge.ops.glue import GLUE_OPS


def test_every_op_has_a_body_test() -> None:
    """A new op needs more than its row in the table of ops: a file here that compares its body."""
    files = [path.read_text() for path in Path(__file__).parent.glob("test_*.py")]
    comparing = "\n".join(text for text in files if "compare_body(" in text)
    assert [name for name in OPS if f'"{name}"' not in comparing] == []


def test_schema_follows_the_reference() -> None:
    """Op names are unique over all domains, prefixed if and only if a plugin has the name."""
    for name, op in OPS.items():
        assert op.name == name
        assert op.plugin == name.startswith("Ssdi8")
        assert len(set(op.inputs) | set(op.outputs)) == len(op.inputs) + len(op.outputs)
    assert not any(op.plugin for op in (*BASELINE_OPS, *GLUE_OPS))
