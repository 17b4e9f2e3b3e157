"""What reaches a terminal or a file: texts as they are, numbers of a few digits, valid JSON."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import environment, ssdi8
from evaluation_rows import FIRST, OTHER, row
from rich.progress import Progress
from rich.table import Table
from tiny_model import write_model, write_text
from torch import Tensor

from runtime.commands import info
from runtime.console import print_json, visible
from ssdi8_edge.cli import output
from ssdi8_edge.evaluate import Subject, evaluate, plan
from ssdi8_edge.evaluate.subject import Running
from ssdi8_edge.evaluate.table import markdown, records, require_writable
from ssdi8_edge.evaluate.windows import _Tally
from ssdi8_edge.ground.artifacts import read_json, write_json
from ssdi8_edge.ground.console import Console, table
from ssdi8_edge.ground.decimals import change, fixed, percent
from ssdi8_edge.ground.errors import UsageError
from ssdi8_edge.ground.inputs import expanded, text_input
from ssdi8_edge.ground.json_text import json_safe, number_of, to_json
from ssdi8_edge.ground.windows import read_tokens
from ssdi8_edge.report.figures import figures
from ssdi8_edge.report.figures import percent as signed
from ssdi8_edge.report.sources import _evaluations

INF, NAN = math.inf, math.nan
ODD = "a [v1] [/red] [bold]b :smile: \\[x] 1.5 'c' 既"


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


def strict(text: str) -> Any:
    """As a reader that keeps to the standard."""
    return json.loads(text, parse_constant=refuse)


# --------------------------------------------------------------------------------------------------
# JSON


def test_json_says_beside_null_what_it_was() -> None:
    value = {"a": INF, "b": [1.0, NAN, [-INF]], "c": {"d": NAN}, "e": (0.5, None), "f": -0.0}
    found = strict(to_json(value))
    assert found["a"] is None and found["b"] == [1.0, None, [None]] and found["e"] == [0.5, None]
    assert found["not_finite"] == {"a": "inf", "b[1]": "nan", "b[2][0]": "-inf"}
    assert found["c"] == {"d": None, "not_finite": {"d": "nan"}}
    assert number_of(found, "a") == INF and number_of(found, "f") == 0
    assert number_of(found, "absent") is None
    assert "\n" not in to_json(value, indent=None)


def test_json_of_numbers_that_it_knows_is_unchanged(tmp_path: Path) -> None:
    value = {"a": 1.5, "b": [1, "x"], "c": None}
    assert json_safe(value) == value
    write_json(tmp_path / "a.json", {"a": NAN, **value, "n": NAN})
    assert strict((tmp_path / "a.json").read_text())["not_finite"] == {"n": "nan"}
    assert read_json(tmp_path / "a.json")["b"] == [1, "x"]


def test_json_of_a_name_that_is_no_utf8() -> None:
    """A lone half of a character is refused by many readers."""
    text = to_json({"path": os.fsdecode(b"caf\xe9")})
    assert strict(text)["path"] == r"caf\udce9"


# --------------------------------------------------------------------------------------------------
# numbers


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (32.84009, "32.8401"),
        (999999.5, "999999.5000"),
        (1e300, "1.0000e+300"),
        (-1e9, "-1.0000e+09"),
        (INF, "inf"),
        (NAN, "nan"),
        (-0.0, "0.0000"),
        (-1e-9, "0.0000"),
    ],
)
def test_decimals(value: float, text: str) -> None:
    assert fixed(value, 4) == text


def test_percents_and_changes() -> None:
    assert percent(0.0123, 2, sign=True) == "+1.23%" and percent(-1e-9, 2, sign=True) == "+0.00%"
    assert percent(1e300, 2, sign=True) == "+1.00e+302%" and percent(NAN, 1) == "nan%"
    assert change(11.0, 10.0) == pytest.approx(0.1)
    assert change(INF, 1.0) is change(1.0, INF) is change(1.0, 0.0) is change(NAN, 1.0) is None
    assert figures(1e300) == "1.00e+300" and figures(INF) == "inf" and figures(-0.0) == "0"
    assert len(signed(1e300)) < 15 and signed(-1e-9) == "+0.00 %"


@pytest.mark.parametrize("value", [1e300, INF, NAN, 1e-300, 0.0])
def test_table_and_json_of_any_perplexity(value: float) -> None:
    """No number of hundreds of digits, and no other row suffers."""
    odd = replace(OTHER, perplexity=value, kl=value, change_stderr=value, top1_agreement=NAN)
    for rows in ([row(FIRST, 0.6), row(odd, NAN)], [row(odd, NAN), row(FIRST, 0.6)]):
        text = markdown(rows)
        assert "10.0000" in text
        assert max(len(word) for word in text.split()) < 20
        found = strict(records(rows))
        assert 10.0 in [record.get("perplexity") for record in found]


def never_fed() -> Running:
    """Of a subject whose test starts no sequence."""
    raise AssertionError("a sequence was started")


def tally(*losses: Tensor) -> _Tally:
    found, targets = _Tally(), torch.zeros(1, 4, dtype=torch.int64)
    for logits in losses:
        found.add(logits.expand(1, 4, 3), targets, torch.zeros(1, 4, 3))
    return found


@pytest.mark.parametrize(
    ("logits", "perplexity"),
    [
        ([0.0, 1e4, 0.0], INF),
        ([0.0, 3e38, 0.0], INF),
        ([-INF, 0.0, 0.0], INF),
        ([NAN, 0.0, 0.0], NAN),
        ([INF, 0.0, 0.0], NAN),
        ([-INF, -INF, -INF], NAN),
    ],
)
def test_any_logits_are_evaluated(logits: list[float], perplexity: float) -> None:
    """Infinite, NaN and huge ones; a model that says nothing agrees with nobody."""
    subject = Subject("s", "s", "e", lambda *_: torch.zeros(0), never_fed, Path("t"), 3)
    text = type("T", (), {"name": "t"})()
    good = tally(torch.zeros(3), torch.zeros(3))
    bad = tally(torch.tensor(logits), torch.zeros(3))
    found = bad.result(subject, text, 5, 4, good)
    assert found.perplexity == pytest.approx(perplexity, nan_ok=True)
    assert found.reason is None or len(found.reason) < 60, "digits without end"
    assert found.top1_agreement is not None and found.top1_agreement <= 1
    if math.isnan(perplexity):
        assert found.top1_agreement == 0.5  # the good window alone
    assert good.result(subject, text, 5, 4, good).perplexity == pytest.approx(3.0)


def test_report_reads_what_evaluate_could_not_say() -> None:
    rows = [row(replace(OTHER, perplexity=INF), 0.5), row(FIRST, 0.6)]
    infinite, first = _evaluations(strict(records(rows)), "m")
    assert infinite.perplexity == INF and first.perplexity == 10.0 and first.change is None


def test_a_diverged_model_beside_a_good_one(tmp_path: Path) -> None:
    """Its loss is beyond 709 nats, whose exponential no float holds."""
    from safetensors.torch import load_file, save_file

    good = write_model(tmp_path / "good")
    bad = Path(shutil.copytree(good, tmp_path / "bad"))
    tensors = load_file(bad / "model.safetensors")
    tensors["backbone.norm_f.weight"] *= 1e5
    save_file(tensors, bad / "model.safetensors")
    text = write_text(tmp_path / "text.txt", size=100)
    saved = tmp_path / "saved.json"
    result = ssdi8("evaluate", bad, good, "--text", text, "--json", "--save", saved)
    assert result.returncode == 0, result.stderr
    for found in (strict(result.stdout), strict(saved.read_text())):
        assert found[0]["perplexity"] is None and found[0]["loss"] > 709
        assert found[0]["not_finite"] == {"perplexity": "inf"}
        assert 1 < found[1]["perplexity"] < 1e6
    shown = ssdi8("evaluate", bad, good, "--text", text)
    assert " inf " in shown.stdout and f"{found[1]['perplexity']:.4f}" in shown.stdout


# --------------------------------------------------------------------------------------------------
# texts


def printed(*objects: Any, width: int = 30) -> str:
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=True, color_system="truecolor")
    console.print(*objects)
    return file.getvalue()


def test_texts_are_neither_markup_nor_code_nor_wrapped() -> None:
    long = f"{ODD}/{'x' * 100} and {'y' * 100}"
    assert printed(long) == f"{long}\n"


def test_cells_and_titles_are_printed_as_they_are() -> None:
    for made in (table(ODD, title=ODD), Table(ODD, title=ODD)):
        made.add_row(ODD)
        assert printed(made, width=200).count(ODD) == 3
    folded = table("a")
    folded.add_row("x" * 100)
    assert printed(folded).count("x") == 100


def test_nothing_steers_the_terminal() -> None:
    """Escapes, carriage returns, a bell, the other direction of writing, bytes of no UTF-8."""
    odd = "a\x1b[31mb\rc\x07d\u202ee\x9bf\u2028g" + os.fsdecode(b"\xe9")
    assert visible(odd) == r"a\x1b[31mb\rc\x07d\u202ee\x9bf\u2028g\xe9"
    assert visible("é 既 👩‍🚀\u00a0x") == "é 既 👩‍🚀\u00a0x"
    made = table("a")
    made.add_row("one\ntwo\x1b[31m")
    assert "\x1b[31m" not in printed(made) + printed("x\x1b[31m\ny")
    assert printed("x\ny") == "x\\ny\n"


def test_labels_of_progress_are_no_markup() -> None:
    taken: list[Any] = []

    class Watched(Progress):
        def __init__(self, *columns: Any, **options: Any) -> None:
            taken.append(columns[0])
            super().__init__(*columns, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rich.progress.Progress", Watched)
        patch.setattr(output, "human", Console(file=io.StringIO(), force_terminal=True))
        assert list(output.progress([1, 2], ODD)) == [1, 2]
    task = type("Task", (), {"description": ODD})()
    assert taken[0].render(task).plain == ODD


def test_paths_in_every_command(tmp_path: Path) -> None:
    """Named, missing: as they are, on one line, also where the console knows ASCII alone."""
    odd = tmp_path / "run[v1] [/red] :smile: \x1b[31m" / ("long" * 30)
    shown = visible(str(odd))
    for command in (
        ["inspect", odd],
        ["verify", odd],
        ["deploy", odd, "--host", "this-machine"],
        ["report", odd],
        ["build", "--target", f"{odd}.toml"],
        ["sweep", odd],
    ):
        result = ssdi8(*command)
        assert result.returncode == 2, (command, result.stderr)
        assert shown in result.stderr and "\x1b" not in result.stderr, result.stderr
    plain = ssdi8("inspect", "/既", env=environment(PYTHONIOENCODING="ascii", LC_ALL="C"))
    assert plain.returncode == 2 and "/\\u65e2 is not a bundle" in plain.stderr


def test_help_shows_brackets() -> None:
    assert "user@board[:port]" in " ".join(ssdi8("deploy", "--help").stdout.split())


def test_board_shows_a_manifest_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    info._print("name \x1b[31m")
    assert capsys.readouterr().out == "name \\x1b[31m\n"


def test_board_json_of_any_number(capsys: pytest.CaptureFixture[str]) -> None:
    report = {"error": math.nan, "rows": [{"worst": math.inf, "n": 1, "s": "nan"}]}
    print_json(report)
    expected = {"error": None, "rows": [{"worst": None, "n": 1, "s": "nan"}]}
    assert strict(capsys.readouterr().out) == expected


# --------------------------------------------------------------------------------------------------
# what was asked


def test_short_text_speaks_of_evaluating(tmp_path: Path) -> None:
    model = write_model(tmp_path / "tiny")
    short = tmp_path / "five.txt"
    short.write_text("five")
    subject = Subject(
        "s", "s", "e", lambda *_: torch.zeros(0), never_fed, model / "tokenizer.json", 256
    )
    with pytest.raises(UsageError, match=r"five\.txt holds 4 tokens; evaluating needs at least 16"):
        evaluate([subject], plan([], [short]))
    with pytest.raises(UsageError, match="calibration needs at least 16"):
        read_tokens(short, model / "tokenizer.json", 16, 1)
    (tmp_path / "wiki.test.raw").write_text("four")
    with pytest.raises(UsageError, match="wikitext2 holds 4 tokens; evaluating needs"):
        evaluate([subject], plan(["wikitext2"], data=tmp_path))


def test_too_short_for_long_context_is_said_first(tmp_path: Path) -> None:
    """Before hours of perplexity."""
    model, text = write_model(tmp_path / "tiny"), write_text(tmp_path / "t.txt", size=100)

    def never(*_: Any) -> Tensor:
        raise AssertionError("the model ran")

    subject = Subject("s", "s", "e", never, never_fed, model / "tokenizer.json", 256)
    with pytest.raises(UsageError, match="the long-context table needs"):
        evaluate([subject], plan([], [text], long_context=True))


def test_paths_that_are_no_text(tmp_path: Path) -> None:
    """Each says what it is; a pipe is not waited for."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for path, words in (
        (tmp_path, "is a folder"),
        (tmp_path / "absent", "does not exist"),
        (tmp_path / "pipe", "is a pipe or a device"),
        (Path("/dev/null"), "is a pipe or a device"),
        (tmp_path / "link", "is a link to nothing"),
        (Path("/proc/1/mem/x"), "cannot read calibration text"),
        (tmp_path / ("x" * 300), "File name too long"),
        (Path("~nobody-here/x"), "there is no home folder"),
    ):
        with pytest.raises(UsageError) as caught:
            text_input(path, "calibration text")
        assert words in str(caught.value), caught.value


def test_home_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "t.txt").write_text("x")
    assert text_input(Path("~/t.txt"), "text") == tmp_path / "t.txt" == expanded("~/t.txt")


def test_home_is_found_by_commands_of_a_bundle(tmp_path: Path) -> None:
    for command in (["verify"], ["run", "--prompt", "x"]):
        found = ssdi8(*command, "~/nothing", env=environment(HOME=str(tmp_path)))
        assert f": {tmp_path}/nothing is not a bundle" in found.stderr, found.stderr


def test_results_that_cannot_be_saved_are_refused_first() -> None:
    with pytest.raises(UsageError, match=r"cannot write /proc/r\.json: .*by --save"):
        require_writable([Path("/proc/r.json")])
