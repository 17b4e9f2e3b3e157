"""Reaching a board: ~/.ssh/config, keys, host keys, jump hosts, and one sentence per failure."""

from __future__ import annotations

import getpass
import os
import pty
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import paramiko
import pytest
from board_simulator.lab import Lab, needs_sshd
from board_simulator.server import free_port
from sweep_board import wait_for

from ssdi8_edge.boards.link import dial, ssh_login
from ssdi8_edge.boards.link.hosts import connect
from ssdi8_edge.boards.link.ssh_config import Settings
from ssdi8_edge.boards.link.ssh_link import SshChannel
from ssdi8_edge.ground.errors import BoardError, LinkLost, UsageError

pytestmark = needs_sshd


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    lab = Lab(tmp_path, monkeypatch)
    yield lab
    lab.close()


def assert_refused(lab: Lab, host: str, pattern: str, kind: type[BoardError] = BoardError) -> str:
    """One sentence, exit code 3; returns it."""
    with pytest.raises(BoardError, match=pattern) as caught:
        lab.connect(host).run(["true"])
    assert type(caught.value) is kind and caught.value.exit_code == 3
    assert "\n" not in str(caught.value) and "Traceback" not in str(caught.value)
    return str(caught.value)


# --------------------------------------------------------------------------------------------------
# host keys


def test_an_unknown_host_key_is_refused_with_its_fingerprint_and_what_to_do(lab: Lab) -> None:
    server = lab.serve("board", known=False, HashKnownHosts="no")
    said = assert_refused(lab, "board", "unknown host key")
    listed = subprocess.run(
        ["ssh-keygen", "-lf", server.folder / "host_key.pub"], capture_output=True, text=True
    )
    assert listed.stdout.split()[1] in said
    command = re.search(r"ssdi8-edge (doctor --host board --accept-new-host-key)$", said)
    assert command, said
    assert not lab.known_hosts.exists()
    code = "from ssdi8_edge.cli import main; main()"
    run = [sys.executable, "-c", code, *command[1].split()]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert lab.known_hosts.read_text() == server.known_host()
    assert lab.connect("board").run(["true"]).exit == 0


def test_a_new_key_is_hashed_where_the_configuration_says_so(lab: Lab) -> None:
    lab.serve("board", known=False, HashKnownHosts="yes")
    assert lab.connect("board", accept_new_host_key=True).run(["true"]).exit == 0
    assert lab.known_hosts.read_text().startswith("|1|")
    assert lab.connect("board").run(["true"]).exit == 0


@pytest.mark.parametrize("accept", [False, True])
def test_a_changed_host_key_is_always_refused(lab: Lab, accept: bool) -> None:
    """Whatever was asked for; the command of the remedy then removes the old key."""
    server = lab.serve("board", StrictHostKeyChecking="no", UserKnownHostsFile=str(lab.known_hosts))
    server.stop()
    server.new_key("host_key")
    server.start()
    before = lab.known_hosts.read_text()
    with pytest.raises(BoardError, match=r"not the one in .*known_hosts:1.*ssh-keygen") as caught:
        lab.connect("board", accept_new_host_key=accept).run(["true"])
    assert lab.known_hosts.read_text() == before
    remedy = re.search(r"ssh-keygen .*$", str(caught.value))
    assert remedy
    subprocess.run(shlex.split(remedy[0]), check=True, capture_output=True)
    assert lab.connect("board", accept_new_host_key=accept).run(["true"]).exit == 0


def test_the_kind_of_key_that_is_known_is_asked_for(lab: Lab) -> None:
    """A server with several keys does not look changed because it prefers another one."""
    rsa = lab.folder / "rsa"
    command = ["ssh-keygen", "-q", "-t", "rsa", "-b", "2048", "-N", "", "-f", rsa]
    subprocess.run(command, check=True)
    server = lab.serve("board", known=False, options=[f"HostKey {rsa}"])
    kind, key, *_ = (lab.folder / "rsa.pub").read_text().split()
    lab.known_hosts.write_text(f"[127.0.0.1]:{server.port} {kind} {key}\n")
    assert lab.connect("board").run(["true"]).exit == 0


