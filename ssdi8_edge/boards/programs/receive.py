"""Takes in a bundle: only content that is not there travels, and a bundle appears whole.

Content goes to partial/<sha256>, which grows over as many attempts as it takes; what has the right
hash, and is on the disk, is renamed to objects/<sha256>. When all of it is there, a new folder is
filled with hard links and renamed to bundles/<bundle>. A lock keeps prune and us apart.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
import stat
import tempfile
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ssdi8_edge.boards.programs.store import (
        checked_name,
        lock_file,
        refuse_os_error,
        store_folder,
    )
    from ssdi8_edge.boards.programs.wire import Wire

BLOCK = 1 << 20
PIECE = 1 << 16  # what a pipe holds; room for more is new memory with every read
BATCH = 1 << 23
SYNCS_AT_ONCE = 8
SPARE = 8 << 20  # bytes left free: folders, logs
WAIT_S = 60.0  # for prune, or for another deploy of the same content; more than its link may take
_SHA256 = re.compile(r"[0-9a-f]{64}\Z")


def main(wire: Wire) -> None:
    """Arguments: bundle (folder name), files {path: {sha256, bytes}}, rehash.

    With `rehash`, what is there is compared by content and dropped where it differs. Answers
    present, or wanted [[sha256, offset]]; takes those bytes in that order; answers mismatch for
    content that is not what it should be, else present.
    """
    given = wire.arguments
    name, files = checked_name(wire, given["bundle"]), given["files"]
    for path, listed in files.items():
        _check_listed(wire, path, listed)
    folders = {kind: store_folder(wire, kind) for kind in ("objects", "partial", "bundles")}
    bundle = os.path.join(folders["bundles"], name)
    store_lock = os.path.join(store_folder(wire, "locks"), "store")
    if lock_file(wire, store_lock, fcntl.LOCK_SH, WAIT_S) is None:
        wire.refuse("the store is being pruned", "wait until that is done, then repeat.")
    try:
        if given["rehash"]:
            _drop_altered(folders["objects"], bundle, files)
        missing = [path for path in files if not _is(os.path.join(bundle, path), files[path])]
        if missing:
            _take_in(wire, folders, {files[path]["sha256"]: files[path] for path in missing})
            _place(folders, bundle, files, missing)
        wire.answer(present=True, folder=bundle)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            _refuse_full(wire, folders["bundles"], getattr(error, "needed", 0))
        refuse_os_error(wire, error.filename or bundle, error)


def _check_listed(wire: Wire, path: str, listed: dict) -> None:
    parts = path.split("/")
    inside = path and "\0" not in path and not {"", ".", ".."} & set(parts)
    if not inside or not _SHA256.match(listed["sha256"]) or listed["bytes"] < 0:
        wire.refuse(f"{path!r} cannot be a file of a bundle", "pack the bundle again.")


def _is(path: str, listed: dict) -> bool:
    """Whether a file of the right size is there, by no link; its content was right when it came."""
    try:
        found = os.lstat(path)
    except OSError:
        return False
    real = os.path.realpath(path) == path
    return real and stat.S_ISREG(found.st_mode) and found.st_size == listed["bytes"]


def _drop_altered(objects: str, bundle: str, files: dict) -> None:
    for path, listed in files.items():
        for copy in (os.path.join(bundle, path), os.path.join(objects, listed["sha256"])):
            if _is(copy, listed) and _digest(copy).hexdigest() != listed["sha256"]:
                os.unlink(copy)


def _digest(path: str) -> hashlib._Hash:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(BLOCK), b""):
            digest.update(block)
    return digest


# --------------------------------------------------------------------------------------------------
# content


def _take_in(wire: Wire, folders: dict, contents: dict) -> None:
    """Receive what `objects` lacks. Locks are held until we end, so that nobody else appends."""
    wanted = []
    for sha256 in sorted(contents):
        path = os.path.join(folders["partial"], sha256)
        while not _is(os.path.join(folders["objects"], sha256), contents[sha256]):
            if _lock_partial(wire, path):
                if os.stat(path).st_size > contents[sha256]["bytes"]:
                    os.truncate(path, 0)
                wanted.append([sha256, os.stat(path).st_size])
                break
    try:
        _take_wanted(wire, folders, contents, wanted)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        for sha256, _ in wanted:
            path = os.path.join(folders["partial"], sha256)
            if os.path.exists(path) and (full or not os.stat(path).st_size):
                os.unlink(path)  # ours, as its lock is; a full disk needs the room more than we do
        raise


def _take_wanted(wire: Wire, folders: dict, contents: dict, wanted: list) -> None:
    needed = sum(contents[sha256]["bytes"] - offset for sha256, offset in wanted)
    disk = os.statvfs(folders["partial"])
    if wanted and disk.f_bavail * disk.f_frsize < needed + SPARE:
        raise _TooLittle(needed + SPARE)
    wire.answer(present=False, wanted=wanted)
    good = []
    for sha256, offset in wanted:
        if _receive(wire, folders, sha256, contents[sha256]["bytes"] - offset):
            good.append(sha256)
        else:
            wire.answer(mismatch=sha256, resumed=offset > 0)
    _keep(folders, good)
    if len(good) < len(wanted):
        wire.exit(0)


def _lock_partial(wire: Wire, path: str) -> bool:
    """Whether it is ours to append to; not where another deploy had it and has placed it."""
    descriptor = lock_file(wire, path, fcntl.LOCK_EX, WAIT_S)
    if descriptor is None:
        wire.refuse("another deploy brings the same bundle", "wait until it is done.")
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


def _receive(wire: Wire, folders: dict, sha256: str, left: int) -> bool:
    """Append `left` bytes to what is there; False, and nothing is there, if the hash is wrong."""
    partial = os.path.join(folders["partial"], sha256)
    digest = _digest(partial)
    try:
        with open(partial, "ab", buffering=0) as file:
            begun = file.tell()
            while left:
                piece = memoryview(wire.read(min(left, PIECE)))
                digest.update(piece)
                left -= len(piece)
                while piece:
                    piece = piece[file.write(piece) :]
                if file.tell() - begun >= BATCH:
                    # Starts writing to the disk now, so that little is left to wait for in _keep.
                    os.posix_fadvise(file.fileno(), begun, BATCH, os.POSIX_FADV_DONTNEED)
                    begun = file.tell()
    except OSError:
        os.unlink(partial)  # a full disk needs the room more than we do
        raise
    if digest.hexdigest() != sha256:
        os.unlink(partial)
        return False
    return True


def _keep(folders: dict, good: list) -> None:
    """Content becomes an object once the disk has it, so that a power cut leaves no half of one."""
    partials = [os.path.join(folders["partial"], sha256) for sha256 in good]
    with ThreadPoolExecutor(SYNCS_AT_ONCE) as pool:
        list(pool.map(_sync, partials))  # the disk takes many at once in the time of one
    for partial in partials:
        os.chmod(partial, 0o444)
        os.rename(partial, os.path.join(folders["objects"], os.path.basename(partial)))
    _sync(folders["objects"])


class _TooLittle(OSError):
    """The disk would be full before the end."""

    def __init__(self, needed: int) -> None:
        super().__init__(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.needed = needed


def _refuse_full(wire: Wire, folder: str, needed: int) -> None:
    disk = os.statvfs(folder)
    free = disk.f_bavail * disk.f_frsize / 1e6
    wants = f"; {needed / 1e6:.0f} MB are needed" if needed else ""
    wire.refuse(
        f"the disk of {folder} is full ({free:.0f} MB free{wants})",
        "free some space there, for instance by `ssdi8-edge deploy --prune`.",
    )


# --------------------------------------------------------------------------------------------------
# bundles


def _place(folders: dict, bundle: str, files: dict, missing: list) -> None:
    """A new bundle appears by one rename; in one that is there, each file does."""
    new = not os.path.lexists(bundle)
    scratch = tempfile.mkdtemp(dir=folders["bundles"], prefix=".")
    try:
        for number, path in enumerate(missing):
            source = os.path.join(folders["objects"], files[path]["sha256"])
            # By number beside a bundle that is there, as its own folders are not ours to trust.
            link = os.path.join(scratch, path if new else str(number))
            os.makedirs(os.path.dirname(link), exist_ok=True)
            os.link(source, link)
            if not new:
                final = os.path.join(_real_folder(bundle, path), os.path.basename(path))
                os.replace(link, final)
        if new:
            for folder, _, _ in os.walk(scratch):
                _sync(folder)
            os.rename(scratch, bundle)
        _sync(folders["bundles"])
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _real_folder(bundle: str, path: str) -> str:
    """The folder of a file in a bundle; a link on the way may lead elsewhere and is replaced."""
    folder = bundle
    for part in ["", *path.split("/")[:-1]]:
        folder = os.path.join(folder, part) if part else folder
        if os.path.islink(folder) or not os.path.isdir(folder):
            if os.path.lexists(folder):
                os.unlink(folder)
            os.mkdir(folder, 0o755)
    return folder


def _sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
