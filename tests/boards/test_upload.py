"""The store on a board: what travels, what is in place when, and what never leaves the store."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from board_simulator.lab import Lab
from board_simulator.server import sshd_path

from ssdi8_edge.boards import programs as board
from ssdi8_edge.boards.link.connection import Connection
from ssdi8_edge.boards.link.local import LocalConnection
from ssdi8_edge.boards.store.upload import Cargo, Placed, prune, upload
from ssdi8_edge.ground.errors import BoardError, BundleError

SIZES = {"model.safetensors": 300_000, "golden.npz": 70_000, "plugins/a/b.cu": 10, "empty": 0}


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    lab = Lab(tmp_path, monkeypatch)
    yield lab
    lab.close()


@pytest.fixture
def connection(lab: Lab) -> Connection:
    """Over SSH where there is a server: the same programs run."""
    if sshd_path() is None:
        return LocalConnection(str(lab.store("board")))
    lab.serve("board")
    return lab.connect("board")


def make_cargo(folder: Path, name: str = "demo--edge", **sizes: int) -> Cargo:
    """A bundle of random files, as far as the store is concerned."""
    files = {}
    for path, size in (sizes or SIZES).items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(os.urandom(size))
        digest = hashlib.sha256(target.read_bytes()).hexdigest()
        files[path] = {"sha256": digest, "bytes": size}
    manifest = {"name": name, "files": files}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return Cargo.of(folder, manifest)


def assert_placed(placed: Placed, cargo: Cargo) -> None:
    """The folder holds the bundle and nothing else, whole."""
    folder = Path(placed.folder)
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert found == set(cargo.files)
    for path, listed in cargo.files.items():
        content = (folder / path).read_bytes()
        assert hashlib.sha256(content).hexdigest() == listed["sha256"]


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


# --------------------------------------------------------------------------------------------------
# what travels


def test_only_what_is_not_there_travels(connection: Connection, tmp_path: Path) -> None:
    first = make_cargo(tmp_path / "first")
    placed = upload(connection, first)
    assert_placed(placed, first)
    assert placed.sent_bytes == sum(SIZES.values()) + first.files["manifest.json"]["bytes"]

    before = snapshot(Path(connection.store))
    again = upload(connection, first)
    assert (again.folder, again.sent, again.sent_bytes) == (placed.folder, 0, 0)
    assert snapshot(Path(connection.store)) == before

    shutil.copytree(tmp_path / "first", tmp_path / "second")
    (tmp_path / "second/tokenizer.json").write_text("{}")
    files = dict(first.files) | {
        "tokenizer.json": {"sha256": hashlib.sha256(b"{}").hexdigest(), "bytes": 2}
    }
    del files["manifest.json"]
    manifest = {"name": "demo--edge", "files": files}
    (tmp_path / "second/manifest.json").write_text(json.dumps(manifest))
    second = Cargo.of(tmp_path / "second", manifest)
    other = upload(connection, second)
    assert other.sent == 2 and other.folder != placed.folder
    assert_placed(other, second)
    assert_placed(placed, first)


def test_an_upload_goes_on_where_it_stopped(connection: Connection, tmp_path: Path) -> None:
    cargo = make_cargo(tmp_path / "bundle")
    weights = (tmp_path / "bundle/model.safetensors").read_bytes()
    partial = Path(connection.store) / "partial" / cargo.files["model.safetensors"]["sha256"]
    partial.parent.mkdir(parents=True)
    partial.write_bytes(weights[:200_000])
    progress: list[tuple[int, int]] = []
    placed = upload(connection, cargo, on_bytes=lambda *args: progress.append(args))
    total = sum(listed["bytes"] for listed in cargo.files.values()) - 200_000
    assert placed.sent_bytes == total and progress[-1] == (total, total)
    assert_placed(placed, cargo)
    assert list(partial.parent.iterdir()) == []


@pytest.mark.parametrize("spoilt", ["begins otherwise", "x" * 400_000])
def test_a_bad_beginning_is_thrown_away(
    connection: Connection, tmp_path: Path, spoilt: str
) -> None:
    """Of what had arrived, or more than there should be; the whole file travels then."""
    cargo = make_cargo(tmp_path / "bundle")
    partial = Path(connection.store) / "partial" / cargo.files["model.safetensors"]["sha256"]
    partial.parent.mkdir(parents=True)
    partial.write_text(spoilt)
    placed = upload(connection, cargo)
    assert_placed(placed, cargo)


def test_a_file_altered_after_packing_is_refused(connection: Connection, tmp_path: Path) -> None:
    cargo = make_cargo(tmp_path / "bundle")
    with (tmp_path / "bundle/model.safetensors").open("r+b") as file:
        file.write(b"not what was packed")
    with pytest.raises(BundleError, match=r"model.safetensors is not the file that the manifest"):
        upload(connection, cargo)
    assert not list((Path(connection.store) / "bundles").iterdir())
    assert not (
        Path(connection.store) / "objects" / cargo.files["model.safetensors"]["sha256"]
    ).exists()
    (tmp_path / "bundle/model.safetensors").write_bytes(b"short")
    with pytest.raises(BundleError, match="became shorter"):
        upload(connection, cargo)


def test_two_deploys_of_one_bundle_at_once(connection: Connection, tmp_path: Path) -> None:
    """Each byte travels once, and both end with the same folder."""
    cargo = make_cargo(tmp_path / "bundle", weights=5_000_000, other=10)
    placed: list[Placed] = []
    threads = [
        threading.Thread(target=lambda: placed.append(upload(connection, cargo))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {each.folder for each in placed} == {placed[0].folder} and len(placed) == 3
    assert sum(each.sent_bytes for each in placed) == sum(f["bytes"] for f in cargo.files.values())
    assert_placed(placed[0], cargo)


# --------------------------------------------------------------------------------------------------
# what was altered over there


def test_what_was_altered_is_brought_anew(connection: Connection, tmp_path: Path) -> None:
    """By content with `rehash`, and always where a file is missing or of another size."""
    cargo = make_cargo(tmp_path / "bundle")
    placed = upload(connection, cargo)
    folder = Path(placed.folder)
    (folder / "engine").mkdir()
    (folder / "engine/model.engine").write_bytes(b"of the board")
    os.chmod(folder / "golden.npz", 0o644)
    with (folder / "golden.npz").open("r+b") as file:
        file.write(b"bad")
    assert upload(connection, cargo).sent == 0
    assert upload(connection, cargo, rehash=True).sent == 1
    (folder / "plugins/a/b.cu").unlink()
    assert upload(connection, cargo).sent == 0  # the object is there; only the link was gone
    os.chmod(folder / "model.safetensors", 0o644)
    os.truncate(folder / "model.safetensors", 100)
    assert upload(connection, cargo).sent == 1
    assert (folder / "engine/model.engine").read_bytes() == b"of the board"
    shutil.rmtree(folder / "engine")
    assert_placed(placed, cargo)


def test_a_clock_in_the_past_does_not_matter(connection: Connection, tmp_path: Path) -> None:
    """A board without a battery: everything there, and what comes, is from 1970 or from 2100."""
    cargo = make_cargo(tmp_path / "bundle")
    placed = upload(connection, cargo)
    for when in (1, 4_102_444_800):
        for path in Path(connection.store).rglob("*"):
            os.utime(path, (when, when))
        assert upload(connection, cargo).sent == 0
    assert upload(connection, cargo, rehash=True).sent == 0
    other = make_cargo(tmp_path / "other")
    assert_placed(upload(connection, other), other)
    assert_placed(placed, cargo)


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
@pytest.mark.skipif(sshd_path() is None, reason="sshd is missing: openssh-server")
def test_a_board_that_believes_it_is_1970(lab: Lab, tmp_path: Path) -> None:
    """With a clock that also jumps back by an hour at every look."""
    source = tmp_path / "clock.c"
    source.write_text(
        "#define _GNU_SOURCE\n#include <time.h>\n#include <sys/time.h>\n"
        "#include <sys/syscall.h>\n#include <unistd.h>\n"
        "static long now = 1000000;\n"
        "time_t time(time_t *t) { now -= 3600; if (t) *t = now; return now; }\n"
        "int gettimeofday(struct timeval *t, void *z) { now -= 3600; t->tv_sec = now;"
        " t->tv_usec = 0; return 0; }\n"
        "int clock_gettime(clockid_t c, struct timespec *t) {\n"
        "  if (c != CLOCK_REALTIME) return syscall(SYS_clock_gettime, c, t);\n"
        "  now -= 3600; t->tv_sec = now; t->tv_nsec = 0; return 0; }\n"
    )
    library = tmp_path / "clock.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    lab.serve("old", environment={"LD_PRELOAD": str(library)})
    connection = lab.connect("old")
    year = connection.run([sys.executable, "-c", "import time; print(time.gmtime().tm_year)"])
    assert year.stdout == "1970\n"
    cargo = make_cargo(tmp_path / "bundle")
    assert_placed(upload(connection, cargo), cargo)
    assert upload(connection, cargo).sent == 0
    with connection.lock("board", holder="me", wait_s=1):
        pass
    assert prune(connection, [])[0] == [cargo.name]


# --------------------------------------------------------------------------------------------------
# hostile names


@pytest.mark.parametrize(
    "path",
    [
        "../outside",
        "/tmp/outside",
        "a/../../outside",
        "a//b",
        "",
        ".",
        "a/./b",
        "a/",
        "nul\0",
    ],
)
def test_paths_that_lead_outside_are_refused(
    connection: Connection, tmp_path: Path, path: str
) -> None:
    """By the board itself, whatever the host let through."""
    cargo = make_cargo(tmp_path / "bundle")
    files = {**cargo.files, path: cargo.files["golden.npz"]}
    with pytest.raises(BoardError, match="cannot be a file of a bundle"):
        upload(connection, Cargo(cargo.folder, cargo.name, files))
    assert not list(Path(connection.store).rglob("outside"))
    assert not (Path(connection.store) / "bundles").exists()


@pytest.mark.parametrize("sha256", ["../outside", "", "A" * 64, "0" * 63, "0" * 64 + "\n"])
def test_hashes_that_are_names_are_refused(
    connection: Connection, tmp_path: Path, sha256: str
) -> None:
    cargo = make_cargo(tmp_path / "bundle")
    files = {**cargo.files, "x": {"sha256": sha256, "bytes": 1}}
    with pytest.raises(BoardError, match="cannot be a file of a bundle"):
        upload(connection, Cargo(cargo.folder, cargo.name, files))


@pytest.mark.parametrize("name", ["..", ".", "../x", "/x", "-rf", ".hidden", "a\nb", ""])
def test_bundle_names_stay_inside(connection: Connection, tmp_path: Path, name: str) -> None:
    cargo = make_cargo(tmp_path / "bundle")
    with pytest.raises(BoardError, match="cannot be a name in the store"):
        upload(connection, Cargo(cargo.folder, name, cargo.files))


def test_odd_names_arrive_as_they_are(connection: Connection, tmp_path: Path) -> None:
    """A name is a name: nothing in it is executed, and the folder's own name is made harmless."""
    odd = {
        "two words": 3,
        "new\nline": 3,
        "$(touch hacked)": 3,
        "-rf": 3,
        "'\"`": 3,
        "…/é🙂": 3,
        "..x": 3,
    }
    cargo = make_cargo(tmp_path / "bundle", name="../$(touch hacked)\n/-rf", **odd)
    placed = upload(connection, cargo)
    assert_placed(placed, cargo)
    assert Path(placed.folder).parent == Path(connection.store).resolve() / "bundles"
    assert not list(tmp_path.rglob("hacked"))


