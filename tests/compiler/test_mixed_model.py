"""A kind of block, an op and a layout that the package does not have: three files, `support/toy`.

Nothing else is needed to calibrate, quantize, export, pack and run a model that mixes them with
Mamba-2.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import onnx
import pytest
import torch
from commands import ssdi8
from conftest import make_config, make_model
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_model import byte_tokenizer, one_thread, write_text
from typer.testing import CliRunner

from ssdi8_edge import ops
from ssdi8_edge.checkpoints import layouts
from ssdi8_edge.checkpoints.quantized import load_quantized
from ssdi8_edge.cli import app
from ssdi8_edge.compile.inspection import inspect_bundle
from ssdi8_edge.compile.pipeline import Build, BuildRequest
from ssdi8_edge.evaluate import open_subject
from ssdi8_edge.models import kinds
from ssdi8_edge.models.description import Description
from ssdi8_edge.models.kinds import kind_named
from ssdi8_edge.ops import OPS
from ssdi8_edge.ops.op import DOMAIN
from ssdi8_edge.recipes.presets import METHODS
from ssdi8_edge.targets import load_target

TOY = Path(__file__).parents[1] / "support" / "toy"
PACKAGES: dict[str, ModuleType] = {"kinds": kinds, "ops": ops, "layouts": layouts}

__all__ = ["one_thread"]  # a fixture, taken over


@pytest.fixture(autouse=True, scope="module")
def toy_files() -> Iterator[None]:
    """As if they lay in the folders of the package; `OPS` looked there before."""
    with pytest.MonkeyPatch.context() as patch:
        for name, package in PACKAGES.items():
            patch.setattr(package, "__path__", [*package.__path__, str(TOY / name)])
        for name, op in vars(importlib.import_module("ssdi8_edge.ops.relu_squared")).items():
            if name.isupper():
                patch.setitem(ops.OPS, op.name, op)
        yield


def test_a_layout_is_asked_before_the_one_that_takes_all() -> None:
    """The one that refuses model types that no other knows comes last."""
    names = [layout.name for layout in layouts.layouts()]
    assert {"toy", "state-spaces"} < {*names} and names[-1] == "unsupported"


def mixed() -> Description:
    """Mamba-2, two MLPs, Mamba-2; all of other sizes, so that ops come with other attributes."""
    first, last = make_config(headdim=16).blocks[0], make_config(2, headdim=32).blocks[0]
    narrow, wide = (kind_named("mlp").from_dict({"hidden": size}) for size in (96, 128))
    return Description(d_model=64, vocab_size=256, blocks=(first, narrow, wide, last))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "mixed"
    folder.mkdir()
    description = mixed()
    blocks = [block.to_dict() for block in description.blocks]
    config = {"width": 64, "vocabulary": 256, "toy_blocks": blocks}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = make_model(description).state_dict()
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors")
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module", params=["edge-w8a8", "ssdi8-w8a8", "fp16"])
def run(
    request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A finished run folder, whose bundle the build has verified by onnxruntime."""
    scene = tmp_path_factory.mktemp("run")
    text, target = write_text(scene / "text.txt", size=300), load_target("host-cpu")
    asked = BuildRequest(str(checkpoint), METHODS[request.param], target, scene / "out", text)
    Build(asked).run()
    return scene / "out"


def test_the_description_survives_the_checkpoint(run: Path) -> None:
    model = load_quantized(run / "quantized")
    assert [block.kind for block in model.description.blocks] == ["mamba2", "mlp", "mlp", "mamba2"]
    names = [name for name, _ in model.description.states(model.recipe)]
    assert names == ["conv_state.0", "ssm_state.0", "conv_state.3", "ssm_state.3"]
    assert Description.from_dict(mixed().to_dict()) == mixed()


def test_the_quantized_model_is_near_the_checkpoint(checkpoint: Path, run: Path) -> None:
    ids = torch.arange(80)[None] % 256
    wanted, found = (
        open_subject(str(each)).logits(ids) for each in (checkpoint, run / "quantized")
    )
    assert (found - wanted).norm() < 0.05 * wanted.norm()


def test_the_bundle_computes_the_same_bits(run: Path) -> None:
    """Also with the states of a first part carried over."""
    ids = torch.arange(50)[None] % 256
    reference, bundle = (open_subject(str(each)).sequence() for each in (run / "quantized", run))
    for part in (ids[:, :32], ids[:, 32:49], ids[:, 49:]):
        wanted, found = reference(part), bundle(part)
        if "fp16" in (run / "quantized" / "config.json").read_text():
            torch.testing.assert_close(found, wanted, rtol=0.01, atol=0.01)
        else:
            assert torch.equal(found, wanted)


def test_nodes_for_tensorrt_have_one_domain(run: Path) -> None:
    """Also of an op that comes with other attributes; its name is that of the plugin."""
    graph = onnx.load(run / "bundle" / "model.onnx", load_external_data=False).graph
    nodes = [node for node in graph.node if node.domain]
    assert {node.domain for node in nodes} <= {DOMAIN}
    assert all(OPS[node.op_type].plugin for node in nodes)


def test_the_runtime_knows_no_kind(run: Path) -> None:
    """A process without the toy's files verifies the bundle."""
    verified = ssdi8("verify", run)
    assert verified.returncode == 0, verified.stderr


def test_inspect_shows_blocks_of_other_kinds(run: Path) -> None:
    """Those without scales and without saturation among them."""
    shown = CliRunner().invoke(app, ["inspect", str(run)])
    assert shown.exit_code == 0, shown.output
    layers = inspect_bundle(run)["layers"]
    assert len(layers) == 4 and layers[1]["scales"].keys() <= {"u_scale", "r_scale"}


def test_an_mlp_has_no_tensors_but_its_linear_layers(run: Path) -> None:
    with safe_open(run / "quantized" / "model.safetensors", framework="pt") as file:
        names = {n.split(".", 2)[2] for n in file.keys() if n.startswith("layers.1.")}  # noqa: SIM118
    assert {name.split(".")[0] for name in names} <= {
        *("norm", "in_proj", "out_proj", "u_scale", "r_scale")
    }
