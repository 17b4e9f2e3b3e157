"""evaluate.py: perplexity against a direct computation, and each kind of model with the others."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from test_pipeline import byte_tokenizer, write_model, write_text

from ssdi8_edge import evaluate
from ssdi8_edge.checkpoint import Checkpoint
from ssdi8_edge.errors import BundleError, CheckpointError, UsageError
from ssdi8_edge.evaluate import open_subject, perplexity
from ssdi8_edge.methods import METHODS
from ssdi8_edge.model import Mamba2Config, Mamba2LM
from ssdi8_edge.pipeline import Build, BuildRequest
from ssdi8_edge.profiles import load_target

WINDOW = 64
TEXT_BYTES = 5 * WINDOW + 10


@pytest.fixture(autouse=True)
def short_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The protocol's 2048 tokens are too many for a test."""
    assert evaluate.WINDOW == 2048
    monkeypatch.setattr(evaluate, "WINDOW", WINDOW)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "held-out.txt", size=TEXT_BYTES)


@pytest.fixture(scope="module", params=["edge-w8a8", "fp16"])
def run(
    request: pytest.FixtureRequest, model: Path, text: Path, tmp_path_factory: Any
) -> tuple[str, Path]:
    """A method and a finished run folder of it."""
    out = tmp_path_factory.mktemp("run") / request.param
    recipe = METHODS[request.param]
    Build(BuildRequest(str(model), recipe, load_target("host-cpu"), out, text)).run()
    return request.param, out


def load_model(folder: Path) -> Mamba2LM:
    checkpoint = Checkpoint(folder)
    model = Mamba2LM(Mamba2Config(**checkpoint.config)).eval()
    model.load_state_dict({name: checkpoint.tensor(name) for name in checkpoint.names})
    return model


def test_perplexity_is_what_the_protocol_says(model: Path, text: Path) -> None:
    """Non-overlapping windows from zero states, a short rest dropped, mean of window means."""
    ids = byte_tokenizer().encode(text.read_text()).ids
    assert len(ids) == TEXT_BYTES
    network, losses = load_model(model), []
    with torch.no_grad():
        for start in range(0, len(ids) - WINDOW + 1, WINDOW):
            window = torch.tensor(ids[start : start + WINDOW])
            log_p = network(window[None])[0][0].log_softmax(-1)
            nll = [-log_p[i, window[i + 1]].item() for i in range(WINDOW - 1)]
            losses.append(sum(nll) / len(nll))
    result = perplexity(open_subject(str(model)), text)
    assert result.perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert (result.windows, result.window_tokens, result.text) == (5, WINDOW, "held-out.txt")
    assert (result.model, result.engine) == ("fp32", "torch")


def test_limit(model: Path, text: Path, tmp_path: Path) -> None:
    """The first windows only, as if the text ended there."""
    subject = open_subject(str(model))
    limited = perplexity(subject, text, limit=2)
    cut = write_text(tmp_path / "cut.txt", size=2 * WINDOW)
    assert limited.windows == 2
    assert limited.perplexity == perplexity(subject, cut).perplexity
    assert perplexity(subject, text, limit=99).windows == 5


def test_text_shorter_than_a_window(model: Path, tmp_path: Path) -> None:
    """It is one window, and says how long."""
    short = write_text(tmp_path / "short.txt", size=40)
    result = perplexity(open_subject(str(model)), short)
    assert (result.windows, result.window_tokens) == (1, 40)


def test_bundle_and_quantized_checkpoint_agree(run: tuple[str, Path], text: Path) -> None:
    """One recipe through onnxruntime and through the torch reference: 1e-3 apart at most."""
    method, out = run
    bundle = perplexity(open_subject(str(out / "bundle")), text)
    checkpoint = perplexity(open_subject(str(out / "quantized")), text)
    assert bundle.perplexity == pytest.approx(checkpoint.perplexity, rel=1e-3)
    assert (bundle.model, checkpoint.model) == (method, method)
    assert "onnxruntime" in bundle.engine and checkpoint.engine == "torch reference"


def test_quantized_is_close_to_the_original(run: tuple[str, Path], model: Path, text: Path) -> None:
    """Far enough from random to notice a wrong scale or a wrong tensor."""
    _, out = run
    original = perplexity(open_subject(str(model)), text)
    quantized = perplexity(open_subject(str(out / "quantized")), text)
    assert quantized.perplexity == pytest.approx(original.perplexity, rel=0.02)


def test_run_folder_stands_for_its_bundle(run: tuple[str, Path], text: Path) -> None:
    _, out = run
    whole, inner = (perplexity(open_subject(str(f)), text, 1) for f in (out, out / "bundle"))
    assert whole == inner


def test_windows_go_through_the_progress_callback(model: Path, text: Path) -> None:
    """A long evaluation shows how far it is."""
    seen: list[tuple[int, str]] = []

    def track(items: Sequence[Any], label: str) -> Sequence[Any]:
        seen.append((len(items), label))
        return items

    perplexity(open_subject(str(model)), text, None, track)
    assert seen == [(5, "evaluate fp32")]


def test_altered_bundle_is_refused(run: tuple[str, Path], tmp_path: Path) -> None:
    """Before anything is computed with it."""
    copy = Path(shutil.copytree(run[1] / "bundle", tmp_path / "bundle"))
    (copy / "tokenizer.json").write_text("{}")
    with pytest.raises(BundleError, match=r"tokenizer\.json has 2 bytes"):
        open_subject(str(copy))


def test_checkpoint_without_tokenizer(model: Path, text: Path, tmp_path: Path) -> None:
    """It asks for one, and takes the one that is named."""
    copy = Path(shutil.copytree(model, tmp_path / "bare"))
    (copy / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    with pytest.raises(UsageError, match=r"has no tokenizer\.json; name one with --tokenizer"):
        open_subject(str(copy))
    named = perplexity(open_subject(str(copy), tmp_path / "tokenizer.json"), text, 1)
    assert named.perplexity == perplexity(open_subject(str(model)), text, 1).perplexity


def test_tokenizer_of_a_larger_model_is_named(model: Path, text: Path, tmp_path: Path) -> None:
    """Token ids that the embedding does not have are the user's mistake, not an index error."""
    from ssdi8_edge.checkpoint import DEMO_FOLDER

    with pytest.raises(UsageError, match="token"):
        perplexity(open_subject(str(model), DEMO_FOLDER / "tokenizer.json"), text, 1)


def test_what_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_subject(str(tmp_path))
