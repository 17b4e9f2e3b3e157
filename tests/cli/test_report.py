"""report/: numbers from files to a page, CSV and Markdown; looked at with a real browser."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from browser import chromium, needs_chromium
from hypothesis import given
from hypothesis import strategies as st

from ssdi8_edge.boards.points.best import best_modes
from ssdi8_edge.boards.points.records import Point, Profile
from ssdi8_edge.ground.errors import UsageError
from ssdi8_edge.report import svg
from ssdi8_edge.report.charts import Bar, Series, Spot, bar_chart, line_chart, scatter
from ssdi8_edge.report.exports import to_csv, to_markdown
from ssdi8_edge.report.figures import between, figures, shown
from ssdi8_edge.report.page import render
from ssdi8_edge.report.reference import SSD_LATENCY_MS
from ssdi8_edge.report.sources import Measurements, load
from ssdi8_edge.report.tables import Table, Tables
from ssdi8_edge.report.values import ssd_seconds

HOSTILE = "\"><script>alert(1)</script><img src=x onerror=alert(2)>' $(reboot) `id` | *a* _b_ ‮=1+1"


# --------------------------------------------------------------------------------------------------
# measurements


def point(
    method: str = "edge-w8a8", length: int = 512, *, speed: float = 1.0, **changes: Any
) -> dict[str, Any]:
    """A point as a sweep writes it; `speed` divides its times."""
    ttft, tpot = length * 1e-4 / speed, 0.01 / speed
    repeats = [
        {"start_s": 1.0, "end_s": 2.0, "ttft_s": ttft * factor, "token_s": [tpot] * 3}
        for factor in (0.9, 1.0, 1.2)
    ]
    watts = 8.0
    return {
        "schema": 1,
        "kind": "point",
        "bundle": {
            "digest": f"{method}-digest",
            "name": f"toy--{method}--orin-nx",
            "model": "toy",
            "checkpoint": "c" * 64,
            "method": method,
            "target": "orin-nx",
            "bytes": 5_000_000,
        },
        "board": "desk",
        "mode": "25W",
        "length": length,
        "settings": {
            "new_tokens": 4,
            "repeat": 3,
            "warmup": 1,
            "pin_clocks": False,
            "power_seconds": 10.0,
        },
        "machine": {
            "kind": "jetson",
            "platform": "Linux",
            "cpu": "Orin",
            "cores": 8,
            "python": "3",
        },
        "backend": "TensorRT 10.3",
        "versions": {"tensorrt": "10.3"},
        "engine": {"key": "0123456789abcdef", "differs": ["built at other clocks"]},
        "conditions": {
            "mode_id": 3,
            "sms": 8,
            "clocks_pinned": True,
            "gpu_mhz": {"mean": 900.0, "low": 306.0, "high": 918.0},
            "temperature_start_c": {"tj": 45.0},
            "temperature_highest_c": {"tj": 61.5},
            "over_current_events": {"oc1": 0, "oc3": 2},
            "l4t": "36.4.3",
            "memory_mb": 16000.0,
        },
        "date": "2026-11-24T01:00:00Z",
        "ssdi8_edge": "0.1.0",
        "timing": {
            "batch": 1,
            "new_tokens": 4,
            "warmup": 1,
            "repeats": repeats,
            "ttft_s": ttft,
            "tpot_s": tpot,
            "token_p50_s": tpot,
            "token_p95_s": tpot * 1.5,
            "tokens_per_s": 1 / tpot,
            "load_s": 1.5,
            "memory": {"peak_rss_bytes": 300_000_000, "gpu_bytes": 200_000_000},
        },
        "power": {
            "source": "ina3221",
            "interval_s": 0.1,
            "window_s": 10.0,
            "tokens": 100,
            "rails": {"VDD_IN": {"mean_w": watts, "energy_j": watts * 10}},
            "total": ["VDD_IN"],
            "whole_module": True,
            "mean_w": watts,
            "idle_w": 4.0,
            "j_per_token": watts * 10 / 100,
            "above_idle_j_per_token": 0.4,
        },
        "power_missing": None,
        **changes,
    }


def simulated(method: str, length: int, **changes: Any) -> dict[str, Any]:
    found = point(method, length, board="toy", **changes)
    found["machine"]["kind"] = "simulated"
    return found


PARTS = {"ChunkScan": "SSD", "StatePassing": "SSD"}


def profile(method: str = "edge-w8a8", length: int = 512, speed: float = 1.0) -> dict[str, Any]:
    found = point(method, length)
    for key in ("timing", "settings", "power", "power_missing"):
        del found[key]
    times = {"ChunkScan": 0.004, "StatePassing": 0.002, "Linear": 0.01, "RmsNorm": 0.001}
    phases = [
        {
            "phase": phase,
            "tokens": tokens,
            "modules": [
                {
                    "module": name,
                    "part": PARTS.get(name, ""),
                    "layers": 2,
                    "seconds": time / fraction / speed,
                }
                for name, time in times.items()
            ],
            "kinds": [],
        }
        for phase, tokens, fraction in (("prefill", length, 1), ("decode", 1, 100))
    ]
    return {**found, "kind": "profile", "phases": phases}


EVALUATION = [
    {"model": "fp16", "text": "wikitext2", "perplexity": 20.0, "windows": 4, "window_tokens": 2048},
    {
        "model": "edge-w8a8",
        "text": "wikitext2",
        "perplexity": 20.5,
        "windows": 4,
        "window_tokens": 2048,
    },
    {"model": "edge-w8a8", "task": "piqa", "accuracy": 0.625, "stderr": 0.01},
]


def write_points(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two methods at three lengths, a simulated board, profiles and an evaluation."""
    speeds = {"fp16": 1.0, "edge-w8a8": 2.0}
    write_points(
        tmp_path / "sweep.jsonl",
        *(point(m, n, speed=s) for m, s in speeds.items() for n in (256, 512, 1024)),
        *(simulated(m, n, speed=s) for m, s in speeds.items() for n in (256, 512)),
    )
    for method, speed in speeds.items():
        (tmp_path / f"profile-{method}.json").write_text(json.dumps(profile(method, speed=speed)))
    (tmp_path / "evaluation.json").write_text(json.dumps(EVALUATION))
    (tmp_path / "unrelated.json").write_text("[1, 2]")
    (tmp_path / "notes.txt").write_text("nothing")
    (tmp_path / "log.jsonl").write_text('{"level": "info"}\n')
    return tmp_path


