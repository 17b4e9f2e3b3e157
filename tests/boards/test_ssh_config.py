"""Settings of a host are those of `ssh -G`; without OpenSSH they are the same, or refused."""

from __future__ import annotations

import dataclasses
import os
import pwd
import socket
import subprocess
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import paramiko
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ssdi8_edge.boards.link import openssh, ssh_config
from ssdi8_edge.boards.link.address import Address, parse_address
from ssdi8_edge.boards.link.ssh_config import Settings, permitted
from ssdi8_edge.ground.errors import UsageError

needs_ssh = pytest.mark.skipif(openssh.program() is None, reason="OpenSSH's ssh is missing")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / ".ssh").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("LAB", "lab")
    monkeypatch.setenv("LAB_SOCK", "/run/lab.sock")
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    return tmp_path


def by_paramiko(lines: Iterable[str], host: str) -> Mapping[str, Any]:
    config = paramiko.SSHConfig()
    config.parse(lines)
    return config.lookup(host)


def look_up(host: str) -> Settings:
    return ssh_config.look_up(parse_address(host), by_paramiko)


def without_openssh(host: str) -> Settings | None:
    """What is read by paramiko; None where it is refused."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openssh, "program", lambda: None)
        try:
            return look_up(host)
        except UsageError as error:
            assert "\n" not in str(error)
            return None


def write(home: Path, text: str) -> None:
    (home / ".ssh/config").write_text(text)


TABLE = [
    # configuration, host, what is expected, whether paramiko's reader must be able to
    ("IdentityFile ~/k # my key", "a", {"identities": ("~/k",)}, True),
    ("IdentityFile ~/k#1", "a", {"identities": ("~/k#1",)}, True),
    ('IdentityFile "~/my key" # "x"', "a", {"identities": ("~/my key",)}, True),
    ("IdentityFile='~/my key'", "a", {"identities": ("~/my key",)}, True),
    (r"IdentityFile ~/my\ key", "a", {"identities": ("~/my key",)}, False),
    ("IdentityFile ~/%h-%n-%p-%r-%%h\nUser u", "a", {"identities": ("~/a-a-22-u-%h",)}, True),
    ("IdentityFile %d/k\nIdentityFile ${HOME}/l", "a", {"identities": ("~/k", "~/l")}, True),
    ("IdentityFile none", "a", {"identities": ()}, True),
    (
        "Host a\nIdentityFile ~/1\nHost *\nIdentityFile ~/2",
        "a",
        {"identities": ("~/1", "~/2")},
        True,
    ),
    ("IdentityFile ~/1\nIdentityFile ~/1", "a", {"identities": ("~/1",)}, True),
    ("CertificateFile ~/1\nCertificateFile ~/2", "a", {"certificates": ("~/1", "~/2")}, True),
    ("IdentityAgent ~/agent", "a", {"agent": "~/agent"}, True),
    ("IdentityAgent none", "a", {"agent": None}, True),
    ("IdentityAgent SSH_AUTH_SOCK", "a", {"agent": None}, True),
    ("IdentityAgent $LAB_SOCK", "a", {"agent": "/run/lab.sock"}, True),
    ("IdentityAgent ${LAB_SOCK}.2", "a", {"agent": "/run/lab.sock.2"}, True),
    ("IdentityAgent $NOT_SET", "a", {"agent": None}, True),
    ("IdentitiesOnly Yes", "a", {"only_identities": True}, True),
    ("IdentitiesOnly TRUE", "a", {"only_identities": True}, True),
    ("IdentitiesOnly No", "a", {"only_identities": False}, True),
    ("identitiesonly=yes", "a", {"only_identities": True}, True),
    ('IdentitiesOnly = "yes"', "a", {"only_identities": True}, True),
    ("PasswordAuthentication no", "a", {"methods": {"publickey", "keyboard-interactive"}}, True),
    ("PubkeyAuthentication False", "a", {"methods": {"password", "keyboard-interactive"}}, True),
    ("ChallengeResponseAuthentication no", "a", {"methods": {"publickey", "password"}}, True),
    ("PreferredAuthentications publickey,hostbased", "a", {"methods": {"publickey"}}, True),
    ("BatchMode yes", "a", {"prompts": 0}, True),
    ("NumberOfPasswordPrompts 1", "a", {"prompts": 1}, True),
    ("ProxyJump ssh://u@gate:2200", "a", {"jumps": (Address("gate", "u", 2200),)}, True),
    ("ProxyJump gate # by night", "a", {"jumps": (Address("gate"),)}, True),
    ("ProxyJump u@[::1]:33", "a", {"jumps": (Address("::1", "u", 33),)}, True),
    (
        "ProxyJump ssh://u@x:33,y,v@[::1]:2",
        "a",
        {"jumps": (Address("x", "u", 33), Address("y"), Address("::1", "v", 2))},
        True,
    ),
    ("Host a\nProxyJump none\nHost *\nProxyJump gate", "a", {"jumps": ()}, True),
    ("Host a\nProxyCommand none\nHost *\nProxyCommand nc %h %p", "a", {"jumps": ()}, True),
    ('UserKnownHostsFile "~/a b" ~/c', "a", {"key_files": ("~/a b", "~/c")}, True),
    ("UserKnownHostsFile none", "a", {"key_files": ("/dev/null",)}, True),
    ("UserKnownHostsFile %d/%n ${HOME}/k", "a", {"key_files": ("~/a", "~/k")}, True),
    ("UserKnownHostsFile one two", "a", {}, False),
    ("HostKeyAlias Orin", "a", {"key_name": "orin"}, True),
    ("HostName %h.lab\nPort 2222", "a", {"host": "a.lab", "key_name": "[a.lab]:2222"}, True),
    ("StrictHostKeyChecking Accept-New", "a", {"accept_new": True}, True),
    ("StrictHostKeyChecking off", "a", {"accept_new": True}, True),
    ("StrictHostKeyChecking YES", "a", {"accept_new": False}, True),
    (
        "StrictHostKeyChecking accept-new\nUserKnownHostsFile '/x y'",
        "a",
        {"accept_new": False},
        True,
    ),
    ("HashKnownHosts Yes", "a", {"hash_names": True}, True),
    ("AddressFamily inet6", "a", {"family": socket.AF_INET6}, True),
    ("BindAddress 127.0.0.1", "a", {"source": "127.0.0.1"}, True),
    ("CheckHostIP yes", "a", {"check_ip": True}, True),
    ("RequiredRSASize 3072", "a", {"rsa_bits": 3072}, True),
    ("Host a\r\n  User u\r\n  Port 7\r\n", "a", {"user": "u", "port": 7}, True),
    ("Host b !a *\n User u\nHost a\n User v", "a", {"user": "v"}, True),
    ("Host [a]*\n User u\nHost ?\n User v", "a", {"user": "v"}, True),
    ('Host b "a" # c\n User u', "a", {"user": "u"}, True),
    ("Host A\n User u\nHost *\n User v", "a", {"user": "v"}, True),
    ("Host *\n Port 9\nHost a\n Port 8\n", "a", {"port": 9}, True),
    ("Host *\n Port 9\n User u", "v@a:8", {"port": 8, "user": "v"}, True),
    ("Host ::1\n User u", "::1", {"user": "u", "host": "::1"}, True),
    ("Match all\n User u", "a", {"user": "u"}, True),
    ("Match originalhost b,a\n User u", "a", {"user": "u"}, True),
    ("Match !originalhost a\n User u\nHost *\n User v", "a", {"user": "v"}, True),
    ("Match user v\n HostName real\nHost a\n User v", "v@a", {"host": "real"}, False),
    ("Match host real\n User u\nHost a\n HostName real\n User v", "a", {"user": "v"}, False),
    ("Match exec true\n User u\nHost a\n User v", "a", {"user": "u"}, False),
    ('Match exec "test %h = b"\n User u\nHost a\n User v', "a", {"user": "v"}, False),
    ("Host a\n HostName real\nMatch final host real\n User u", "a", {"user": "u"}, False),
    ("CanonicalizeHostname no\nUser u", "a", {"user": "u"}, True),
    ("Host a\n Include one\n Port 9\nHost *\n User v", "a", {"user": "u", "port": 9}, True),
    ("Host b\n Include one\nHost *\n User v", "a", {"user": "v"}, True),
    ("Include blocks\nUser v\nPort 9", "a", {"user": "v", "port": 9}, True),
    ("Host b\n Include blocks\nHost *\n User v", "b", {"user": "w"}, False),
    ("Include ~/.ssh/on? 'blocks'\n", "a", {"user": "u", "identities": ("~/in",)}, True),
    ("IgnoreUnknown Foo\nFoo x\nUser u", "a", {"user": "u"}, False),
    ("ForwardAgent yes\nSendEnv A B\nLocalForward 1 x:2\nServerAliveInterval 5", "a", {}, True),
]


@needs_ssh
@pytest.mark.parametrize(("text", "host", "expected", "paramiko_can"), TABLE)
def test_both_readings_of_a_configuration(
    home: Path, text: str, host: str, expected: dict[str, Any], paramiko_can: bool | None
) -> None:
    """What OpenSSH says; paramiko's reader says the same, or nothing."""
    write(home, text)
    (home / ".ssh/one").write_text("User u\nIdentityFile ~/in\n")
    (home / ".ssh/blocks").write_text("Host b\n User w\n")
    found = look_up(host)
    for name, value in expected.items():
        assert readable(getattr(found, name), home) == value, name
    other = without_openssh(host)
    if paramiko_can is not None:
        assert (other is not None) is paramiko_can
    if other is not None:
        assert dataclasses.asdict(other) == dataclasses.asdict(found)


