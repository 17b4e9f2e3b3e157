"""Commands of run_engine.py by the engine `kernels`, and which engine is taken; no GPU needed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from emulated_engine import emulated_gpu
from fake_cuda import Cuda
from hypothesis import given
from hypothesis import strategies as st
from kernel_fixtures import GPU
from tiny_model import one_thread, write_model, write_text

from runtime import command_line
from runtime.backends.choose import choose
from runtime.backends.kernels.arena import BLOCK, Lifetime, plan
from runtime.backends.kernels.library import LIBRARY
from runtime.backends.kernels.program import Shape
from runtime.backends.protocol import BackendOptions
from runtime.bundle import open_bundle
from runtime.files import BUILD_LOG
from ssdi8_edge.compile.pipeline import Build, BuildRequest
from ssdi8_edge.recipes.presets import METHODS
from ssdi8_edge.targets import load_target

__all__ = ["one_thread"]  # a fixture, taken over


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle for target host-gpu, built without TensorRT."""
    folder = tmp_path_factory.mktemp("host-gpu")
    model = write_model(folder / "model", d_model=128)
    text = write_text(folder / "text.txt")
    target = load_target("host-gpu")
    Build(
        BuildRequest(str(model), METHODS["edge-w8a8"], target, folder / "run", calibration=text)
    ).run()
    return folder / "run" / "bundle"


@pytest.fixture
def bundle(packed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed, tmp_path / "bundle"))


@pytest.fixture
def cuda() -> Iterator[Cuda]:
    with emulated_gpu() as gpu:
        yield gpu
        assert gpu.leaks() == []


@pytest.mark.skipif(GPU, reason="shown by the emulation alone")
def test_verify_bench_profile_and_prompt(
    bundle: Path, cuda: Cuda, emulated_library: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Where setup.sh has built the library, it is taken without a word; records name the engine."""
    (bundle / "build").mkdir()
    shutil.copy(emulated_library, bundle / "build" / LIBRARY)

    def run(*arguments: str) -> Any:
        assert command_line.run([str(bundle), *arguments, "--json"], bundle) == 0
        return json.loads(capfd.readouterr().out)

    verified = run("--verify")
    assert verified["verified"] and verified["backend"].startswith("our CUDA kernels on Fake Orin")
    assert verified["notes"] == []
    measuring = ("--seq-lens", "8", "--repeat", "2", "--warmup", "1")
    record = run("--bench", *measuring, "--new-tokens", "4")
    assert record["runtime"] == "kernels" and record["engine"] is None
    assert record["versions"]["kernels"].startswith("ABI ") and record["memory"]["gpu_bytes"] > 0
    profile = run("--profile", *measuring)
    modules = {module["module"] for module in profile["phases"][1]["modules"]}
    assert {"SsdScan", "CausalConv1d", "Linear", "EmbeddingInt8", "Logits"} <= modules
    assert run("--prompt", "the", "--max-new-tokens", "3")["new_tokens"] == 3


def test_the_first_engine_that_is_ready(bundle: Path) -> None:
    """And why, where it is not the bundle's first."""
    manifest = json.loads((bundle / "manifest.json").read_text())

    def chosen(*engines: str, **options: Any) -> tuple[str, str]:
        manifest["target"]["engines"] = engines
        (bundle / "manifest.json").write_text(json.dumps(manifest))
        return choose(open_bundle(bundle), BackendOptions(**options))

    assert manifest["target"]["engines"] == ["kernels", "tensorrt"]
    assert chosen("onnxruntime") == ("onnxruntime", "")
    assert chosen("tensorrt", "kernels") == ("tensorrt", "")  # which says what it lacks
    (bundle / "build").mkdir()
    (bundle / "build" / LIBRARY).touch()
    assert chosen("kernels", "tensorrt") == ("kernels", "")
    assert chosen("tensorrt", "kernels") == (
        "kernels",
        "no TensorRT engine was built here, so our kernels run it",
    )
    assert chosen("tensorrt", "kernels", engines=bundle) == ("tensorrt", "")  # it was named
    log = {"engine": {"bytes": 1, "sha256": ""}, "requirements": {}, "conditions": {}}
    log |= {"schema": 1, "plugins": None, "layers": [], "built_unix": 0}
    (bundle / "engine" / "key").mkdir(parents=True)
    (bundle / "engine" / "key" / BUILD_LOG).write_text(json.dumps(log))
    assert chosen("tensorrt", "kernels") == ("tensorrt", "")
    (bundle / "build" / LIBRARY).unlink()
    assert chosen("kernels", "tensorrt") == (
        "tensorrt",
        "there is no kernel library here, so its TensorRT engine runs it",
    )


@st.composite
def lives(draw: st.DrawFn) -> dict[str, Lifetime]:
    count = draw(st.integers(1, 30))
    made = {}
    for i in range(count):
        first = draw(st.integers(-1, 12))
        nbytes = draw(st.one_of(st.integers(0, 5000), st.integers(BLOCK // 3, BLOCK)))
        made[f"t{i}"] = Lifetime(nbytes, first, first + draw(st.integers(0, 6)))
    return made


@given(lives())
def test_who_lives_at_the_same_time_does_not_overlap(lifetimes: dict[str, Lifetime]) -> None:
    """Nor lies across the end of a block, nor behind the end of all."""
    made = plan(lifetimes)
    assert sum(made.blocks) == made.nbytes
    for name, life in lifetimes.items():
        start, end = made.offsets[name], made.offsets[name] + life.nbytes
        assert end <= made.nbytes and start % 256 == 0
        assert life.nbytes == 0 or start // BLOCK == (end - 1) // BLOCK
        for other, its in lifetimes.items():
            apart = its.last < life.first or life.last < its.first
            before = made.offsets[other] + its.nbytes <= start or end <= made.offsets[other]
            assert other == name or apart or before


@given(st.integers(1, 4), st.integers(1, 3000), st.integers(1, 64))
def test_sizes_of_a_program(batch: int, tokens: int, keep: int) -> None:
    """Factors, one of them divided and rounded up."""
    shape = Shape(batch, tokens, keep)
    assert shape.value(7) == 7
    assert shape.value("batch*tokens") == batch * tokens
    assert shape.value("3*logits_to_keep") == 3 * keep
    assert shape.value("batch*tokens/64") == batch * -(-tokens // 64)
