"""artifacts.py: a file or folder is the old one or the new one, and a full disk is one sentence."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.files import _BLOCK, sha256
from ssdi8_edge.ground import artifacts
from ssdi8_edge.ground.artifacts import key_of, whole_or_absent
from ssdi8_edge.ground.errors import Ssdi8Error
from ssdi8_edge.ground.shipped import shipped

SMALL_DISK = 64 * 1024


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB, which fills up for everyone, root included."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    command = ["mount", "-t", "tmpfs", "-o", f"size={SMALL_DISK}", "tmpfs", str(place)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"mounting a small tmpfs failed: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def write_folder(folder: Path, text: str) -> None:
    with whole_or_absent(folder) as path:
        (path / "inner").mkdir(parents=True)
        (path / "inner" / "file").write_text(text)


def contents(folder: Path) -> dict[str, str]:
    """Every file below `folder`, hidden ones included: leftovers show."""
    return {
        path.relative_to(folder).as_posix(): path.read_text()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# --------------------------------------------------------------------------------------------------
# whole or absent


def test_new_file_in_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    """The parents are made, and nothing but the file is left."""
    with whole_or_absent(tmp_path / "a" / "b" / "file") as path:
        path.write_text("new")
        assert not (tmp_path / "a" / "b" / "file").exists()
    assert contents(tmp_path) == {"a/b/file": "new"}


def test_file_replaces_a_file(tmp_path: Path) -> None:
    """Until the end the old content is what a reader sees."""
    final = tmp_path / "file"
    final.write_text("old")
    with whole_or_absent(final) as path:
        path.write_text("new")
        assert final.read_text() == "old"
    assert contents(tmp_path) == {"file": "new"}


def test_folder_replaces_a_folder_whole(tmp_path: Path) -> None:
    """Files of the old folder do not linger in the new one."""
    write_folder(tmp_path / "folder", "old")
    (tmp_path / "folder" / "extra").write_text("only in the old one")
    write_folder(tmp_path / "folder", "new")
    assert contents(tmp_path) == {"folder/inner/file": "new"}


def test_a_folder_may_give_way_to_a_file_and_back(tmp_path: Path) -> None:
    """A change of kind cannot be exchanged in one step; it still has to arrive."""
    place = tmp_path / "thing"
    write_folder(place, "folder")
    with whole_or_absent(place) as path:
        path.write_text("file")
    assert contents(tmp_path) == {"thing": "file"}


@pytest.mark.parametrize("stop", [ValueError, KeyboardInterrupt, SystemExit])
def test_whatever_happens_inside_keeps_the_old(tmp_path: Path, stop: type[BaseException]) -> None:
    """An exception, Ctrl-C and exit alike: old content, no leftovers, the cause unchanged."""
    write_folder(tmp_path / "folder", "old")
    with pytest.raises(stop), whole_or_absent(tmp_path / "folder") as path:
        path.mkdir()
        (path / "half").write_text("half")
        raise stop
    assert contents(tmp_path) == {"folder/inner/file": "old"}


def test_other_os_errors_are_not_hidden(tmp_path: Path) -> None:
    """Only a full or forbidden disk is turned into a sentence; a defect keeps its traceback."""
    with pytest.raises(FileNotFoundError), whole_or_absent(tmp_path / "file"):
        (tmp_path / "absent").read_text()
    assert contents(tmp_path) == {}


def test_leftovers_of_a_killed_build_are_removed(tmp_path: Path) -> None:
    """Scratch folders of the same artifact go, those of another artifact stay."""
    for name in (".file.abc123.partial", ".other.abc123.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_text("half")
    with whole_or_absent(tmp_path / "file") as path:
        path.write_text("new")
    assert contents(tmp_path) == {"file": "new", ".other.abc123.partial/half": "half"}


def test_exchange_leaves_no_moment_without_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill right after the swap finds the new folder; one right before, the old one."""
    write_folder(tmp_path / "folder", "old")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(artifacts, "_exchange", killed)
    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path / "folder", "new")
    assert contents(tmp_path) == {"folder/inner/file": "old"}