def test_links_in_the_store_are_not_followed(connection: Connection, tmp_path: Path) -> None:
    """Each place that is written could be a link to somewhere else."""
    cargo, store, outside = make_cargo(tmp_path / "b"), Path(connection.store), tmp_path / "outside"
    for folder in ("objects", "partial", "bundles", "locks"):
        shutil.rmtree(store, ignore_errors=True)
        shutil.rmtree(outside, ignore_errors=True)
        outside.mkdir()
        store.mkdir()
        (store / folder).symlink_to(outside)
        with pytest.raises(BoardError, match="no folder of its own"):
            upload(connection, cargo)
        assert list(outside.iterdir()) == []

    shutil.rmtree(store)
    placed = Path(upload(connection, cargo).folder)
    sha256 = cargo.files["golden.npz"]["sha256"]
    victim = outside / "victim"
    victim.write_bytes(b"v" * SIZES["golden.npz"])

    def replace(path: Path, target: Path) -> None:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        path.symlink_to(target)

    replace(placed / "golden.npz", victim)
    replace(store / "objects" / sha256, victim)
    replace(store / "partial" / sha256, victim)
    with pytest.raises(BoardError, match="Too many levels of symbolic links"):
        upload(connection, cargo)
    (store / "partial" / sha256).unlink()
    replace(placed / "plugins", outside)
    assert upload(connection, cargo).sent == 1
    assert_placed(Placed(str(placed), 0, 0), cargo)
    replace(placed, outside)
    upload(connection, cargo)
    assert_placed(Placed(str(placed), 0, 0), cargo)
    assert snapshot(outside) == {"victim": b"v" * SIZES["golden.npz"]}


