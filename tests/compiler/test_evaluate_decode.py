"""evaluate/decode.py: a text that is decoded token by token, and the option that asks for it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import ssdi8
from tiny_model import byte_tokenizer, one_thread, write_model, write_text
from torch import Tensor

from ssdi8_edge.compile.pipeline import Build, BuildRequest
from ssdi8_edge.evaluate import Subject, evaluate, open_subject, plan
from ssdi8_edge.evaluate import decode as decode_module
from ssdi8_edge.evaluate.decode import Decoding, decodings
from ssdi8_edge.evaluate.subject import Running
from ssdi8_edge.evaluate.table import markdown
from ssdi8_edge.evaluate.texts import text_file
from ssdi8_edge.ground.errors import UsageError
from ssdi8_edge.ground.failures import as_ours
from ssdi8_edge.ground.json_text import to_json
from ssdi8_edge.ground.progress import silent
from ssdi8_edge.recipes.presets import METHODS
from ssdi8_edge.report.sources import load
from ssdi8_edge.targets import load_target

TOKENS = 90

__all__ = ["one_thread"]  # a fixture, taken over


@pytest.fixture(autouse=True, scope="module")
def small_pieces() -> Iterator[None]:
    """So that a short text takes several; a multiple of the model's chunks of 16."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode_module, "PIECE", 32)
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"d_model": 64, "headdim": 16, "d_state": 16, "chunk_size": 16}
    return write_model(tmp_path_factory.mktemp("model") / "tiny", **sizes)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "held-out.txt", size=200)


