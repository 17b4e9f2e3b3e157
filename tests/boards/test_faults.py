"""Everything that can happen to a link: whatever it is, the next attempt finishes the work."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from board_simulator.lab import FAULT_SEEDS, PATH, Lab, needs_sshd
from board_simulator.proxy import Fault, Proxy
from board_simulator.server import SshServer
from test_deploy import (
    FAKE_BUILD,
    FAKE_RUN,
    FAKE_SETUP,
    pack_for_tensorrt,
    with_tensorrt,
)
from tiny_bundle import make_bundle

from ssdi8_edge.boards.link import connection as connection_module
from ssdi8_edge.boards.link import dial, process, ssh_link
from ssdi8_edge.boards.link.connection import Connection
from ssdi8_edge.boards.store.deploy import deploy
from ssdi8_edge.boards.store.jobs import start_job
from ssdi8_edge.ground.errors import LinkLost

pytestmark = needs_sshd

STEPS = 40


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    lab = Lab(tmp_path, monkeypatch)
    monkeypatch.setattr(connection_module, "_RETRY_S", (0.05, 0.1))
    yield lab
    lab.close()


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a bundle for TensorRT whose tools are stand-ins, and some content to carry."""
    run = tmp_path_factory.mktemp("run")
    bundle = make_bundle(run / "bundle")
    for name, text in (
        ("setup.sh", FAKE_SETUP),
        ("build_engine.py", FAKE_BUILD),
        ("run_engine.py", FAKE_RUN),
    ):
        (bundle / name).write_text(text)
    (bundle / "weights.more").write_bytes(random.Random(0).randbytes(1_500_000))
    pack_for_tensorrt(bundle, steps=STEPS)
    return run


class Witness:
    """Looks at a store all the time: what is in place must be whole at every moment."""

    def __init__(self, store: Path, manifest: dict[str, dict[str, object]]) -> None:
        self.problems: list[str] = []
        self.looks = 0
        self._store = store
        self._files = manifest
        self._sizes = {str(f["sha256"]): f["bytes"] for f in manifest.values()}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look_on, daemon=True)
        self._thread.start()

    def _look_on(self) -> None:
        while not self._over.wait(0.002):
            self.looks += 1
            try:
                self._look()
            except FileNotFoundError:
                continue  # renamed or removed while we looked

    def _look(self) -> None:
        objects, bundles = self._store / "objects", self._store / "bundles"
        for path in objects.iterdir() if objects.exists() else ():
            size = path.stat().st_size
            if size != self._sizes.get(path.name, size):
                self.problems.append(f"object {path.name} has {size} bytes")
        for bundle in bundles.iterdir() if bundles.exists() else ():
            if bundle.name.startswith("."):
                continue
            for name, listed in self._files.items():
                found = bundle / name
                if not found.exists() or found.stat().st_size != listed["bytes"]:
                    self.problems.append(f"{name} is not whole in {bundle.name}")
            engine = bundle / "engine/0123/model.engine"
            if engine.exists() and engine.stat().st_size != 6000:
                self.problems.append("half an engine")

    def end(self) -> None:
        self._over.set()
        self._thread.join()
        assert self.looks and self.problems == []