def column(table: Table, title: str, **where: str) -> list[str]:
    """The cells of a column in the rows whose other cells are as said."""
    wanted = [row for row in table.rows if set(where.values()) <= set(row)]
    return [row[list(table.columns).index(title)] for row in wanted]


# --------------------------------------------------------------------------------------------------
# reading


def test_a_folder_holds_whatever_was_written_there(folder: Path) -> None:
    data = load([folder])
    assert (len(data.points), len(data.profiles), len(data.evaluations)) == (10, 2, 2)
    assert data.methods == ["fp16", "edge-w8a8"]
    assert [setup.board for setup in data.setups] == ["desk", "toy"]
    assert [setup.simulated for setup in data.setups] == [False, True]


def test_a_run_folder_says_which_model_an_evaluation_is_of(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "bundle").mkdir(parents=True)
    manifest = {
        "name": "other--edge-w8a8--host-cpu",
        "recipe": {"name": "edge-w8a8"},
        "target": {"name": "host-cpu"},
    }
    (run / "bundle/manifest.json").write_text(json.dumps(manifest))
    (run / "evaluation.json").write_text(json.dumps(EVALUATION))
    points = write_points(tmp_path / "sweep.jsonl", point())
    data = load([points, run])
    assert data.evaluations[0].model == "other"
    assert data.evaluation("toy", "edge-w8a8") is None
    loose = tmp_path / "loose.json"
    loose.write_text(json.dumps(EVALUATION))
    found = load([points, loose]).evaluation("toy", "edge-w8a8")
    assert found is not None and found.perplexity == 20.5
    assert found.change == pytest.approx(0.025) and found.accuracies == {"piqa": 0.625}


