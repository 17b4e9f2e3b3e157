"""The command line of run_engine.py: arguments, the three commands, exit codes.

What was asked for goes to stdout, timings and problems to stderr.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from runtime.backend import Backend, open_backend
from runtime.bundle import RUNTIMES, Bundle, BundleProblem, open_bundle
from runtime.generate import Step, Timings, generate
from runtime.machine import this_machine
from runtime.sampling import Sampler
from runtime.text import TextCodec, TextStream
from runtime.verify import TOLERANCE, compare_with_golden

INTERRUPTED = 130  # what a shell reports for a program that Ctrl-C ended
PIPE_CLOSED = 141  # and for one whose reader went away


def run(arguments: Sequence[str], default_bundle: Path) -> int:
    """Run the command line; returns the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a console without UTF-8 shall not end a run
    try:
        options = _parse(arguments, default_bundle)
        bundle = open_bundle(options.bundle)
        if options.info:
            return _info(bundle, options)
        if options.verify:
            return _verify(bundle, options)
        return _generate(bundle, options)
    except BundleProblem as problem:
        print(f"run_engine: {problem}", file=sys.stderr)
        return problem.exit_code
    except BrokenPipeError:
        # Python flushes stdout once more at exit, which would complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except OSError as error:
        print(f"run_engine: {error}; check that this user may read the bundle.", file=sys.stderr)
        return 2


# --------------------------------------------------------------------------------------------------
# arguments


class _Parser(argparse.ArgumentParser):
    """Reports a wrong option as every other problem is reported: one sentence, exit code 2."""

    def error(self, message: str) -> NoReturn:
        raise BundleProblem(message, f"see {self.prog} --help")


def _number(kind: type, least: float, most: float = math.inf) -> Callable[[str], Any]:
    """An argparse type: a number of `kind` in a range, infinity excluded."""
    noun = "a whole number" if kind is int else "a number"
    limits = f"of at least {least}" if most == math.inf else f"from {least} to {most}"

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most or value == math.inf:
            raise argparse.ArgumentTypeError(f"{text!r} is not {noun} {limits}")
        return value

    return parse


def _parse(arguments: Sequence[str], default_bundle: Path) -> argparse.Namespace:
    parser = _Parser(
        prog="run_engine.py",
        description="Run, verify or describe a bundle: a quantized Mamba-2 model in one folder.",
    )
    add = parser.add_argument
    add(
        "bundle",
        nargs="?",
        type=Path,
        default=default_bundle,
        metavar="BUNDLE",
        help="its folder (default: the folder of this script)",
    )
    command = parser.add_mutually_exclusive_group()
    command.add_argument("--prompt", metavar="TEXT", help="text to continue")
    command.add_argument(
        "--prompt-file",
        metavar="FILE",
        help="read it from a file, - for stdin; one final newline is dropped",
    )
    command.add_argument(
        "--verify",
        action="store_true",
        help="check all hashes, then compare with the golden vectors; exit code 0 or 1",
    )
    command.add_argument("--info", action="store_true", help="describe the bundle")
    count, whole = _number(int, 1), _number(int, 0)
    add("--max-new-tokens", type=count, default=64, metavar="N", help="(default: 64)")
    add(
        "--temperature",
        type=_number(float, 0),
        default=0.0,
        metavar="T",
        help="0, the default, always takes the likeliest token",
    )
    add("--top-k", type=whole, default=0, metavar="K", help="sample among K tokens (default: all)")
    add("--seed", type=whole, default=0, metavar="S", help="of the sampling (default: 0)")
    add("--backend", choices=RUNTIMES, help="(default: the one that the bundle is for)")
    add("--threads", type=_number(int, 1, 1024), metavar="N", help="(default: one per core)")
    add("--json", action="store_true", help="one JSON object on stdout")
    return parser.parse_args(arguments)


# --------------------------------------------------------------------------------------------------
# generate


