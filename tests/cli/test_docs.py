"""What the documentation promises to a reader who follows a link or a citation."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = (
    ".ci",
    "benchmarks",
    "docs",
    "jetson",
    "plugins",
    "profiles",
    "ssdi8_edge",
    "tests",
    "tools",
)
SUFFIXES = {".cpp", ".cu", ".cuh", ".h", ".j2", ".md", ".py", ".sh", ".toml", ".txt"}
# What builds and runs leave behind.
NOT_SOURCES = {"build", "data", "__pycache__"}
METHOD = ROOT / "docs" / "method.md"

SECTION = re.compile(r"§(\d+(?:\.\d+)*)")
# A citation may go on behind a line break of a comment.
CITATION = re.compile(
    r"docs/method\.md[\s#/*]+(§[\d.]+(?:(?:,| and)?\s+§[\d.]+)*)(?:\s+\((\d+)\))?"
)
OLD_CITATION = re.compile(r"\b[Mm]ethod[\s#]+(?:§|\d+\.\d)")
HEADING = re.compile(r"^#{1,6} +(.*)$", re.M)
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^()\s]+)\)")
FENCE = re.compile(r"^```.*?^```", re.M | re.S)


@cache
def sources() -> list[Path]:
    """Files that people write, but for books and vocabularies."""
    found = [path for path in ROOT.iterdir() if path.is_file()]
    for folder in FOLDERS:
        found += (ROOT / folder).rglob("*")
    return sorted(
        path
        for path in found
        if path.suffix in SUFFIXES
        and path.is_file()
        and not NOT_SOURCES.intersection(path.relative_to(ROOT).parts)
        and not (path.parent.name == "demo" and path.suffix == ".txt")
        and path != Path(__file__)
    )


# A path from the root, and a module by its place in the package: `compile/export.py`.
PATH = re.compile(r"`((?:ssdi8_edge|jetson|plugins|tests|tools|profiles|benchmarks)/[\w./-]*)`")
MODULE = re.compile(r"`((?:[a-z_0-9]+/)+[a-z_0-9]+\.py)`")


def pages() -> list[Path]:
    return [path for path in sources() if path.suffix == ".md"]


@cache
def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def prose(path: Path) -> str:
    """A page without its code blocks, whose comments look like headings."""
    return FENCE.sub("", text_of(path))


def sections() -> list[str]:
    """The numbers of the headings of docs/method.md, in order."""
    numbers = (re.match(r"(\d+(?:\.\d+)*)\.? ", text) for text in HEADING.findall(prose(METHOD)))
    return [number[1] for number in numbers if number]


def equations() -> list[int]:
    """Numbers at the ends of the lines of its formulas, in order."""
    blocks = "\n".join(FENCE.findall(text_of(METHOD)))
    return [int(number) for number in re.findall(r" \((\d+)\)$", blocks, re.M)]


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", shown).replace(" ", "-")


def anchors(path: Path) -> set[str]:
    seen: Counter[str] = Counter()
    found = set()
    for heading in HEADING.findall(prose(path)):
        anchor = slug(heading)
        found.add(f"{anchor}-{seen[anchor]}" if seen[anchor] else anchor)
        seen[anchor] += 1
    return found


def relative_links(path: Path) -> Iterator[str]:
    for target in LINK.findall(prose(path)):
        if not re.match(r"[a-z]+:", target):
            yield target


def broken(path: Path, target: str) -> str | None:
    """What a link from the page `path` lacks."""
    file, _, anchor = target.partition("#")
    place = (path.parent / file).resolve() if file else path
    if not place.exists():
        return f"{name(path)}: {target}: there is no such file"
    if anchor and anchor not in anchors(place):
        return f"{name(path)}: {target}: there is no such heading"
    return None


def test_numbers_of_the_method_are_in_order() -> None:
    """A number left out or used twice would let a citation point at something else."""
    found = sections()
    assert len(found) == len(set(found))
    chapters = [number for number in found if "." not in number]
    assert chapters == [str(i + 1) for i in range(len(chapters))]
    for chapter in chapters:
        inside = [number for number in found if number.startswith(f"{chapter}.")]
        assert inside == [f"{chapter}.{i + 1}" for i in range(len(inside))]
    assert equations() == list(range(1, len(equations()) + 1))


def test_every_cited_section_exists() -> None:
    """In all sources; also where a file cites a further section by its number alone."""
    known = set(sections())
    missing = [
        f"{name(path)}: §{number}"
        for path in sources()
        for number in SECTION.findall(text_of(path))
        if number not in known
    ]
    assert not missing


def test_sections_are_cited_by_their_page() -> None:
    """§ without the page, or a "method §" of another document, tells a reader nothing."""
    wrong = []
    for path in sources():
        text = text_of(path)
        homeless = path.suffix != ".md" and "§" in text and not CITATION.search(text)
        if homeless or OLD_CITATION.search(text):
            wrong.append(name(path))
    assert not wrong


def test_every_cited_equation_exists() -> None:
    known = {str(number) for number in equations()}
    cited = [
        (name(path), found[2])
        for path in sources()
        for found in CITATION.finditer(text_of(path))
        if found[2]
    ]
    assert len(cited) > 2
    assert not [entry for entry in cited if entry[1] not in known]


def test_citations_inside_the_method_exist() -> None:
    """Equations that the page itself names, outside its formulas."""
    named = re.findall(r"(?<![\w)])\((\d{1,2})\)", prose(METHOD))  # a year has four digits
    assert named
    assert {int(number) for number in named} <= set(equations())


@pytest.mark.parametrize("path", pages(), ids=name)
def test_links_lead_somewhere(path: Path) -> None:
    assert not [found for target in relative_links(path) if (found := broken(path, target))]


HISTORY = {"CHANGELOG.md", "benchmarks/README.md"}
LIVING = [path for path in pages() if name(path) not in HISTORY]


@pytest.mark.parametrize("path", LIVING, ids=name)
def test_paths_exist(path: Path) -> None:
    """Of files and folders that a page names; the history of CHANGELOG and benchmarks aside."""
    text = prose(path)
    named = {*PATH.findall(text), *MODULE.findall(text)}
    roots = (ROOT, ROOT / "ssdi8_edge")
    assert not [each for each in named if not any((root / each).exists() for root in roots)]


def test_a_broken_link_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks themselves: a file, a heading, a second heading of the same words, code blocks."""
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    page, other = tmp_path / "page.md", tmp_path / "other.md"
    other.write_text("# A `b-*` c, d\n## Same\n## Same\n```\n# no heading\n```\n", encoding="utf-8")
    links = {
        "other.md#a-b--c-d": True,
        "other.md#same-1": True,
        "other.md#same-2": False,
        "other.md#no-heading": False,
        "none.md": False,
        "#here": True,
        "#there": False,
    }
    page.write_text("# Here\n" + "".join(f"[x]({link})\n" for link in links), encoding="utf-8")
    assert list(relative_links(page)) == list(links)
    assert {link: broken(page, link) is None for link in links} == links