def plan(**changes: Any) -> dict[str, Any]:
    """As `plan --json` writes it: a prompt of 512 tokens takes 25.6 ms at least, a token 5 ms."""
    return {
        "kind": "plan",
        "model": "toy",
        "method": "edge-w8a8",
        "target": "orin-nx",
        "prompt_tokens": 512,
        "memory": {"weights": 4_000_000, "total": 9_000_000},
        "room": {"free": 8_000_000_000, "source": "profile of orin-nx"},
        "fits": True,
        "prompt": {"seconds": 0.0256},
        "token": {"seconds": 0.005},
        "assumptions": ["the memory's whole bandwidth"],
        **changes,
    }


def test_plans_stand_beside_what_was_measured(tmp_path: Path) -> None:
    """Bounds as shares of the fastest point of the same model, method, target and length."""
    points = write_points(tmp_path / "sweep.jsonl", point(), point(length=256, speed=2.0))
    (tmp_path / "plan.json").write_text(json.dumps([plan(), plan(method="fp16", fits=None)]))
    data = load([points, tmp_path / "plan.json"])
    table = Tables(data).plan()
    assert table.rows[0][6:] == ["512", "25.6", "50%", "5.00", "50%"]
    assert table.rows[1][3] == "not stated" and table.rows[1][8] == "–"
    assert "Plan and bounds" in render(data) and "whole bandwidth" in to_markdown(data)
    (tmp_path / "plan.json").write_text(json.dumps(plan(token={"seconds": -1.0})))
    with pytest.raises(UsageError, match="is not a plan"):
        load([points, tmp_path / "plan.json"])


def test_energy_and_the_best_modes(tmp_path: Path) -> None:
    """Of a prompt with its answer and for a joule; a slower mode may be the thriftier one."""
    slow = point(speed=0.5, mode="15W")
    slow["power"] |= {"j_per_token": 0.25, "above_idle_j_per_token": -0.1}
    data = load([write_points(tmp_path / "sweep.jsonl", point(), slow)])
    first, second = sorted(data.points, key=lambda p: p.mode or "", reverse=True)
    assert first.power is not None and second.power is not None
    assert first.j_per_prompt == pytest.approx(4 * (first.power.j_per_token or 0))
    assert second.power.tokens_per_j == 4.0
    assert second.power.above_idle_tokens_per_j is None
    (best,) = best_modes(data.points)
    assert (best.fastest.mode, best.thriftiest and best.thriftiest.mode) == ("25W", "15W")
    assert "15W by energy (4.00 tokens/J)" in to_markdown(data).replace("\\", "")
    slow["power"] = None
    slow["power_missing"] = "no sensor"
    fast = point(power=None, power_missing="no sensor")
    (blind,) = best_modes(load([write_points(tmp_path / "two.jsonl", fast, slow)]).points)
    assert blind.thriftiest is None and "no mode has its energy measured" in str(blind)


def test_decoding_is_a_text_of_its_own(tmp_path: Path) -> None:
    """Beside the perplexity of the same text, not in its place."""
    decoded = {"measure": "decode", "model": "fp16", "text": "held-out.txt", "tokens": 64}
    rows = [*EVALUATION, {**decoded, "perplexity": 7.0, "prefill_perplexity": 6.5}]
    (tmp_path / "evaluation.json").write_text(json.dumps(rows))
    data = load([write_points(tmp_path / "sweep.jsonl", point()), tmp_path / "evaluation.json"])
    found = next(each for each in data.evaluations if each.method == "fp16")
    assert found.perplexities.pop("held-out.txt, 64 tokens one by one") == 7.0
    assert 7.0 not in found.perplexities.values() and found.perplexities


