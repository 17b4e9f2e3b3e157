"""--prompt and --prompt-file: text to stdout as it comes, timings to stderr."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from runtime.backends.choose import open_backend
from runtime.backends.protocol import Backend, BackendOptions
from runtime.bundle import Bundle, BundleProblem
from runtime.console import print_json, stdin
from runtime.machine import this_machine
from runtime.sampling import Sampler, settings
from runtime.session import Step, Timings, generate
from runtime.stop import StopTexts
from runtime.text import TextCodec, TextStream

INTERRUPTED = 130


@dataclass
class Output:
    """What a run has produced so far; Ctrl-C ends it early and loses nothing.

    A stop text is among the tokens, and not in the text.
    """

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    seconds: list[float] = field(default_factory=list)  # of each step
    finish: str = "length"  # or "stop" at end or stop text, "interrupt" at Ctrl-C


def run(bundle: Bundle, options: argparse.Namespace) -> int:
    """Continue the prompt; returns the exit code."""
    text = _read_prompt(options)
    bundle.check_files()
    codec = TextCodec(bundle)
    prompt = codec.encode(text)
    backend, load_s = open_timed(bundle, options)
    try:
        sample = sampler(codec, options)
        sample.read(prompt)
        steps = generate(backend, bundle, prompt, sample, options.max_new_tokens, codec.end_ids)
        output = collect(steps, codec, prompt, options.stop, stream=not options.json)
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
                "sampling": settings(vars(options)),
                "stop": options.stop,
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
    return Sampler(codec.vocabulary, **settings(vars(options)))


def collect(
    steps: Iterator[Step],
    codec: TextCodec,
    prompt: np.ndarray,
    stops: Sequence[str],
    stream: bool,
    stopped: Callable[[], bool] = lambda: False,
) -> Output:
    """Run `steps` after `prompt` (1, l) to their end or to one of `stops`.

    With `stream`, print the text as it comes.

    `stopped` is asked after each token; Ctrl-C stops as well.
    """
    output = Output()
    text_stream, stop = TextStream(codec, prompt[0].tolist()), StopTexts(stops)

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
            give(stop.add(text_stream.add(step.token)))
            if stop.found:
                output.finish = "stop"
                break
            if stopped():
                output.finish = "interrupt"
                break
    except KeyboardInterrupt:
        output.finish = "interrupt"
    finally:
        if not stop.found:
            give(stop.add(text_stream.finish()) + stop.flush())
            if stop.found:
                output.finish = "stop"
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
        else:
            raw = stdin().buffer.read() if source == "-" else Path(source).read_bytes()
            # Editors begin a file with a byte order mark, and end it with a newline, that are no
            # part of the prompt.
            text = raw.decode("utf-8-sig").removesuffix("\n").removesuffix("\r")
    except UnicodeError as error:
        raise BundleProblem(f"the prompt is not UTF-8 ({error})", "convert it") from error
    except OSError as error:
        raise BundleProblem(
            f"the prompt file {source} cannot be read ({error.strerror})", "check --prompt-file"
        ) from error
    if not text:
        raise BundleProblem("the prompt is empty", "give at least one character")
    return text