@pytest.fixture(scope="module")
def run(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run folder of edge-w8a8."""
    out = tmp_path_factory.mktemp("run") / "w8"
    Build(BuildRequest(str(model), METHODS["edge-w8a8"], load_target("host-cpu"), out, text)).run()
    return out


@pytest.fixture(scope="module")
def found(model: Path, text: Path, run: Path) -> list[Decoding]:
    """Of the checkpoint, its quantized checkpoint and its bundle."""
    subjects = [open_subject(str(source)) for source in (model, run / "quantized", run)]
    return decodings(subjects, text_file(text), TOKENS)


def test_decoding_in_floating_point_is_prefill(found: list[Decoding]) -> None:
    fp32 = found[0]
    assert fp32.kl is not None and fp32.kl < 1e-9
    assert fp32.prefill_kl == 0
    assert fp32.perplexity == pytest.approx(fp32.prefill_perplexity, rel=1e-6)
    assert math.exp(fp32.loss) == pytest.approx(fp32.perplexity)
    assert len(fp32.kl_parts) == decode_module.PARTS


def test_perplexity_is_of_the_first_tokens(model: Path, text: Path, found: list[Decoding]) -> None:
    ids = torch.tensor(byte_tokenizer().encode(text.read_text()).ids)[:TOKENS]
    log_p = open_subject(str(model)).logits(ids[None])[0].double().log_softmax(-1)
    loss = -log_p[:-1].gather(1, ids[1:, None]).mean().item()
    assert found[0].loss == pytest.approx(loss, rel=1e-6)
    assert (found[0].tokens, found[0].text) == (TOKENS, "held-out.txt")


def test_a_quantized_checkpoint_and_its_bundle(found: list[Decoding]) -> None:
    """They decode about as well as they prefill, and both the same."""
    _, checkpoint, bundle = found
    for each in (checkpoint, bundle):
        assert each.kl is not None and each.prefill_kl is not None
        assert 0 < each.kl < 3 * each.prefill_kl
        assert sum(each.kl_parts) / len(each.kl_parts) == pytest.approx(each.kl, rel=0.1)
    assert checkpoint.kl == pytest.approx(bundle.kl, rel=1e-4)


def changed(subject: Subject, sequence: Any) -> Subject:
    return replace(subject, name="changed", sequence=sequence)


def test_a_state_that_is_lost_shows(model: Path, text: Path) -> None:
    """A sequence that begins anew at each call, and one that forgets half way."""
    fp32 = open_subject(str(model))

    def forgets() -> Running:
        return lambda ids: fp32.sequence()(ids)

    def late() -> Running:
        runs, seen = [fp32.sequence()], 0

        def feed(ids: Tensor) -> Tensor:
            nonlocal seen
            seen += ids.shape[1]
            if ids.shape[1] == 1 and seen == TOKENS // 2:
                runs.append(fp32.sequence())
            return runs[-1](ids)

        return feed

    subjects = [fp32, changed(fp32, forgets), changed(fp32, late)]
    first, anew, half = decodings(subjects, text_file(text), TOKENS)
    assert first.kl is not None and anew.kl is not None and half.kl is not None
    assert anew.kl > 1e-3 > 1e3 * first.kl
    assert half.kl > 1e-4 > 1e3 * first.kl
    assert half.kl_parts[0] < 1e-9 < half.kl_parts[decode_module.PARTS // 2]


def test_other_tokens_are_not_compared(model: Path, text: Path, tmp_path: Path) -> None:
    fp32 = open_subject(str(model))
    byte_tokenizer(120).save(str(tmp_path / "tokenizer.json"))
    foreign = replace(fp32, tokenizer=tmp_path / "tokenizer.json")
    _, other = decodings([fp32, foreign], text_file(text), 20)
    assert (other.kl, other.prefill_kl, other.kl_parts) == (None, None, ())


def test_what_is_no_number_is_said(model: Path, text: Path) -> None:
    """In the record and in a note."""
    fp32 = open_subject(str(model))

    def broken() -> Running:
        return lambda ids: torch.full((1, ids.shape[1], 256), math.nan)

    rows = evaluate([fp32, changed(fp32, broken)], plan((), [text], decode=20))
    (decoding,) = rows[1].decodings
    assert math.isnan(decoding.perplexity) and math.isnan(decoding.loss)
    record = json.loads(to_json(rows[1].records()[-1]))
    assert record["measure"] == "decode" and record["perplexity"] is None
    assert record["not_finite"]["perplexity"] == "nan"
    assert "logits that are not numbers" in markdown(rows)


def test_lack_of_memory_names_the_model_and_the_text(model: Path, text: Path) -> None:
    fp32 = open_subject(str(model))

    def large() -> Running:
        def feed(ids: Tensor) -> Tensor:
            raise MemoryError

        return feed

    with pytest.raises(MemoryError) as caught:
        decodings([fp32, changed(fp32, large)], text_file(text), 20)
    sentence = str(as_ours(caught.value, "running evaluate"))
    assert "while decoding held-out.txt by changed" in sentence
    assert "name fewer models at once" in sentence


@pytest.mark.parametrize("tokens", [1, 0, -3])
def test_too_few_tokens(tokens: int, text: Path) -> None:
    with pytest.raises(UsageError, match=f"--decode {tokens} predicts no token; give at least 2"):
        plan((), [text], decode=tokens)


def test_decoding_needs_a_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssdi8_edge.evaluate.evaluation.require_lm_eval", lambda: None)
    with pytest.raises(UsageError, match="--decode needs a text; add wikitext2"):
        plan(["lambada"], decode=16)


def test_a_text_too_short_is_refused_before_anything_is_measured(model: Path, text: Path) -> None:
    measured: list[str] = []

    def track(items: Any, label: str) -> Any:
        measured.append(label)
        return silent(items, label)

    with pytest.raises(UsageError, match=r"held-out.txt holds 200 tokens, .* 201 needs 201"):
        evaluate([open_subject(str(model))], plan((), [text], decode=201), track)
    assert measured == []
    evaluate([open_subject(str(model))], plan((), [text], decode=200), track)
    assert measured[-1] == "held-out.txt, 200 tokens one by one"


def test_the_command_measures_methods(model: Path, text: Path, tmp_path: Path) -> None:
    """Columns, notes and records; `report` takes the file."""
    saved = [tmp_path / "table.md", tmp_path / "table.json"]
    done = ssdi8(
        *("evaluate", model, "--methods", "fp16,edge-w8a8", "--calibration", text),
        *("--runs", tmp_path / "runs", "--text", text, "--decode", 40),
        *("--save", saved[0], "--save", saved[1]),
    )
    assert done.returncode == 0, done.stderr
    table = saved[0].read_text()
    for heading in ("perplexity", "KL", "KL of prefill"):
        assert f"held-out.txt 40 tokens decoded {heading} |" in table
    assert "the text is given token by token" in table
    assert "decoded by edge-w8a8 (torch reference): KL" in table
    records = [r for r in json.loads(saved[1].read_text()) if r["measure"] == "decode"]
    assert [r["model"] for r in records] == ["fp32", "fp16", "edge-w8a8"]
    assert all(r["tokens"] == 40 and len(r["kl_parts"]) == 8 for r in records)
    with pytest.raises(UsageError, match="no measured point"):  # and not that it is no evaluation
        load([saved[1]])