def readable(value: Any, home: Path) -> Any:
    """Paths as the table writes them, without the global ones."""
    if isinstance(value, Path):
        return str(value).replace(str(home), "~")
    if isinstance(value, tuple):
        return tuple(readable(one, home) for one in value if not str(one).startswith("/etc/"))
    return set(value) if isinstance(value, frozenset) else value


@needs_ssh
@pytest.mark.parametrize(("text", "host", "expected", "paramiko_can"), TABLE)
def test_openssh_is_understood(
    home: Path, text: str, host: str, expected: dict[str, Any], paramiko_can: bool | None
) -> None:
    """Its own words about a configuration without a home in it, read by this test."""
    if "~" in text or "nclude" in text or "%d" in text:
        return
    write(home, text)
    address = parse_address(host)
    command = ["ssh", "-G", "-F", str(home / ".ssh/config")]
    command += ["-l", address.user] if address.user else []
    command += ["-p", str(address.port)] if address.port else []
    said = subprocess.run([*command, "--", address.host], capture_output=True, text=True).stdout
    words = dict(line.partition(" ")[::2] for line in said.splitlines())
    found = look_up(host)
    assert found.host == words["hostname"] and found.user == words["user"]
    assert str(found.port) == words["port"]
    assert found.only_identities == (words["identitiesonly"] == "yes")
    assert bool(found.jumps) == ("proxyjump" in words)


