"""evaluate/: what can be evaluated, and what is measured over windows of a text."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import byte_tokenizer, one_thread, write_model, write_text
from torch import Tensor

from ssdi8_edge.checkpoints.checkpoint import DEMO_FOLDER, Checkpoint
from ssdi8_edge.checkpoints.quantized import load_quantized
from ssdi8_edge.compile.pipeline import Build, BuildRequest
from ssdi8_edge.evaluate import Subject, open_subject, perplexity, require_device, windows
from ssdi8_edge.evaluate import subject as subject_module
from ssdi8_edge.evaluate.subject import Running
from ssdi8_edge.evaluate.texts import join_lines, text_file, wikitext2
from ssdi8_edge.evaluate.windows import long_context, perplexities
from ssdi8_edge.ground.errors import BundleError, CheckpointError, UsageError
from ssdi8_edge.local.gpu_backend import GpuBackend
from ssdi8_edge.models.float import FloatModel
from ssdi8_edge.models.network import Scope
from ssdi8_edge.numerics.int8 import round_to_int8
from ssdi8_edge.ops import kernel_library
from ssdi8_edge.ops.rms_norm import RMS_NORM
from ssdi8_edge.recipes.presets import METHODS
from ssdi8_edge.targets import load_target

WINDOW = 64
TEXT_BYTES = 5 * WINDOW + 10

__all__ = ["one_thread"]  # a fixture, taken over


@pytest.fixture(autouse=True)
def short_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The protocol's 2048 tokens are too many for a test."""
    assert windows.WINDOW == 2048
    assert (windows.CONTEXTS, windows.LAST, windows.SPACING) == ((512, 2048, 8192), 256, 2048)
    monkeypatch.setattr(windows, "WINDOW", WINDOW)
    monkeypatch.setattr(windows, "CONTEXTS", (16, 32, 128))
    monkeypatch.setattr(windows, "LAST", 8)
    monkeypatch.setattr(windows, "SPACING", 48)


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


def load_model(folder: Path) -> FloatModel:
    checkpoint = Checkpoint(folder)
    model = FloatModel(checkpoint.description).eval()
    model.load_state_dict({name: checkpoint.tensor(name) for name in checkpoint.names})
    return model


def random_subject(
    name: str, tokenizer: Path, forward: Callable[..., Tensor] | None = None, **fields: Any
) -> Subject:
    """A model of 256 tokens; its logits depend on the tokens so far, and a little on its name."""
    common, own = (
        torch.randn(256, 256, generator=torch.Generator().manual_seed(seed))
        for seed in (0, len(name))
    )
    table = common + 0.3 * own

    def cumulative(ids: Tensor, keep: int, scope: Scope) -> Tensor:
        return table[ids].cumsum(1)[:, -keep:]

    def sequence() -> Running:
        return lambda ids: cumulative(ids, ids.shape[1], lambda name: nullcontext())

    run = (forward or cumulative, sequence)
    return Subject(name, name, "a table", *run, tokenizer, 256, **fields)


@pytest.fixture
def pair(model: Path) -> list[Subject]:
    """Two models that differ."""
    return [random_subject(name, model / "tokenizer.json") for name in ("one", "another")]


# --------------------------------------------------------------------------------------------------
# perplexity


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
    assert (result.model, result.engine, result.scored_tokens) == ("fp32", "torch", WINDOW - 1)
    assert (result.kl, result.top1_agreement, result.saturation) == (None, None, {})
    assert result.change_stderr is None


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
    assert (result.windows, result.window_tokens, result.scored_tokens) == (1, 40, 39)


