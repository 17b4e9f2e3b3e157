"""Steps of connecting that need no SSH: a socket, a deadline, words for what went wrong."""

from __future__ import annotations

import queue
import socket
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from ssdi8_edge.boards.link.ssh_config import Settings
from ssdi8_edge.ground.errors import BoardError, LinkLost

T = TypeVar("T")

STEP_S = 15.0  # for each step of connecting


def dial(settings: Settings) -> socket.socket:
    """A socket to a host, within STEP_S.

    Raises:
        LinkLost: it does not answer now.
        BoardError: there is no such host.
    """
    try:
        return _connected(settings)
    except socket.gaierror as error:
        if error.errno == socket.EAI_AGAIN:
            raise LinkLost(
                f"the name {settings.host} cannot be looked up now;",
                "see whether this machine is on the network.",
            ) from error
        raise BoardError(
            f"there is no host named {settings.host} ({words(error)});",
            "check the spelling, or add it to ~/.ssh/config.",
        ) from error
    except UnicodeError as error:
        raise BoardError(f"{settings.host!r} is no name of a host;", "check it.") from error
    except ConnectionRefusedError as error:
        raise LinkLost(
            f"{settings} refuses connections;", "see whether the port is right and sshd runs there."
        ) from error
    except TimeoutError as error:
        raise LinkLost(
            f"{settings} does not answer within {STEP_S:g} s;",
            "see whether it is switched on and no firewall stands between.",
        ) from error
    except OSError as error:
        raise LinkLost(
            f"there is no way to {settings} ({words(error)});",
            "see whether both machines are on the network.",
        ) from error


def _connected(settings: Settings) -> socket.socket:
    """A socket to the first address that answers, of those that the configuration allows."""
    source = None if settings.source is None else (settings.source, 0)
    failure: OSError | None = None
    addresses = socket.getaddrinfo(
        settings.host, settings.port, settings.family, socket.SOCK_STREAM
    )
    for family, kind, protocol, _, address in addresses:
        sock = socket.socket(family, kind, protocol)
        try:
            sock.settimeout(STEP_S)
            if source is not None:
                sock.bind(source)
            sock.connect(address)
            # Else small packets wait for each other's receipts, 40 ms at a time.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return sock
        except BaseException as error:
            sock.close()
            if not isinstance(error, OSError):
                raise
            failure = error
    raise failure or OSError("it has no address")


def within(action: Callable[[], T]) -> T:
    """What `action` returns or raises; TimeoutError if that takes longer than a step may."""
    outcome: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue()

    def work() -> None:
        try:
            outcome.put((action(), None))
        except BaseException as error:
            outcome.put((None, error))

    threading.Thread(target=work, daemon=True).start()
    try:
        value, error = outcome.get(timeout=STEP_S)
    except queue.Empty:
        raise TimeoutError(f"no answer within {STEP_S:g} s") from None
    if error is not None:
        raise error
    return value


def words(error: BaseException) -> str:
    """What went wrong, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or "the connection was closed"