@needs_ssh
@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("Foo bar", r"\.ssh/config: line 1: Bad configuration option: foo"),
        ("User u\nInclude more", r"\.ssh/more: line 2: Bad configuration option: foo"),
        ("Port twenty", r"config line 1: Bad (port|number)"),
        ("IdentitiesOnly maybe", "unsupported option|yes/no"),
        ("ProxyCommand nc %h %p", "ProxyCommand, which is not run here"),
        ("RevokedHostKeys ~/revoked", "sets revokedhostkeys to .*which is not done here"),
        ("KnownHostsCommand /bin/true %H", "sets knownhostscommand to"),
        ("BindInterface lo", "sets bindinterface to"),
        ("IdentityFile ~/%Z", "%Z is unknown"),
        ("IdentityFile ${NOT_SET}/x", r"\$\{NOT_SET\} is unknown"),
        ("ProxyJump -oProxyCommand=x", "cannot be read|is no host"),
        ("ProxyJump a", "jumphost loop|lies behind itself"),
        ("Include config", "included by itself"),
    ],
)
def test_what_is_not_understood_is_refused_in_one_sentence(
    home: Path, text: str, pattern: str
) -> None:
    write(home, text)
    (home / ".ssh/more").write_text("# fine\nFoo bar\n")
    with pytest.raises(UsageError, match=pattern) as caught:
        look_up("a")
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2
    if "ProxyJump a" not in text:  # whose loop shows on the way
        assert without_openssh("a") is None


@needs_ssh
def test_a_slow_configuration_has_a_deadline(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openssh, "DEADLINE_S", 0.5)
    write(home, 'Match exec "sleep 20"\n User u\n')
    begin = time.monotonic()
    with pytest.raises(UsageError, match=r"not read within 0\.5 s"):
        look_up("a")
    assert time.monotonic() - begin < 5


def make_program(folder: Path, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "ssh").write_text(f"#!/bin/sh\n{text}\n")
    (folder / "ssh").chmod(0o755)


