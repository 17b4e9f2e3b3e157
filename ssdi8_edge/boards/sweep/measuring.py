"""One call of board/measure.py from this side: its answers, checked, until it is done."""

from __future__ import annotations

import getpass
import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from runtime.problems import BundleProblem
from ssdi8_edge.boards.link.call import Call
from ssdi8_edge.boards.link.connection import Connection
from ssdi8_edge.boards.points.records import Bundle, model_name, plain
from ssdi8_edge.boards.sweep.interpret import State
from ssdi8_edge.boards.sweep.sweep_commands import Installed
from ssdi8_edge.ground.artifacts import key_of
from ssdi8_edge.ground.board_runtime import open_checked_bundle
from ssdi8_edge.ground.errors import BoardBusy, BoardError, BundleError

# nvpmodel and jetson_clocks may each take a minute without a word.
SILENCE_S = 200.0
# For what a call whose link was lost may still hold.
LOCK_WAIT_S = 45.0

Say = Callable[[str], None]


Deploy = Callable[[Connection, Path, Say], Installed]


class Source(NamedTuple):
    """A bundle on this machine, checked."""

    folder: Path
    bundle: Bundle
    key: str


def open_source(path: Path, prompt: int, new: int) -> Source:
    """The bundle in a folder, or in a run folder.

    Args:
        prompt, new: the most tokens that will be read and generated at once.

    Raises:
        BundleError: it is none, was altered, or has a context of fewer tokens.
    """
    opened = open_checked_bundle(path)
    try:
        opened.require_room(
            prompt + new, f"a prompt of {prompt} tokens and {new} new are asked for", "give fewer"
        )
    except BundleProblem as problem:
        raise BundleError(f"{problem.message};", f"{problem.hint}.") from problem
    manifest = opened.manifest
    try:
        bundle = Bundle(
            digest=key_of(manifest["files"]),
            name=manifest["name"],
            model=model_name(manifest),
            checkpoint=manifest["checkpoint"]["sha256"],
            method=manifest["recipe"]["name"],
            target=manifest["target"]["name"],
            bytes=sum(listed["bytes"] for listed in manifest["files"].values()),
        )
        return Source(opened.root, bundle, str(manifest["key"]))
    except (KeyError, TypeError, ValidationError) as error:
        raise BundleError(
            f"the manifest of {opened.root} does not say what it is a bundle of ({error});",
            "pack it again.",
        ) from error


def holder(what: str) -> str:
    """What others are told who want the board meanwhile."""
    return plain(f"{what} of {getpass.getuser()} on {platform.node()}")


class Session:
    """A call that holds the board's lock; iterate over it until it is done.

    Attributes:
        state: the board's, at the start.
        put_back: what a killed call had left changed, and whether that was put back; or None.
    """

    def __init__(self, call: Call, name: str, first: Mapping[str, Any]) -> None:
        self._call = call
        self._name = name
        self.state = self.state_of(first)
        put_back = first.get("put_back")
        self.put_back: Mapping[str, Any] | None = put_back if isinstance(put_back, dict) else None

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Answers about modes and points, the last of them `done`.

        Raises:
            LinkLost: the link broke.
            BoardError: it answered rubbish, or ended too early.
        """
        whole = False
        for answer in self._call.answers():
            whole = "done" in answer
            yield answer
        if not whole:
            raise self.rubbish("the end came too early")

    def state_of(self, answer: Mapping[str, Any]) -> State:
        """The state that an answer carries."""
        try:
            return State.model_validate(answer.get("state"))
        except ValidationError as error:
            raise self.rubbish(str(error.errors()[0]["msg"])) from error

    def rubbish(self, what: str) -> BoardError:
        """An answer that makes no sense."""
        return BoardError(
            f"{self._name} answered a measurement with what makes no sense ({plain(what)});",
            "see whether it is the right machine, then repeat: what is measured stays.",
        )


@contextmanager
def measuring(connection: Connection, arguments: Mapping[str, Any]) -> Iterator[Session]:
    """Begin a call; it holds the lock `board`.

    Args:
        arguments: of `sweep_commands.call_arguments`.

    Raises:
        BoardBusy: someone else measures there.
        LinkLost, BoardError: as any call.
    """
    with connection.open_program("measure", arguments, what="measuring", silence=SILENCE_S) as call:
        first = call.next_answer()
        if "busy" in first:
            who = plain(str(first["busy"])) or "someone else"
            raise BoardBusy(f"{connection.name} is in use by {who};", "repeat when that is done.")
        yield Session(call, connection.name, first)