# --------------------------------------------------------------------------------------------------
# full disks


@pytest.fixture
def small_disk(connection: Connection, tmp_path: Path) -> Iterator[Path]:
    """A disk of 32 MB under the store."""
    store = tmp_path / "small"
    store.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=32m", "none", str(store)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("mount is missing")
    if done.returncode != 0:
        pytest.skip(f"a small disk cannot be mounted (root is missing): {done.stderr.strip()}")
    connection.store = str(store)
    try:
        yield store
    finally:
        subprocess.run(["umount", "--lazy", str(store)], check=True)


def assert_nothing_in_place(store: Path) -> None:
    assert list((store / "bundles").iterdir()) == []
    assert list((store / "partial").iterdir()) == []
    for path in (store / "objects").iterdir():
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name


def test_too_little_disk_is_said_before_anything_travels(
    connection: Connection, small_disk: Path, tmp_path: Path
) -> None:
    cargo = make_cargo(tmp_path / "bundle", weights=40_000_000)
    sent: list[tuple[int, int]] = []
    with pytest.raises(BoardError, match=r"is full \(\d+ MB free; 48 MB are needed\)") as caught:
        upload(connection, cargo, on_bytes=lambda *args: sent.append(args))
    assert "\n" not in str(caught.value) and not sent
    assert_nothing_in_place(small_disk)