@pytest.mark.parametrize(
    "text",
    [
        "echo 'Dropbear v2022.83' >&2; exit 1",
        "echo 'OpenSSH_6.6, OpenSSL 1.0.1f' >&2",
        "exit 1",
        "printf '\\377\\376' >&2",
    ],
)
def test_another_ssh_is_not_asked(home: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    make_program(home / "bin", text)
    monkeypatch.setenv("PATH", f"{home / 'bin'}:/usr/bin:/bin")
    assert openssh.program() is None
    write(home, "User u # me")
    assert look_up("a").user == "u"


def test_no_ssh_at_all(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(home))
    write(home, "User u # me\nProxyJump ssh://v@gate:22")
    assert look_up("a").jumps == (Address("gate", "v", 22),)
    write(home, "Match localnetwork 10.0.0.0/8\n User u\nHost a\n User v\n")
    with pytest.raises(UsageError, match=r"config line 1: Match localnetwork .*install OpenSSH"):
        look_up("a")


@pytest.mark.parametrize("usual", [True, False])
def test_how_openssh_is_asked(home: Path, monkeypatch: pytest.MonkeyPatch, usual: bool) -> None:
    """As `ssh` itself where HOME is that of the user; no host or user can become an option."""
    asked = home / "asked"
    make_program(
        home / "bin",
        f'if [ "$1" = -V ]; then echo OpenSSH_9.9p1 >&2; exit; fi\n'
        f'printf "%s|" "$@" >> {asked}; echo >> {asked}\necho hostname $0',
    )
    monkeypatch.setenv("PATH", f"{home / 'bin'}:/usr/bin:/bin")
    place = home if usual else home / "elsewhere"
    monkeypatch.setattr(pwd, "getpwuid", lambda _: SimpleNamespace(pw_dir=str(place)))
    monkeypatch.setenv("LOGNAME", "me")
    look_up("u@a:7")
    first = asked.read_text().splitlines()[0]
    assert first.endswith("-l|u|-p|7|--|a|") and ("|-F|" in first) is not usual


@needs_ssh
def test_a_home_of_the_user_database_is_not_copied(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the real one of this machine holds, the same goes for both."""
    real = pwd.getpwuid(os.getuid()).pw_dir
    monkeypatch.setenv("HOME", real)
    assert look_up("no-such-alias.invalid:7").port == 7


@pytest.mark.parametrize("known", [True, False])
def test_a_user_without_a_name(home: Path, monkeypatch: pytest.MonkeyPatch, known: bool) -> None:
    """As in a container: OpenSSH does not work for it."""

    def nobody(uid: int) -> Any:
        raise KeyError(uid)

    if not known:
        monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.setenv("LOGNAME", "me")
    write(home, "Port 9")
    assert look_up("a").port == 9


# --------------------------------------------------------------------------------------------------
# at random

WORDS = ["a", "b", "*", "?", "!a", "a*", "[a]", '"a"', "'b c'", "%h", "~/k", "x#y", "# z", "yes"]
FLAGS = ["yes", "No", "TRUE", '"yes"', "no # yes", "no #", "yes no"]
NAMES = ["User", "HostName", "IdentityFile", "ProxyJump", "UserKnownHostsFile", "HostKeyAlias"]
NAMES += ["IdentityAgent", "CertificateFile", "Host", "Host", "Match", "Match originalhost", "#"]
FLAG_NAMES = ["IdentitiesOnly", "StrictHostKeyChecking", "BatchMode", "PasswordAuthentication"]


def line(names: list[str], words: list[str], most: int) -> st.SearchStrategy[str]:
    return st.builds(
        lambda indent, name, between, words, end: f"{indent}{name}{between}{' '.join(words)}{end}",
        st.sampled_from(["", "  ", "\t"]),
        st.sampled_from(names),
        st.sampled_from([" ", "=", " = ", "\t"]),
        st.lists(st.sampled_from(words), min_size=1, max_size=most),
        st.sampled_from(["", " ", "\r", " # note"]),
    )


lines = st.one_of(line(NAMES, WORDS, 3), line(FLAG_NAMES, FLAGS, 1), st.just("Match all"))


@needs_ssh
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(lines, max_size=6))
def test_random_configurations_are_read_alike_or_refused(home: Path, text: list[str]) -> None:
    """Never otherwise: whatever OpenSSH refuses is refused, too."""
    write(home, "\n".join(text))
    other = without_openssh("a")
    if other is None:
        return
    try:
        found = look_up("a")
    except UsageError as error:
        if "jumphost loop" in str(error):  # which is found on the way, too
            return
        pytest.fail(f"only OpenSSH refuses: {error}")
    assert dataclasses.asdict(other) == dataclasses.asdict(found)


@pytest.mark.parametrize(
    ("spec", "left"),
    [
        ("a,c", ("a",)),
        ("+c", ("a", "b1", "b2")),
        ("^b1", ("a", "b1", "b2")),
        ("-b*", ("a",)),
        ("b*", ("b1", "b2")),
        ("c", ()),
    ],
)
def test_lists_of_algorithms(spec: str, left: tuple[str, ...]) -> None:
    assert permitted(spec, ("a", "b1", "b2")) == left