@pytest.mark.parametrize("seed", range(FAULT_SEEDS or 4))
def test_a_deploy_with_faults_at_random_moments(
    lab: Lab, run_folder: Path, seed: int, record_property: Callable[[str, object], None]
) -> None:
    """Cuts, resets, flipped bits; sessions or the whole server killed, in upload and build.

    No half-written file is ever in place, the build runs once, its log is read once, and the deploy
    ends as if nothing had happened; the next one moves nothing.
    """
    chance = random.Random(seed)
    server = lab.serve("board", environment=with_tensorrt(lab.folder))
    # A login takes about 5 kB, the bundle 1.6 MB: some faults hit logins, most what follows.
    faults = [
        Fault(int(10 ** chance.uniform(2, 6.1)), chance.choice(["cut", "reset", "flip"]))
        for _ in range(chance.randint(1, 6))
    ]
    proxy = Proxy(server.port, faults)
    lab.config.write_text(lab.config.read_text().replace(str(server.port), str(proxy.port)))
    lab.known_hosts.write_text(server.known_host().replace(str(server.port), str(proxy.port)))
    manifest = json.loads((run_folder / "bundle/manifest.json").read_text())
    witness = Witness(lab.store("board"), manifest["files"])
    # Moments: bytes sent in one attempt of the upload, steps of the build.
    in_upload = sorted(chance.randrange(1_600_000) for _ in range(chance.randint(0, 2)))
    in_build = sorted(chance.randrange(STEPS) for _ in range(chance.randint(0, 2)))
    killed: list[str] = []
    lines: list[str] = []

    def kill() -> None:
        killed.append(chance.choice(["sessions", "server"]))
        if killed[-1] == "sessions":
            server.kill_sessions()
        else:
            server.kill()
            server.start()

    def on_bytes(done: int, total: int) -> None:
        if in_upload and done > in_upload[0]:
            in_upload.pop(0)
            kill()

    def on_line(line: str) -> None:
        lines.append(line)
        if in_build and line == f"step {in_build[0]}":
            in_build.pop(0)
            kill()

    here = lab.folder / "run"
    shutil.copytree(run_folder, here)
    connection = lab.connect("board")
    said: list[str] = []
    placed = deploy(connection, here, on_line=on_line, on_bytes=on_bytes, say=said.append)
    witness.end()
    record_property("faults", len(proxy.met))
    record_property("killed sessions", killed.count("sessions"))
    record_property("killed servers", killed.count("server"))
    record_property("lost links", sum("trying again" in line for line in said))
    record_property("looks", witness.looks)
    assert placed.verification is not None and placed.verification["verified"] is True
    assert [line for line in lines if "step" in line] == [f"step {i}" for i in range(STEPS)]
    folder = Path(placed.folder)
    assert (folder / "started").read_text() == "x"
    for name, listed in manifest["files"].items():
        content = (folder / name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == listed["sha256"]
    assert list((lab.store("board") / "partial").iterdir()) == []
    assert (Path(placed.results) / "model.engine").read_bytes() == b"engine" * 1000
    again = deploy(connection, here)
    assert again.sent_bytes == 0 and again.engine is not None and not again.engine["built"]
    proxy.close()


def test_a_peer_that_falls_silent_is_given_up(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wire stays up and nothing comes: no error of the network would ever tell."""
    monkeypatch.setattr(ssh_link, "LOST_S", 1.5)
    monkeypatch.setattr(ssh_link, "PULSE_S", 0.3)
    server = lab.serve("board")
    proxy = Proxy(server.port, [Fault(8_000, "silence")])
    lab.config.write_text(lab.config.read_text().replace(str(server.port), str(proxy.port)))
    lab.known_hosts.write_text(server.known_host().replace(str(server.port), str(proxy.port)))
    connection = lab.connect("board")
    begin = time.monotonic()
    with pytest.raises(LinkLost, match=r"nothing was heard for|link to board was lost"):
        connection.run(["sleep", "60"], timeout=None)
    assert time.monotonic() - begin < 20
    assert connection.run(["echo", "back"]).stdout == "back\n"
    proxy.close()


# --------------------------------------------------------------------------------------------------
# networks


class Network:
    """A board in a network of its own, at the other end of a cable that can be pulled."""

    def __init__(self, lab: Lab) -> None:
        self.space = f"ssdi8-{os.getpid()}"
        self.cable = f"sb{os.getpid() % 100000}"
        # Of the range that is set apart for tests of networks.
        self.here, self.there = "198.18.77.1", "198.18.77.2"
        for command in (
            f"ip netns add {self.space}",
            f"ip link add {self.cable} type veth peer name {self.cable}b netns {self.space}",
            f"ip addr add {self.here}/30 dev {self.cable}",
            f"ip link set {self.cable} up",
            f"ip -n {self.space} addr add {self.there}/30 dev {self.cable}b",
            f"ip -n {self.space} link set {self.cable}b up",
            f"ip -n {self.space} link set lo up",
        ):
            subprocess.run(command.split(), check=True, capture_output=True)
        self.server = SshServer(
            lab.folder / "far",
            address=self.there,
            prefix=["ip", "netns", "exec", self.space],
            environment={"HOME": str(lab.folder), "PATH": PATH, **with_tensorrt(lab.folder)},
        )
        self.server.start()
        lab.add(self.server.client_config("far"), self.server.known_host())

    def pull(self) -> None:
        self._set("down")

    def plug_in(self) -> None:
        self._set("up")

    def _set(self, state: str) -> None:
        command = f"ip -n {self.space} link set {self.cable}b {state}"
        subprocess.run(command.split(), check=True)

    def close(self) -> None:
        self.server.stop()
        subprocess.run(["ip", "netns", "del", self.space], check=False)
        subprocess.run(["ip", "link", "del", self.cable], check=False, capture_output=True)


@pytest.fixture
def network(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> Iterator[Network]:
    if shutil.which("ip") is None:
        pytest.skip("ip is missing: iproute2")
    probe = subprocess.run(["ip", "netns", "add", f"probe-{os.getpid()}"], capture_output=True)
    if probe.returncode != 0:
        pytest.skip("network namespaces cannot be made: root is missing")
    subprocess.run(["ip", "netns", "del", f"probe-{os.getpid()}"], check=True)
    network = Network(lab)
    yield network
    network.close()


def test_a_pulled_cable_is_noticed_and_the_work_goes_on(
    lab: Lab, network: Network, run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pulled in the middle of an upload, which goes on where it was once the cable is back."""
    monkeypatch.setattr(ssh_link, "LOST_S", 2.0)
    monkeypatch.setattr(ssh_link, "PULSE_S", 0.5)
    monkeypatch.setattr(dial, "STEP_S", 1.0)
    connection = lab.connect("far")
    pulled: list[float] = []

    def on_bytes(done: int, total: int) -> None:
        if done > 700_000 and not pulled:
            network.pull()
            pulled.append(time.monotonic())
            threading.Timer(4.0, network.plug_in).start()

    here = lab.folder / "run"
    shutil.copytree(run_folder, here)
    said: list[str] = []
    placed = deploy(connection, here, on_bytes=on_bytes, say=said.append)
    assert pulled and any("was lost" in line for line in said)
    assert any("nothing was heard" in line or "does not answer" in line for line in said), said
    assert placed.verification is not None and placed.verification["verified"] is True


def test_a_board_that_is_unplugged_is_said_to_be_so(
    lab: Lab, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dial, "STEP_S", 1.0)
    network.pull()
    with pytest.raises(LinkLost, match=r"far \(198.18.77.2:\d+\) does not answer|no way to far"):
        lab.connect("far").run(["true"])


def test_a_network_that_does_not_lead_there_is_said_to_be_so(lab: Lab, network: Network) -> None:
    """No route: told at once."""
    route = ["unreachable", f"{network.there}/32"]
    subprocess.run(["ip", "route", "add", *route], check=True)
    try:
        with pytest.raises(LinkLost, match=r"no way to far \(.*\) \(No route to host\)") as caught:
            lab.connect("far").run(["true"])
    finally:
        subprocess.run(["ip", "route", "del", *route], check=True)
    assert caught.value.exit_code == 3
    assert lab.connect("far").run(["true"]).exit == 0


def test_a_silent_cut_frees_the_board(
    lab: Lab, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither side is told that the other is gone: lock and command end all the same, a job not."""
    text = connection_module._program_text
    sooner = lambda name: text(name).replace("SILENCE_S = 30", "SILENCE_S = 3")  # noqa: E731
    monkeypatch.setattr(connection_module, "_program_text", sooner)
    monkeypatch.setattr(process, "HEARTBEAT_S", 0.5)
    monkeypatch.setattr(ssh_link, "LOST_S", 3.0)
    monkeypatch.setattr(ssh_link, "PULSE_S", 0.5)
    connection = lab.connect("far")
    seconds = f"77.{os.getpid()}"
    outcome: list[Exception] = []

    def work() -> None:
        try:
            connection.run(["sh", "-c", f"sleep {seconds}; true"], timeout=None)
        except LinkLost as error:
            outcome.append(error)

    job = start_job(connection, "build", ["sleep", f"78.{os.getpid()}"])
    with connection.lock("board", holder="me") as lock:
        worker = threading.Thread(target=work)
        worker.start()
        wait_until(lambda: runs(f"sleep {seconds}"), 10)
        lock.check()
        network.pull()
        worker.join(20)
        assert outcome
        wait_until(lambda: not runs(f"sleep {seconds}"), 20)
        with pytest.raises(LinkLost):
            lock.check()
    network.plug_in()
    other: Connection = lab.connect("far")

    def take_lock() -> None:
        with other.lock("board", holder="you", wait_s=5):
            pass

    other.patiently(take_lock)  # the network needs a moment, too
    assert job.state().running
    job.cancel()


def wait_until(true: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


def runs(command: str) -> bool:
    """Whether a process runs that is exactly `command`."""
    wanted = command.replace(" ", "\0").encode() + b"\0"
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes() == wanted:
                return True
        except OSError:
            continue
    return False
