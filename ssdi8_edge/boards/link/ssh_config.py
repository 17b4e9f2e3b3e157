"""How to reach one host: what the user wrote, completed from the configuration of SSH.

OpenSSH is asked where it is installed (`openssh`), else paramiko's reader (`ssh_fallback`). Either
gives settings by name; here they get their meaning. Each is honoured, or harmless to ignore, or
refused: what is ignored must not let in a host, or give away a password, where OpenSSH would not.
"""

from __future__ import annotations

import fnmatch
import getpass
import os
import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ssdi8_edge.boards.link import openssh, ssh_fallback
from ssdi8_edge.boards.link.address import Address, parse_address
from ssdi8_edge.boards.link.known_hosts import SSH_PORT, host_name
from ssdi8_edge.boards.link.ssh_fallback import Parse
from ssdi8_edge.ground.errors import UsageError

_DEFAULT_IDENTITIES = ("id_rsa", "id_ecdsa", "id_ed25519")
_DEFAULT_PROMPTS = 3
_METHODS = {
    "publickey": "pubkeyauthentication",
    "password": "passwordauthentication",
    "keyboard-interactive": "kbdinteractiveauthentication",
}
_ALGORITHMS = {  # by the name that paramiko has for them
    "ciphers": "ciphers",
    "macs": "macs",
    "kex": "kexalgorithms",
    "keys": "hostkeyalgorithms",
    "pubkeys": "pubkeyacceptedalgorithms",
}
_SAME = {"curve25519-sha256": "curve25519-sha256@libssh.org"}  # two names of one method
_FAMILIES = {"any": socket.AF_UNSPEC, "inet": socket.AF_INET, "inet6": socket.AF_INET6}
_OTHER_NAMES = {
    "challengeresponseauthentication": "kbdinteractiveauthentication",
    "skeyauthentication": "kbdinteractiveauthentication",
    "tisauthentication": "kbdinteractiveauthentication",
    "dsaauthentication": "pubkeyauthentication",
    "pubkeyacceptedkeytypes": "pubkeyacceptedalgorithms",
    "hostbasedkeytypes": "hostbasedacceptedalgorithms",
}
_LISTS = ("userknownhostsfile", "globalknownhostsfile")
_HONOURED = (
    *("hostname", "port", "user", "addressfamily", "bindaddress", "proxyjump", "identityfile"),
    *("identitiesonly", "identityagent", "certificatefile", "hostkeyalias", "checkhostip"),
    *("hashknownhosts", "stricthostkeychecking", "batchmode", "numberofpasswordprompts"),
    *("preferredauthentications", "requiredrsasize"),
    *_METHODS.values(),
    *_ALGORITHMS.values(),
)
# They name a way more to get in, which is not taken; or what is forwarded, shown, or said while the
# link is up, which is done here in its own way, or not at all; or what `ssh -G` has applied.
_HARMLESS = """
addkeystoagent canonicaldomains canonicalizefallbacklocal canonicalizemaxdots
canonicalizepermittedcnames casignaturealgorithms channeltimeout clearallforwardings compression
compressionlevel connectionattempts connecttimeout controlmaster controlpath controlpersist
dynamicforward enableescapecommandline enablesshkeysign escapechar exitonforwardfailure
fingerprinthash forkafterauthentication forwardagent forwardx11 forwardx11timeout
forwardx11trusted gatewayports gssapiauthentication gssapiclientidentity gssapidelegatecredentials
gssapikexalgorithms gssapikeyexchange gssapirenewalforcesrekey gssapiserveridentity gssapitrustdns
host hostbasedacceptedalgorithms hostbasedauthentication ignoreunknown ipqos kbdinteractivedevices
localcommand localforward loglevel logverbose nohostauthenticationforlocalhost
obscurekeystroketiming permitlocalcommand permitremoteopen pkcs11provider protocol proxyusefdpass
rekeylimit remotecommand remoteforward requesttty securitykeyprovider sendenv serveralivecountmax
serveraliveinterval sessiontype setenv stdinnull streamlocalbindmask streamlocalbindunlink
syslogfacility tag tcpkeepalive tunnel tunneldevice updatehostkeys usekeychain useprivilegedport
verifyhostkeydns versionaddendum visualhostkey warnweakcrypto xauthlocation
"""
_REFUSED = (
    "bindinterface",
    "canonicalizehostname",
    "knownhostscommand",
    "proxycommand",
    "refuseconnection",
    "revokedhostkeys",
)
_IGNORED = frozenset(_HARMLESS.split())
# Settings of the fallback: whether each has one value.
_KNOWN = {
    **dict.fromkeys((*_IGNORED, *_REFUSED, *_LISTS), False),
    **dict.fromkeys((*_HONOURED, *_OTHER_NAMES), True),
}


