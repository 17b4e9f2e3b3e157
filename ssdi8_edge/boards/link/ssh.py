"""A board over SSH. The only file that knows paramiko.

Commands run in exec channels; SFTP is not used, so that a board needs no more than sshd. What a
garbled line brings can make paramiko raise anything, so around its calls every exception means that
the link failed.
"""

from __future__ import annotations

import logging
import shlex
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import paramiko
from paramiko.ssh_exception import (
    AuthenticationException,
    BadAuthenticationType,
    ChannelException,
    IncompatiblePeer,
)

from ssdi8_edge.boards.link import dial
from ssdi8_edge.boards.link.address import Address
from ssdi8_edge.boards.link.connection import DEFAULT_STORE, Connection
from ssdi8_edge.boards.link.known_hosts import HostKey, add_key, judge, known_keys
from ssdi8_edge.boards.link.process import Channel, link_lost
from ssdi8_edge.boards.link.prompts import Prompts
from ssdi8_edge.boards.link.ssh_config import Settings, look_up, public_blob
from ssdi8_edge.boards.link.ssh_link import Ear, Link, SshChannel, quietly
from ssdi8_edge.ground.errors import BoardError, LinkLost, Ssdi8Error, UsageError

T = TypeVar("T")

MAX_HOPS = 8
PASSWORD_TRIES = 3
MANY_KEYS = 3  # after which a host may hang up
# Hardware does GCM on every board and host worth naming; counter mode is for old servers.
CIPHERS = ("aes128-gcm@openssh.com", "aes256-gcm@openssh.com", "aes128-ctr", "aes256-ctr")
WINDOW = 1 << 24

# A password is asked for once, however many links are made.
_prompts = Prompts()

# It would print tracebacks; what goes wrong is said by exceptions.
logging.getLogger("paramiko").setLevel(logging.CRITICAL + 1)


class SshConnection(Connection):
    """A board over SSH; see `Connection` for what is guaranteed.

    Args:
        address: of the board.
        accept_new_host_key: store the key of a host that has none stored yet.
    """

    def __init__(
        self,
        address: Address,
        *,
        accept_new_host_key: bool = False,
        store: str = DEFAULT_STORE,
        python: str | None = None,
    ) -> None:
        super().__init__(str(address), store, python)
        self._address = address
        self._accept_new = accept_new_host_key
        self._link: Link | None = None
        self._linking = threading.Lock()

    def open_channel(self, program: str) -> Channel:
        """Run python3 with the one-line `program`, over a new link if there is none."""
        link = self._live_link()

        def execute() -> paramiko.Channel:
            channel = link.transport.open_session(window_size=WINDOW, timeout=dial.STEP_S)
            channel.exec_command(f"exec python3 -I -S -c {shlex.quote(program)}")
            return channel

        try:
            return SshChannel(link, dial.within(execute))
        except ChannelException as error:
            raise BoardError(
                f"{self.name} does not let this user run commands ({dial.words(error)});",
                "allow it in its sshd_config.",
            ) from error
        except Exception as error:
            self.close()
            raise _told(error, link_lost(self.name, dial.words(error))) from error

    def close(self) -> None:
        """Drop the link."""
        with self._linking:
            if self._link is not None:
                self._link.close()
                self._link = None

    def _live_link(self) -> Link:
        with self._linking:
            if self._link is not None:
                try:
                    self._link.check()
                except LinkLost:
                    self._link.close()
                    self._link = None
            if self._link is None:
                transports: list[paramiko.Transport] = []
                try:
                    self._reach(look_up(self._address, _parse_config), transports, 0)
                except BaseException:
                    for transport in reversed(transports):
                        quietly(transport.close)
                    raise
                self._link = Link(self.name, transports)
            return self._link

    def _reach(self, settings: Settings, transports: list[paramiko.Transport], depth: int) -> None:
        """Append the transport to a host, after those that it goes through."""
        if depth > MAX_HOPS:
            raise UsageError(
                f"{self.name} lies behind more than {MAX_HOPS} jump hosts;",
                "mend ProxyJump in ~/.ssh/config.",
            )
        for jump in settings.jumps:
            hop = look_up(jump, _parse_config)
            # Only the first hop's own ProxyJump counts, as with OpenSSH.
            if transports:
                transports.append(self._log_in(hop, _tunnel(transports[-1], hop)))
            else:
                self._reach(hop, transports, depth + 1)
        sock = _tunnel(transports[-1], settings) if transports else dial.dial(settings)
        transports.append(self._log_in(settings, sock))

    def _log_in(self, settings: Settings, sock: Any) -> paramiko.Transport:
        known = known_keys(settings.key_name, settings.key_files)
        transport = _greet(settings, sock, {line.key.kind for line in known})
        try:
            found = transport.get_remote_server_key()
            shown = HostKey(found.get_name(), found.asbytes())
            if not judge(str(settings.address), settings.key_name, shown, known):
                self._take_new_key(settings, shown)
            _Authentication(transport, settings).run()
        except Exception as error:
            quietly(transport.close)
            lost = LinkLost(
                f"{settings} went away during the login ({dial.words(error)});", "try again."
            )
            raise _told(error, lost) from error
        return transport

    def _take_new_key(self, settings: Settings, shown: HostKey) -> None:
        if not (self._accept_new or settings.accept_new):
            raise BoardError(
                f"{settings.address} shows an unknown host key, {shown};",
                f"compare it with `ssh-keygen -lf /etc/ssh/ssh_host_{shown.algorithm}_key.pub` "
                "there, then "
                f"accept it: ssdi8-edge doctor --host {shlex.quote(self.name)} "
                "--accept-new-host-key",
            )
        try:
            add_key(settings.key_name, shown, settings.key_files[0], hashed=settings.hash_names)
        except (OSError, IndexError) as error:
            raise UsageError(
                f"the host key of {settings.address} cannot be stored ({dial.words(error)});",
                "mend ~/.ssh/known_hosts.",
            ) from error


