"""The text of SSH configuration files: words, quotes, comments and included files."""

from __future__ import annotations

import glob
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ssdi8_edge.ground.errors import UsageError

SYSTEM = Path("/etc/ssh/ssh_config")

_SPACE = " \t\r\n\f"
_SETTING = re.compile(r"([A-Za-z0-9]+)(?:[ \t]*=[ \t]*|[ \t]+)(.+)")
_WORD = re.compile(r"""[ \t]*((?!\#)(?:"[^"]*"|'[^']*'|[^ \t"'])+)""")
_QUOTED = re.compile(r""""([^"]*)"|'([^']*)'""")
_HOME = re.compile(r"""(?<=[\s="'])~(?=/)|(?<!%)((?:%%)*)%d""")
_PATHS = (
    *("certificatefile", "globalknownhostsfile", "identityagent", "identityfile"),
    *("revokedhostkeys", "userknownhostsfile"),
)
_COMMANDS = ("proxycommand", "localcommand", "remotecommand")  # the rest of the line, as it is
_MAX_INCLUDES = 16


@dataclass(frozen=True)
class Line:
    """One line of a configuration.

    Attributes:
        place: file and number, for messages.
        text: as it stands there.
        keyword: in lower case; empty where the line sets nothing.
        rest: what follows it.
    """

    place: str
    text: str
    keyword: str
    rest: str

    def words(self) -> list[str]:
        """What follows the keyword, without quotes and a comment.

        Raises:
            UsageError: quotes do not match, or characters are escaped, which is OpenSSH's to read.
        """
        if self.keyword in _COMMANDS:
            return [self.rest]
        if self.keyword == "proxyjump":  # which knows no quotes
            return [self.rest.partition(" #")[0].strip()]
        words, position = [], 0
        while found := _WORD.match(self.rest, position):
            words.append(_QUOTED.sub(lambda quoted: quoted[1] or quoted[2] or "", found[1]))
            position = found.end()
        tail = self.rest[position:].lstrip(_SPACE)
        if tail[:1] not in ("", "#") or not all(words) or not words or "\\" in self.rest:
            raise self.refusal(f"{self.text.strip()!r} cannot be read")
        return words

    def refusal(
        self, problem: str, remedy: str = "mend it, or install OpenSSH's ssh"
    ) -> UsageError:
        """What to raise about this line."""
        return UsageError(f"{self.place}: {problem};", f"{remedy}.")


def read(file: Path) -> Iterator[Line]:
    """Lines of one file; none where there is none.

    Raises:
        UsageError: it cannot be read, or holds a line that no configuration has.
    """
    try:
        text = file.read_bytes().decode("utf-8", "surrogateescape")
    except FileNotFoundError:
        return
    except OSError as error:
        raise UsageError(f"{file} cannot be read ({error.strerror});", "mend it.") from error
    for number, line in enumerate(text.split("\n"), 1):
        place, bare = f"{file} line {number}", line.strip(_SPACE)
        if not bare or bare.startswith("#"):
            yield Line(place, line, "", "")
            continue
        found = _SETTING.fullmatch(bare)
        if found is None:
            raise UsageError(f"{place}: {bare!r} cannot be read;", "mend it.")
        yield Line(place, line, found[1].lower(), found[2])


def included(line: Line, folder: Path, home: Path) -> list[Path]:
    """Files that an Include line names.

    Args:
        folder: that names without a path are relative to.
    """
    names = []
    for pattern in line.words():
        if "%" in pattern or "$" in pattern:
            raise line.refusal("what it includes depends on variables")
        path = home / pattern[2:] if pattern.startswith("~/") else folder / pattern
        names += sorted(glob.glob(str(path)))
    return [Path(name) for name in names]


def copy_for_home(
    file: Path, folder: Path, home: Path, copies: Path, originals: dict[str, str], depth: int = 0
) -> Path:
    """A copy of `file`, and of what it includes, in which `~` and `%d` are `home`.

    OpenSSH looks the home up in the user database, whatever HOME says.

    Args:
        folder: that included names are relative to.
        copies: folder for the copies.
        originals: gets the original of each copy. Lines keep their numbers.
    """
    check_depth(file, depth)
    copy = copies / str(len(originals))
    originals[str(copy)] = str(file)
    quoted_home = str(home).replace("%", "%%")
    lines = []
    for line in read(file):
        if line.keyword == "include":
            names = [
                str(copy_for_home(name, folder, home, copies, originals, depth + 1))
                for name in included(line, folder, home)
            ]
            lines.append(f"Include {shlex.join(names)}" if names else "")
        elif line.keyword not in _PATHS:
            lines.append(line.text)
        else:
            lines.append(_HOME.sub(lambda found: (found[1] or "") + quoted_home, line.text))
    copy.write_bytes("\n".join(lines).encode("utf-8", "surrogateescape"))
    return copy


def check_depth(file: Path, depth: int) -> None:
    """Raises UsageError where files include each other without an end."""
    if depth > _MAX_INCLUDES:
        raise UsageError(f"{file} is included by itself;", "mend the Include lines.")