def test_distance_to_the_first_model(
    pair: list[Subject], text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """KL(first ‖ other) and equal likeliest tokens, position by position, in slices of any size."""
    ids = torch.tensor(byte_tokenizer().encode(text.read_text()).ids)
    kl, same = [], []
    for start in range(0, 5 * WINDOW, WINDOW):
        p, q = (
            subject.logits(ids[None, start : start + WINDOW])[0, :-1].double().softmax(-1)
            for subject in pair
        )
        kl += (p * (p / q).log()).sum(-1).tolist()
        same += (p.argmax(-1) == q.argmax(-1)).tolist()
    assert 0 < sum(same) < len(same)  # else the test would show nothing
    for size in (windows.SLICE, 7):
        monkeypatch.setattr(windows, "SLICE", size)
        first, other = perplexities(pair, text_file(text))
        assert (first.kl, first.top1_agreement) == (None, None)
        assert other.kl == pytest.approx(sum(kl) / len(kl), rel=1e-9)
        assert other.top1_agreement == sum(same) / len(same)


def test_a_model_is_no_distance_from_itself(pair: list[Subject], text: Path) -> None:
    _, again = perplexities([pair[0], pair[0]], text_file(text), limit=2)
    assert (again.kl, again.top1_agreement, again.change_stderr) == (0.0, 1.0, 0.0)


def test_standard_error_of_the_change(pair: list[Subject], text: Path) -> None:
    """Of the mean difference of the two losses, over windows; one window says nothing."""
    ids = torch.tensor(byte_tokenizer().encode(text.read_text()).ids)
    windows_of_ids = ids[: 5 * WINDOW].reshape(5, WINDOW)
    losses = [
        -subject.logits(windows_of_ids)[:, :-1]
        .double()
        .log_softmax(-1)
        .gather(2, windows_of_ids[:, 1:, None])
        .mean((1, 2))
        for subject in pair
    ]
    expected = (losses[1] - losses[0]).std().item() / 5**0.5
    first, other = perplexities(pair, text_file(text))
    assert first.change_stderr is None
    assert other.change_stderr == pytest.approx(expected, rel=1e-6)
    assert perplexities(pair, text_file(text), limit=1)[1].change_stderr is None


def test_other_tokens_are_not_compared(pair: list[Subject], text: Path, tmp_path: Path) -> None:
    """Each model is measured in its own tokens; a KL between them would mean nothing."""
    byte_tokenizer(120).save(str(tmp_path / "tokenizer.json"))  # knows fewer letters
    foreign = random_subject("foreign", tmp_path / "tokenizer.json")
    _, other, same = perplexities([pair[0], foreign, pair[1]], text_file(text))
    assert other.kl is None and other.top1_agreement is None and other.change_stderr is None
    assert other.perplexity == perplexity(foreign, text).perplexity
    assert same.kl is not None


def test_saturation_is_that_of_the_worst_layer(model: Path, text: Path) -> None:
    """Averaged over the windows, kept per site; other windows of other models do not mix in."""
    seen = 0

    def forward(ids: Tensor, keep: int, scope: Scope) -> Tensor:
        nonlocal seen
        seen += 1
        for layer, high in enumerate((0, 2 if seen == 1 else 6)):
            with scope(f"layers.{layer}"):
                values = torch.zeros(16)
                values[:high] = 300
                round_to_int8(values, "half_even", "u")
        round_to_int8(torch.full((4,), 300.0), "half_even", "ends")
        return torch.zeros(1, keep, 256)

    tokenizer = model / "tokenizer.json"
    quiet = random_subject("quiet", tokenizer, forward)
    counted = random_subject("counted", tokenizer, forward, counts_saturation=True)
    (result,) = perplexities([counted], text_file(text), limit=2)
    assert result.saturation == {"u": (2 + 6) / 2 / 16, "ends": 1.0}
    assert perplexity(quiet, text, limit=1).saturation == {}


def test_saturation_of_a_quantized_model(run: tuple[str, Path], text: Path) -> None:
    """Every INT8 tensor of the torch reference; nothing where nothing is INT8 or counted."""
    method, out = run
    found = perplexity(open_subject(str(out / "quantized")), text, 1).saturation
    sites = {"B", "C"}  # the others have dynamic scales, or are FP16
    assert set(found) >= (sites if method == "edge-w8a8" else set())
    assert bool(found) == (method == "edge-w8a8")
    assert all(0 <= fraction < 0.2 for fraction in found.values())
    assert perplexity(open_subject(str(out)), text, 1).saturation == {}


def test_windows_go_through_the_progress_callback(pair: list[Subject], text: Path) -> None:
    """A long evaluation shows how far it is: one step per window and model."""
    seen: list[tuple[int, str]] = []

    def track(items: Sequence[Any], label: str) -> Sequence[Any]:
        seen.append((len(items), label))
        return items

    perplexities(pair, text_file(text), None, track)
    assert seen == [(10, "held-out.txt, 64 tokens")]
    seen.clear()
    long_context(pair, text_file(text), None, track)
    assert seen == [(10, f"held-out.txt, {length} tokens") for length in (16, 32, 128)]


# --------------------------------------------------------------------------------------------------
# long context


def test_long_context_scores_the_same_tokens_after_more_of_the_text(
    pair: list[Subject], text: Path
) -> None:
    """The last 8 of windows of 16, 32 and 128, all of which end at the same places, 48 apart."""
    ids = torch.tensor(byte_tokenizer().encode(text.read_text()).ids)
    for subject, results in zip(pair, long_context(pair, text_file(text)), strict=True):
        for context, result in zip((16, 32, 128), results, strict=True):
            losses = []
            for end in (128, 176, 224, 272, 320):
                window = ids[end - context : end]
                log_p = subject.logits(window[None])[0].double().log_softmax(-1)
                losses += [-log_p[i - 1, window[i]].item() for i in range(context - 8, context)]
            assert result.perplexity == pytest.approx(math.exp(sum(losses) / 40), rel=1e-9)
            assert (result.windows, result.window_tokens, result.scored_tokens) == (5, context, 8)
            assert (result.kl is None) == (subject is pair[0])


def test_limit_of_long_context(pair: list[Subject], text: Path, tmp_path: Path) -> None:
    """The first windows of each length, as if the text ended there."""
    cut = write_text(tmp_path / "held-out.txt", size=128 + 48)
    assert long_context(pair, text_file(text), 2) == long_context(pair, text_file(cut))
    assert long_context(pair, text_file(text), 99) == long_context(pair, text_file(text))


def test_long_context_of_a_short_text(pair: list[Subject], tmp_path: Path) -> None:
    short = text_file(write_text(tmp_path / "short.txt", size=100))
    with pytest.raises(UsageError, match=r"short\.txt holds 100 tokens; .* at least 128\."):
        long_context(pair, short)


# --------------------------------------------------------------------------------------------------
# texts


def test_wikitext2_is_joined_as_the_protocol_says(tmp_path: Path) -> None:
    """Lines end at line feeds alone and keep them; blank ones are empty; two more go between."""
    lines = [" \n", " = A = \n", " \n", " b\x0b\x85\u2028c \n", " d\re \n"]
    assert join_lines(lines) == "\n\n = A = \n\n\n\n\n b\x0b\x85\u2028c \n\n\n d\re \n"
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "wiki.test.raw").write_bytes("".join(lines).encode())
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    found = wikitext2(tmp_path).windows(tmp_path / "tokenizer.json", 5, 1 << 40)
    ids = byte_tokenizer().encode(join_lines(lines)).ids
    assert found.tolist() == [ids[i : i + 5] for i in range(0, len(ids) - 4, 5)]


