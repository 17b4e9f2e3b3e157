"""What holds of every op in `OPS`."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

from ssdi8_edge.ops import OPS, baseline, glue, linear
from ssdi8_edge.ops.op import Op


def ops_of(module: ModuleType) -> list[Op]:
    return [value for value in vars(module).values() if isinstance(value, Op)]


def test_every_op_has_a_body_test() -> None:
    """A new op needs more than its module: a file here that compares its body."""
    files = [path.read_text() for path in Path(__file__).parent.glob("test_*.py")]
    comparing = "\n".join(text for text in files if "compare_body(" in text)
    assert [name for name in OPS if f'"{name}"' not in comparing] == []


def test_schema_follows_the_reference() -> None:
    """Op names are unique over all domains, prefixed if and only if a plugin has the name."""
    for name, op in OPS.items():
        assert op.name == name
        assert op.plugin == name.startswith("Ssdi8")
        assert len(set(op.inputs) | set(op.outputs)) == len(op.inputs) + len(op.outputs)
    assert not any(op.plugin for module in (baseline, glue) for op in ops_of(module))


def test_ops_are_found() -> None:
    """In modules and in folders of them; none is left out."""
    assert ops_of(linear) == [OPS["Ssdi8Linear"], OPS["Ssdi8LinearW4"]]
    assert {"Ssdi8SsdScan", "SsdScan", "Embedding", "Logits"} <= set(OPS)
