"""Logging in to a host that has shown its key: keys of the agent, keys in files, then a password.

Works on paramiko's transports, which `ssh` makes.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import paramiko
from paramiko.agent import AgentKey, AgentSSH
from paramiko.auth_handler import AuthHandler
from paramiko.common import cMSG_USERAUTH_REQUEST
from paramiko.pkey import PublicBlob
from paramiko.ssh_exception import AuthenticationException, BadAuthenticationType

from ssdi8_edge.boards.link import dial
from ssdi8_edge.boards.link.key_files import (
    CERTIFICATE,
    beside,
    certified_key,
    kind_of,
    public_blob,
    public_key,
)
from ssdi8_edge.boards.link.prompts import Prompts
from ssdi8_edge.boards.link.ssh_config import Settings, permitted
from ssdi8_edge.ground.errors import BoardError

MANY_KEYS = 3  # after which a host may hang up
_RSA = "ssh-rsa"
_BY_PASSWORD = ("password", "keyboard-interactive")

# A password is asked for once, however many links are made.
_prompts = Prompts()


def log_in(transport: paramiko.Transport, settings: Settings) -> None:
    """Offer what the user has and the configuration allows.

    Raises:
        BoardError: the host lets the user in with none of it.
    """
    login = _Login(transport, settings)
    agent = _Agent()
    try:
        if settings.agent is not None:
            login.join(agent, settings.agent)
        login.run(agent.keys)
    finally:
        agent.close()


@dataclass(frozen=True)
class _Offer:
    """A key that the host is asked about.

    Attributes:
        blob: the public key or certificate.
        key: that signs, if it is at hand.
        file: to open for it otherwise.
    """

    blob: bytes
    key: paramiko.PKey | None
    file: Path | None


class _Agent(AgentSSH):
    """An agent at any socket; paramiko's own knows that of SSH_AUTH_SOCK alone."""

    keys: Sequence[AgentKey] = ()

    def join(self, path: Path) -> None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(dial.STEP_S)
            sock.connect(str(path))
            sock.settimeout(None)  # it may ask the user before it signs
            self._connect(sock)
        except BaseException:
            sock.close()
            raise
        self.keys = self.get_keys()

    def close(self) -> None:
        self._close()


class _Question(AuthHandler):
    """Asks whether the host would take a key; paramiko itself signs at once."""

    _welcome = False

    def ask(self, user: str, blob: bytes) -> list[str] | None:
        """None when it would; else raises, as `Transport.auth_publickey` does."""
        self._blob = blob
        self._algorithm = self._finalize_pubkey_algorithm(kind_of(blob))
        answered = threading.Event()
        self.auth_publickey(user, None, answered)
        try:
            methods: list[str] = self.wait_for_response(answered)
        except AuthenticationException:
            if self._welcome:
                return None
            raise
        return methods

    def _parse_service_accept(self, message: Any) -> None:
        request = paramiko.Message()
        request.add_byte(cMSG_USERAUTH_REQUEST)
        for text in (self.username, "ssh-connection", "publickey"):
            request.add_string(text)
        request.add_boolean(False)  # nothing is signed
        request.add_string(self._algorithm)
        request.add_string(self._blob)
        self.transport._send_message(request)

    def _parse_userauth_info_request(self, message: Any) -> None:
        # "This key is fine" has the number that a question has after other requests.
        self._welcome = True
        self.auth_event.set()


