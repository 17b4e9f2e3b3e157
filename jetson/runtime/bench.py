"""Measures time to first token, time per token and memory; the one definition of a bench record.

    python run_engine.py BUNDLE --bench --seq-lens 256,512 --new-tokens 64 --repeat 5 --warmup 1

prints one line per prompt length to stdout, each a JSON object, as soon as that length is measured
(`--seconds S` keeps repeating a length until at least S seconds have passed, for power passes).
All times are in seconds, all sizes in bytes. Schema 1:

    schema          1
    kind            "bench"
    bundle, key     name and key of the bundle, from its manifest
    recipe, target  their names
    runtime         "onnxruntime", "tensorrt" or "kernels"
    backend         library, version and device, for people
    engine          null, or {"key", "built_for": {what the key was made from}, "differs": [text]}
                    with one text per condition (power mode, clocks, …) that is not as it was when
                    the engine was built
    machine         {"kind": "jetson" | "simulated" | "other", "platform", "cpu", "cores", "python",
                    "board": null or {"model", "l4t", "power_mode", "gpu_max_hz", "emc_cap_hz"}}
                    "simulated": the board's tools answer, but this is no Tegra; each field of
                    `board` is null where it cannot be read
    versions        {library: version} of what ran: numpy and onnxruntime, or numpy, tensorrt,
                    pycuda, cuda, or numpy, kernels, cuda
    threads         threads asked for, null for the library's own choice
    batch           1
    prompt_tokens   L, the entry of --seq-lens
    new_tokens      tokens generated in each repeat, the first included
    warmup          runs of this length before the first repeat, not measured
    repeats         list, one object per repeat, in order:
        start_s, end_s  time.monotonic() (CLOCK_MONOTONIC of that machine) around the repeat
        ttft_s          prompt ids on the host -> first new token on the host
        token_s         list of new_tokens - 1: each later token, sampling included
    ttft_s          median over repeats
    tpot_s          median over repeats of the mean of token_s; null if new_tokens is 1
    token_p50_s, token_p95_s   percentiles over the token_s of all repeats; null likewise
    tokens_per_s    1 / tpot_s; null likewise
    load_s          seconds that opening the backend took
    started_unix    time.time() at the first warm-up
    memory          object, null where the machine does not tell:
        rss_bytes             resident memory of this process after the last repeat
        peak_rss_bytes        its highest so far (VmHWM)
        available_before_bytes, available_bytes   MemAvailable before the backend was opened, and
                              the lowest of the values read after each run
        gpu_bytes             GPU memory taken by engine, contexts and buffers; null without a GPU

The prompt is random tokens from a fixed seed; decoding is greedy and goes on after an end token.
Nothing is printed to stdout but these lines; Ctrl-C ends with exit code 130 after whole lines.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from runtime.machine import Machine, available_memory, process_memory
from runtime.session import Session

SCHEMA = 1
SEED = 0


@dataclass(frozen=True)
class BenchOptions:
    """What to measure; `seconds` is the least time to spend on the repeats of a length."""

    seq_lens: Sequence[int]
    new_tokens: int
    repeat: int
    warmup: int
    seconds: float
    threads: int | None


def measure(
    session: Session, machine: Machine, available_before: int | None, options: BenchOptions
) -> Iterator[dict[str, Any]]:
    """One record per prompt length, as soon as it is measured.

    Args:
        available_before: MemAvailable in bytes before the session was opened.
    """
    lowest = available_before
    vocabulary = session.bundle.model.vocab_size
    for length in options.seq_lens:
        prompt = np.random.default_rng(SEED).integers(0, vocabulary, (1, length))
        started_unix = time.time()
        for _ in range(options.warmup):
            _run_once(session, prompt, options.new_tokens)
        repeats: list[dict[str, Any]] = []
        started = time.monotonic()
        while len(repeats) < options.repeat or time.monotonic() - started < options.seconds:
            repeats.append(_run_once(session, prompt, options.new_tokens))
            lowest = _lower(lowest, available_memory())
        yield {
            **_conditions(session, machine, options),
            "prompt_tokens": length,
            "new_tokens": options.new_tokens,
            "warmup": options.warmup,
            "repeats": repeats,
            **summary(repeats),
            "load_s": session.load_s,
            "started_unix": started_unix,
            "memory": _memory(session, available_before, lowest),
        }


def _run_once(session: Session, prompt: np.ndarray, new_tokens: int) -> dict[str, Any]:
    start = time.monotonic()
    seconds = [
        step.seconds
        for step in session.generate(
            prompt.astype(np.int32), lambda logits: int(logits.argmax()), new_tokens, ()
        )
    ]
    end = time.monotonic()
    return {"start_s": start, "end_s": end, "ttft_s": seconds[0], "token_s": seconds[1:]}


def summary(repeats: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Medians and percentiles over the repeats of one length."""
    tokens = [seconds for repeat in repeats for seconds in repeat["token_s"]]
    tpot = (
        statistics.median(statistics.fmean(repeat["token_s"]) for repeat in repeats)
        if tokens
        else None
    )
    return {
        "ttft_s": statistics.median(repeat["ttft_s"] for repeat in repeats),
        "tpot_s": tpot,
        "token_p50_s": float(np.percentile(tokens, 50)) if tokens else None,
        "token_p95_s": float(np.percentile(tokens, 95)) if tokens else None,
        "tokens_per_s": 1 / tpot if tpot else None,
    }


def _conditions(session: Session, machine: Machine, options: BenchOptions) -> dict[str, Any]:
    bundle, backend = session.bundle, session.backend
    return {
        "schema": SCHEMA,
        "kind": "bench",
        "bundle": bundle.name,
        "key": bundle.key,
        "recipe": bundle.recipe,
        "target": bundle.target,
        "runtime": backend.runtime,
        "backend": backend.description,
        "engine": backend.engine,
        "machine": asdict(machine),
        "versions": dict(backend.versions),
        "threads": options.threads,
        "batch": 1,
    }


def _memory(
    session: Session, available_before: int | None, lowest: int | None
) -> dict[str, int | None]:
    resident, peak = process_memory()
    return {
        "rss_bytes": resident,
        "peak_rss_bytes": peak,
        "available_before_bytes": available_before,
        "available_bytes": lowest,
        "gpu_bytes": session.backend.gpu_bytes,
    }


def _lower(a: int | None, b: int | None) -> int | None:
    return b if a is None else a if b is None else min(a, b)
