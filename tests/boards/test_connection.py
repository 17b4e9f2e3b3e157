"""What every connection guarantees, on this machine and over a real OpenSSH server on loopback."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from board_simulator.lab import Lab
from board_simulator.server import sshd_path
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ssdi8_edge.boards.link.connection import Connection
from ssdi8_edge.boards.link.lines import LineReader
from ssdi8_edge.boards.link.local import LocalConnection
from ssdi8_edge.boards.store.jobs import start_job
from ssdi8_edge.ground.errors import BoardBusy, BoardError, LinkLost

HOSTILE = [
    "two words",
    "new\nline",
    "$(touch hacked)",
    "`touch hacked`",
    "; touch hacked",
    "'; touch hacked; '",
    '"',
    "\\",
    "-rf",
    "*",
    "~",
    "!!",
    "é🙂",
    "\udcff",  # a byte that is no text
]


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    lab = Lab(tmp_path, monkeypatch)
    yield lab
    lab.close()


@pytest.fixture(params=["local", "ssh"])
def connection(request: pytest.FixtureRequest, lab: Lab) -> Connection:
    if request.param == "local":
        return LocalConnection(str(lab.folder / "store"))
    if sshd_path() is None:
        pytest.skip("sshd is missing: openssh-server")
    lab.serve("board")
    return lab.connect("board")


def wait_until(true: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def processes(matching: Callable[[Path], bool]) -> list[int]:
    """Those whose folder in /proc matches."""
    found = []
    for path in Path("/proc").iterdir():
        with contextlib.suppress(OSError):  # it has just ended
            if path.name.isdigit() and matching(path):
                found.append(int(path.name))
    return found


def sleepers(seconds: str) -> list[int]:
    """Processes that are exactly `sleep SECONDS`; no two tests sleep as long."""
    command = f"sleep\0{seconds}\0".encode()
    return processes(lambda path: (path / "cmdline").read_bytes() == command)


def holders(file: Path) -> list[int]:
    """Processes that have it open."""
    return processes(
        lambda path: any(os.readlink(fd) == str(file) for fd in (path / "fd").iterdir())
    )


# --------------------------------------------------------------------------------------------------
# commands


def test_a_command_gives_its_exit_status_and_both_streams(connection: Connection) -> None:
    lines: list[str] = []
    done = connection.run(
        ["sh", "-c", 'cat; echo "$WHO" >&2; exit 7'],
        input=b"one\ntwo",
        environment={"WHO": "me"},
        on_line=lines.append,
    )
    assert (done.exit, done.stdout, done.stderr) == (7, "one\ntwo", "me\n")
    assert lines == ["one", "two"]
    assert done.last_words() == "me"


def test_a_killed_command_reports_its_signal(connection: Connection) -> None:
    assert connection.run(["sh", "-c", "kill -9 $$"]).exit == 128 + signal.SIGKILL


def test_a_missing_command_is_a_result(connection: Connection) -> None:
    done = connection.run(["no such command"])
    assert done.exit == 127 and "no such command: No such file or directory" in done.stderr


def test_arguments_and_paths_arrive_as_they_are(connection: Connection, tmp_path: Path) -> None:
    """Nothing is taken for an option, a variable, a command or a second word."""
    program = "import sys; print(ascii(sys.argv[1:]))"
    done = connection.run([sys.executable, "-c", program, *HOSTILE], folder=str(tmp_path))
    assert done.stdout == ascii(HOSTILE) + "\n"
    path = "/".join([str(tmp_path), *HOSTILE])
    connection.write_bytes(path, b"content")
    assert connection.read_bytes(path) == b"content"
    assert Path(path).read_bytes() == b"content"
    assert not list(tmp_path.rglob("hacked"))


def test_large_streams_in_both_directions_at_once(connection: Connection) -> None:
    """More than any window or pipe holds; one that waits for the other would stop for ever."""
    data = os.urandom(1 << 20).hex().encode() * 4
    done = connection.run(["sh", "-c", "tee /dev/stderr"], input=data)
    assert done.stdout.encode() == data and done.stderr.encode() == data


def test_lines_come_while_the_command_runs(connection: Connection) -> None:
    begin, times = time.monotonic(), []
    connection.run(
        ["sh", "-c", "echo a; sleep 0.6; echo b"],
        on_line=lambda line: times.append(time.monotonic() - begin),
    )
    assert times[1] - times[0] > 0.4


def test_files_are_fetched_whole(connection: Connection, tmp_path: Path) -> None:
    data = os.urandom(3_000_000)
    (tmp_path / "there").write_bytes(data)
    connection.fetch(f"{tmp_path}/there", tmp_path / "here")
    assert (tmp_path / "here").read_bytes() == data
    with pytest.raises(BoardError, match="No such file"):
        connection.fetch(f"{tmp_path}/nothing", tmp_path / "not")
    assert not (tmp_path / "not").exists()
    with pytest.raises(BoardError, match="too many"):
        connection.read_bytes(f"{tmp_path}/there", limit=1000)
    with pytest.raises(BoardError, match="Is a directory"):
        connection.read_bytes(str(tmp_path))


def test_calls_overlap(connection: Connection) -> None:
    """Eight at once, from eight threads, each with its own answer."""
    connection.run(["true"])
    answers: dict[int, str] = {}

    def ask(number: int) -> None:
        answers[number] = connection.run(["sh", "-c", f"sleep 0.2; echo {number}"]).stdout

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {number: f"{number}\n" for number in range(8)}


# --------------------------------------------------------------------------------------------------
# deadlines


@pytest.mark.parametrize("deadline", ["timeout", "silence"])
def test_a_deadline_ends_the_command_over_there(connection: Connection, deadline: str) -> None:
    seconds = f"31.{os.getpid()}"
    begin = time.monotonic()
    with pytest.raises(BoardError, match=r"(did not end within|said nothing for) 0\.5 s") as caught:
        connection.run(["sh", "-c", f"sleep {seconds}; true"], **{deadline: 0.5})  # type: ignore[arg-type]
    assert time.monotonic() - begin < 15
    assert caught.value.exit_code == 3
    wait_until(lambda: not sleepers(seconds))


def test_output_holds_off_silence(connection: Connection) -> None:
    done = connection.run(
        ["sh", "-c", "for i in 1 2 3 4 5 6; do echo $i; sleep 0.3; done"], silence=1.2
    )
    assert done.exit == 0


def test_a_command_that_outlives_its_parent_does_not_hold_us_up(connection: Connection) -> None:
    """A daemon keeps the streams open; the exit status is there all the same."""
    begin = time.monotonic()
    seconds = f"21.{os.getpid()}"
    script = f"setsid sleep {seconds} & echo started; exit 4"
    done = connection.run(["sh", "-c", script], timeout=20)
    assert (done.exit, done.stdout) == (4, "started\n")
    assert time.monotonic() - begin < 12
    for pid in sleepers(seconds):
        os.kill(pid, signal.SIGKILL)


def test_the_death_of_the_host_ends_the_command(connection: Connection, lab: Lab) -> None:
    """kill -9 on this side leaves nothing running on the other."""
    seconds = f"32.{os.getpid()}"
    name = "board" if connection.name == "board" else "this-machine"
    program = (
        "from ssdi8_edge.boards.link.hosts import connect;"
        f"connect({name!r}).run(['sleep', {seconds!r}], timeout=None)"
    )
    host = subprocess.Popen([sys.executable, "-c", program])
    try:
        wait_until(lambda: bool(sleepers(seconds)))
    finally:
        host.kill()
        host.wait()
    wait_until(lambda: not sleepers(seconds))


# --------------------------------------------------------------------------------------------------
# locks and jobs


def test_a_lock_is_held_by_one(connection: Connection) -> None:
    with connection.lock("board", holder="the first sweep") as lock:
        lock.check()
        with (
            pytest.raises(BoardBusy, match="in use by the first sweep"),
            connection.lock("board", holder="another"),
        ):
            pass
        with connection.lock("other", holder="x"):
            pass
    for _ in range(3):  # it is free when its block has ended, not some time after
        with connection.lock("board", holder="another"):
            pass


def test_shared_locks_keep_out_exclusive_ones(connection: Connection) -> None:
    with (
        connection.lock("store", holder="a", shared=True),
        connection.lock("store", holder="b", shared=True),
        pytest.raises(BoardBusy),
        connection.lock("store", holder="c"),
    ):
        pass


def test_a_lock_whose_program_is_gone_says_so(connection: Connection) -> None:
    with connection.lock("board", holder="me") as lock:
        for pid in holders(Path(connection.store) / "locks/board"):
            os.kill(pid, signal.SIGKILL)

        def lost() -> bool:
            try:
                lock.check()
            except LinkLost:
                return True
            return False

        wait_until(lost)


def test_a_job_is_picked_up_and_its_log_read_once(connection: Connection) -> None:
    command = ["sh", "-c", "for i in 1 2 3 4; do echo $i; sleep 0.2; done; exit 5"]
    assert not start_job(connection, "build", command).picked_up
    job = start_job(connection, "build", command)
    assert job.picked_up and job.state().running
    lines: list[str] = []
    assert job.follow(lines.append) == 5
    assert lines == ["1", "2", "3", "4"]
    state = job.state()
    assert (state.running, state.exit) == (False, 5)
    assert job.log() == "1\n2\n3\n4\n"
    again = start_job(connection, "build", ["sh", "-c", "echo new"])
    assert not again.picked_up and again.follow(lambda line: None) == 0
    assert again.log() == "new\n"


def test_a_killed_job_has_no_status(connection: Connection) -> None:
    seconds = f"33.{os.getpid()}"
    job = start_job(connection, "build", ["sh", "-c", f"echo going; sleep {seconds}"])
    wait_until(lambda: "going" in job.log())
    job.cancel()
    assert job.state().running is False
    with pytest.raises(BoardError, match="ended without an exit status"):
        job.follow(lambda line: None)
    assert not sleepers(seconds)


def test_a_job_holds_its_lock(connection: Connection) -> None:
    """Nothing measures while an engine is built, and no build begins while something measures."""
    job = start_job(connection, "build", ["sleep", "34.25"], lock="board")
    with pytest.raises(BoardBusy, match="job build"), connection.lock("board", holder="sweep"):
        pass
    job.cancel()
    with connection.lock("board", holder="sweep"):
        with pytest.raises(BoardBusy, match="sweep"):
            start_job(connection, "build", ["true"], lock="board")
        assert not job.state().running


def test_a_missing_program_ends_its_job_with_a_reason(connection: Connection) -> None:
    job = start_job(connection, "build", ["no such thing"])
    assert job.follow(lambda line: None) == 127
    assert "No such file" in job.log()


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".hidden", "-x", "a b", "x\n", "x" * 300])
def test_names_stay_inside_the_store(connection: Connection, name: str, lab: Lab) -> None:
    with pytest.raises(BoardError, match="cannot be a name"):
        start_job(connection, name, ["true"])
    with pytest.raises(BoardError, match="cannot be a name"), connection.lock(name, holder="x"):
        pass


def test_a_store_that_leads_elsewhere_is_refused(connection: Connection, tmp_path: Path) -> None:
    """A link in place of one of its folders is not followed."""
    store, outside = Path(connection.store), tmp_path / "outside"
    store.mkdir()
    outside.mkdir()
    (store / "jobs").symlink_to(outside)
    with pytest.raises(BoardError, match="no folder of its own"):
        start_job(connection, "build", ["true"])
    (store / "locks").mkdir()
    (store / "locks/board").symlink_to(outside / "lock")
    with pytest.raises(BoardError, match="locks/board"), connection.lock("board", holder="x"):
        pass
    assert list(outside.iterdir()) == []


# --------------------------------------------------------------------------------------------------
# lines


@given(st.text(), st.lists(st.integers(0, 200)))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_lines_are_the_same_however_they_are_cut(text: str, cuts: list[int]) -> None:
    data = text.encode("utf-8", "surrogatepass")
    lines: list[str] = []
    reader = LineReader(lines.append)
    places = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    for start, end in itertools.pairwise(places):
        reader.add(data[start:end])
    reader.end()
    whole = data.decode("utf-8", "replace")
    assert reader.text == whole and reader.bytes == len(data)
    expected = whole.split("\n")
    assert lines == [x.removesuffix("\r") for x in expected[: len(expected) - (expected[-1] == "")]]