# --------------------------------------------------------------------------------------------------
# configuration


def test_the_configuration_is_read_as_openssh_reads_it(lab: Lab) -> None:
    """Included files, patterns, the first value of an option, what --host says before all."""
    server = lab.serve("real")
    included = lab.home / ".ssh/lab.d"
    included.mkdir()
    (included / "boards").write_text(
        f"Host orin-*\n  HostName 127.0.0.1\n  Port {server.port}\n  IdentityFile={server.identity}"
    )
    lab.config.write_text(
        "Include lab.d/*\n# a comment\nHost orin-1\n  HostName 192.0.2.1\nHost *\n  Port 9\n"
    )
    assert lab.connect("orin-1").run(["echo", "here"]).stdout == "here\n"
    assert_refused(lab, "orin-1:1", r"orin-1:1 \(127.0.0.1:1\) refuses connections", LinkLost)
    assert_refused(lab, "nobody@orin-2", "does not let nobody in")


def test_own_known_hosts_and_alias_for_the_key(lab: Lab) -> None:
    server = lab.serve("board", known=False, HostKeyAlias="orin", UserKnownHostsFile="~/.ssh/lab")
    kind, key, *_ = server.host_key.split()
    (lab.home / ".ssh/lab").write_text(f"orin {kind} {key}\n")
    assert lab.connect("board").run(["true"]).exit == 0


@pytest.mark.parametrize(
    ("config", "pattern"),
    [
        ("Host board\n  ProxyCommand touch hacked\n", "ProxyCommand, which is not run here"),
        ("Host board\n  Port twenty\n", "cannot be read|and not to a number"),
        ("Host board\n  ProxyJump board\n", "jumphost loop via board|lies behind itself"),
        ("=\n", "cannot be read"),
    ],
)
def test_a_configuration_that_does_not_fit(lab: Lab, config: str, pattern: str) -> None:
    lab.config.write_text(config)
    with pytest.raises(UsageError, match=pattern):
        lab.connect("board").run(["true"])


@pytest.mark.parametrize("known", ["with space", "second"])
def test_several_known_hosts_files_with_quotes(lab: Lab, known: str) -> None:
    """A key in any of them counts, also against one that would be let in as new."""
    server = lab.serve("board", known=False, StrictHostKeyChecking="accept-new")
    lab.add(f'    UserKnownHostsFile "~/.ssh/with space" {lab.home}/.ssh/second\n')
    for name in ("with space", "second"):
        (lab.home / ".ssh" / name).touch()
    (lab.home / ".ssh" / known).write_text(server.known_host())
    assert lab.connect("board").run(["true"]).exit == 0
    server.stop()
    server.new_key("host_key")
    server.start()
    assert_refused(lab, "board", f"not the one in .*{known}:1")


def test_the_key_of_an_address_counts_where_the_configuration_says_so(lab: Lab) -> None:
    server = lab.serve("board", known=False, HostName="localhost", CheckHostIP="Yes")
    named = server.known_host().replace("127.0.0.1", "localhost")
    lab.known_hosts.write_text(named + server.known_host())
    lab.add("    AddressFamily inet\n    BindAddress 127.0.0.1\n")
    assert lab.connect("board").run(["true"]).exit == 0
    key = server.host_key.split()[1]
    other = new_identity(lab.folder / "other").with_name("other.pub").read_text().split()[1]
    lab.known_hosts.write_text(named + server.known_host().replace(key, other))
    assert_refused(lab, "board", "not the one in .*known_hosts:2")


