from __future__ import annotations

import gc
import weakref

from hypothesis import given
from hypothesis import strategies as st

from penstock.text.stop import StopMatch, StopStrings, stop_strings

letters = st.text("ab", max_size=12)
stops = st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=4).map(tuple)


def first_match(stop: tuple[str, ...], text: str) -> StopMatch | None:
    """The stop string complete first, of several the longest: by trying them all."""
    for end in range(len(text) + 1):
        found = [s for s in stop if text[:end].endswith(s)]
        if found:
            return StopMatch(max(found, key=len), end)
    return None


@given(stop=stops, text=letters)
def test_finds_the_first_complete(stop: tuple[str, ...], text: str) -> None:
    _, found = StopStrings(stop).advance(0, text, match=True)
    assert found == first_match(stop, text)


@given(stop=stops, pieces=st.lists(letters, max_size=5))
def test_cuts_do_not_matter(stop: tuple[str, ...], pieces: list[str]) -> None:
    automaton = StopStrings(stop)
    expected = first_match(stop, "".join(pieces))
    state, num_read = 0, 0
    for piece in pieces:
        state, found = automaton.advance(state, piece, match=True)
        if found is not None:
            assert StopMatch(found.stop, num_read + found.end) == expected
            return
        num_read += len(piece)
    assert expected is None


@given(stop=stops, text=letters)
def test_holds_the_longest_beginning_of_a_stop_string(stop: tuple[str, ...], text: str) -> None:
    automaton = StopStrings(stop)
    state, found = automaton.advance(0, text, match=False)
    assert found is None
    begins = [
        n for n in range(len(text) + 1) if any(s.startswith(text[len(text) - n :]) for s in stop)
    ]
    assert automaton.num_held(state) == max(begins)


def test_automata_are_shared_and_not_kept() -> None:
    stop = ("one", "two" * 1000)
    automaton = stop_strings(stop)
    assert stop_strings(tuple(stop)) is automaton
    reference = weakref.ref(automaton)
    del automaton
    gc.collect()
    assert reference() is None
