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

from runtime.answer import collect
from runtime.bundle import Bundle
from runtime.console import print_json, show_notes, stdin, text_on_stdout
from runtime.machine import this_machine
from runtime.options import open_session
from runtime.problems import BundleProblem
from runtime.sampling import Sampler, settings
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
    """Read lines and continue each until Ctrl-D or a full context; returns the exit code."""
    _read_bytes_as_utf8()
    bundle.check_files()
    codec = TextCodec(bundle)
    with open_session(bundle, options) as session:
        backend = session.backend
        print(
            f"{backend.description} on {this_machine()}; loaded in {session.load_s:.2f} s\n"
            "Ctrl-C stops an answer, Ctrl-D ends.",
            file=sys.stderr,
        )
        show_notes(backend.notes)
        conversation = session.conversation()
        sample = Sampler(codec.vocabulary, **settings(vars(options)))
        continues = False
        for number, line in enumerate(iter(_read_line, None), start=1):
            if not line:
                continue
            try:
                checked = _checked(line, number)
                prompt = codec.encode(f"\n{checked}" if continues else checked, continues)
                conversation.require_room(prompt)
            except BundleProblem as problem:
                print(f"run_engine: {problem}", file=sys.stderr)
                continue
            sample.read(prompt)
            stop = _Stop()
            with stop.listening(), text_on_stdout(not options.json) as show:
                steps = conversation.generate(prompt, sample, options.max_new_tokens, codec.end_ids)
                answer = collect(steps, codec, prompt, options.stop, show, stop)
            if options.json:
                timings = answer.timings
                turn = {"prompt": line, "text": answer.text, "tokens": answer.tokens}
                times = {"ttft_s": timings.ttft_s, "tpot_s": timings.tpot_s}
                print_json({**turn, "finish": answer.finish, **times}, indent=None)
            else:
                print(answer.describe(), file=sys.stderr)
            if conversation.full:
                print(f"run_engine: {conversation.full}", file=sys.stderr)
                break
            continues = True
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