def test_wikitext2_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no wiki\.test\.raw below .*; put it there or leave out"):
        wikitext2(tmp_path)
    with pytest.raises(UsageError, match=r"nowhere is not a folder; name the folder .* by --data"):
        wikitext2(tmp_path / "nowhere")
    path = tmp_path / "wiki.test.raw"
    for content, message in ((b" \n", "is empty; fetch"), (b"\xff\n", r"cannot read .*; fetch")):
        path.write_bytes(content)
        with pytest.raises(UsageError, match=message):
            wikitext2(tmp_path)
    path.unlink()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "wiki.test.raw").write_text("a\n")
    with pytest.raises(
        UsageError, match=r"a/wiki\.test\.raw and .*b/wiki\.test\.raw have the same"
    ):
        wikitext2(tmp_path)


def test_wikitext2_from_a_hub_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets (extra eval) reads the hub")

    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(
        UsageError, match=r"cannot fetch wikitext2 .* name a folder with wiki\.test"
    ):
        wikitext2(None)


# --------------------------------------------------------------------------------------------------
# what can be evaluated


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
    subjects = [open_subject(str(model)), open_subject(str(out / "quantized"))]
    original, quantized = perplexities(subjects, text_file(text))
    assert quantized.perplexity == pytest.approx(original.perplexity, rel=0.02)
    assert quantized.kl is not None and 0 < quantized.kl < 0.01


