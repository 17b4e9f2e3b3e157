"""A board over SSH. Only this file and `ssh_login` know paramiko.

Commands run in exec channels; SFTP is not used, so that a board needs no more than sshd. What a
garbled line brings can make paramiko raise anything, so around its calls every exception means that
the link failed.
"""

from __future__ import annotations

import logging
import shlex
import socket
import threading
from collections.abc import Iterable, Mapping
from typing import Any

import paramiko
from paramiko.ssh_exception import ChannelException, IncompatiblePeer

from ssdi8_edge.boards.link import dial
from ssdi8_edge.boards.link.address import Address
from ssdi8_edge.boards.link.connection import DEFAULT_STORE, Connection, Stream
from ssdi8_edge.boards.link.known_hosts import HostKey, add_key, host_name, judge, known_keys
from ssdi8_edge.boards.link.process import Channel, link_lost
from ssdi8_edge.boards.link.ssh_config import Settings, look_up, permitted
from ssdi8_edge.boards.link.ssh_link import Ear, Link, SshChannel, hang_up
from ssdi8_edge.boards.link.ssh_login import log_in
from ssdi8_edge.ground.errors import BoardError, LinkLost, Ssdi8Error, UsageError

MAX_HOPS = 8
# Hardware does GCM on every board and host worth naming; counter mode is for old servers.
CIPHERS = ("aes128-gcm@openssh.com", "aes256-gcm@openssh.com", "aes128-ctr", "aes256-ctr")
WINDOW = 1 << 24

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

    def open_stream(self, port: int) -> Stream:
        """Connect to a port of the board's loopback, as `ssh -L` does."""
        link = self._live_link()

        def connect() -> paramiko.Channel:
            to, source = ("127.0.0.1", port), ("127.0.0.1", 0)
            return link.transport.open_channel("direct-tcpip", to, source, timeout=dial.STEP_S)

        try:
            return dial.within(connect)
        except ChannelException as error:
            raise BoardError(
                f"port {port} of {self.name} cannot be reached ({dial.words(error)});",
                "see whether the server runs, and whether its sshd_config has"
                " AllowTcpForwarding no.",
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
                    self._reach(look_up(self._address, _parse_config), transports, ())
                except BaseException:
                    for transport in reversed(transports):
                        hang_up(transport)
                    raise
                self._link = Link(self.name, transports)
            return self._link

    def _reach(
        self,
        settings: Settings,
        transports: list[paramiko.Transport],
        behind: tuple[Settings, ...],
    ) -> None:
        """Append the transport to a host, after those that it goes through.

        Args:
            behind: the hosts that are to be reached through it.
        """
        if any(_same_place(settings, other) for other in behind):
            way = " - ".join(str(one.address) for one in (*behind, settings))
            raise UsageError(
                f"{self.name} lies behind itself ({way});", "mend ProxyJump in ~/.ssh/config."
            )
        if len(behind) > MAX_HOPS:
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
                self._reach(hop, transports, (*behind, settings))
        sock = _tunnel(transports[-1], settings) if transports else dial.dial(settings)
        transports.append(self._log_in(settings, sock))

    def _log_in(self, settings: Settings, sock: Any) -> paramiko.Transport:
        transport = paramiko.Transport(Ear(sock), default_window_size=WINDOW)
        try:
            known = known_keys(settings.key_name, settings.key_files)
            _greet(transport, settings, {line.key.kind for line in known})
            found = transport.get_remote_server_key()
            shown = HostKey(found.get_name(), found.asbytes())
            _check_strength(settings, found)
            label = str(settings.address)
            if settings.check_ip and isinstance(sock, socket.socket):
                name = host_name(sock.getpeername()[0], settings.port)
                judge(label, name, shown, known_keys(name, settings.key_files))
            if not judge(label, settings.key_name, shown, known):
                self._take_new_key(settings, shown)
            log_in(transport, settings)
        except BaseException as error:
            hang_up(transport)
            if not isinstance(error, Exception):
                raise
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


def _same_place(one: Settings, other: Settings) -> bool:
    return (one.host, one.port, one.user, one.jumps) == (
        other.host,
        other.port,
        other.user,
        other.jumps,
    )


def _check_strength(settings: Settings, key: paramiko.PKey) -> None:
    if key.get_name() == "ssh-rsa" and key.get_bits() < settings.rsa_bits:
        raise BoardError(
            f"{settings.address} shows an RSA key of {key.get_bits()} bits, and the SSH "
            f"configuration wants {settings.rsa_bits};",
            "make it a longer one there: ssh-keygen -A",
        )


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


def _greet(transport: paramiko.Transport, settings: Settings, known_kinds: set[str]) -> None:
    """Agree on keys and ciphers; the host has shown its key, and nothing was told to it."""
    transport.banner_timeout = transport.auth_timeout = dial.STEP_S
    options = transport.get_security_options()
    options.ciphers = CIPHERS
    transport.disabled_algorithms = _disabled(settings, options)
    # Ask for a kind of key that is stored, so that another kind does not look changed.
    if "ssh-rsa" in known_kinds:
        known_kinds |= {"rsa-sha2-512", "rsa-sha2-256"}
    options.key_types = sorted(options.key_types, key=lambda kind: kind not in known_kinds)
    try:
        # Without a timeout of its own: at that one, start_client returns as if all were well.
        dial.within(transport.start_client)
    except IncompatiblePeer as error:
        raise BoardError(
            f"{settings} has no encryption in common with this machine ({dial.words(error)});",
            "update its OpenSSH.",
        ) from error
    except Exception as error:
        lost = LinkLost(
            f"{settings} does not answer as an SSH server does ({dial.words(error)});",
            "see whether the port is right and sshd runs there.",
        )
        raise _told(error, lost) from error


def _disabled(settings: Settings, options: Any) -> dict[str, list[str]]:
    """Algorithms that the configuration excludes, as paramiko takes them."""
    usual = {
        "ciphers": options.ciphers,
        "macs": options.digests,
        "kex": options.kex,
        "keys": options.key_types,
    }
    # Keys of users are of the same kinds as those of hosts.
    usual["pubkeys"] = usual["keys"]
    disabled = {}
    for kind, spec in settings.algorithms.items():
        allowed = permitted(spec, usual[kind])
        if not allowed and kind != "pubkeys":
            raise UsageError(
                f"the SSH configuration for {settings.address} leaves none of the {kind} that are "
                f"known here ({', '.join(usual[kind])});",
                "let it allow one of them.",
            )
        disabled[kind] = [name for name in usual[kind] if name not in allowed]
    return disabled


def _told(error: Exception, lost: LinkLost) -> Ssdi8Error:
    """`lost`, unless `error` is ours already."""
    return error if isinstance(error, Ssdi8Error) else lost