# --------------------------------------------------------------------------------------------------
# steps of connecting


def _parse_config(lines: Iterable[str], host: str) -> Mapping[str, Any]:
    config = paramiko.SSHConfig()
    config.parse(lines)
    return config.lookup(host)


def _tunnel(through: paramiko.Transport, to: Settings) -> paramiko.Channel:
    try:
        return through.open_channel(
            "direct-tcpip", (to.host, to.port), ("127.0.0.1", 0), timeout=dial.STEP_S
        )
    except Exception as error:
        lost = LinkLost(
            f"the jump host cannot reach {to} ({dial.words(error)});",
            "see whether it is up, and whether the jump host allows forwarding.",
        )
        raise _told(error, lost) from error


def _greet(settings: Settings, sock: Any, known_kinds: set[str]) -> paramiko.Transport:
    """Agree on keys and ciphers; the host has shown its key, and nothing was told to it."""
    transport = paramiko.Transport(Ear(sock), default_window_size=WINDOW)
    transport.banner_timeout = transport.auth_timeout = dial.STEP_S
    options = transport.get_security_options()
    options.ciphers = CIPHERS
    # Ask for a kind of key that is stored, so that another kind does not look changed.
    if "ssh-rsa" in known_kinds:
        known_kinds |= {"rsa-sha2-512", "rsa-sha2-256"}
    options.key_types = sorted(options.key_types, key=lambda kind: kind not in known_kinds)
    try:
        # Without a timeout of its own: at that one, start_client returns as if all were well.
        dial.within(transport.start_client)
    except IncompatiblePeer as error:
        quietly(transport.close)
        raise BoardError(
            f"{settings} has no encryption in common with this machine ({dial.words(error)});",
            "update its OpenSSH.",
        ) from error
    except Exception as error:
        quietly(transport.close)
        lost = LinkLost(
            f"{settings} does not answer as an SSH server does ({dial.words(error)});",
            "see whether the port is right and sshd runs there.",
        )
        raise _told(error, lost) from error
    return transport


