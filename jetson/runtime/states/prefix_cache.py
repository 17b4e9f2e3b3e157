"""States of texts that were read: a text that begins with one of them is read from there on.

A state is small and of constant size (a hybrid's grows with its text), so that many are held: of
the end of each answer, of a system prompt, of the pieces of a long prompt. They are found by their
tokens, which have to be equal one by one. What was used longest ago goes first.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from runtime.backends.protocol import Backend
from runtime.bundle import Bundle
from runtime.problems import BundleProblem
from runtime.states.fingerprint import digest, fingerprint
from runtime.states.slot import Snapshot
from runtime.states.state_file import SUFFIX, Saved, load, save

MIB = 1 << 20


class StateFolder:
    """The files of one cache; those of other models, methods, tokenizers and engines lie apart."""

    def __init__(self, root: Path, bundle: Bundle, backend: Backend) -> None:
        """Raises BundleProblem where the folder cannot be made."""
        self._bundle = bundle
        self._fingerprint = fingerprint(bundle, backend)
        self._folder = root / digest(self._fingerprint)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BundleProblem(
                f"the folder of states {root} cannot be made ({error.strerror})",
                "name another --state-dir",
            ) from error

    def newest_first(self) -> list[Path]:
        """Files of states by the time of their last use."""
        files = self._folder.glob(f"*{SUFFIX}")
        return sorted(files, key=lambda path: path.stat().st_mtime_ns, reverse=True)

    def read(self, path: Path) -> Snapshot:
        """Raises BundleProblem where the file is torn, altered or foreign."""
        return load(path, self._bundle, self._fingerprint).snapshot

    def write(self, name: str, snapshot: Snapshot) -> None:
        """Raises BundleProblem where it cannot be written."""
        save(self._folder / (name + SUFFIX), Saved(snapshot), self._bundle, self._fingerprint)

    def used(self, name: str) -> None:
        """Note the time of a use; a file that somebody took away is none."""
        path = self._folder / (name + SUFFIX)
        if path.exists():
            now = time.time_ns()  # what the kernel would set goes in steps of milliseconds
            os.utime(path, ns=(now, now))

    def remove(self, name: str) -> None:
        """A state that goes; a file that somebody took away is none."""
        (self._folder / (name + SUFFIX)).unlink(missing_ok=True)


class PrefixCache:
    """Snapshots by their tokens, as many as `budget_bytes` hold.

    notes    files of the folder that were refused, one sentence each
    """

    def __init__(self, budget_bytes: int, folder: StateFolder | None = None) -> None:
        """`folder`: what it holds is there from the start, and what is kept goes there, too."""
        self._budget = budget_bytes
        self._folder = folder
        self._held: OrderedDict[str, Snapshot] = OrderedDict()  # used last at the end
        self._bytes = 0
        self._unsaved: set[str] = set()
        self.notes: list[str] = []
        if folder:
            self._read(folder)

    def __len__(self) -> int:
        return len(self._held)

    @property
    def nbytes(self) -> int:
        """Bytes that the states take."""
        return self._bytes

    def longest(self, ids: Sequence[int] | np.ndarray) -> Snapshot | None:
        """The state of the longest text that `ids` (l,) begin with and go on from, if there is one.

        Its pending token is among `ids` or was never part of them: it is not to be run.
        """
        text = np.asarray(ids, np.int32)
        fitting = [name for name, held in self._held.items() if held.is_prefix_of(text)]
        if not fitting:
            return None
        name = max(fitting, key=lambda name: self._held[name].ids.size)
        self._held.move_to_end(name)
        if self._folder:
            self._folder.used(name)
        return self._held[name]

    def keep(self, snapshot: Snapshot) -> None:
        """Hold it, unless it alone is larger than the budget; of equal tokens the last one counts.

        No time for a disk is taken here: an answer is waited for. `save` writes.
        """
        if snapshot.nbytes > self._budget:
            return
        name = _name(snapshot.ids)
        self._insert(name, snapshot)
        while self._bytes > self._budget:
            oldest, gone = self._held.popitem(last=False)
            self._bytes -= gone.nbytes
            self._unsaved.discard(oldest)
            if self._folder:
                self._folder.remove(oldest)
        self._unsaved.add(name)

    def save(self) -> None:
        """Write what is held and not in the folder yet, if there is one.

        Raises:
            BundleProblem: a file cannot be written; the state is held all the same.
        """
        unsaved, self._unsaved = self._unsaved, set()
        if self._folder:
            for name in unsaved:
                self._folder.write(name, self._held[name])

    def clear(self) -> None:
        """Forget all states, those of the folder included."""
        for name in self._held:
            if self._folder:
                self._folder.remove(name)
        self._held.clear()
        self._unsaved.clear()
        self._bytes = 0

    def _read(self, folder: StateFolder) -> None:
        """As many of its files as fit, those first that were used last."""
        for path in folder.newest_first():
            try:
                snapshot = folder.read(path)
            except BundleProblem as problem:
                self.notes.append(str(problem))
                continue
            if self._bytes + snapshot.nbytes > self._budget:
                return
            name = _name(snapshot.ids)
            self._insert(name, snapshot)
            self._held.move_to_end(name, last=False)

    def _insert(self, name: str, snapshot: Snapshot) -> None:
        before = self._held.pop(name, None)
        self._bytes += snapshot.nbytes - (before.nbytes if before else 0)
        self._held[name] = snapshot


def _name(ids: np.ndarray) -> str:
    """Of the tokens; texts that differ do not share one."""
    return hashlib.sha256(ids.astype("<i4").tobytes()).hexdigest()[:32]