def test_exchange_without_kernel_support(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """File systems without RENAME_EXCHANGE: the old folder steps aside, and is removed."""
    write_folder(tmp_path / "folder", "old")

    class Libc:
        def renameat2(self, *_: object) -> int:
            return -1

    monkeypatch.setattr(artifacts.ctypes, "CDLL", lambda *_, **__: Libc())
    write_folder(tmp_path / "folder", "new")
    assert contents(tmp_path) == {"folder/inner/file": "new"}


# --------------------------------------------------------------------------------------------------
# disks


def test_full_disk_is_one_sentence_and_keeps_the_old(small_disk: Path) -> None:
    """A real ENOSPC while writing: the path, the remedy, exit code 2, the old artifact."""
    final = small_disk / "file"
    final.write_text("old")
    with pytest.raises(Ssdi8Error) as caught, whole_or_absent(final) as path:
        path.write_bytes(bytes(2 * SMALL_DISK))
    assert caught.value.exit_code == 2
    assert str(caught.value) == (
        f"cannot write {final}: No space left on device; "
        "free some space or choose another place; what was finished is kept."
    )
    assert contents(small_disk) == {"file": "old"}


def test_full_disk_in_a_folder(small_disk: Path) -> None:
    """The second file of a folder does not fit: the first one is not left behind either."""
    write_folder(small_disk / "folder", "old")
    with (
        pytest.raises(Ssdi8Error, match="No space left"),
        whole_or_absent(small_disk / "folder") as path,
    ):
        path.mkdir()
        (path / "first").write_bytes(bytes(SMALL_DISK // 2))
        (path / "second").write_bytes(bytes(SMALL_DISK))
    assert contents(small_disk) == {"folder/inner/file": "old"}


def test_read_only_disk(small_disk: Path) -> None:
    """Found before any work is done."""
    command = ["mount", "-o", "remount,ro", str(small_disk)]
    subprocess.run(command, check=True, capture_output=True)
    with pytest.raises(Ssdi8Error, match="Read-only file system; choose a folder") as caught:
        write_folder(small_disk / "folder", "new")
    assert caught.value.exit_code == 2


def test_folder_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for a folder that belongs to somebody else."""

    def refused(**_: object) -> str:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(artifacts.tempfile, "mkdtemp", refused)
    with pytest.raises(Ssdi8Error, match="Permission denied; choose a folder") as caught:
        write_folder(tmp_path / "folder", "new")
    assert caught.value.exit_code == 2
    assert contents(tmp_path) == {}


# --------------------------------------------------------------------------------------------------
# names and links


@pytest.mark.parametrize("size", [0, 1, _BLOCK, _BLOCK + 1])
def test_sha256_around_the_block_size(tmp_path: Path, size: int) -> None:
    """Reading in blocks loses nothing at their ends."""
    data = os.urandom(size)
    (tmp_path / "file").write_bytes(data)
    assert sha256(tmp_path / "file") == hashlib.sha256(data).hexdigest()


def test_key_depends_on_every_part_and_not_on_their_order() -> None:
    base = {"text": "a", "windows": [1, 2], "recipe": {"x": None, "y": 0.5}}
    reordered = {"recipe": {"y": 0.5, "x": None}, "windows": [1, 2], "text": "a"}
    assert key_of(base) == key_of(reordered)
    others = [
        {**base, "text": "b"},
        {**base, "windows": [2, 1]},
        {**base, "recipe": {"x": 0, "y": 0.5}},
        {**base, "more": 1},
    ]
    assert len({key_of(parts) for parts in (base, *others)}) == 5


def test_intact_means_every_listed_byte(tmp_path: Path) -> None:
    """A missing, shorter or altered file shows; the record itself and unlisted files do not."""
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "data").write_bytes(b"abc")
    (tmp_path / "record").write_text("{}")
    files = artifacts.listing(tmp_path, "record")
    assert list(files) == ["inner/data"] and files["inner/data"]["bytes"] == 3
    (tmp_path / "unlisted").touch()
    assert artifacts.is_intact(tmp_path, files)
    for damage in (b"abd", b"ab"):
        (tmp_path / "inner" / "data").write_bytes(damage)
        assert not artifacts.is_intact(tmp_path, files)
    (tmp_path / "inner" / "data").unlink()
    assert not artifacts.is_intact(tmp_path, files)


@pytest.mark.parametrize("name", ["jetson", "plugins", "profiles"])
def test_shipped_folders_are_found(name: str) -> None:
    assert any(shipped(name).iterdir())