def test_what_cannot_be_read_is_named(tmp_path: Path, folder: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text('{"a": 1}')
    broken = tmp_path / "broken.json"
    broken.write_text('{"kind": "profile"}')
    for paths, words in (
        ([tmp_path / "absent"], "does not exist"),
        ([other], "neither points, a profile, a plan nor an evaluation"),
        ([broken], "is not a profile"),
        ([write_points(tmp_path / "bad.jsonl", {"kind": "point"}, point())], "line 1"),
        ([folder / "evaluation.json"], "no measured point"),
    ):
        with pytest.raises(UsageError, match=words):
            load(paths)


def test_a_point_measured_again_counts_once(tmp_path: Path) -> None:
    old = write_points(tmp_path / "old.jsonl", point(speed=1.0, date="2026-11-23T00:00:00Z"))
    new = write_points(tmp_path / "new.jsonl", point(speed=4.0))
    for order in ([old, new], [new, old]):
        data = load(order)
        assert [p.timing.tokens_per_s for p in data.points] == [400.0] and data.superseded == 1
    assert "1 points that were measured again" in render(data)


def test_two_builds_of_one_name_do_not_become_one_line(tmp_path: Path) -> None:
    """The later keeps the name, the other shows its digest; models likewise by their checkpoint."""
    first, second, third = point(date="2026-11-20T00:00:00Z"), point(), point()
    first["bundle"]["digest"] = "aaaabbbbcccc"
    third["bundle"] |= {"digest": "ddddeeeeffff", "checkpoint": "12345678" * 8}
    third["date"] = "2026-11-25T00:00:00Z"
    data = load([write_points(tmp_path / "a.jsonl", first, second, third)])
    names = {(p.bundle.model, p.bundle.method) for p in data.points}
    assert names == {
        ("toy (cccccccc)", "edge-w8a8 (aaaabbbb)"),
        ("toy (cccccccc)", "edge-w8a8"),
        ("toy", "edge-w8a8"),
    }


# --------------------------------------------------------------------------------------------------
# numbers


def test_numbers_of_the_tables(folder: Path) -> None:
    tables = Tables(load([folder]))
    summary = tables.summary()
    edge = next(row for row in summary.rows if row[:2] == ["desk, 25W", "edge-w8a8"])
    cells = dict(zip(summary.columns[3:], edge[3:], strict=True))
    assert cells["TTFT, ms"] == "51.2" and cells["tokens/s"] == "200"
    assert edge[5] == "2.00" and edge[7] == "2.00"
    assert cells["J/token"] == "0.800" and cells["memory, MB"] == "500"
    assert cells["perplexity"] == "20.500" and cells["change"] == "+2.50 %"
    accuracy = tables.accuracy()
    assert accuracy.columns[1] == "wikitext2, 4 × 2048 tokens, perplexity"
    gains = tables.speedups()
    assert {cell for row in gains.rows for cell in row[4:]} == {"2.00", "–"}
    ssd = column(tables.latency(), "512 tokens", board="desk, 25W", method="edge-w8a8", kind="SSD")
    assert ssd == ["3.00"]
    modules = tables.modules()
    assert column(modules, "all, ms", method="edge-w8a8", phase="prefill") == ["8.50"]
    assert column(modules, "Linear", method="fp16", phase="prefill") == ["10.0"]
    runs = tables.runs()
    row = dict(zip(runs.columns, runs.rows[0], strict=True))
    assert row["engine"] == "0123456789ab; built at other clocks"
    conditions = tables.conditions()
    row = dict(zip(conditions.columns, conditions.rows[0], strict=True))
    assert (row["heat, °C"], row["over-current"], row["pinned"]) == ("45.0 → 61.5", "6", "yes")
    assert row["GPU, MHz"] == "900 (306 – 918)"


def test_rows_of_the_paper_are_there_as_published_and_marked(folder: Path) -> None:
    table = Tables(load([folder])).latency()
    paper = [row for row in table.rows if "paper" in row]
    assert [row[1] for row in paper] == list(SSD_LATENCY_MS)
    shown_there = [cell for cell in paper[0] if re.fullmatch(r"[0-9.]+", cell)]
    assert shown_there == ["55.30", "76.10", "134.40", "262.90"]
    assert any("does not state their unit" in note for note in table.notes)


def test_everything_simulated_is_marked(folder: Path) -> None:
    """In every table row, every chart and every line of CSV of that board, and at the top."""
    data = load([folder])
    tables = Tables(data)
    for table in (
        *(tables.summary(), tables.latency(), tables.speedups(), tables.power(), tables.memory()),
        *(tables.points(), tables.machines(), tables.runs(), tables.conditions()),
    ):
        rows = [row for row in table.rows if any(cell.startswith("toy, 25W") for cell in row)]
        assert rows and all("simulated" in row for row in rows)
        others = [row for row in table.rows if row not in rows]
        assert not any("simulated" in row for row in others)
    page = render(data)
    charts = re.findall(r"<figure>.*?</figure>", page, re.DOTALL)
    toy = [chart for chart in charts if "on toy, 25W" in chart]
    assert len(toy) == 8 and all("simulated board" in chart for chart in toy)
    assert not any("simulated" in chart for chart in charts if chart not in toy)
    assert 'id="simulated"' in page
    rows = list(csv.DictReader(io.StringIO(to_csv(data))))
    assert {row["board"] for row in rows if row["source"] == "simulated"} == {"toy"}


def test_csv_has_every_point_in_si_units(folder: Path) -> None:
    rows = list(csv.DictReader(io.StringIO(to_csv(load([folder])))))
    assert len(rows) == 10
    row = next(r for r in rows if (r["method"], r["prompt_tokens"]) == ("edge-w8a8", "1024"))
    assert float(row["ttft_s"]) == 0.0512 and float(row["ttft_low_s"]) == pytest.approx(0.04608)
    assert (
        row["gpu_bytes"] == "200000000" and row["emc_mhz"] == "" and row["clocks_pinned"] == "True"
    )


def test_markdown_has_the_tables(folder: Path) -> None:
    text = to_markdown(load([folder]))
    assert text.count("\n## ") == 11
    tables = re.findall(r"(?m)(?:^\|.*\n)+", text)
    assert len(tables) == 11
    for table in tables:
        assert len({row.count("|") for row in table.splitlines()}) == 1


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.001234, "0.00123"), (1234.5, "1\u2009234"), (99.96, "100.0"), (-2.5, "-2.50")],
)
def test_figures(value: float, text: str) -> None:
    assert figures(value) == text
    assert shown(None) == "–" and between(1.0, 1.0001) == "1.00"