@pytest.mark.parametrize("way", ["ssh://{user}@127.0.0.1:{gate},second", "gate,ssh://second"])
def test_a_chain_of_jump_hosts(lab: Lab, way: str) -> None:
    gate = lab.serve("gate")
    # Only the first one's own ProxyJump counts.
    lab.serve("second", ProxyJump="nowhere.invalid")
    jump = way.format(user=getpass.getuser(), gate=gate.port)
    board = lab.serve("board", ProxyJump=jump)
    lab.add(f"Host 127.0.0.1\n    IdentityFile {gate.identity}\n")
    connection = lab.connect("board")
    seen = connection.run(["sh", "-c", "echo $SSH_CONNECTION"]).stdout.split()
    assert seen[3] == str(board.port)
    assert "Accepted publickey" in gate.log


def test_a_circle_of_jump_hosts_is_found(lab: Lab) -> None:
    lab.add("Host a\n  ProxyJump b\nHost b\n  ProxyJump c\nHost c\n  ProxyJump a\n")
    with pytest.raises(UsageError, match=r"a lies behind itself \(a - b - c - a\)"):
        lab.connect("a").run(["true"])


def test_a_board_behind_a_jump_host_behind_another(lab: Lab) -> None:
    """Each with its own key and host key; the link is as good as a direct one."""
    lab.serve("gate")
    lab.serve("second", ProxyJump="gate")
    board = lab.serve("board", ProxyJump="second")
    data = os.urandom(300_000)
    connection = lab.connect("board")
    done = connection.run(["wc", "-c"], input=data)
    assert done.stdout.split() == ["300000"]
    assert connection.run(["sh", "-c", "echo $SSH_CONNECTION"]).stdout.split()[3] == str(board.port)


def test_a_jump_host_that_does_not_get_through(lab: Lab) -> None:
    lab.serve("gate")
    lab.add(f"Host far\n  HostName 127.0.0.1\n  Port {free_port()}\n  ProxyJump gate\n")
    assert_refused(lab, "far", r"jump host cannot reach far", LinkLost)
    lab.serve("closed", options=["AllowTcpForwarding no"])
    lab.add("Host further\n  HostName 127.0.0.1\n  ProxyJump closed\n")
    assert_refused(lab, "further", r"prohibited.*allows forwarding", LinkLost)


def test_an_unknown_jump_host_is_refused_too(lab: Lab) -> None:
    lab.serve("gate", known=False)
    lab.serve("board", ProxyJump="gate")
    assert_refused(lab, "board", "gate shows an unknown host key")


# --------------------------------------------------------------------------------------------------
# logging in


def test_a_key_that_nobody_knows(lab: Lab) -> None:
    """The command of the remedy reaches the same server: by the alias, and its port if named."""
    server, user = lab.serve("board"), getpass.getuser()
    server.new_key("identity")
    said = assert_refused(lab, "board", r"1 key was offered, it takes publickey")
    assert f"ssh-copy-id {user}@board;" in said
    said = assert_refused(lab, f"board:{server.port}", "1 key was offered")
    assert f"ssh-copy-id -p {server.port} {user}@board;" in said


def test_a_key_with_a_passphrase_and_nobody_to_ask(lab: Lab) -> None:
    server = lab.serve("board")
    add_passphrase(server.identity, "open sesame")
    assert_refused(lab, "board", r"0 keys were offered, .*identity cannot be opened.*ssh-add")


def add_passphrase(identity: Path, phrase: str) -> None:
    command = ["ssh-keygen", "-q", "-p", "-N", phrase, "-P", "", "-f", identity]
    subprocess.run(command, check=True)


