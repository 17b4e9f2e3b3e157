"""evaluate/table.py: the table on a terminal and in files, and the command that prints it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Result, ssdi8
from evaluation_rows import FIRST, OTHER, row
from tiny_model import write_model, write_text
from typer.testing import CliRunner
from zero_shot_data import NO_HARNESS, write_data

from ssdi8_edge.cli import app
from ssdi8_edge.compile.comparison import quantize_by
from ssdi8_edge.evaluate.evaluation import Evaluation
from ssdi8_edge.evaluate.table import markdown, require_writable, save_results, show
from ssdi8_edge.ground.artifacts import QUANTIZED
from ssdi8_edge.ground.console import Console
from ssdi8_edge.ground.errors import UsageError
from ssdi8_edge.recipes.presets import METHODS


@pytest.fixture
def rows() -> list[Evaluation]:
    return [row(FIRST, 0.6, _512=12.0, _8192=9.0), row(OTHER, 0.55, _512=12.0, _8192=9.9)]


def printed(rows: list[Evaluation], width: int) -> str:
    console = Console(width=width, record=True)
    with console.capture() as captured:
        show(rows, console)
    return captured.get()


CELLS = [
    *("10.0000", "10.2000 (+2.00% ± 0.12%)", "0.00123", "98.70%", "0.100% u"),
    *("60.0 ± 2.0", "55.0 ± 2.0", "70.0 ± 0.0", "65.0 ± 1.0", "60.0 ± 1.0"),
    *("12.0000 (+0.00% ± 0.12%)", "9.9000 (+10.00% ± 0.12%)", "torch reference"),
]


def test_markdown_is_one_table(rows: list[Evaluation]) -> None:
    """A line a model, every measure a column, and what they were measured on below."""
    head, rule, first, other, blank, *rest = markdown(rows).splitlines()
    cells = [
        line.replace("\\|", "").strip("| ").split(" | ") for line in (head, rule, first, other)
    ]
    assert len({len(line) for line in cells[:2]}) == 1 and blank == ""
    assert first.replace("\\|", "").count("|") == other.replace("\\|", "").count("|")
    assert "a\\|b [x].txt perplexity" in head and "hellaswag acc_norm" in head
    for cell in CELLS:
        assert f"| {cell} " in first + other
    assert "- a\\|b [x].txt: 3 × 2048 tokens" in rest
    assert any("items: lambada 400, hellaswag 100" in line for line in rest)
    assert any("the last 256 tokens of 3 windows" in line for line in rest)


@pytest.mark.parametrize("width", [200, 100, 60])
def test_terminal_folds_the_table_and_keeps_every_cell(rows: list[Evaluation], width: int) -> None:
    """Names of files are no markup; a narrow terminal gets several tables, each with the names."""
    text = printed(rows, width)
    for cell in CELLS:
        assert cell in text, cell
    assert "a|b [x].txt" in text
    assert max(map(len, text.splitlines())) <= width
    assert (text.count("edge-w8a8") == 1) == (width == 200)


def test_measures_that_were_not_made_take_no_room() -> None:
    text = printed([Evaluation("a/folder", "fp16", "torch", [replace(FIRST, model="fp16")])], 200)
    assert "10.0000" in text
    for word in ("KL", "saturation", "acc", "average", "long context", "change"):
        assert word not in text


def test_two_texts_are_told_apart(rows: list[Evaluation]) -> None:
    for each in rows:
        each.perplexities.append(replace(each.perplexities[0], text="other.txt", perplexity=5.0))
    head = markdown(rows).splitlines()[0]
    assert "other.txt perplexity | other.txt KL | other.txt top-1" in head


def test_two_builds_by_one_method_are_told_apart() -> None:
    """By what the user named."""
    found = [Evaluation(source, "edge-w8a8", "torch", [FIRST]) for source in ("runs/a", "runs/b")]
    text = printed(found, 100)
    assert "edge-w8a8 runs/a" in text and "edge-w8a8 runs/b" in text
    assert found[1].records()[0]["source"] == "runs/b"


def test_files(rows: list[Evaluation], tmp_path: Path) -> None:
    """JSON holds every figure under its name, unrounded; Markdown the table."""
    paths = [tmp_path / "a.json", tmp_path / "b.md"]
    require_writable(paths)
    save_results(rows, paths)
    found = json.loads(paths[0].read_text())
    assert [record["measure"] for record in found[: len(found) // 2]] == [
        *("perplexity", "accuracy", "accuracy", "average", "long_context", "long_context")
    ]
    assert found[6]["kl"] == 0.00123 and found[6]["saturation"] == {"u": 0.001, "r": 0.00002}
    assert found[3]["tasks"] == ["lambada", "hellaswag"]
    assert paths[1].read_text() == markdown(rows)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "b.md"]


def test_files_that_cannot_be_written(tmp_path: Path) -> None:
    """Found out before hours of measuring; a folder of that name is left alone."""
    (tmp_path / "folder.md").mkdir()
    with pytest.raises(UsageError, match=r"cannot save results as .*x\.csv; .* \.json or \.md"):
        require_writable([tmp_path / "x.csv"])
    for path in (tmp_path / "folder.md", tmp_path / "absent" / "x.md"):
        with pytest.raises(
            UsageError, match=r"cannot write .*; name a file in a folder that exists"
        ):
            require_writable([path])


# --------------------------------------------------------------------------------------------------
# the command


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny model, a text, and local data."""
    folder = tmp_path_factory.mktemp("scene")
    write_model(folder / "tiny")
    write_text(folder / "text.txt")
    write_data(folder / "data")
    return folder