# --------------------------------------------------------------------------------------------------
# hostile and thin input


class Elements(HTMLParser):
    """What a page consists of."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: dict[str, int] = {}
        self.attributes: set[str] = set()
        self.references: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] = self.tags.get(tag, 0) + 1
        self.attributes |= {name for name, _ in attrs}
        self.references += [v or "" for name, v in attrs if name in ("href", "src", "srcset")]


def hostile_data(tmp_path: Path) -> Measurements:
    one = point(HOSTILE, 512, board=HOSTILE, mode=HOSTILE)
    one["bundle"] |= {"model": HOSTILE, "name": HOSTILE, "target": HOSTILE}
    one["backend"] = one["machine"]["cpu"] = one["machine"]["platform"] = (
        "=cmd|' /C calc'!A0\n\x1b[2J"
    )
    one["engine"]["differs"] = [HOSTILE]
    one["conditions"]["throttle_alerts"] = [HOSTILE]
    one["power"] |= {"rails": {HOSTILE: {"mean_w": 1.0, "energy_j": 1.0}}, "total": [HOSTILE]}
    fp16 = point("fp16", 512, board=HOSTILE, mode=HOSTILE)
    fp16["bundle"] |= {"model": HOSTILE, "target": HOSTILE}
    found = profile()
    found["phases"][0]["modules"][0]["module"] = HOSTILE
    (tmp_path / "profile.json").write_text(json.dumps(found))
    rows = [{"model": HOSTILE, "text": HOSTILE, "perplexity": 2.0}]
    rows.append({"model": "fp16", "task": HOSTILE, "accuracy": 1.0})
    (tmp_path / "evaluation.json").write_text(json.dumps(rows))
    write_points(tmp_path / "sweep.jsonl", one, fp16)
    return load([tmp_path])


def test_hostile_names_are_text_everywhere(tmp_path: Path) -> None:
    data = hostile_data(tmp_path)
    page = render(data)
    elements = Elements(page)
    assert not {"script", "img", "iframe", "object", "link"} & set(elements.tags)
    assert not any(name.startswith("on") for name in elements.attributes)
    assert "\x1b" not in page
    for row in csv.reader(io.StringIO(to_csv(data))):
        assert not any(cell.startswith(("=", "+", "-", "@")) for cell in row)
    text = to_markdown(data)
    assert "<script" not in text and "<img" not in text
    for table in re.findall(r"(?m)(?:^\|.*\n)+", text):
        counts = {len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}
        assert len(counts) == 1


def test_the_page_asks_nothing_of_a_network(folder: Path) -> None:
    page = render(load([folder]))
    elements = Elements(page)
    assert "script" not in elements.tags
    assert all(reference.startswith("#") for reference in elements.references)
    assert "default-src 'none'" in page
    assert not re.search(r"url\(|@import|https?://", page)


@pytest.mark.parametrize(
    "thin",
    [
        lambda p: p["timing"].update(tpot_s=None, tokens_per_s=None, token_p50_s=None),
        lambda p: p["timing"].update(memory=None),
        lambda p: p.update(power=None, power_missing="no sensor"),
        lambda p: p.update(mode=None),
        lambda p: p.update(engine=None, conditions={}),
        lambda p: p["power"].update(mean_w=None, idle_w=None, j_per_token=None, total=[]),
        lambda p: p.update(length=1),
    ],
)
def test_what_is_absent_is_a_dash(tmp_path: Path, thin: Callable[[dict[str, Any]], None]) -> None:
    """One point that lacks something: every form is made, and nothing absent becomes 0 or None."""
    one = point()
    thin(one)
    data = load([write_points(tmp_path / "a.jsonl", one)])
    page = render(data)
    assert ">None<" not in page and "nan" not in page.lower()
    assert "None" not in to_markdown(data) and "None" not in to_csv(data)


def test_a_profile_alone_makes_a_report(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(json.dumps(profile()))
    page = render(load([tmp_path / "p.json"]))
    assert "Prefill, ms per module" in page and "Speed-up" not in page


# --------------------------------------------------------------------------------------------------
# charts


@given(
    st.lists(st.floats(0, 1000), min_size=1, max_size=40),
    st.floats(5, 30),
    st.floats(0, 100),
    st.floats(101, 1000),
)
def test_labels_keep_apart_and_stay_inside(
    wanted: list[float], gap: float, low: float, high: float
) -> None:
    places = svg.spread(wanted, gap, low, high)
    assert all(low - 1e-6 <= place <= high + 1e-6 for place in places)
    ordered = sorted(places)
    least = min(gap, (high - low) / max(1, len(wanted) - 1))
    assert all(b - a >= least - 1e-6 for a, b in pairwise(ordered))
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    assert [places[i] for i in order] == ordered


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=20), st.sampled_from([0.0, 1.0, None]))
def test_scales_hold_their_values_and_have_readable_ticks(
    values: list[float], include: float | None
) -> None:
    scale = svg.scale_for(values, 100.0, 0.0, include)
    assert all(-1e-6 <= scale(value) <= 100 + 1e-6 for value in values)
    ticks = scale.ticks()
    assert 1 <= len(ticks) <= 9
    assert all(-1e-6 <= scale(tick) <= 100 + 1e-6 for tick in ticks)
    words = [scale.words(tick) for tick in ticks]
    assert len(set(words)) == len(words)
    assert all(
        math.isclose(float(w.replace("\u2009", "")), t, rel_tol=1e-3, abs_tol=1e-12)
        for w, t in zip(words, ticks, strict=True)
    )


def test_names_of_lines_are_in_the_order_of_their_ends() -> None:
    series = [
        Series(name, i, [Spot(256, end / 2), Spot(512, end)])
        for i, (name, end) in enumerate({"low": 1.0, "high": 3.0, "middle": 2.0}.items())
    ]
    picture = str(line_chart("title", "ms", series))
    labels = re.findall(r'y="([0-9.]+)"[^>]* class="name[^>]*>(\w+)<', picture)
    assert [name for _, name in sorted(labels, key=lambda each: float(each[0]))] == [
        "high",
        "middle",
        "low",
    ]


# --------------------------------------------------------------------------------------------------
# in a browser


# Every text against its picture's frame, and labels against each other, in pixels of the screen.
MEASURE = """
const whole = document.documentElement;
const out = {charts: 0, clipped: [], overlapping: [], wide: whole.scrollWidth - whole.clientWidth,
             dark: matchMedia('(prefers-color-scheme: dark)').matches,
             paper: getComputedStyle(document.body).backgroundColor};