def test_the_agent_holds_the_key(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that the configuration names and that has a passphrase on disk."""
    server = lab.serve("board")
    with agent_with(lab, server.identity) as sock:
        monkeypatch.setenv("SSH_AUTH_SOCK", str(sock))
        add_passphrase(server.identity, "open sesame")
        assert lab.connect("board").run(["true"]).exit == 0
        lab.config.write_text(lab.config.read_text().replace("IdentitiesOnly yes", ""))
        server.identity.unlink()
        assert lab.connect("board").run(["true"]).exit == 0


@contextmanager
def agent_with(lab: Lab, *identities: Path) -> Iterator[Path]:
    """An agent that holds keys, and its socket."""
    sock = lab.folder / "agent.sock"
    environment = {**os.environ, "SSH_AUTH_SOCK": str(sock)}
    command = ["ssh-agent", "-D", "-a", str(sock)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as agent:
        try:
            while (
                subprocess.run(["ssh-add", "-l"], env=environment, capture_output=True).returncode
                > 1
            ):
                time.sleep(0.01)
            for identity in identities:
                subprocess.run(["ssh-add", "-q", identity], check=True, env=environment)
            yield sock
        finally:
            agent.terminate()
            agent.wait()
            sock.unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("setting", "works"),
    [
        ('IdentityAgent "{}" # mine', True),
        ("IdentityAgent $LAB_SOCK", True),
        ("IdentityAgent none", False),
        ("IdentityAgent /nowhere", False),
        ("# the agent of the login", False),
    ],
)
def test_the_agent_that_the_configuration_names(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, setting: str, works: bool
) -> None:
    server = lab.serve("board")
    with agent_with(lab, server.identity) as sock:
        monkeypatch.setenv("LAB_SOCK", str(sock))
        server.identity.unlink()
        lab.add("    " + setting.format(sock) + "\n")
        if works:
            assert lab.connect("board").run(["true"]).exit == 0
        else:
            assert_refused(lab, "board", "0 keys were offered")
        monkeypatch.setenv("SSH_AUTH_SOCK", str(sock))
        if setting.startswith("#"):
            assert lab.connect("board").run(["true"]).exit == 0
        elif not works:
            assert_refused(lab, "board", "0 keys were offered")


class Asked:
    """Stands for the terminal; answers in turn, and remembers the questions."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *answers: str) -> None:
        self.questions: list[str] = []
        self._answers = iter(answers)
        monkeypatch.setattr(ssh_login, "_prompts", self)

    def ask(self, question: str) -> str | None:
        self.questions.append(question)
        return next(self._answers, None)

    def forget(self, question: str) -> None:
        pass


def new_identity(path: Path, *options: str, phrase: str = "") -> Path:
    command = ["ssh-keygen", "-q", "-N", phrase, "-f", str(path), *(options or ["-t", "ed25519"])]
    subprocess.run(command, check=True)
    return path


@pytest.mark.parametrize(("answers", "asked"), [(["sesame"], 1), (["wrong", "sesame"], 2)])
@pytest.mark.parametrize("public_file", [True, False])
def test_a_passphrase_is_asked_for_when_the_host_takes_the_key(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, answers: list[str], asked: int, public_file: bool
) -> None:
    server = lab.serve("board")
    add_passphrase(server.identity, "sesame")
    if not public_file:  # the private one holds its public half, too
        server.identity.with_name("identity.pub").unlink()
    terminal = Asked(monkeypatch, *answers)
    assert lab.connect("board").run(["true"]).exit == 0
    assert terminal.questions == [f"passphrase of {server.identity}"] * asked


@pytest.mark.parametrize(
    "options", [["-t", "ed25519"], ["-t", "rsa", "-b", "2048"], ["-t", "ecdsa", "-m", "PEM"]]
)
def test_no_passphrase_is_asked_for_a_key_that_the_host_does_not_want(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    server = lab.serve("board")
    locked = new_identity(lab.folder / "locked", *options, phrase="secret")
    text = lab.config.read_text()
    lab.config.write_text(text.replace("IdentityFile", f"IdentityFile {locked}\n    IdentityFile"))
    terminal = Asked(monkeypatch)
    assert lab.connect("board").run(["true"]).exit == 0
    locked.with_name("locked.pub").unlink()  # an old format then shows nothing of it
    assert lab.connect("board").run(["true"]).exit == 0
    server.new_key("identity")
    said = assert_refused(lab, "board", "keys were offered|key was offered")
    assert terminal.questions == []
    assert ("ssh-keygen -y -f" in said) is ("PEM" in options)


def test_a_passphrase_that_is_wrong_each_time(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    server = lab.serve("board", NumberOfPasswordPrompts="2")
    add_passphrase(server.identity, "sesame")
    terminal = Asked(monkeypatch, "a", "b", "c", "d")
    assert_refused(
        lab, "board", "identity cannot be opened: it has a passphrase, and what was typed"
    )
    assert len(terminal.questions) == 2


def test_a_batch_is_asked_nothing(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    server = lab.serve("board", options=["PasswordAuthentication yes"], BatchMode="yes")
    add_passphrase(server.identity, "sesame")
    terminal = Asked(monkeypatch, "sesame", "sesame")
    assert_refused(lab, "board", "the configuration forbids to ask")
    assert terminal.questions == []


@pytest.mark.parametrize(
    "setting",
    ["PasswordAuthentication no", "PreferredAuthentications publickey", "BatchMode Yes"],
)
def test_no_password_is_asked_for_where_the_configuration_forbids_it(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    server = lab.serve("board", options=["PasswordAuthentication yes"])
    server.new_key("identity")
    lab.add(f"    {setting}\n")
    terminal = Asked(monkeypatch, "secret")
    assert_refused(lab, "board", "1 key was offered")
    assert terminal.questions == []


def test_no_key_is_offered_where_the_configuration_forbids_it(lab: Lab) -> None:
    lab.serve("board", PubkeyAuthentication="No")
    assert_refused(lab, "board", "0 keys were offered, the configuration forbids publickey")


@pytest.mark.parametrize(
    ("place", "kind"), [("beside", "ed25519"), ("named", "rsa"), ("agent", "ecdsa")]
)
def test_a_certificate_lets_in(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, place: str, kind: str
) -> None:
    """Of a key with a passphrase, too, or one that the agent holds."""
    authority = new_identity(lab.folder / "authority")
    server = lab.serve("board", options=[f"TrustedUserCAKeys {authority}.pub"])
    (server.folder / "authorized_keys").write_text("")
    server.identity.unlink()
    new_identity(server.identity, "-t", kind)
    sign = ["ssh-keygen", "-q", "-s", str(authority), "-I", "me", "-n", getpass.getuser()]
    subprocess.run([*sign, str(server.identity) + ".pub"], check=True, capture_output=True)
    made = server.folder / "identity-cert.pub"
    if place != "beside":
        made.rename(lab.folder / "certificate")
        lab.add(f"    CertificateFile {lab.folder}/certificate\n")
    terminal = Asked(monkeypatch, "sesame")
    with agent_with(lab, *([server.identity] if place == "agent" else [])) as sock:
        lab.add(f"    IdentityAgent {sock}\n")
        add_passphrase(server.identity, "sesame")
        assert lab.connect("board").run(["true"]).exit == 0
    assert len(terminal.questions) == (0 if place == "agent" else 1)


def test_an_rsa_key_that_is_too_short_is_not_used(lab: Lab) -> None:
    server = lab.serve("board", RequiredRSASize="3072")
    server.identity.unlink()
    new_identity(server.identity, "-t", "rsa", "-b", "2048")
    (server.folder / "authorized_keys").write_text((server.folder / "identity.pub").read_text())
    assert_refused(lab, "board", "an RSA key of 2048 bits is too short")
    lab.config.write_text(lab.config.read_text().replace("3072", "2048"))
    assert lab.connect("board").run(["true"]).exit == 0
    lab.add("    PubkeyAcceptedAlgorithms ssh-ed25519\n")
    assert_refused(lab, "board", "0 keys were offered")


@pytest.mark.parametrize(
    ("setting", "pattern"),
    [
        ("Ciphers aes256-ctr", None),
        ("MACs hmac-sha2-512", None),
        ("KexAlgorithms curve25519-sha256", None),
        ("HostKeyAlgorithms ssh-ed25519", None),
        ("Ciphers -aes*-gcm@openssh.com", None),
        ("HostKeyAlgorithms ecdsa-sha2-nistp256", "no encryption in common"),
        ("Ciphers chacha20-poly1305@openssh.com", "none of the ciphers that are known here"),
        ("HostKeyAlgorithms sk-ssh-ed25519@openssh.com", "none of the keys"),
    ],
)
def test_algorithms_of_the_configuration(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, setting: str, pattern: str | None
) -> None:
    """A board that is refused before anything was agreed on keeps no socket open."""
    sockets, connected = [], dial._connected

    def remembered(settings: Settings) -> socket.socket:
        sockets.append(connected(settings))
        return sockets[-1]

    monkeypatch.setattr(dial, "_connected", remembered)
    lab.serve("board")
    lab.add(f"    {setting}\n")
    if pattern is None:
        assert lab.connect("board").run(["true"]).exit == 0
        return
    with pytest.raises((BoardError, UsageError), match=pattern):
        lab.connect("board").run(["true"])
    wait_for(lambda: all(one.fileno() == -1 for one in sockets))
    assert sockets


@pytest.mark.parametrize(
    ("host", "settings"),
    [
        ("board", "    Ciphers chacha20-poly1305@openssh.com\n"),
        ("board", "    HostKeyAlgorithms ecdsa-sha2-nistp256\n"),
        ("board", "    UserKnownHostsFile /nowhere\n"),
        ("board", "    IdentityFile /nowhere\n"),
        ("board:1", ""),
        ("far", "Host far\n  HostName 127.0.0.1\n  Port 1\n  ProxyJump board\n"),
    ],
)
def test_a_link_that_is_not_made_leaves_no_socket_open(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, host: str, settings: str
) -> None:
    """At whichever step it fails: none is left for the garbage collector to find."""
    made: list[socket.socket] = []

    class Kept(socket.socket):
        def __init__(self, *arguments: int) -> None:
            super().__init__(*arguments)
            made.append(self)

    server = lab.serve("board")
    lab.add(settings)
    if "Identity" in settings:
        server.identity.unlink()
    monkeypatch.setattr(dial.socket, "socket", Kept)
    with pytest.raises((BoardError, UsageError)):
        lab.connect(host).run(["true"])
    end = time.monotonic() + 5
    while any(sock.fileno() >= 0 for sock in made) and time.monotonic() < end:
        time.sleep(0.01)
    assert made and all(sock.fileno() < 0 for sock in made)


class PasswordServer(paramiko.ServerInterface):
    """Lets in by a password alone, and runs commands through a shell."""

    def __init__(self, methods: str) -> None:
        self.methods = methods

    def get_allowed_auths(self, username: str) -> str:
        return self.methods

    def check_auth_password(self, username: str, password: str) -> int:
        good = "password" in self.methods and password == "open sesame"
        return paramiko.AUTH_SUCCESSFUL if good else paramiko.AUTH_FAILED

    def check_auth_interactive(self, username: str, submethods: str) -> object:
        if "keyboard-interactive" not in self.methods:
            return paramiko.AUTH_FAILED
        return paramiko.InteractiveQuery("", "", ("Password: ", False))

    def check_auth_interactive_response(self, responses: list[str]) -> int:
        good = responses == ["open sesame"]
        return paramiko.AUTH_SUCCESSFUL if good else paramiko.AUTH_FAILED

    def check_channel_request(self, kind: str, chanid: int) -> int:
        return paramiko.OPEN_SUCCEEDED

    def check_channel_exec_request(self, channel: paramiko.Channel, command: bytes) -> bool:
        threading.Thread(target=self._run, args=(channel, command), daemon=True).start()
        return True

    def _run(self, channel: paramiko.Channel, command: bytes) -> None:
        process = subprocess.Popen(
            ["sh", "-c", command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        stdin, stdout = process.stdin, process.stdout
        assert stdin is not None and stdout is not None

        def feed() -> None:
            with suppress(OSError, ValueError):  # the program has ended, its pipe is closed
                while data := channel.recv(1 << 16):
                    stdin.write(data)
                    stdin.flush()

        threading.Thread(target=feed, daemon=True).start()
        with suppress(OSError):  # the client is gone
            with process:
                for line in stdout:
                    channel.sendall(line)
            channel.send_exit_status(process.returncode)
            channel.close()


@contextmanager
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


@pytest.mark.parametrize("methods", ["password", "keyboard-interactive", "publickey,password"])
def test_a_password_is_asked_for_on_the_terminal_and_shown_nowhere(lab: Lab, methods: str) -> None:
    with listener() as server:
        transports = []

        def serve() -> None:
            transport = paramiko.Transport(server.accept()[0])
            transports.append(transport)
            transport.add_server_key(paramiko.RSAKey.generate(2048))
            transport.start_server(server=PasswordServer(methods))

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        host = f"me@127.0.0.1:{server.getsockname()[1]}"
        code = (
            "from ssdi8_edge.boards.link.hosts import connect\n"
            f"c = connect({host!r}, accept_new_host_key=True, store={str(lab.folder)!r})\n"
            "print('said', c.call('gather', dict(files=[], names=[], tools={}, disk='/'),"
            " what='x')['simulated'])\n"
        )
        said = on_a_terminal([sys.executable, "-c", code], "open sesame\n")
        thread.join(10)
        for transport in transports:
            transport.close()
            transport.sock.close()
    assert "password of me on" in said and "said False" in said
    assert "sesame" not in said


def on_a_terminal(command: list[str], answer: str) -> str:
    """What a command says on a terminal whose user types `answer` once it asks."""
    child, terminal = pty.fork()
    if child == 0:
        os.execv(command[0], command)
    said = b""
    try:
        while piece := os.read(terminal, 1024):
            if b": " in piece and b"password" in said + piece:
                os.write(terminal, answer.encode())
            said += piece
    except OSError:  # how the end of a terminal shows
        pass
    os.close(terminal)
    assert os.waitpid(child, 0)[1] == 0, said.decode()
    return said.decode()


def test_without_a_terminal_no_password_is_asked_for(lab: Lab) -> None:
    lab.serve("board", options=["PasswordAuthentication yes"])
    lab.config.write_text(lab.config.read_text().replace("identity", "nothing"))
    assert_refused(lab, "board", r"0 keys were offered, it takes publickey or password")


# --------------------------------------------------------------------------------------------------
# what is no board


def test_nobody_there(lab: Lab) -> None:
    assert_refused(lab, f"127.0.0.1:{free_port()}", "refuses connections", LinkLost)
    assert_refused(lab, "no-such-board.invalid", "no host named no-such-board.invalid")


@pytest.mark.parametrize(
    "greeting",
    [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\0" * 5000, b"SSH-2.0-x\r\n" + b"\xff" * 99],
)
def test_a_port_that_answers_rubbish(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, greeting: bytes
) -> None:
    """Also one that takes the call and says nothing: it must not be waited for."""
    monkeypatch.setattr(dial, "STEP_S", 1.0)
    with listener() as server:

        def serve() -> None:
            client = server.accept()[0]
            client.sendall(greeting)
            time.sleep(3)
            client.close()

        threading.Thread(target=serve, daemon=True).start()
        host = f"127.0.0.1:{server.getsockname()[1]}"
        begin = time.monotonic()
        assert_refused(lab, host, "does not answer as an SSH server does", LinkLost)
        assert time.monotonic() - begin < 5


def test_ctrl_c_ends_the_wait_for_a_board_that_says_nothing(lab: Lab) -> None:
    """At once, with its own exit code: it is not taken for a network that failed."""
    with listener() as server:
        code = "from ssdi8_edge.cli import main; main()"
        host = f"127.0.0.1:{server.getsockname()[1]}"
        command = [sys.executable, "-c", code, "doctor", "--host", host]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            client = server.accept()[0]
            client.recv(10)
            begin = time.monotonic()
            process.send_signal(signal.SIGINT)
            said = process.communicate(timeout=20)[1]
            client.close()
        assert process.returncode == 130 and "stopped" in said
        assert time.monotonic() - begin < 5


class DyingChannel:
    """Of a link that dies while receiving tells the other side that there is room again."""

    def recv(self, most: int) -> bytes:
        raise EOFError

    recv_stderr = recv


def test_a_link_that_dies_while_receiving_ends_the_stream() -> None:
    channel = SshChannel(None, DyingChannel())  # type: ignore[arg-type]
    assert channel.read() == channel.read_errors() == b""


@pytest.mark.parametrize(
    ("command", "pattern"),
    [
        ("echo hello", "makes no sense"),
        ("cat /dev/zero", "makes no sense"),
        ("true", "makes no sense"),
        ("echo sorry >&2; exit 1", "failed on board: sorry"),
        ("kill -9 $$", "was killed on board"),
        ("sleep 30", "said nothing for 1 s|did not end within 1 s"),
    ],
)
def test_a_board_that_runs_something_else(lab: Lab, command: str, pattern: str) -> None:
    lab.serve("board", options=[f"ForceCommand {command}"])
    with pytest.raises(BoardError, match=pattern) as caught:
        lab.connect("board").run(["true"], timeout=1)
    assert "\n" not in str(caught.value)


def test_a_board_without_python(lab: Lab) -> None:
    lab.serve("board", environment={"PATH": "/nowhere"})
    assert_refused(lab, "board", "has no python3; install it there: sudo apt install python3")


def test_a_login_script_that_prints(lab: Lab) -> None:
    """What it says before our mark is skipped, however it looks."""
    lab.serve("board")
    noise = 'echo "{}"; echo Welcome; printf "no newline"; echo to stderr >&2\n'
    (lab.folder / "board/board/.bashrc").write_text(noise)
    (lab.folder / "board/board/.profile").write_text(noise)
    done = lab.connect("board").run(["echo", "mine"])
    assert done.stdout == "mine\n"


def test_a_full_session_limit_is_said(lab: Lab) -> None:
    lab.serve("board", options=["MaxSessions 0"])
    assert_refused(lab, "board", "does not let this user run commands")


# --------------------------------------------------------------------------------------------------
# lost links


def test_a_lost_link_is_said_at_once_and_made_again(lab: Lab) -> None:
    server = lab.serve("board")
    connection = lab.connect("board")
    assert connection.run(["true"]).exit == 0
    threading.Timer(0.5, server.kill_sessions).start()
    begin = time.monotonic()
    with pytest.raises(LinkLost, match="link to board was lost"):
        connection.run(["sleep", "20"])
    assert time.monotonic() - begin < 5
    assert connection.run(["echo", "back"]).stdout == "back\n"


def test_patience_outlasts_a_restart(lab: Lab) -> None:
    server = lab.serve("board")
    connection = lab.connect("board")
    said: list[str] = []
    connection.run(["true"])
    server.kill()
    threading.Timer(1.5, server.start).start()
    done = connection.patiently(lambda: connection.run(["echo", "back"]), say=said.append)
    assert done.stdout == "back\n" and said


def test_patience_has_an_end_and_is_for_links_alone(lab: Lab) -> None:
    host = f"127.0.0.1:{free_port()}"
    connection = lab.connect(host)
    begin = time.monotonic()
    with pytest.raises(LinkLost, match="refuses"):
        connection.patiently(lambda: connection.run(["true"]), patience_s=2.5)
    assert 0.9 < time.monotonic() - begin < 6
    with pytest.raises(BoardError, match="no host"):
        lab.connect("no-such-board.invalid").patiently(lambda: connect("x.invalid").run(["true"]))