def by_methods(scene: Path, *more: object) -> list[object]:
    return [
        *(
            "evaluate",
            scene / "tiny",
            "--methods",
            "fp16, ssdi8-w8a8",
            "--text",
            scene / "text.txt",
        ),
        *("--calibration", scene / "text.txt", "--runs", scene / "runs", "--limit", 2),
        *more,
    ]


def test_each_method_is_quantized_once_and_evaluated(scene: Path) -> None:
    """The checkpoint itself first; the run folders are those of `build`, and are found again."""
    pytest.importorskip("lm_eval", reason=NO_HARNESS)
    more = ("--tasks", "piqa,lambada", "--data", scene / "data", "--save", scene / "result.md")
    first: Result = ssdi8(*by_methods(scene, *more))
    assert first.returncode == 0, first.stderr
    assert "ssdi8-w8a8: quantize: done in" in first.stderr
    for word in ("fp32", "fp16", "ssdi8-w8a8", "KL", "piqa", "average"):
        assert word in first.stdout
    assert (scene / "result.md").read_text().count("\n| ") == 4
    assert (scene / "runs" / "tiny--ssdi8-w8a8--host-cpu" / QUANTIZED).is_dir()
    again = ssdi8(*by_methods(scene, "--json"))
    assert again.stderr.count("up to date") == 4 and "done in" not in again.stderr
    found = [(record["model"], record["kl"] is None) for record in json.loads(again.stdout)]
    assert found == [("fp32", True), ("fp16", False), ("ssdi8-w8a8", False)]


def test_methods_with_the_same_windows_share_their_statistics(scene: Path) -> None:
    """Calibrated once; the second run folder is what building it alone would give."""
    said: list[str] = []
    recipes = [METHODS[name] for name in ("had-w8a8", "quamba2-w8a8")]
    recipes.append(replace(METHODS["edge-w8a8"], calibration_tokens=100))
    for wanted, runs in ((recipes, "shared"), (recipes[1:2], "alone")):
        quantize_by(
            *(wanted, str(scene / "tiny"), scene / runs),
            calibration=scene / "text.txt",
            say=lambda method, line: said.append(f"{method}: {line}"),
        )
    shared_by = [line for line in said if "calibrate: up to date" in line]
    assert shared_by == ["quamba2-w8a8: calibrate: up to date"]
    shared, alone = (scene / runs / "tiny--quamba2-w8a8--host-cpu" for runs in ("shared", "alone"))
    for name in ("calibration.safetensors", f"{QUANTIZED}/model.safetensors"):
        assert (shared / name).read_bytes() == (alone / name).read_bytes()
    noted = json.loads((shared / "steps.json").read_text())
    assert list(noted) == ["calibrate", "quantize"]


CASES: dict[str, tuple[list[str], str]] = {
    "no measure": (["TINY"], "nothing to evaluate on"),
    "unknown task": (["TINY", "--tasks", "mmlu"], "unknown task 'mmlu'"),
    "unknown method": (["TINY", "--text", "TEXT", "--methods", "int2"], "unknown method 'int2'"),
    "two checkpoints": (
        ["TINY", "TINY", "--text", "TEXT", "--methods", "fp16"],
        "--methods takes one checkpoint, not 2; name one.",
    ),
    "no methods": (["TINY", "--text", "TEXT", "--methods", ","], "--methods names none"),
    "calibration of nothing": (
        ["TINY", "--text", "TEXT", "--calibration", "TEXT"],
        "--calibration goes with --methods",
    ),
    "kind of file": (["TINY", "--text", "TEXT", "--save", "a.csv"], "cannot save results as a.csv"),
    "device": (["TINY", "--text", "TEXT", "--device", "tpu"], "unknown device 'tpu'"),
    "tokenizer": (["TINY", "--text", "TEXT", "--tokenizer", "/no.json"], "/no.json does not exist"),
    "no text": (["TINY", "--text", "/absent.txt"], "text /absent.txt does not exist"),
    "no data": (["TINY", "--tasks", "wikitext2", "--data", "/absent"], "/absent is not a folder"),
}


@pytest.mark.parametrize("name", CASES)
def test_what_does_not_fit_is_refused(scene: Path, name: str) -> None:
    """Before anything is quantized or measured."""
    arguments, message = CASES[name]
    places = {"TINY": str(scene / "tiny"), "TEXT": str(scene / "text.txt")}
    command = ["evaluate", *(places.get(word, word) for word in arguments), "--limit", "1"]
    outcome: Any = CliRunner().invoke(app, command)
    assert isinstance(outcome.exception, UsageError)
    assert message in str(outcome.exception)


def test_quantized_model_is_not_quantized_again(scene: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / QUANTIZED).mkdir(parents=True)
    (tmp_path / "run" / QUANTIZED / "config.json").write_text('{"recipe": {}}')
    for folder in (tmp_path / "run", tmp_path / "run" / QUANTIZED):
        command = ["evaluate", str(folder), "--methods", "fp16", "--text", str(scene / "text.txt")]
        outcome = CliRunner().invoke(app, command)
        assert isinstance(outcome.exception, UsageError)
        assert "is quantized already; name the checkpoint" in str(outcome.exception)


def test_without_a_gpu(scene: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a method is quantized nor a model loaded."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    command = [str(word) for word in by_methods(scene, "--device", "cuda", "--runs", scene / "no")]
    outcome = CliRunner().invoke(app, command)
    assert isinstance(outcome.exception, UsageError)
    assert "finds no CUDA GPU here" in str(outcome.exception) and not (scene / "no").exists()
