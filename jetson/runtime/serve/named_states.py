"""States that clients save under a name, to go on from as often as they like.

A name is letters, digits and a few signs, so that it can be part of a file's name and of no path.
Of a folder the files are read at the start; each save is one whole file there.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from runtime.problems import BundleProblem
from runtime.serve.fields import RequestProblem
from runtime.session import Session
from runtime.states.fingerprint import digest, fingerprint
from runtime.states.slot import Snapshot
from runtime.states.state_file import SUFFIX, Saved, load, save

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
FOLDER = "named"  # inside --state-dir


def checked_name(name: Any) -> str:
    """Raises RequestProblem where `name` is no name of a state."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise RequestProblem(
            "that is no name of a state",
            "take 1 to 64 letters, digits, dots, dashes and underscores, a letter or digit first",
        )
    return name


class NamedStates:
    """Only the engine's thread works on them.

    notes    files of the folder that were refused, one sentence each
    """

    def __init__(self, session: Session, budget_bytes: int, folder: Path | None) -> None:
        """Raises BundleProblem where the folder cannot be made."""
        self._bundle = session.bundle
        self._fingerprint = fingerprint(session.bundle, session.backend)
        self._budget = budget_bytes
        self._held: dict[str, Snapshot] = {}
        self._folder = folder and folder / FOLDER / digest(self._fingerprint)
        self.notes: list[str] = []
        if self._folder is not None:
            self._read(self._folder)

    def _read(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BundleProblem(
                f"the folder of states {folder} cannot be made ({error.strerror})",
                "name another --state-dir",
            ) from error
        for path in sorted(folder.glob(f"*{SUFFIX}")):
            try:
                saved = load(path, self._bundle, self._fingerprint)
            except BundleProblem as problem:
                self.notes.append(str(problem))
            else:
                self._held[path.name.removesuffix(SUFFIX)] = saved.snapshot

    def get(self, name: str) -> Snapshot:
        """Raises RequestProblem where there is none of this name."""
        if name not in self._held:
            raise RequestProblem(
                f"there is no state {name}",
                "GET /v1/states lists those that there are",
                status=404,
                param="state",
                code="state_not_found",
            )
        return self._held[name]

    def save(self, name: str, snapshot: Snapshot) -> None:
        """Hold it, in place of one of that name.

        Raises:
            RequestProblem: there is no room for it.
            BundleProblem: its file cannot be written; what was held before still is.
        """
        others = sum(held.nbytes for other, held in self._held.items() if other != name)
        if others + snapshot.nbytes > self._budget:
            raise RequestProblem(
                f"the saved states take {others} bytes, this one would take {snapshot.nbytes}, and"
                f" there is room for {self._budget}",
                "delete some, or start the server with a larger --state-memory",
                status=409,
                code="states_full",
            )
        if self._folder is not None:
            save(self._path(name), Saved(snapshot), self._bundle, self._fingerprint)
        self._held[name] = snapshot

    def delete(self, name: str) -> None:
        """Raises RequestProblem where there is none of this name."""
        self.get(name)
        if self._folder is not None:
            self._path(name).unlink(missing_ok=True)
        del self._held[name]

    def listed(self) -> list[dict[str, Any]]:
        """One object of each, by name."""
        return [self.described(name) for name in sorted(self._held)]

    def described(self, name: str) -> dict[str, Any]:
        """What the API tells of a state."""
        held = self.get(name)
        tokens = held.ids.size + len(held.pending)
        return {"id": name, "object": "state", "tokens": tokens, "bytes": held.nbytes}

    def _path(self, name: str) -> Path:
        assert self._folder is not None
        return self._folder / (name + SUFFIX)
