"""Finds stop strings in a text that arrives in pieces, in linear time.

Aho and Corasick's automaton (CACM 1975): its state is the longest suffix of the text that begins a
stop string, which is just what must be held back. Knows no tokens. Invariant: what it finds depends
on the text alone, not on how it was cut: the stop string that is complete first; of several
complete at once, the longest.
"""

from __future__ import annotations

from typing import NamedTuple
from weakref import WeakValueDictionary


class StopMatch(NamedTuple):
    """A stop string in a piece of text: it ends after `end` characters of the piece."""

    stop: str
    end: int


class StopStrings:
    """The automaton of a set of stop strings. Immutable; a state is an integer, 0 at first."""

    def __init__(self, stop: tuple[str, ...]) -> None:
        self._edges: list[dict[str, int]] = [{}]
        self._depth = [0]
        self._match: list[str | None] = [None]  # the longest stop string that ends here
        for text in stop:
            self._insert(text)
        self._fallback = self._link()

    def _insert(self, text: str) -> None:
        state = 0
        for char in text:
            target = self._edges[state].get(char)
            if target is None:
                target = self._edges[state][char] = len(self._edges)
                self._edges.append({})
                self._depth.append(self._depth[state] + 1)
                self._match.append(None)
            state = target
        self._match[state] = text

    def _link(self) -> list[int]:
        """For each state, the state of its longest proper suffix; breadth first."""
        fallback = [0] * len(self._edges)
        queue = list(self._edges[0].values())
        for state in queue:
            if self._match[state] is None:
                self._match[state] = self._match[fallback[state]]
            for char, target in self._edges[state].items():
                suffix = fallback[state]
                while suffix and char not in self._edges[suffix]:
                    suffix = fallback[suffix]
                fallback[target] = self._edges[suffix].get(char, 0)
                queue.append(target)
        return fallback

    def num_held(self, state: int) -> int:
        """How many characters at the end of the text may yet begin a stop string."""
        return self._depth[state]

    def advance(self, state: int, text: str, *, match: bool) -> tuple[int, StopMatch | None]:
        """Read a piece of text; stops at a match, unless `match` is False."""
        if not state and self._edges[0].keys().isdisjoint(text):
            return 0, None
        edges, fallback = self._edges, self._fallback
        for index, char in enumerate(text, 1):
            target = edges[state].get(char)
            while target is None and state:
                state = fallback[state]
                target = edges[state].get(char)
            state = target or 0
            if match and (stop := self._match[state]) is not None:
                return state, StopMatch(stop, index)
        return state, None


_in_use: WeakValueDictionary[tuple[str, ...], StopStrings] = WeakValueDictionary()


def stop_strings(stop: tuple[str, ...]) -> StopStrings:
    """The automaton of these stop strings. Those who use the same at one time share it; nothing is
    kept after them, for an automaton takes some hundred bytes a character."""
    found = _in_use.get(stop)
    if found is None:
        found = _in_use[stop] = StopStrings(stop)
    return found