@dataclass(frozen=True)
class Settings:
    """Attributes:
    address: the host as the user wrote it.
    family: of addresses, one of socket.AF_*.
    source: address on this machine to call from.
    jumps: hosts to go through, the first one first.
    methods: ways to log in that are allowed: publickey, password, keyboard-interactive.
    prompts: how often to ask for a password or passphrase; 0 for never.
    identities: key files, configured or the usual ones; they need not exist.
    certificates: files to offer with a key that they are for.
    only_identities: whether the agent may offer no other keys.
    agent: its socket; None for no agent.
    key_name: what its host key is filed under.
    key_files: where host keys are filed; new ones go into the first.
    check_ip: whether a key that is stored for its IP address must be the same.
    accept_new: whether the configuration lets unknown host keys in.
    hash_names: whether names of hosts are hashed there.
    algorithms: lists as in the configuration, by the name that paramiko has for them.
    rsa_bits: the least that an RSA key must have, of the host or ours.
    """

    address: Address
    host: str
    port: int
    user: str
    family: int
    source: str | None
    jumps: tuple[Address, ...]
    methods: frozenset[str]
    prompts: int
    identities: tuple[Path, ...]
    certificates: tuple[Path, ...]
    only_identities: bool
    agent: Path | None
    key_name: str
    key_files: tuple[Path, ...]
    check_ip: bool
    accept_new: bool
    hash_names: bool
    algorithms: Mapping[str, str]
    rsa_bits: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.address} ({host}:{self.port})"


def look_up(address: Address, parse: Parse) -> Settings:
    """Settings for `address`; what it says itself goes before the configuration.

    Args:
        parse: paramiko's reader, for where OpenSSH is not installed.

    Raises:
        UsageError: the configuration cannot be read, or asks for what is not done here.
    """
    home = Path.home()
    ssh = openssh.program()
    if ssh is not None:
        found = openssh.effective(ssh, address, home)
    else:
        found = ssh_fallback.effective(parse, address, home, _KNOWN)
    return _Reading(address, home, found, by_openssh=ssh is not None).settings()


