"""--interactive: a text that you and the model write in turns.

The models are no chat models: they go on from all that was written so far, which is kept in the
states and not read again. That is all tokens that were generated, those of a stop text and of an
end of text included: the next line follows them.

Lines are UTF-8 in every locale. One that is not is named and left out.
"""

from __future__ import annotations

import argparse
import io
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from runtime.bundle import Bundle, BundleProblem
from runtime.commands.generate import collect, describe, open_timed, sampler, show_notes
from runtime.console import print_json, stdin
from runtime.machine import this_machine
from runtime.session import Conversation, Timings
from runtime.text import TextCodec

PROMPT = "> "


class _Stop:
    """Whether Ctrl-C was pressed. It only takes note, so that a step under way ends whole."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self) -> bool:
        return self.asked

    @contextmanager
    def listening(self) -> Iterator[None]:
        def take_note(*_: object) -> None:
            self.asked = True

        before = signal.signal(signal.SIGINT, take_note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


def run(bundle: Bundle, options: argparse.Namespace) -> int:
    """Read lines and continue each until Ctrl-D; returns the exit code."""
    _read_bytes_as_utf8()
    bundle.check_files()
    codec = TextCodec(bundle)
    backend, load_s = open_timed(bundle, options)
    try:
        print(
            f"{backend.description} on {this_machine()}; loaded in {load_s:.2f} s\n"
            "Ctrl-C stops an answer, Ctrl-D ends.",
            file=sys.stderr,
        )
        show_notes(backend)
        conversation = Conversation(backend, bundle)
        sample = sampler(codec, options)
        continues = False
        for number, line in enumerate(iter(_read_line, None), start=1):
            if not line:
                continue
            try:
                checked = _checked(line, number)
                prompt = codec.encode(f"\n{checked}" if continues else checked, continues)
            except BundleProblem as problem:
                print(f"run_engine: {problem}", file=sys.stderr)
                continue
            sample.read(prompt)
            stop = _Stop()
            with stop.listening():
                steps = conversation.generate(prompt, sample, options.max_new_tokens, codec.end_ids)
                output = collect(steps, codec, prompt, options.stop, not options.json, stop)
            timings = Timings.of(prompt.shape[1], output.seconds)
            if options.json:
                turn = {"prompt": line, "text": output.text, "tokens": output.tokens}
                times = {"ttft_s": timings.ttft_s, "tpot_s": timings.tpot_s}
                print_json({**turn, "finish": output.finish, **times}, indent=None)
            else:
                print(describe(timings, len(output.tokens)), file=sys.stderr)
            continues = True
    finally:
        backend.close()
    return 0


def _read_bytes_as_utf8() -> None:
    """Let stdin give bytes that are not UTF-8 as lone surrogates, and end lines at \\n alone.

    The default stops at such a byte, and with it all lines that were read ahead are lost.
    """
    stream = stdin()
    if isinstance(stream, io.TextIOWrapper):
        # "-sig" leaves out a byte order mark at the start.
        stream.reconfigure(encoding="utf-8-sig", errors="surrogateescape", newline="\n")


def _checked(line: str, number: int) -> str:
    try:
        return line.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError as error:
        raise BundleProblem(f"line {number} is not UTF-8 ({error})", "convert it") from error


def _read_line() -> str | None:
    """A line without its end; empty after Ctrl-C, None after Ctrl-D."""
    try:
        return input(PROMPT if sys.stdin.isatty() else "").removesuffix("\r")
    except KeyboardInterrupt:
        print("\nCtrl-D ends.", file=sys.stderr)
        return ""
    except EOFError:
        if sys.stdin.isatty():
            print(file=sys.stderr)
        return None
