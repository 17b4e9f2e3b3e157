"""Stop texts: what is shown, when, and that nothing shown is regretted."""

from __future__ import annotations

import itertools

import pytest
import tiny_bundle  # noqa: F401  (puts jetson/ on the path)
from hypothesis import given
from hypothesis import strategies as st

from runtime.stop import StopTexts

FEW = st.text("ab ", max_size=30)
STOPS = st.lists(st.text("ab ", min_size=1, max_size=5), max_size=4)


def up_to_first(text: str, stops: list[str]) -> tuple[str, bool]:
    """By definition: the shortest beginning of `text` that ends with a stop text, without it."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(len(stop) for stop in found)], True
    return text, False


@given(FEW, STOPS, st.lists(st.integers(0, 30)))
def test_pieces_make_no_difference(text: str, stops: list[str], cuts: list[int]) -> None:
    expected, found = up_to_first(text, stops)
    edges = sorted({0, len(text), *(cut for cut in cuts if cut <= len(text))})
    stop = StopTexts(stops)
    shown = ""
    for start, end in itertools.pairwise(edges):
        shown += stop.add(text[start:end])
        assert expected.startswith(shown)
        assert stop.found == up_to_first(text[:end], stops)[1]
        if stop.found:
            break
        # Nothing is held back that can be decided: no stop text begins with all of it.
        held = text[len(shown) : end]
        assert not held or any(each.startswith(held) and each != held for each in stops)
    shown += stop.flush()
    assert (shown, stop.found) == (expected, found)


@pytest.mark.parametrize(
    ("stops", "pieces", "shown"),
    [
        ([], ["a", "b"], ["a", "b", ""]),
        (["END"], ["text E", "N", "D more"], ["text ", "", ""]),
        (["END"], ["text E", "Nd"], ["text ", "ENd", ""]),
        (["END"], ["text EN"], ["text ", "EN"]),
        (["aab"], ["aaa", "ab"], ["a", "a"]),
        (["\n\n"], ["one\n", "two\n", "\nthree"], ["one", "\ntwo", ""]),
        (["bc", "abc"], ["xab", "cd"], ["x", ""]),  # end together: the longest
        (["abcd", "bc"], ["abcd"], ["a"]),  # bc is complete before abcd is
        (["日本"], ["これは日", "本"], ["これは", ""]),
    ],
    ids=str,
)
def test_what_is_shown_when(stops: list[str], pieces: list[str], shown: list[str]) -> None:
    stop = StopTexts(stops)
    seen = [stop.add(piece) for piece in pieces]
    assert [*seen, stop.flush()][: len(shown)] == shown
    assert stop.flush() == ""
