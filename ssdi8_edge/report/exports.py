"""The same numbers for other programs: CSV in SI units, one row a point, and tables in Markdown."""

from __future__ import annotations

import csv
import html
import io
import re
from collections.abc import Sequence

from ssdi8_edge.boards.points.records import Point
from ssdi8_edge.report.page import sections
from ssdi8_edge.report.sources import Measurements, Setup
from ssdi8_edge.report.tables import Table, source_of
from ssdi8_edge.report.values import gpu_bytes, process_bytes, ttft_range

# A spreadsheet takes a text that begins so for a formula.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")

COLUMNS = (
    *("source", "model", "method", "target", "board", "mode", "prompt_tokens", "new_tokens"),
    *("repeats", "ttft_s", "ttft_low_s", "ttft_high_s", "tpot_s", "token_p50_s", "token_p95_s"),
    *("tokens_per_s", "load_s", "peak_rss_bytes", "gpu_bytes", "power_source", "mean_w", "idle_w"),
    *("j_per_token", "above_idle_j_per_token", "whole_module", "gpu_mhz", "emc_mhz", "sms"),
    *("clocks_pinned", "over_current_events", "hottest_c", "machine", "l4t", "backend"),
    *("engine_key", "bundle", "date", "ssdi8_edge"),
)


def to_csv(data: Measurements) -> str:
    """One row per measured point; what is absent is empty."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for setup in data.setups:
        for points in data.of(setup).values():
            for point in points:
                row = _row(setup, point)
                writer.writerow([_cell(row[name]) for name in COLUMNS])
    return out.getvalue()


def _row(setup: Setup, point: Point) -> dict[str, object]:
    timing, power, state = point.timing, point.power, point.conditions
    low, high = ttft_range(timing)
    return {
        "source": source_of(setup),
        "model": point.bundle.model,
        "method": point.bundle.method,
        "target": point.bundle.target,
        "board": point.board,
        "mode": point.mode,
        "prompt_tokens": point.length,
        "new_tokens": timing.new_tokens,
        "repeats": len(timing.repeats),
        "ttft_s": timing.ttft_s,
        "ttft_low_s": low,
        "ttft_high_s": high,
        "tpot_s": timing.tpot_s,
        "token_p50_s": timing.token_p50_s,
        "token_p95_s": timing.token_p95_s,
        "tokens_per_s": timing.tokens_per_s,
        "load_s": timing.load_s,
        "peak_rss_bytes": process_bytes(timing),
        "gpu_bytes": gpu_bytes(timing),
        "power_source": power.source if power else None,
        "mean_w": power.mean_w if power else None,
        "idle_w": power.idle_w if power else None,
        "j_per_prompt": point.j_per_prompt,
        "above_idle_j_per_prompt": point.above_idle_j_per_prompt,
        "j_per_token": power.j_per_token if power else None,
        "above_idle_j_per_token": power.above_idle_j_per_token if power else None,
        "tokens_per_j": power.tokens_per_j if power else None,
        "above_idle_tokens_per_j": power.above_idle_tokens_per_j if power else None,
        "whole_module": power.whole_module if power else None,
        "gpu_mhz": state.gpu_mhz.mean if state.gpu_mhz else None,
        "emc_mhz": state.emc_mhz.mean if state.emc_mhz else None,
        "sms": state.sms,
        "clocks_pinned": state.clocks_pinned,
        "over_current_events": sum(state.over_current_events.values())
        if state.over_current_events
        else None,
        "hottest_c": max(state.temperature_highest_c.values(), default=None),
        "machine": point.machine.cpu,
        "l4t": state.l4t,
        "backend": point.backend,
        "engine_key": point.engine.key if point.engine else None,
        "bundle": point.bundle.digest,
        "date": point.date,
        "ssdi8_edge": point.ssdi8_edge,
    }


def _cell(value: object) -> object:
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value


def to_markdown(data: Measurements) -> str:
    """Every table of the page, under its heading."""
    parts = ["# SSDi8-Edge measurements\n"]
    for section in sections(data):
        if section.table is None or not section.table.rows:
            continue
        parts.append(f"## {section.title}\n\n{section.lead}\n")
        parts.append(_markdown_table(section.table))
        parts += [f"{_markdown(note)}\n" for note in section.table.notes]
    return "\n".join(parts)


def _markdown_table(table: Table) -> str:
    rule = ["---"] * table.words + ["---:"] * (len(table.columns) - table.words)
    lines = [_markdown_row([_markdown(c) for c in table.columns]), _markdown_row(rule)]
    lines += [_markdown_row([_markdown(cell) for cell in row]) for row in table.rows]
    return "\n".join(lines) + "\n"


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _markdown(words: str) -> str:
    """Text that Markdown and the HTML inside it leave as it is."""
    return re.sub(r"([\\`*_{}\[\]|~#!])", r"\\\1", html.escape(words, quote=False))
