"""--host and known_hosts: what is written is what is meant, and nothing else gets through."""

from __future__ import annotations

import base64
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssdi8_edge.boards.link.address import Address, parse_address
from ssdi8_edge.boards.link.known_hosts import HostKey, add_key, host_name, judge, known_keys
from ssdi8_edge.ground.errors import BoardError, UsageError

KEY = HostKey("ssh-ed25519", b"\0\0\0\x0bssh-ed25519" + bytes(36))
OTHER = HostKey("ssh-ed25519", b"\0\0\0\x0bssh-ed25519" + bytes(35) + b"x")
RSA = HostKey("ssh-rsa", b"\0\0\0\x07ssh-rsa" + bytes(64))


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("orin", Address("orin")),
        ("nv@orin", Address("orin", "nv")),
        ("nv@orin.local:2222", Address("orin.local", "nv", 2222)),
        ("10.0.0.7:22", Address("10.0.0.7", None, 22)),
        ("::1", Address("::1")),
        ("[::1]:2222", Address("::1", None, 2222)),
        ("nv@[fe80::1%eth0]:22", Address("fe80::1%eth0", "nv", 22)),
        ("nv@fe80::1%eth0", Address("fe80::1%eth0", "nv")),
        ("my_board", Address("my_board")),
    ],
)
def test_addresses_are_read_and_written(text: str, address: Address) -> None:
    assert parse_address(text) == address
    assert parse_address(str(address)) == address


@pytest.mark.parametrize(
    "text",
    [
        "",
        "-oProxyCommand=touch x",
        "nv@-x",
        "-nv@orin",
        "nv@",
        "@orin",
        "a b",
        "orin\n",
        "$(touch x)",
        "`x`",
        "orin;x",
        "orin'",
        'orin"',
        "../x",
        "orin:0",
        "orin:65536",
        "orin:x",
        "a@b@c",
        "ssh://orin",
        "orin\0",
    ],
)
def test_what_is_no_host_is_refused_in_one_sentence(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_address(text)
    assert "\n" not in str(caught.value) and "is no host" in str(caught.value)


@given(st.text(max_size=30))
def test_no_text_becomes_an_option_or_two_words(text: str) -> None:
    try:
        address = parse_address(text)
    except UsageError:
        return
    assert parse_address(str(address)) == address
    for part in (address.host, address.user or "x"):
        assert part and not part.startswith("-") and not set(part) & set(" \n\t/;$`'\"\\\0@")


# --------------------------------------------------------------------------------------------------
# known_hosts


def test_a_new_key_is_found_again(tmp_path: Path) -> None:
    file = tmp_path / "new" / "known_hosts"
    add_key("[orin]:2222", KEY, file, hashed=False)
    add_key("orin", RSA, file, hashed=True)
    assert "orin " not in file.read_text().splitlines()[1]
    assert [line.key for line in known_keys("[orin]:2222", [file])] == [KEY]
    assert [line.key for line in known_keys("orin", [file])] == [RSA]
    assert known_keys("nano", [file]) == []
    assert file.stat().st_mode & 0o777 == 0o600 and file.parent.stat().st_mode & 0o777 == 0o700


def test_a_last_line_without_its_end_is_not_spoilt(tmp_path: Path) -> None:
    file = tmp_path / "known_hosts"
    file.write_text(f"nano {KEY.kind} {base64.b64encode(KEY.blob).decode()}")
    add_key("orin", OTHER, file, hashed=False)
    assert [line.key for line in known_keys("nano", [file])] == [KEY]
    assert [line.key for line in known_keys("orin", [file])] == [OTHER]


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="needs ssh-keygen")
@pytest.mark.parametrize("hashed", [False, True])
def test_openssh_reads_what_is_written(tmp_path: Path, hashed: bool) -> None:
    """And the fingerprint is the one that a user sees on the board."""
    subprocess.run(["ssh-keygen", "-q", "-N", "", "-f", tmp_path / "key"], check=True)
    kind, encoded, *_ = (tmp_path / "key.pub").read_text().split()
    key = HostKey(kind, base64.b64decode(encoded))
    add_key("[orin]:2222", key, tmp_path / "known", hashed=hashed)
    found = subprocess.run(
        ["ssh-keygen", "-l", "-F", "[orin]:2222", "-f", tmp_path / "known"],
        check=True,
        capture_output=True,
        text=True,
    )
    assert str(key).split()[1] in found.stdout


@pytest.mark.parametrize(
    ("patterns", "name", "applies"),
    [
        ("orin", "orin", True),
        ("orin,nano", "nano", True),
        ("*.lab", "orin.lab", True),
        ("*.lab,!nano.lab", "nano.lab", False),
        ("or?n", "orin", True),
        ("[orin]:22??", "[orin]:2222", True),
        ("[orin]:2222", "orin", False),
        ("[o]rin", "orin", False),
        ("ORIN", "orin", True),
    ],
)
def test_patterns_mean_what_they_mean_to_openssh(
    tmp_path: Path, patterns: str, name: str, applies: bool
) -> None:
    file = tmp_path / "known"
    file.write_text(f"# a comment\n{patterns} {KEY.kind} {base64.b64encode(KEY.blob).decode()}\n")
    assert bool(known_keys(name, [file])) is applies


@given(st.binary(max_size=200))
def test_a_spoilt_file_is_no_reason_to_fail(content: bytes) -> None:
    read, write = os.pipe()
    os.write(write, content)
    os.close(write)
    with os.fdopen(read):
        assert known_keys("orin", [Path(f"/dev/fd/{read}")]) == []


def test_verdicts(tmp_path: Path) -> None:
    """The known key passes; nothing known is for the user to decide; all else is refused."""
    file = tmp_path / "known"
    name = host_name("Orin", 22)
    assert judge("orin", name, KEY, []) is False
    add_key(name, KEY, file, hashed=False)
    assert judge("orin", name, KEY, known_keys(name, [file])) is True
    for shown in (OTHER, RSA):  # also one of another kind: it may be someone else's only one
        with pytest.raises(
            BoardError, match=r"not the one in .*known:1.*ssh-keygen -f .*known -R orin"
        ):
            judge("orin", name, shown, known_keys(name, [file]))
    file.write_text(file.read_text() + "@revoked * " + file.read_text().split(" ", 1)[1])
    with pytest.raises(BoardError, match="revoked"):
        judge("orin", name, KEY, known_keys(name, [file]))
