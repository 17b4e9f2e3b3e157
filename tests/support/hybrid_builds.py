"""Builds of a tiny model of Mamba-2, attention, an MLP, and Mamba-2 beside attention.

Its checkpoint has the toy layout, so that no family's names are needed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from safetensors.torch import save_file
from tiny_hybrids import hybrid
from tiny_model import byte_tokenizer, write_text

from runtime.files import sha256
from ssdi8_edge.checkpoints import layouts
from ssdi8_edge.compile.pipeline import Build, BuildRequest
from ssdi8_edge.models.description import Description
from ssdi8_edge.models.kinds.attention import Attention
from ssdi8_edge.models.kinds.mamba2 import Mamba2
from ssdi8_edge.models.kinds.mlp import Mlp
from ssdi8_edge.models.kinds.parallel import Parallel
from ssdi8_edge.recipes.presets import METHODS
from ssdi8_edge.targets import load_target

TOY = Path(__file__).parent / "toy"
CONTEXT = 48
# One block of each kind; chunks of 16 tokens, of which a token is a byte.
MAMBA = Mamba2(d_inner=128, headdim=16, d_state=16, chunk_size=16)
MODEL = Description(
    d_model=64,
    vocab_size=256,
    blocks=(
        MAMBA,
        Attention(n_heads=4, n_kv_heads=2, head_dim=16),
        Mlp(hidden=128, activation="swiglu"),
        Parallel(MAMBA, Attention(n_heads=4, n_kv_heads=2, head_dim=16, rope_theta=1e4)),
    ),
)


@pytest.fixture(autouse=True, scope="module")
def toy_layout() -> Iterator[None]:
    """As if the layout lay in the folder of the package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layouts, "__path__", [*layouts.__path__, str(TOY / "layouts")])
        yield


def write_hybrid(folder: Path) -> Path:
    """Its checkpoint, random, with a tokenizer."""
    folder.mkdir(parents=True)
    blocks = [block.to_dict() for block in MODEL.blocks]
    config = {"width": 64, "vocabulary": 256, "toy_blocks": blocks}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = hybrid(MODEL).state_dict()
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors")
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def request(scene: Path, method: str = "edge-w8a8", context: int = CONTEXT) -> BuildRequest:
    """A build of the checkpoint in `scene` into `scene`/run."""
    model, text = scene / "hybrid", scene / "text.txt"
    if not model.exists():
        write_hybrid(model)
        write_text(text, size=300)
    target = load_target("host-cpu").model_copy(update={"context": context})
    return BuildRequest(str(model), METHODS[method], target, scene / "run", calibration=text)


def build_hybrid(scene: Path, method: str = "edge-w8a8") -> Path:
    """The run folder; onnxruntime has verified the bundle."""
    Build(request(scene, method)).run()
    return scene / "run"


def for_board(bundle: Path, folder: Path) -> Path:
    """The same bundle as if for a board, whose engine computes what the portable graph does."""
    shutil.copytree(bundle, folder, ignore=shutil.ignore_patterns("build"))
    graph = onnx.load(folder / "model.portable.onnx", load_external_data=False)
    kept = next(tensor for tensor in graph.graph.input if tensor.name == "logits_to_keep")
    graph.graph.input.remove(kept)
    one = onnx.numpy_helper.from_array(np.array(1, np.int64), "logits_to_keep")
    graph.graph.initializer.append(one)
    onnx.save(graph, folder / "model.onnx")
    (folder / "build").mkdir()
    (folder / "build" / "libssdi8_plugins.so").write_bytes(b"fake plugins")
    manifest = json.loads((folder / "manifest.json").read_text())
    shapes = {"batch": [1, 1, 2], "tokens": [1, 16, 32], "workspace_mb": 1}
    manifest["target"] |= {"engines": ["tensorrt"], "engine": shapes, "max_tokens": 32}
    made = folder / "model.onnx"
    manifest["files"]["model.onnx"] = {"sha256": sha256(made), "bytes": made.stat().st_size}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder
