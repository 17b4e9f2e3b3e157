"""--prompt and --prompt-file: text to stdout as it comes, timings to stderr."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from runtime.backend import Backend, BackendOptions, open_backend
from runtime.bundle import Bundle, BundleProblem
from runtime.console import print_json
from runtime.generate import Step, Timings, generate
from runtime.machine import this_machine
from runtime.sampling import Sampler
from runtime.text import TextCodec, TextStream

INTERRUPTED = 130


@dataclass
class Output:
    """What a run has produced so far; Ctrl-C ends it early and loses nothing."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    seconds: list[float] = field(default_factory=list)  # of each step
    finish: str = "length"  # or "stop" at the end of the text, "interrupt" at Ctrl-C


def run(bundle: Bundle, options: argparse.Namespace) -> int:
    """Continue the prompt; returns the exit code."""
    text = _read_prompt(options)
    bundle.check_files()
    codec = TextCodec(bundle)
    prompt = codec.encode(text)
    backend, load_s = open_timed(bundle, options)
    try:
        steps = generate(
            *(backend, bundle, prompt, sampler(codec, options)),
            *(options.max_new_tokens, codec.end_ids),
        )
        output = collect(steps, codec, prompt, stream=not options.json)
    finally:
        backend.close()

    timings = Timings.of(prompt.shape[1], output.seconds)
    machine = this_machine()
    if options.json:
        print_json(
            {
                "bundle": bundle.name,
                "recipe": bundle.recipe,
                "backend": backend.description,
                "notes": list(backend.notes),
                "machine": asdict(machine),
                "threads": options.threads,
                "sampling": {
                    "max_new_tokens": options.max_new_tokens,
                    "temperature": options.temperature,
                    "top_k": options.top_k,
                    "top_p": options.top_p,
                    "seed": options.seed,
                },
                "prompt": text,
                "text": output.text,
                "tokens": output.tokens,
                "finish": output.finish,
                "prompt_tokens": timings.prompt_tokens,
                "new_tokens": len(output.tokens),
                "load_s": load_s,
                "ttft_s": timings.ttft_s,
                "tpot_s": timings.tpot_s,
                "tokens_per_s": timings.tokens_per_s,
            }
        )
    else:
        print(describe(timings, len(output.tokens)), file=sys.stderr)
        print(f"{backend.description} on {machine}; loaded in {load_s:.2f} s", file=sys.stderr)
        show_notes(backend)
    return INTERRUPTED if output.finish == "interrupt" else 0


def open_timed(
    bundle: Bundle, options: argparse.Namespace, profiling: bool = False, hash_all: bool = False
) -> tuple[Backend, float]:
    """The backend that the options ask for, and the seconds that loading it took."""
    started = time.perf_counter()
    chosen = BackendOptions(
        threads=options.threads,
        engines=options.engine,
        plugins=options.plugins,
        profiling=profiling,
        hash_all=hash_all,
    )
    backend = open_backend(bundle, options.backend or bundle.runtime, chosen)
    return backend, time.perf_counter() - started


def sampler(codec: TextCodec, options: argparse.Namespace) -> Sampler:
    """As the options ask."""
    return Sampler(
        codec.vocabulary, options.temperature, options.top_k, options.top_p, options.seed
    )


def collect(
    steps: Iterator[Step],
    codec: TextCodec,
    prompt: np.ndarray,
    stream: bool,
    stopped: Callable[[], bool] = lambda: False,
) -> Output:
    """Run `steps` after `prompt` (1, l) to their end; with `stream`, print the text as it comes.

    `stopped` is asked after each token; Ctrl-C stops as well.
    """
    output = Output()
    text_stream = TextStream(codec, prompt[0].tolist())

    def give(new_text: str) -> None:
        output.text += new_text
        if stream:
            print(new_text, end="", flush=True)

    try:
        for step in steps:
            output.seconds.append(step.seconds)
            if step.token in codec.end_ids:
                output.finish = "stop"
                break
            output.tokens.append(step.token)
            give(text_stream.add(step.token))
            if stopped():
                output.finish = "interrupt"
                break
    except KeyboardInterrupt:
        output.finish = "interrupt"
    finally:
        give(text_stream.finish())
        if stream:
            print(flush=True)
    return output


def describe(timings: Timings, new_tokens: int) -> str:
    """Timings for people, in one line."""
    parts = [f"{timings.prompt_tokens} prompt tokens", f"{new_tokens} new"]
    if timings.ttft_s is not None:
        parts.append(f"TTFT {timings.ttft_s * 1e3:.1f} ms")
    if timings.tpot_s is not None:
        parts.append(f"TPOT {timings.tpot_s * 1e3:.2f} ms")
        parts.append(f"{timings.tokens_per_s:.1f} tokens/s")
    return ", ".join(parts)


def show_notes(backend: Backend) -> None:
    """What the user should know of this run, to stderr."""
    for note in backend.notes:
        print(f"note: {note}", file=sys.stderr)


def _read_prompt(options: argparse.Namespace) -> str:
    source = options.prompt_file
    try:
        if source is None:
            text = options.prompt
            text.encode("utf-8")  # bytes that are no text arrive as lone surrogates and fail here
        else:
            raw = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
            # Editors end a file with a newline that is no part of the prompt.
            text = raw.decode("utf-8").removesuffix("\n").removesuffix("\r")
    except UnicodeError as error:
        raise BundleProblem(f"the prompt is not UTF-8 ({error})", "convert it") from error
    except OSError as error:
        raise BundleProblem(
            f"the prompt file {source} cannot be read ({error.strerror})", "check --prompt-file"
        ) from error
    if not text:
        raise BundleProblem("the prompt is empty", "give at least one character")
    return text