class _Reading:
    """Gives settings their meaning."""

    def __init__(
        self, address: Address, home: Path, found: Mapping[str, list[str]], *, by_openssh: bool
    ) -> None:
        self._address = address
        self._home = home
        self._found = {_OTHER_NAMES.get(name, name): values for name, values in found.items()}
        self._by_openssh = by_openssh
        self._check_names()
        self._user = address.user or self._word("user") or getpass.getuser()
        self._port = address.port or self._number("port", SSH_PORT, 1, (1 << 16) - 1)
        self._host = self._word("hostname") or address.host
        self._jump = self._word("proxyjump") or "none"
        if not by_openssh:
            # In its own name %h is what the user wrote.
            self._host = self._expanded(self._host, {"%": "%", "h": address.host})
        self._tokens = {
            "%": "%",
            "d": str(home),
            "h": self._host,
            "i": str(os.getuid()),
            "k": self._word("hostkeyalias") or address.host,
            "L": socket.gethostname().partition(".")[0],
            "l": socket.gethostname(),
            "n": address.host,
            "p": str(self._port),
            "r": self._user,
            "u": getpass.getuser(),
        }

    def settings(self) -> Settings:
        strict = self._choice(
            "stricthostkeychecking",
            "ask",
            ("ask", "accept-new", "yes", "true", "no", "false", "off"),
        )
        key_files = self._key_files("userknownhostsfile", ("known_hosts", "known_hosts2"))
        system = Path("/etc/ssh")
        global_files = self._key_files(
            "globalknownhostsfile", (system / "ssh_known_hosts", system / "ssh_known_hosts2")
        )
        all_files = (*(key_files or [Path(os.devnull)]), *global_files)
        alias = self._word("hostkeyalias")
        return Settings(
            address=self._address,
            host=self._host,
            port=self._port,
            user=self._user,
            family=_FAMILIES[self._choice("addressfamily", "any", tuple(_FAMILIES))],
            source=self._word("bindaddress"),
            jumps=self._jumps(),
            methods=self._methods(),
            prompts=0
            if self._flag("batchmode")
            else self._number("numberofpasswordprompts", _DEFAULT_PROMPTS, 0, 1 << 16),
            identities=self._paths(
                "identityfile", [f"~/.ssh/{name}" for name in _DEFAULT_IDENTITIES]
            ),
            certificates=self._paths("certificatefile", []),
            only_identities=self._flag("identitiesonly"),
            agent=self._agent(),
            key_name=alias.lower() if alias else host_name(self._host, self._port),
            key_files=all_files,
            check_ip=self._flag("checkhostip") and not alias,
            accept_new=strict in ("accept-new", "no", "false", "off")
            # Printed without quotes, it may be several names: a stored key could go unseen.
            and all(" " not in str(file) or file.exists() for file in all_files),
            hash_names=self._flag("hashknownhosts"),
            algorithms={
                kind: spec for kind, name in _ALGORITHMS.items() if (spec := self._word(name))
            },
            rsa_bits=self._number("requiredrsasize", 0, 0, 1 << 16),
        )

    def _check_names(self) -> None:
        for name, values in self._found.items():
            if name in _HONOURED or name in _LISTS or name in _IGNORED:
                continue
            if name == "canonicalizehostname" and self._by_openssh:  # which has done it
                continue
            value = " ".join(values)
            if name == "proxycommand" and value.lower() != "none":
                raise UsageError(
                    f"the SSH configuration reaches {self._address.host} by a ProxyCommand, which "
                    "is not run here;",
                    "use ProxyJump.",
                )
            if value.lower() not in ("none", "no", "false"):
                raise self._refusal(name, f"{value}, which is not done here")

    def _refusal(self, name: str, what: str) -> UsageError:
        return UsageError(
            f"the SSH configuration for {self._address.host} sets {name} to {what};",
            "leave it out for this host.",
        )

    def _word(self, name: str) -> str | None:
        """The value of a setting that is no list."""
        return next(iter(self._found.get(name, ())), None)

    def _choice(self, name: str, default: str, choices: tuple[str, ...]) -> str:
        value = (self._word(name) or default).lower()
        if value not in choices:
            raise self._refusal(name, f"{value!r}, and not to one of {', '.join(choices)}")
        return value

    def _flag(self, name: str, default: str = "no", also: tuple[str, ...] = ()) -> bool:
        value = self._choice(name, default, ("yes", "true", "no", "false", *also))
        return value not in ("no", "false")

    def _number(self, name: str, default: int, least: int, most: int) -> int:
        value = self._word(name)
        if value is None:
            return default
        if not (value.isascii() and value.isdigit() and least <= int(value) <= most):
            raise self._refusal(name, f"{value!r}, and not to a number from {least} to {most}")
        return int(value)

    def _methods(self) -> frozenset[str]:
        preferred = self._word("preferredauthentications")
        names = _METHODS if preferred is None else preferred.replace(" ", "").split(",")
        also = ("unbound", "host-bound")
        return frozenset(
            method
            for method, setting in _METHODS.items()
            if method in names and self._flag(setting, "yes", also if "pubkey" in setting else ())
        )

    def _jumps(self) -> tuple[Address, ...]:
        if self._jump.lower() == "none":
            return ()
        # An IPv6 zone has a % of its own.
        tokens = {key: self._tokens[key] for key in "%hnpr"}
        jump = re.sub(r"%([%hnpr])", lambda found: tokens[found[1]], self._jump)
        return tuple(_jump_address(one.strip()) for one in jump.split(","))

    def _agent(self) -> Path | None:
        name = self._word("identityagent") or "SSH_AUTH_SOCK"
        if name.lower() == "none":
            return None
        if name == "SSH_AUTH_SOCK" or re.fullmatch(r"\$\w+", name):
            name = os.environ.get(name.removeprefix("$"), "")
            return Path(name) if name else None
        return self._path(name)

    def _paths(self, name: str, default: list[str]) -> tuple[Path, ...]:
        values = self._found.get(name, default)
        paths = (self._path(value) for value in values if value.lower() != "none")
        return tuple(dict.fromkeys(paths))

    def _key_files(self, name: str, default: tuple[str | Path, ...]) -> list[Path]:
        values = self._found.get(name)
        if values is None:
            return [self._home / ".ssh" / file for file in default]
        values = [value for value in values if value.lower() != "none"]
        if self._by_openssh:  # which has expanded all but ~ of global names
            return [self._in_home(value) for value in values]
        paths = [self._path(value) for value in values]
        if not all(path.is_absolute() for path in paths):
            raise self._refusal(name, "a name that depends on the current folder")
        return paths

    def _path(self, text: str) -> Path:
        return self._in_home(self._expanded(text, self._tokens))

    def _in_home(self, text: str) -> Path:
        if text == "~" or text.startswith("~/"):
            return self._home / text[2:]
        try:
            return Path(text).expanduser()
        except RuntimeError as error:
            raise self._refusal("a file", f"{text}, whose user is unknown") from error

    def _expanded(self, text: str, tokens: Mapping[str, str]) -> str:
        """`text` with its tokens and variables replaced."""

        def value(found: re.Match[str]) -> str:
            known = os.environ.get(found[2]) if found[2] else tokens.get(found[1])
            if known is None:
                raise self._refusal("a name", f"{text!r}, in which {found[0]} is unknown")
            return known

        return re.sub(r"%(.?)|\$\{(\w*)\}", value, text)


def permitted(spec: str, names: Sequence[str]) -> tuple[str, ...]:
    """Those of `names` that a list of algorithms lets through.

    Args:
        spec: the list, or what is taken off the usual one (`-`); what is added to that (`+`, `^`)
            changes nothing here.
    """
    if spec.startswith(("+", "^")):
        return tuple(names)
    patterns = spec.removeprefix("-").replace(" ", "").split(",")
    patterns += [_SAME[pattern] for pattern in patterns if pattern in _SAME]
    listed = {name for name in names for one in patterns if fnmatch.fnmatchcase(name, one)}
    return tuple(name for name in names if (name in listed) != spec.startswith("-"))


def _jump_address(text: str) -> Address:
    """`[user@]host[:port]`, or the same as a URI."""
    uri = re.fullmatch(r"ssh://([^/]*)/?", text)
    return parse_address(uri[1] if uri else text)