def test_only_the_last_positions(run: tuple[str, Path], model: Path) -> None:
    """Asking for fewer logits gives the same ones, from every kind of model."""
    ids = torch.randint(256, (2, 40), generator=torch.Generator().manual_seed(3))
    for source in (model, run[1], run[1] / "quantized"):
        subject = open_subject(str(source))
        every, some = subject.logits(ids), subject.logits(ids, 5)
        assert every.shape == (2, 40, 256) and every.dtype == torch.float32
        torch.testing.assert_close(some, every[:, -5:], rtol=0, atol=1e-5)


def test_run_folder_stands_for_its_bundle(run: tuple[str, Path], text: Path) -> None:
    _, out = run
    whole, inner = (perplexity(open_subject(str(f)), text, 1) for f in (out, out / "bundle"))
    assert whole == inner


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


def test_tokenizer_that_is_none(model: Path, tmp_path: Path) -> None:
    """Found out when the model is opened, not after hours."""
    with pytest.raises(UsageError, match=r"absent\.json does not exist; name the model's"):
        open_subject(str(model), tmp_path / "absent.json")


def test_tokenizer_of_a_larger_model_is_named(model: Path, text: Path) -> None:
    """Token ids that the embedding does not have are the user's mistake, not an index error."""
    with pytest.raises(UsageError, match="token"):
        perplexity(open_subject(str(model), DEMO_FOLDER / "tokenizer.json"), text, 1)


def test_what_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_subject(str(tmp_path))


def test_text_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"text .*absent\.txt does not exist; name a text file\."):
        text_file(tmp_path / "absent.txt")


# --------------------------------------------------------------------------------------------------
# devices


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "cpu:0", "mps", "cuda:-1", ""])
def test_device_that_does_not_exist(device: str) -> None:
    with pytest.raises(UsageError, match=r"unknown device .*; give cpu, cuda or cuda:INDEX"):
        require_device(device)


def test_device_that_torch_does_not_have(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence before the model is loaded."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match=r"finds no CUDA GPU here; .* or give --device cpu\."):
        open_subject(str(model), device="cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UsageError, match="no cuda:2: torch counts 2 CUDA GPUs"):
        open_subject(str(model), device="cuda:2")


@pytest.mark.parametrize(("headdim", "engine"), [(16, "torch reference"), (64, "CUDA kernels")])
def test_sizes_without_kernels(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, headdim: int, engine: str
) -> None:
    """Evaluated on a GPU by the references; running on one needs the kernels."""
    model, recipe = write_model(tmp_path / "odd", headdim=headdim), METHODS["edge-w8a8"]
    target, out = load_target("host-cpu"), tmp_path / "run"
    Build(BuildRequest(str(model), recipe, target, out, text, until="quantize")).run()
    quantized = load_quantized(out / "quantized")
    monkeypatch.setattr(subject_module, "require_device", lambda _: None)
    monkeypatch.setattr(subject_module, "load_quantized", lambda folder, device: quantized)
    monkeypatch.setattr(kernel_library, "available", lambda: True)
    allowed = []

    def forward(*arguments: Any) -> list[Tensor]:
        allowed.append(RMS_NORM.runnable_kernel() is not None)
        return [torch.zeros(1, 1, 256)]

    monkeypatch.setattr(quantized, "forward", forward)
    found = open_subject(str(out), device="cuda")
    found.forward(torch.zeros(1, 1, dtype=torch.int64), 1, nullcontext)
    assert found.engine == f"{engine}, cuda" and allowed == [headdim == 64]
    assert found.counts_saturation == (headdim == 16)
    if headdim == 16:
        with pytest.raises(UsageError, match=r"headdim is 16, but .* on cuda; use --device cpu"):
            GpuBackend(quantized)


def test_bundle_stays_on_the_cpu(run: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """It says which folder runs on a GPU instead."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UsageError, match=r"on the CPU; name the quantized/ folder"):
        open_subject(str(run[1] / "bundle"), device="cuda")


@pytest.mark.gpu
def test_gpu_reads_what_the_cpu_reads(run: tuple[str, Path], model: Path, text: Path) -> None:
    """Through the torch reference or the kernels, whichever this machine has."""
    if not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA GPU here")
    for source in (model, run[1] / "quantized"):
        here, there = (
            perplexity(open_subject(str(source), device=device), text) for device in ("cpu", "cuda")
        )
        assert there.perplexity == pytest.approx(here.perplexity, rel=1e-3)