for (const chart of document.querySelectorAll('figure svg.chart')) {
  const frame = chart.getBoundingClientRect();
  if (frame.width > 100 && frame.height > 30) out.charts++;
  const seen = [];
  for (const text of chart.querySelectorAll('text')) {
    const box = text.getBoundingClientRect();
    if (box.left < frame.left - 1 || box.right > frame.right + 1 || box.top < frame.top - 2 ||
        box.bottom > frame.bottom + 2) out.clipped.push(text.textContent);
    for (const [other, name] of seen)
      if (box.left < other.right - 1 && other.left < box.right - 1 &&
          box.top < other.bottom - 4 && other.top < box.bottom - 4)
        out.overlapping.push([name, text.textContent]);
    seen.push([box, text.textContent]);
  }
}
document.body.setAttribute('data-found', JSON.stringify(out));
"""


def looked_at(page: str, tmp_path: Path, width: int, *options: str) -> dict[str, Any]:
    """Geometry of the page as the browser lays it out."""
    policy = re.search(r"<meta http-equiv[^>]*>", page)
    assert policy is not None
    probed = page.replace(policy[0], "").replace("</body>", f"<script>{MEASURE}</script></body>")
    path = tmp_path / "probed.html"
    path.write_text(probed)
    dom = chromium(path.as_uri(), tmp_path / f"browser-{width}-{len(options)}", width, *options)
    found = re.search(r'data-found="([^"]*)"', dom)
    assert found is not None
    return dict(json.loads(found[1].replace("&quot;", '"').replace("&amp;", "&")))


@needs_chromium
def test_a_browser_finds_the_charts(folder: Path, tmp_path: Path) -> None:
    """As it is, with its policy against anything from elsewhere."""
    data = load([folder])
    path = tmp_path / "report.html"
    path.write_text(render(data))
    elements = Elements(chromium(path.as_uri(), tmp_path / "browser", 1200))
    # Per board: accuracy, two of latency, two of speed-up, two of power, memory; the profiles of
    # one board; and the paper's.
    assert elements.tags["figure"] == elements.tags["svg"] == 2 * 8 + 2 + 1
    assert elements.tags["table"] == 11
    assert elements.tags["path"] > 50 and elements.tags["rect"] > 8


@needs_chromium
@pytest.mark.parametrize(
    ("width", "options"),
    [(1200, []), (500, ["--blink-settings=preferredColorScheme=0"])],
    ids=["wide and light", "narrow and dark"],
)
def test_no_label_is_cut_off_or_covers_another(
    folder: Path, tmp_path: Path, width: int, options: list[str]
) -> None:
    for length in (256, 2048):
        with (folder / "sweep.jsonl").open("a") as file:
            for i, method in enumerate(("ssdi8-w4a8", "quamba2-w8a8", "had-with-a-very-long-name")):
                record = point(method, length, speed=1.9 + i / 50)
                file.write(json.dumps(record) + "\n")
    found = looked_at(render(load([folder])), tmp_path, width, *options)
    assert found["charts"] == 2 * 8 + 2 + 1
    assert found["clipped"] == [] and found["overlapping"] == []
    assert found["wide"] == 0, "the page scrolls sideways"
    assert found["dark"] is bool(options)
    assert found["paper"] == ("rgb(20, 23, 27)" if options else "rgb(255, 255, 255)")


@needs_chromium
def test_hostile_names_do_nothing_in_a_browser(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(render(hostile_data(tmp_path)))
    elements = Elements(chromium(path.as_uri(), tmp_path / "browser", 1200))
    assert not {"script", "img", "iframe", "object"} & set(elements.tags)


def test_charts_of_one_value_or_many() -> None:
    one = [Series("a", 0, [Spot(1, 5.0)])]
    assert "a" in line_chart("t", "ms", one, baseline=(1.0, "FP16"))
    many = [
        Series(f"method {i}", i % 9, [Spot(2**k, i + k + 1) for k in range(15)]) for i in range(30)
    ]
    assert line_chart("t", "ms", many).count('class="name') == 30
    assert "rect" in bar_chart("t", "MB", [Bar("x", [("a", 1, 0.0)])])
    assert (
        scatter("t", "x", "y", [("a", 1, 2.0, 2.0), ("b", 2, 2.0, 2.0)]).count('class="name') == 2
    )


def test_records_survive_their_own_file(tmp_path: Path) -> None:
    """What is read is what was written."""
    record = Point.model_validate_json(json.dumps(point()))
    assert Point.model_validate_json(json.dumps(record.to_json())) == record
    found = Profile.model_validate_json(json.dumps(profile()))
    assert Profile.model_validate_json(json.dumps(found.to_json())) == found


def test_a_profile_that_cannot_name_its_layers_gives_no_ssd_time() -> None:
    """Time that belongs to no module may be the SSD's: a part of it would look like speed."""
    record = profile()
    assert ssd_seconds(Profile.model_validate(record)) == pytest.approx(0.006)
    other = {"module": "other", "part": "", "layers": 5, "seconds": 0.001}
    record["phases"][0]["modules"].append(other)
    assert ssd_seconds(Profile.model_validate(record)) == pytest.approx(0.006)
    other["seconds"] = 0.1
    assert ssd_seconds(Profile.model_validate(record)) is None


def test_parts_and_kinds_of_blocks_come_from_the_profile(tmp_path: Path) -> None:
    """The SSD's time is that of its part, whatever its ops are called; blocks have columns."""
    record = profile()
    for module in record["phases"][0]["modules"]:
        module["part"] = "SSD" if module["module"] == "Linear" else ""
    assert ssd_seconds(Profile.model_validate(record)) == pytest.approx(0.01)
    assert "blocks" not in tables_of(tmp_path, record)
    times = {"mamba2": 0.01, "attention": 0.004, "mlp": 0.002, "other": 0.001}
    record["phases"][0]["kinds"] = [
        {"kind": kind, "layers": 1, "seconds": seconds} for kind, seconds in times.items()
    ]
    shown = tables_of(tmp_path, record)
    assert re.search("mamba2 blocks.*attention blocks.*mlp blocks", shown)


def tables_of(folder: Path, record: dict[str, Any]) -> str:
    """The columns of the table of modules, in a row."""
    (folder / "profile.json").write_text(json.dumps(record))
    return ", ".join(Tables(load([folder / "profile.json"])).modules().columns)
