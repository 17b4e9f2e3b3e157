"""--interactive: you and the model write in turns.

Where the bundle has a chat template it is a chat: roles, a system prompt, answers that end. Else
the model goes on from all that was written so far. That is all tokens that were generated, those of
a stop text and of an end of text included: the next line follows them. In both, what was said is
kept in the states and not read again.

Lines are UTF-8 in every locale. One that is not is named and left out.
"""

from __future__ import annotations

import argparse
import io
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from os.path import expanduser  # a shell does it for what stands on a command line
from pathlib import Path

import numpy as np

from runtime.answer import Answer, collect
from runtime.bundle import Bundle
from runtime.chat_template import ChatTemplate
from runtime.console import print_json, show_notes, stdin, text_on_stdout, visible
from runtime.dialogue import Continuation, Dialogue, TemplateChat
from runtime.machine import this_machine
from runtime.options import open_cache, open_session
from runtime.problems import BundleProblem
from runtime.sampling import Sampler, settings
from runtime.session import Session, load_state, save_state
from runtime.text import TextCodec

PROMPT, MORE = "> ", ". "
BLOCK = '"""'
HELP = f"""\
/save FILE   write the state of this conversation
/load FILE   go on from one that was written
/reset       start anew
/help        this
{BLOCK}          alone on a line: what follows, up to the next one, is one message
Ctrl-C stops an answer, Ctrl-D ends."""


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


class _Talk:
    """The conversation and what a user can do with it."""

    def __init__(
        self,
        session: Session,
        codec: TextCodec,
        dialogue: Dialogue,
        options: argparse.Namespace,
        cached: bool,
    ) -> None:
        """`cached`: hold states of what was said, since a later turn may go back to one."""
        self._session, self._codec, self._dialogue = session, codec, dialogue
        self._options = options
        cache = open_cache(session, options) if cached or options.state_dir else None
        show_notes(cache.notes if cache else ())
        self._conversation = session.conversation(cache)
        self._sample = Sampler(codec.vocabulary, **settings(vars(options)))
        self.commands: Mapping[str, Callable[[str], None]] = {
            "/save": lambda name: self.save(Path(expanduser(name))),
            "/load": lambda name: self.load(Path(expanduser(name))),
            "/reset": lambda _: self._reset(),
            "/help": lambda _: print(HELP, file=sys.stderr),
        }

    @property
    def full(self) -> str | None:
        """A sentence if the context is full, so that no token can follow."""
        return self._conversation.full

    def save(self, path: Path) -> None:
        """Raises BundleProblem."""
        save_state(path, self._conversation, self._session, self._dialogue.saved())

    def load(self, path: Path) -> None:
        """Raises BundleProblem, and leaves the conversation as it was."""
        saved = load_state(path, self._session)
        snapshot = saved.snapshot
        self._dialogue.restore(saved.chat, [*snapshot.ids.tolist(), *snapshot.pending])
        self._conversation.resume(snapshot)

    def answer(self, text: str) -> Answer:
        """Show the answer to `text` as it comes; raises BundleProblem where it does not fit."""
        options, conversation = self._options, self._conversation
        asked = self._dialogue.ask(text, conversation.ids)
        prompt = conversation.lead_to(asked.ids)
        kept = len(conversation.ids)
        self._sample.forget()
        self._sample.read(np.array([asked.ids]))
        stop = _Stop()
        with stop.listening(), text_on_stdout(not options.json) as show:
            steps = conversation.generate(
                *(prompt, self._sample, options.max_new_tokens, self._codec.end_ids, asked.marks)
            )
            answer = collect(steps, self._codec, prompt, options.stop, show, stop, kept)
        self._dialogue.heard(conversation.ids, options.stop)
        return answer

    def keep(self) -> None:
        """Have the states of what was said held; raises BundleProblem where a disk is full."""
        self._conversation.keep()

    def _reset(self) -> None:
        self._dialogue.reset()
        self._conversation.reset()