class _Login:
    def __init__(self, transport: paramiko.Transport, settings: Settings) -> None:
        self._transport = transport
        self._settings = settings
        self._offered = 0
        self._notes: list[str] = []

    def join(self, agent: _Agent, path: Path) -> None:
        """Get the keys of an agent; one that is not there has none."""
        try:
            dial.within(lambda: agent.join(path))
        except (FileNotFoundError, ConnectionRefusedError):
            pass  # its program has ended
        except Exception as error:
            self._notes.append(f"the agent at {path} does not answer: {dial.words(error)}")

    def run(self, held: Sequence[AgentKey]) -> None:
        user, transport = self._settings.user, self._transport
        methods = self._try(lambda: transport.auth_none(user)) or []
        if "publickey" in self._settings.methods:
            for offer in self._offers(held) if "publickey" in methods else ():
                methods = self._present(offer) or methods
                if transport.is_authenticated():
                    return
        if not transport.is_authenticated():
            self._offer_password(methods)

    def _try(self, attempt: Callable[[], list[str] | None]) -> list[str] | None:
        """What the host wants next; an empty list when it is content, or did not say."""
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

    # ----------------------------------------------------------------------------------------------
    # keys

    def _offers(self, held: Sequence[AgentKey]) -> Iterator[_Offer]:
        """Keys in OpenSSH's order: configured ones that the agent holds, its others, files."""
        agent_keys = {key.blob: key for key in held}
        named = [(path, public_blob(path)) for path in self._settings.identities]
        for _, blob in named:
            if key := agent_keys.pop(blob, None):
                yield from self._with_certificates(_Offer(blob, key, None))
        if not self._settings.only_identities:
            for blob, key in agent_keys.items():
                yield _Offer(blob, key, None)
        offered = {key.blob for key in held} - set(agent_keys)
        for path, blob in named:
            if blob not in offered and (offer := self._in_file(path, blob)):
                offered.add(offer.blob)
                yield from self._with_certificates(offer)

    def _in_file(self, path: Path, blob: bytes) -> _Offer | None:
        """A private key in a file, unopened if its public half is known; None for no key."""
        if not path.is_file() or public_key(path):
            return None
        if blob:
            return _Offer(blob, None, path)
        try:
            key = paramiko.PKey.from_path(path)
            return _Offer(key.asbytes(), key, path)
        except TypeError:
            # Whether the host wants it cannot be asked, and so its passphrase is not.
            self._notes.append(
                f"{path} has a passphrase and no public half beside it, which "
                f"`ssh-keygen -y -f {path} > {path}.pub` makes"
            )
        except Exception as error:  # of paramiko or cryptography: unknown kind, unreadable
            self._notes.append(f"{path} cannot be opened: {dial.words(error)}")
        return None

    def _with_certificates(self, offer: _Offer) -> Iterator[_Offer]:
        """First its certificates, then the key itself."""
        files = [*self._settings.certificates]
        files += [beside(path, "-cert.pub") for path in self._settings.identities]
        for certificate in dict.fromkeys(public_key(file) for file in files):
            if certificate and certified_key(certificate) == offer.blob:
                yield _Offer(certificate, offer.key, offer.file)
        yield offer

    def _present(self, offer: _Offer) -> list[str] | None:
        """Ask whether the host takes a key, and sign with it if so; what the host wants next."""
        user, transport = self._settings.user, self._transport
        if not self._allowed(kind_of(offer.blob)):
            return None
        question = _Question(transport)
        transport.auth_handler = question
        self._offered += 1
        methods = self._try(lambda: question.ask(user, offer.blob))
        if methods is not None:
            return methods
        key = offer.key or self._opened(offer)
        if key is None:
            self._offered -= 1
            return None
        kind = kind_of(offer.blob)
        if kind.startswith(_RSA) and key.get_bits() < self._settings.rsa_bits:
            self._notes.append(f"an RSA key of {key.get_bits()} bits is too short")
            return None
        key.public_blob = PublicBlob(kind, offer.blob) if kind.endswith(CERTIFICATE) else None
        return self._try(lambda: transport.auth_publickey(user, key))

    def _allowed(self, kind: str) -> bool:
        """Whether the configuration lets a kind of key be used; of RSA, with any hash."""
        plain = kind.removesuffix(CERTIFICATE)
        names = ["rsa-sha2-256", "rsa-sha2-512"] if plain == _RSA else [plain]
        spec = self._settings.algorithms.get("pubkeys")
        ending = kind.removeprefix(plain)
        return spec is None or bool(permitted(spec, [name + ending for name in names]))

    def _opened(self, offer: _Offer) -> paramiko.PKey | None:
        """The private key, by its passphrase if it has one; None where it stays closed."""
        path = offer.file
        assert path is not None
        try:
            return paramiko.PKey.from_path(path)
        except TypeError:  # it has a passphrase
            pass
        except Exception as error:
            self._notes.append(f"{path} cannot be opened: {dial.words(error)}")
            return None
        question, problem = f"passphrase of {path}", "the configuration forbids to ask for it"
        for _ in range(self._settings.prompts):
            phrase = _prompts.ask(question)
            if phrase is None:
                problem = "no terminal is there to ask for it"
                break
            with contextlib.suppress(Exception):  # of cryptography: the wrong one
                return paramiko.PKey.from_path(path, phrase.encode())
            _prompts.forget(question)
            problem = "what was typed is another one"
        self._notes.append(f"{path} cannot be opened: it has a passphrase, and {problem}")
        return None

    # ----------------------------------------------------------------------------------------------
    # passwords

    def _offer_password(self, methods: Sequence[str]) -> None:
        user, transport, settings = self._settings.user, self._transport, self._settings
        question = f"password of {user} on {settings}"
        ways = [way for way in _BY_PASSWORD if way in methods and way in settings.methods]
        for _ in range(settings.prompts if ways else 0):
            password = _prompts.ask(question)
            if password is None:
                break
            self._try(lambda word=password: self._use(ways[0], word))  # type: ignore[misc]
            if transport.is_authenticated():
                return
            _prompts.forget(question)
        keys = "1 key was" if self._offered == 1 else f"{self._offered} keys were"
        notes = [f"{keys} offered", *self._notes]
        forbidden = {"publickey", *_BY_PASSWORD} & set(methods) - settings.methods
        if forbidden:
            notes.append(f"the configuration forbids {' and '.join(sorted(forbidden))}")
        # As the user wrote it: ssh-copy-id reads the same configuration.
        address = settings.address
        port = f"-p {address.port} " if address.port else ""
        raise BoardError(
            f"{settings} does not let {user} in ({', '.join(notes)}, it takes "
            f"{' or '.join(methods) or 'others'});",
            f"bring your key there: ssh-copy-id {port}{user}@{address.host}; or add it to the "
            "agent: ssh-add",
        )

    def _use(self, way: str, password: str) -> list[str]:
        user, transport = self._settings.user, self._transport

        def answers(title: str, text: str, fields: Sequence[object]) -> list[str]:
            # Whoever asks for more than a password is not told it.
            return [password] if len(fields) == 1 else [""] * len(fields)

        if way == "password":
            methods: list[str] = transport.auth_password(user, password, fallback=False)
        else:
            methods = transport.auth_interactive(user, answers)
        return methods