@dataclass
class _Output:
    """What a run has produced so far; Ctrl-C ends it early and loses nothing."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    seconds: list[float] = field(default_factory=list)  # of each step
    finish: str = "length"  # or "stop" at the end of the text, "interrupt" at Ctrl-C


def _generate(bundle: Bundle, options: argparse.Namespace) -> int:
    text = _read_prompt(options)
    bundle.check_files()
    codec = TextCodec(bundle)
    prompt = codec.encode(text)
    backend, load_s = _open_backend(bundle, options)
    sampler = Sampler(codec.vocabulary, options.temperature, options.top_k, options.seed)
    steps = generate(backend, bundle, prompt, sampler, options.max_new_tokens, codec.end_id)
    output = _collect(steps, codec, stream=not options.json)

    timings = Timings.of(prompt.shape[1], output.seconds)
    machine = this_machine()
    if options.json:
        _print_json(
            {
                "bundle": bundle.name,
                "recipe": bundle.recipe,
                "backend": backend.description,
                "machine": asdict(machine),
                "threads": options.threads,
                "sampling": {
                    "max_new_tokens": options.max_new_tokens,
                    "temperature": options.temperature,
                    "top_k": options.top_k,
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
        print(_describe(timings, len(output.tokens)), file=sys.stderr)
        print(f"{backend.description} on {machine}; loaded in {load_s:.2f} s", file=sys.stderr)
    return INTERRUPTED if output.finish == "interrupt" else 0


def _collect(steps: Iterator[Step], codec: TextCodec, stream: bool) -> _Output:
    """Run `steps` to their end; with `stream`, print the text as it comes."""
    output = _Output()
    text_stream = TextStream(codec)
    try:
        for step in steps:
            output.seconds.append(step.seconds)
            if step.token == codec.end_id:
                output.finish = "stop"
                break
            output.tokens.append(step.token)
            new_text = text_stream.add(step.token)
            output.text += new_text
            if stream:
                print(new_text, end="", flush=True)
    except KeyboardInterrupt:
        output.finish = "interrupt"
    finally:
        if stream:
            print(flush=True)
    return output


def _read_prompt(options: argparse.Namespace) -> str:
    source = options.prompt_file
    try:
        if options.prompt is not None:
            text = options.prompt
            text.encode("utf-8")  # bytes that are no text arrive as lone surrogates and fail here
        elif source is not None:
            raw = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
            # Editors end a file with a newline that is no part of the prompt.
            text = raw.decode("utf-8").removesuffix("\n").removesuffix("\r")
        else:
            raise BundleProblem(
                "there is nothing to do",
                "give --prompt TEXT, --prompt-file FILE, --verify or --info",
            )
    except UnicodeError as error:
        raise BundleProblem(f"the prompt is not UTF-8 ({error})", "convert it") from error
    except OSError as error:
        raise BundleProblem(
            f"the prompt file {source} cannot be read ({error.strerror})", "check --prompt-file"
        ) from error
    if not text:
        raise BundleProblem("the prompt is empty", "give at least one character")
    return text


def _open_backend(bundle: Bundle, options: argparse.Namespace) -> tuple[Backend, float]:
    """The backend and the seconds that loading it took."""
    started = time.perf_counter()
    backend = open_backend(bundle, options.backend or bundle.runtime, options.threads)
    return backend, time.perf_counter() - started


def _describe(timings: Timings, new_tokens: int) -> str:
    parts = [f"{timings.prompt_tokens} prompt tokens", f"{new_tokens} new"]
    if timings.ttft_s is not None:
        parts.append(f"TTFT {timings.ttft_s * 1e3:.1f} ms")
    if timings.tpot_s is not None:
        parts.append(f"TPOT {timings.tpot_s * 1e3:.2f} ms")
        parts.append(f"{timings.tokens_per_s:.1f} tokens/s")
    return ", ".join(parts)


# --------------------------------------------------------------------------------------------------
# verify


def _verify(bundle: Bundle, options: argparse.Namespace) -> int:
    report: dict[str, Any] = {
        "bundle": bundle.name,
        "verified": False,
        "problem": None,
        "backend": None,
        "machine": asdict(this_machine()),
        "tolerance": TOLERANCE,
        "comparisons": [],
    }
    try:
        hashed = bundle.check_files(hash_up_to=None)
    except BundleProblem as problem:
        report["problem"] = str(problem)
        return _report_verification(report, options)
    if not options.json:
        print(f"files: {len(bundle.files)} as packed ({_size(hashed)} hashed)", flush=True)
    backend, _ = _open_backend(bundle, options)
    report["backend"] = backend.description
    compared = list(compare_with_golden(backend, bundle))
    report["comparisons"] = [
        {
            "name": c.name,
            "relative_error": c.relative_error if math.isfinite(c.relative_error) else None,
            "agrees": c.agrees,
        }
        for c in compared
    ]
    differing = [c for c in compared if not c.agrees]
    report["verified"] = not differing
    if differing:
        first = differing[0]
        report["problem"] = (
            f"{_place(first.name)} is the first of {len(differing)} tensors that differ from the"
            f" golden vectors (relative error {first.relative_error:.1e}, allowed {TOLERANCE:.0e});"
            " do not use this bundle with this backend here."
        )
    elif not options.json:
        worst = max(compared, key=lambda c: c.relative_error)
        print(
            f"golden vectors: {len(compared)} tensors agree,"
            f" worst relative error {worst.relative_error:.1e} in {_place(worst.name)}"
        )
        print(f"verified with {backend.description} on {this_machine()}")
    return _report_verification(report, options)


def _report_verification(report: dict[str, Any], options: argparse.Namespace) -> int:
    if options.json:
        _print_json(report)
    elif not report["verified"]:
        print(f"run_engine: {report['problem']}", file=sys.stderr)
    return 0 if report["verified"] else 1


def _place(name: str) -> str:
    """ssm_state.1 -> layer 1: ssm_state"""
    kind, _, layer = name.partition(".")
    return f"layer {layer}: {kind}" if layer else name


# --------------------------------------------------------------------------------------------------
# info


def _info(bundle: Bundle, options: argparse.Namespace) -> int:
    bundle.check_files()
    manifest, dtypes = bundle.manifest, bundle.state_dtypes()
    sizes = {name: listed["bytes"] for name, listed in bundle.files.items()}
    state_bytes = sum(
        math.prod(shape) * dtypes[name].itemsize
        for name, shape in bundle.model.state_shapes(batch=1).items()
    )
    report = {
        "bundle": bundle.name,
        "model": manifest["model"],
        "recipe": manifest["recipe"],
        "target": manifest["target"],
        "files": sizes,
        "bytes": sum(sizes.values()),
        "state_bytes_per_sequence": state_bytes,
        "created": manifest["created"],
        "steps": manifest["steps"],
        "not_run": manifest["not_run"],
    }
    if options.json:
        _print_json(report)
        return 0
    largest = max(sizes, key=lambda name: sizes[name])
    print(f"bundle   {bundle.name}")
    print(f"model    {_pairs(report['model'])}")
    print(f"recipe   {_pairs(report['recipe'])}")
    print(f"target   {_pairs(report['target'])}")
    print(
        f"size     {_size(report['bytes'])} in {len(sizes)} files, largest {largest}"
        f" ({_size(sizes[largest])}); {_size(state_bytes)} of state per sequence"
    )
    print(f"created  {_pairs(report['created'])}")
    for step in report["steps"]:
        print(f"ran      {_pairs(step)}")
    for step in report["not_run"]:
        print(f"not run  {step}")
    return 0


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{key} ({_pairs(value)})" if isinstance(value, Mapping) else f"{key} {value}"
        for key, value in values.items()
    )


def _size(count: float) -> str:
    """Bytes for people: 1536 -> 1.5 KiB"""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def _print_json(report: Mapping[str, Any]) -> None:
    # ASCII, so that no console's encoding can spoil it.
    print(json.dumps(report, indent=2, allow_nan=False))
