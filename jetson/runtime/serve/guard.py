"""Who may talk to the server: the name that it was called by, the page that calls, the key.

A page from elsewhere cannot use a server on loopback through the browser of whoever looks at it:
neither by a name of its own that it lets point there (Host), nor by a request across sites
(Origin).
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import socket
from collections.abc import Collection, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from runtime.problems import BundleProblem
from runtime.serve.fields import RequestProblem
from runtime.serve.replies import error

# They tell nothing and take nothing: the page asks for the key itself.
OPEN_PATHS = ("/", "/page.css", "/page.js", "/health")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens on `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_keys(path: Path) -> list[str]:
    """The keys of a file, one a line; lines that are empty or begin with # say nothing.

    Raises:
        BundleProblem: it cannot be read, has no key, or one that no header can carry.
    """
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except OSError as problem:
        raise BundleProblem(
            f"the key file {path} cannot be read ({problem.strerror})", "check --api-key-file"
        ) from problem
    except UnicodeError as problem:
        raise BundleProblem(
            f"the key file {path} holds more than ASCII", "keys are letters, digits and signs"
        ) from problem
    keys = [line.strip() for line in lines]
    keys = [key for key in keys if key and not key.startswith("#")]
    if not keys or not all(key.isprintable() and " " not in key for key in keys):
        raise BundleProblem(
            f"the key file {path} has no key, or one with a space",
            "write one key a line, for example from: openssl rand -hex 24",
        )
    return keys


class Guard:
    """ASGI middleware that answers whoever may not come in.

    Args:
        keys: of which a request has to show one; none: nobody is asked.
        names: that the server may be called by, besides addresses and this machine's own.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str], names: Collection[str]) -> None:
        self._app = app
        self._keys = [_digest(key) for key in keys]
        own = socket.gethostname().lower()
        self._names = {"localhost", own, f"{own}.local", *(name.lower() for name in names)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            self._check(Headers(scope=scope), scope["path"])
        except RequestProblem as problem:
            status, body, headers = error(problem)
            await JSONResponse(body, status, headers)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _check(self, headers: Headers, path: str) -> None:
        host = headers.get("host", "")
        if not self._is_ours(host):
            raise RequestProblem(
                f"this server is not called {host[:100]!r}",
                "use its address, or name it with --allow-host",
                status=403,
                code="host_not_allowed",
            )
        origin = headers.get("origin")
        if origin is not None and urlsplit_host(origin) != host.lower():
            raise RequestProblem(
                f"a page of {origin[:100]!r} may not use this server",
                "open the server's own page, or call it from a program",
                status=403,
                code="origin_not_allowed",
            )
        if self._keys and path not in OPEN_PATHS and not self._has_key(headers):
            problem = RequestProblem(
                "the API key is missing or wrong",
                "send the header Authorization: Bearer KEY",
                status=401,
                code="invalid_api_key",
            )
            problem.headers["WWW-Authenticate"] = "Bearer"
            raise problem

    def _is_ours(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        try:
            ipaddress.ip_address(name)
            return True  # what is no name cannot be made to point elsewhere
        except ValueError:
            return name in self._names

    def _has_key(self, headers: Headers) -> bool:
        """Compares digests, all of them each time, so that time tells nothing of a key."""
        scheme, _, shown = headers.get("authorization", "").partition(" ")
        digest = _digest(shown.strip())
        matches = [hmac.compare_digest(digest, key) for key in self._keys]
        return scheme.lower() == "bearer" and any(matches)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def urlsplit_host(origin: str) -> str | None:
    """host[:port] of an http origin, in small letters; None where it is of another kind."""
    try:
        parts = urlsplit(origin)
    except ValueError:
        return None
    return parts.netloc.lower() if parts.scheme in ("http", "https") else None