def _told(error: Exception, lost: LinkLost) -> Ssdi8Error:
    """`lost`, unless `error` is ours already."""
    return error if isinstance(error, Ssdi8Error) else lost


class _Authentication:
    """Offers what the user has: configured keys, the agent's, then what the terminal answers."""

    def __init__(self, transport: paramiko.Transport, settings: Settings) -> None:
        self._transport = transport
        self._settings = settings
        self._offered = 0
        self._notes: list[str] = []

    def run(self) -> None:
        """Raises BoardError when the host lets the user in with none of it."""
        agent = dial.within(paramiko.Agent)
        try:
            self._log_in(agent)
        finally:
            agent.close()

    def _log_in(self, agent: paramiko.Agent) -> None:
        user, transport = self._settings.user, self._transport
        methods = self._offer(lambda: transport.auth_none(user))
        for key in self._keys(agent) if "publickey" in methods else ():
            self._offered += 1
            # After a key that was right a host may still want something else.
            methods = self._offer(lambda key=key: transport.auth_publickey(user, key)) or methods  # type: ignore[misc]
            if transport.is_authenticated():
                return
        if not transport.is_authenticated():
            self._offer_password(methods)

    def _offer(self, attempt: Callable[[], list[str]]) -> list[str]:
        """What the host wants next; nothing when it is content, or did not say."""
        try:
            return dial.within(attempt)
        except BadAuthenticationType as error:
            return list(error.allowed_types)
        except AuthenticationException as error:
            if not self._transport.is_active() and self._offered >= MANY_KEYS:
                raise BoardError(
                    f"{self._settings} hung up after {self._offered} keys;",
                    "name the right one in ~/.ssh/config: IdentityFile, and IdentitiesOnly yes.",
                ) from error
            if not self._transport.is_active():
                raise
            return []

    def _keys(self, agent: paramiko.Agent) -> Iterator[paramiko.PKey]:
        """Configured keys, by the agent where it holds them; then what else the agent has."""
        held_keys = {key.asbytes(): key for key in agent.get_keys()}
        for path in self._settings.identities:
            held = held_keys.pop(public_blob(path), None)
            key = held or self._load(path)
            if key is not None:
                yield key
        if not self._settings.only_identities:
            yield from held_keys.values()

    def _load(self, path: Path) -> paramiko.PKey | None:
        """A private key; None where there is none that can be used."""
        if not path.is_file() or path.suffix == ".pub":
            return None
        question = f"passphrase of {path}"
        try:
            try:
                return paramiko.PKey.from_path(path)
            except TypeError:  # it has a passphrase
                phrase = _prompts.ask(question)
                if phrase is not None:
                    return paramiko.PKey.from_path(path, phrase.encode())
        except Exception:  # of paramiko or cryptography: wrong passphrase, unknown kind, unreadable
            _prompts.forget(question)
        self._notes.append(f"{path} cannot be opened")
        return None

    def _offer_password(self, methods: Sequence[str]) -> None:
        user, transport = self._settings.user, self._transport
        question = f"password of {user} on {self._settings}"
        if {"password", "keyboard-interactive"} & set(methods):
            for _ in range(PASSWORD_TRIES):
                password = _prompts.ask(question)
                if password is None:
                    break
                self._offer(lambda word=password: transport.auth_password(user, word))  # type: ignore[misc]
                if transport.is_authenticated():
                    return
                _prompts.forget(question)
        keys = "1 key was" if self._offered == 1 else f"{self._offered} keys were"
        notes = [f"{keys} offered", *self._notes]
        # As the user wrote it: ssh-copy-id reads the same configuration.
        address = self._settings.address
        port = f"-p {address.port} " if address.port else ""
        raise BoardError(
            f"{self._settings} does not let {user} in ({', '.join(notes)}, it takes "
            f"{' or '.join(methods) or 'others'});",
            f"bring your key there: ssh-copy-id {port}{user}@{address.host}; or add it to the "
            "agent: ssh-add",
        )