def run(bundle: Bundle, options: argparse.Namespace) -> int:
    """Read lines and answer each until Ctrl-D or a full context; returns the exit code."""
    _read_bytes_as_utf8()
    bundle.check_files()
    codec = TextCodec(bundle)
    template = ChatTemplate.of(bundle)
    dialogue = _dialogue(bundle, codec, template, options)
    with open_session(bundle, options) as session:
        backend = session.backend
        mode = (
            "This is a chat, by the template of the checkpoint."
            if template
            else "There is no chat template: the model goes on from what you write."
        )
        print(
            f"{backend.description} on {this_machine()}; loaded in {session.load_s:.2f} s\n"
            f"{mode}\nCtrl-C stops an answer, Ctrl-D ends, /help shows more.",
            file=sys.stderr,
        )
        show_notes(backend.notes)
        talk = _Talk(session, codec, dialogue, options, cached=template is not None)
        if options.load_state:
            talk.load(Path(options.load_state))
        for text in _messages():
            with _sentences():
                _answer(talk, text, options.json)
            if talk.full and not template:
                break
        if options.save_state:
            talk.save(Path(options.save_state))
    return 0


def _dialogue(
    bundle: Bundle, codec: TextCodec, template: ChatTemplate | None, options: argparse.Namespace
) -> Dialogue:
    """Raises BundleProblem where an option asks for what there is not."""
    if options.think and options.no_think:
        raise BundleProblem("--think and --no-think exclude each other", "give one of them")
    if template is None:
        chosen = {
            "--system": options.system is not None,
            "--think": options.think,
            "--no-think": options.no_think,
        }
        for flag, given in chosen.items():
            if given:
                raise BundleProblem(
                    f"bundle {bundle.name} has no chat template, which {flag} is for",
                    f"leave {flag} out, or build from a checkpoint with one",
                )
        return Continuation(codec)
    wanted = True if options.think else False if options.no_think else None
    return TemplateChat(template, codec, bundle, options.system, template.thinking(wanted))


def _answer(talk: _Talk, text: str, json: bool) -> None:
    """Do what a message asks for; raises BundleProblem."""
    command, _, argument = text.partition(" ")
    if command in talk.commands and "\n" not in text:
        takes = command in ("/save", "/load")
        if takes != bool(argument.strip()):
            raise BundleProblem(
                f"{command} {'needs the name of a file' if takes else 'takes nothing'}",
                "see /help",
            )
        talk.commands[command](argument.strip())
        return
    answer = talk.answer(text)
    if json:
        timings = answer.timings
        turn = {"prompt": text, "text": answer.text, "tokens": answer.tokens}
        counts = {"prompt_tokens": answer.prompt_tokens, "kept_tokens": answer.kept_tokens}
        times = {"ttft_s": timings.ttft_s, "tpot_s": timings.tpot_s}
        print_json({**turn, "finish": answer.finish, **counts, **times}, indent=None)
    else:
        print(answer.describe(), file=sys.stderr)
    if talk.full:
        print(f"run_engine: {talk.full}", file=sys.stderr)
    talk.keep()


@contextmanager
def _sentences() -> Iterator[None]:
    """What a user can put right is said, and the conversation goes on."""
    try:
        yield
    except BundleProblem as problem:
        if type(problem) is not BundleProblem:  # the model does not run
            raise
        print(f"run_engine: {visible(str(problem))}", file=sys.stderr)


def _messages() -> Iterator[str]:
    """What is typed: lines, and blocks of lines; what is not UTF-8 is named and left out."""
    number = 0
    block: list[str] | None = None
    while True:
        try:
            line = _read_line(block is not None)
        except KeyboardInterrupt:
            print("\nCtrl-D ends.", file=sys.stderr)
            block = None
            continue
        if line is None:
            break
        number += 1
        text = None
        with _sentences():
            text = _checked(line, number)
        if text is None:
            continue
        if text == BLOCK:
            if block:
                yield "\n".join(block)
            block = [] if block is None else None
        elif block is not None:
            block.append(text)
        elif text:
            yield text
    if block:
        yield "\n".join(block)


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


def _read_line(within_block: bool) -> str | None:
    """A line without its end; None after Ctrl-D."""
    prompt = MORE if within_block else PROMPT
    try:
        return input(prompt if sys.stdin.isatty() else "").removesuffix("\r")
    except EOFError:
        if sys.stdin.isatty():
            print(file=sys.stderr)
        return None