def test_a_disk_that_fills_up_meanwhile(
    connection: Connection, small_disk: Path, tmp_path: Path
) -> None:
    """One sentence; what was written is removed, so that the board can go on; then it is mended."""
    cargo = make_cargo(tmp_path / "bundle", a=1000, weights=20_000_000)

    def fill(done: int, total: int) -> None:
        if done > total // 2 and not (small_disk / "hog").exists():
            with (
                (small_disk / "hog").open("wb", buffering=0) as hog,
                contextlib.suppress(OSError),
            ):
                while True:
                    hog.write(bytes(1 << 16))

    with pytest.raises(BoardError, match=r"is full \(\d+ MB free\)") as caught:
        upload(connection, cargo, on_bytes=fill)
    assert "\n" not in str(caught.value)
    (small_disk / "hog").unlink()
    assert_nothing_in_place(small_disk)
    placed = upload(connection, cargo)
    assert_placed(placed, cargo)


# --------------------------------------------------------------------------------------------------
# prune


def test_prune_removes_what_nothing_refers_to(connection: Connection, tmp_path: Path) -> None:
    kept, old = make_cargo(tmp_path / "kept"), make_cargo(tmp_path / "old", name="old")
    place = upload(connection, kept)
    upload(connection, old)
    store = Path(connection.store)
    (store / "partial" / ("0" * 64)).write_bytes(b"left over")
    (store / "bundles/.leftover").mkdir()
    (store / "bundles" / old.name / "engine").mkdir()
    (store / "bundles" / old.name / "engine/plan").write_bytes(bytes(5000))
    removed, freed = prune(connection, [kept.name])
    assert removed == [old.name]
    assert freed >= sum(SIZES.values()) + 5000
    assert_placed(place, kept)
    assert {path.name for path in (store / "objects").iterdir()} == {
        listed["sha256"] for listed in kept.files.values()
    }
    assert list((store / "partial").iterdir()) == []
    assert [path.name for path in (store / "bundles").iterdir()] == [kept.name]
    assert upload(connection, kept).sent == 0
    assert prune(connection, [])[0] == [kept.name]
    assert list((store / "objects").iterdir()) == []


def test_prune_does_not_leave_the_store(connection: Connection, tmp_path: Path) -> None:
    cargo = make_cargo(tmp_path / "bundle")
    placed = upload(connection, cargo)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("x")
    (Path(placed.folder) / "link").symlink_to(outside)
    (Path(connection.store) / "bundles/link").symlink_to(outside)
    prune(connection, [])
    assert (outside / "precious").read_text() == "x"


def test_prune_and_deploy_do_not_meet(connection: Connection, tmp_path: Path) -> None:
    """Neither a deploy that is under way nor a measurement loses its files."""
    cargo = make_cargo(tmp_path / "bundle")
    placed = upload(connection, cargo)
    other = make_cargo(tmp_path / "other", weights=3_000_000)
    met: list[str] = []

    def meet(done: int, total: int) -> None:
        if not met:
            with pytest.raises(BoardError, match="a deploy is running there") as caught:
                prune(connection, [])
            met.append(str(caught.value))

    upload(connection, other, on_bytes=meet)
    with (
        connection.lock("board", holder="a sweep"),
        pytest.raises(BoardError, match="measurement or a build is running"),
    ):
        prune(connection, [])
    assert met
    assert_placed(placed, cargo)


# --------------------------------------------------------------------------------------------------
# programs for boards


@pytest.mark.parametrize("path", sorted(Path(board.__file__).parent.glob("*.py")), ids=str)
def test_board_programs_need_an_old_python_and_nothing_else(path: Path) -> None:
    """They run on a board that has neither the package nor a newer Python than 3.8."""
    tree = ast.parse(path.read_text(), feature_version=(3, 8))
    for node in tree.body:
        names: list[Any] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module]
        for name in names:
            assert name.partition(".")[0] in sys.stdlib_module_names, f"{path} imports {name}"
