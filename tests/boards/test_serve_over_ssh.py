"""serve on a board: a job over a real sshd, the way to its port, and its end."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from board_simulator.lab import Lab, needs_sshd
from board_simulator.server import free_port
from commands import ssdi8
from sweep_board import wait_for
from tiny_bundle import make_bundle

from ssdi8_edge.boards.link.forward import Forward
from ssdi8_edge.boards.link.local import LocalConnection
from ssdi8_edge.ground.errors import BoardError, UsageError

pytestmark = needs_sshd

COMMAND = [sys.executable, "-m", "ssdi8_edge", "serve"]


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    lab = Lab(tmp_path, monkeypatch)
    lab.serve("board")
    yield lab
    lab.close()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("portable") / "bundle")


def command(lab: Lab, *words: str) -> list[str]:
    return [*COMMAND, *words, "--host=board", f"--store={lab.store('board')}"]


def serve(lab: Lab, *words: str) -> subprocess.CompletedProcess[str]:
    return ssdi8(*command(lab, *words)[3:])


def ask(url: str) -> Any:
    body = json.dumps({"prompt": "a", "max_tokens": 6, "temperature": 0}).encode()
    with urllib.request.urlopen(f"{url}/v1/completions", body, timeout=30) as answer:
        return json.load(answer)["choices"][0]["text"]


def read_until(process: subprocess.Popen[str], pattern: str) -> re.Match[str]:
    said = []
    assert process.stderr is not None
    for line in process.stderr:
        said.append(line)
        if found := re.search(pattern, line):
            return found
    raise AssertionError("".join(said))


def test_a_server_outlives_the_link_and_the_command(lab: Lab, bundle: Path) -> None:
    """Started, used through the forwarded port, left, found again, used, and ended."""
    assert serve(lab, "--status").returncode == 1
    port = str(free_port())
    words = (str(bundle), f"--port={port}", "--threads=1", "--forward=0")
    answers = []
    for attempt in (words, ("--forward=0",)):  # the second one only looks at what runs
        process = subprocess.Popen(command(lab, *attempt), stderr=subprocess.PIPE, text=True)
        try:
            url = read_until(process, r"answers on (http://127.0.0.1:\d+)/")[1]
            assert not url.endswith(port)
            answers.append(ask(url))
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 130
        finally:
            process.kill()
            process.communicate()
        said = serve(lab, "--status")
        assert said.returncode == 0 and f"port {port}" in said.stderr
    assert answers[0] == answers[1] == ask(f"http://127.0.0.1:{port}")
    other = make_bundle(lab.folder / "other")
    named = json.loads((other / "manifest.json").read_text()) | {"name": "another"}
    (other / "manifest.json").write_text(json.dumps(named))
    refused = serve(lab, str(other))
    assert refused.returncode == 3 and "--stop" in refused.stderr
    assert "has ended" in serve(lab, "--stop").stderr
    assert "nothing is served" in serve(lab, "--stop").stderr
    with pytest.raises(OSError):
        ask(f"http://127.0.0.1:{port}")


def test_detached_with_keys_that_nobody_else_reads(lab: Lab, bundle: Path) -> None:
    keys = lab.folder / "keys"
    keys.write_text("a-key\n")
    port = str(free_port())
    done = serve(lab, str(bundle), f"--port={port}", f"--api-key-file={keys}", "--detach")
    try:
        assert done.returncode == 0, done.stderr
        with pytest.raises(urllib.error.HTTPError, match="401"):
            ask(f"http://127.0.0.1:{port}")
        sent = lab.store("board") / "serve.keys"
        assert sent.read_text() == "a-key\n" and sent.stat().st_mode & 0o077 == 0
    finally:
        assert serve(lab, "--stop").returncode == 0


def test_a_server_that_cannot_start_says_why(lab: Lab, bundle: Path) -> None:
    done = serve(lab, str(bundle), "--listen=0.0.0.0")
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 3 and "0.0.0.0" in last and "--api-key-file" in last
    assert serve(lab).returncode == 2
    assert serve(lab, "--port=a").returncode == 2


# --------------------------------------------------------------------------------------------------
# the way to a port


@pytest.fixture
def echo() -> Iterator[int]:
    """The port of a server that sends back what it got, when all of it has come."""
    listener = socket.create_server(("127.0.0.1", 0))

    def answer(caller: socket.socket) -> None:
        with caller:
            received = b"".join(iter(lambda: caller.recv(1 << 16), b""))
            caller.sendall(received)

    def work() -> None:
        while True:
            try:
                caller, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(caller,), daemon=True).start()

    threading.Thread(target=work, daemon=True).start()
    yield listener.getsockname()[1]
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()


def through(port: int, data: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port)) as sock:
        writer = threading.Thread(target=lambda: (sock.sendall(data), sock.shutdown(1)))
        writer.start()
        back = b"".join(iter(lambda: sock.recv(1 << 16), b""))
        writer.join()
        return back


def test_all_bytes_come_through_both_ways_at_once(lab: Lab, echo: int) -> None:
    payloads = [os.urandom(size) for size in (0, 1, 3_000_000, 70_000)]
    found: dict[int, bytes] = {}
    with Forward(lab.connect("board"), echo, 0) as forward:
        threads = [
            threading.Thread(target=lambda i=i, p=p: found.update({i: through(forward.port, p)}))
            for i, p in enumerate(payloads)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert [found[i] for i in range(4)] == payloads
    with pytest.raises(OSError):
        through(forward.port, b"a")


def test_a_new_link_is_made_after_one_that_was_lost(lab: Lab, echo: int) -> None:
    connection = lab.connect("board")
    with Forward(connection, echo, 0) as forward:
        assert through(forward.port, b"one") == b"one"
        connection.close()
        wait_for(lambda: through(forward.port, b"two") == b"two")


def test_ports_that_are_taken_or_closed(lab: Lab, echo: int) -> None:
    connection = lab.connect("board")
    with pytest.raises(UsageError, match="--forward"):
        Forward(connection, 1, echo)
    closed = free_port()
    with pytest.raises(BoardError, match=str(closed)):
        connection.open_stream(closed)
    with Forward(connection, closed, 0) as forward:
        assert through(forward.port, b"") == b""
    with pytest.raises(BoardError, match=str(closed)):
        LocalConnection().open_stream(closed)
