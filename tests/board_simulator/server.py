"""A real OpenSSH server on loopback with keys, configuration and port of its own."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

START_S = 10.0
DOWN_S = 1.0  # of a reboot


def sshd_path() -> str | None:
    """Where sshd is; it wants to be started by its full path, and is often not on PATH."""
    return shutil.which("sshd", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")


def free_port() -> int:
    """A port of loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class SshServer:
    """sshd that lets this user in with one key.

    Args:
        folder: for keys, configuration and log; made where missing.
        environment: of every session.
        options: further lines of sshd_config, before the usual ones, so that they win.
        address: to listen on.
        prefix: command in front of sshd, such as `ip netns exec NAME`.

    Attributes:
        identity: the user's private key.
        host_key: the server's public key, as in a .pub file.
    """

    def __init__(
        self,
        folder: Path,
        *,
        environment: Mapping[str, str] | None = None,
        options: Sequence[str] = (),
        port: int | None = None,
        address: str = "127.0.0.1",
        prefix: Sequence[str] = (),
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.port = port or free_port()
        self.address = address
        self.identity = folder / "identity"
        self._prefix = list(prefix)
        self._options = list(options)
        self._environment = dict(environment or {})
        self._process: subprocess.Popen[bytes] | None = None
        self._monitor: threading.Thread | None = None
        self._stopping = threading.Event()
        for name in ("identity", "host_key"):
            if not (folder / name).exists():
                self.new_key(name)
        shutil.copyfile(folder / "identity.pub", folder / "authorized_keys")

    @property
    def host_key(self) -> str:
        return (self.folder / "host_key.pub").read_text().strip()

    @property
    def log(self) -> str:
        """What sshd has written."""
        path = self.folder / "log"
        return path.read_text(errors="replace") if path.exists() else ""

    def new_key(self, name: str) -> None:
        """Make or replace `identity` or `host_key`."""
        (self.folder / name).unlink(missing_ok=True)
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / name)]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)

    def start(self) -> SshServer:
        """Start it and wait until it answers."""
        sshd = sshd_path()
        if sshd is None:
            raise RuntimeError("sshd is missing: install openssh-server")
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # else sshd as root refuses
        (self.folder / "sshd_config").write_text(self._config())
        command = [*self._prefix, sshd, "-D", "-e", "-f", str(self.folder / "sshd_config")]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        end = time.monotonic() + START_S
        while not self._listens():
            if self._process.poll() is not None or time.monotonic() > end:
                self.stop()
                raise RuntimeError(f"sshd did not start: {self.log[-500:]}")
            time.sleep(0.02)
        return self

    def _listens(self) -> bool:
        if self._prefix:  # in a network of its own
            return "Server listening" in self.log
        try:
            with socket.create_connection((self.address, self.port), timeout=1):
                return True
        except OSError:
            return False

    def _config(self) -> str:
        lines = [
            *self._options,
            f"Port {self.port}",
            f"ListenAddress {self.address}",
            f'HostKey "{self.folder}/host_key"',
            f'AuthorizedKeysFile "{self.folder}/authorized_keys"',
            f'PidFile "{self.folder}/pid"',
            "StrictModes no",
            "UsePAM no",
            "PermitRootLogin yes",
            "PasswordAuthentication no",
            "KbdInteractiveAuthentication no",
            "MaxStartups 100",
            "Subsystem sftp internal-sftp",
        ]
        variables = " ".join(f'"{name}={value}"' for name, value in self._environment.items())
        if variables:
            lines.append(f"SetEnv {variables}")
        return "\n".join(lines) + "\n"

    def kill_sessions(self) -> None:
        """End every connection at once; the server goes on."""
        if self._process is not None:
            for pid in _children(self._process.pid):
                _kill_tree(pid)

    def kill(self) -> None:
        """The power is cut: server, sessions and what runs in them end without a word."""
        if self._process is not None:
            for pid in _children(self._process.pid):
                _kill_tree(pid)
            self._process.kill()
            self._process.wait()
            self._process = None

    def stop(self) -> None:
        """End it."""
        self._stopping.set()
        if self._monitor is not None:
            self._monitor.join()
        self.kill()

    def restart_after(self, marker: Path) -> None:
        """While it runs: when `marker` appears, go down and come up again, as a reboot does."""

        def watch() -> None:
            while not self._stopping.wait(0.1):
                if marker.exists():
                    marker.unlink()
                    self.kill()
                    if not self._stopping.wait(DOWN_S):
                        self.start()

        self._monitor = threading.Thread(target=watch, daemon=True)
        self._monitor.start()

    def client_config(self, alias: str, **options: str) -> str:
        """A block of ~/.ssh/config that reaches it."""
        lines = {
            "HostName": self.address,
            "Port": str(self.port),
            "IdentityFile": f'"{self.identity}"',
            "IdentitiesOnly": "yes",
            **options,
        }
        return f"Host {alias}\n" + "".join(f"    {k} {v}\n" for k, v in lines.items())

    def known_host(self) -> str:
        """A line of known_hosts."""
        kind, key, *_ = self.host_key.split()
        name = self.address if self.port == 22 else f"[{self.address}]:{self.port}"
        return f"{name} {kind} {key}\n"

    def __enter__(self) -> SshServer:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()


def _children(pid: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[1]) == pid:
                found.append(int(entry.name))
    return found


def _kill_tree(pid: int) -> None:
    children = _children(pid)
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    for child in children:
        _kill_tree(child)


if sys.platform != "linux":
    raise ImportError("the simulated board reads /proc: it needs Linux")
