"""Regular expressions that come from strangers, matched in bounded time.

Configs name modules by regular expressions. Python's engine backtracks: `(a+)+$` on a name of forty
letters runs for minutes, and it cannot be stopped. So the subset that such configs use is matched
here as an automaton (Thompson 1968), which looks at each letter once: literals, `.`, classes,
groups, `|`, `*`, `+`, `?`, `{m,n}`, `^`, `$`. The rest (look-around, back-references, flags) is
refused by name. Knows no modules and no formats.

Invariant: a match takes at most `MAX_VISITS` visits of a node in the life of an object, and an
answer is that of `re.match`, as far as ASCII names go.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from penstock.errors import UnsupportedModel

MAX_LETTERS = 1000  # of a pattern
MAX_NODES = 10_000  # of all patterns of an object together
MAX_VISITS = 1_000_000  # about a second
_MAX_REPEATS = 100
_MAX_DEPTH = 50
_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
_CLASSES = {
    "d": frozenset("0123456789"),
    "w": frozenset(_LETTERS + "0123456789_"),
    "s": frozenset(" \t\n\r\f\v"),
}
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "v": "\v"}


class _Letters(NamedTuple):
    """What one letter may be."""

    members: frozenset[str]
    is_negated: bool = False

    def has(self, letter: str) -> bool:
        return (letter in self.members) != self.is_negated


class _Node(NamedTuple):
    """Of the automaton. Without letters it is passed at once, at the place that `at` names."""

    letters: _Letters | None
    following: tuple[int, ...]
    at: str = ""  # "^", "$" or anywhere
    accepts: int = -1  # the pattern that ends here


class _Refused(Exception):
    """What a pattern has that is not implemented."""


class Patterns:
    """Some regular expressions that are matched together.

    Raises:
        UnsupportedModel: one of them is too long, wrong or beyond the subset; the message names
            `key`, where it stands in the model's config.
    """

    def __init__(self, patterns: Sequence[str], key: str) -> None:
        self._key = key
        self._nodes: list[_Node] = []
        starts = [self._compiled(pattern, index) for index, pattern in enumerate(patterns)]
        self._num_visits = 0
        # Sets of nodes, each once; all else of them is found as it is needed. The first is empty.
        self._sets: list[frozenset[int]] = [frozenset()]
        self._ids: dict[frozenset[int], int] = {frozenset(): 0}
        self._accepted: list[tuple[int, ...]] = [()]
        self._steps: list[dict[str, int]] = [{}]
        self._ends: dict[tuple[int, str], tuple[int, ...]] = {}
        self._start = self._id(self._closure(starts, "^"))

    def first(self, text: str) -> int | None:
        """Index of the first pattern that matches from the start of `text`, as `re.match` does."""
        return min((index for _, index in self._matches(text)), default=None)

    def ends(self, text: str) -> set[int]:
        """How many letters of `text` a match of any pattern can take."""
        return {length for length, _ in self._matches(text)}

    def _matches(self, text: str) -> Iterator[tuple[int, int]]:
        """Length and pattern of every match at the start of the text."""
        states = self._start
        for length, letter in enumerate(text):
            for index in self._accepted[states]:
                yield length, index
            following = self._steps[states].get(letter)
            states = self._after(states, letter) if following is None else following
            if not states:
                return
        for index in self._last(states, "$" if text else "^$"):
            yield len(text), index

    def _after(self, states: int, letter: str) -> int:
        """What one letter leads to."""
        nodes = [self._nodes[state] for state in self._sets[states]]
        self._visit(len(nodes))
        reached = [
            following
            for node in nodes
            if node.letters is not None and node.letters.has(letter)
            for following in node.following
        ]
        found = self._steps[states][letter] = self._id(self._closure(reached, ""))
        return found

    def _last(self, states: int, at: str) -> tuple[int, ...]:
        """The patterns that a text ends in."""
        found = self._ends.get((states, at))
        if found is None:
            found = self._accepts(self._closure(self._sets[states], at))
            self._ends[states, at] = found
        return found

    def _accepts(self, states: frozenset[int]) -> tuple[int, ...]:
        return tuple(sorted({self._nodes[state].accepts for state in states} - {-1}))

    def _id(self, states: frozenset[int]) -> int:
        found = self._ids.setdefault(states, len(self._sets))
        if found == len(self._sets):
            self._sets.append(states)
            self._accepted.append(self._accepts(states))
            self._steps.append({})
        return found

    def _visit(self, num_nodes: int) -> None:
        self._num_visits += num_nodes
        if self._num_visits > MAX_VISITS:
            raise UnsupportedModel(
                f"The patterns of `{self._key}` in the model's config take too long to match.",
                hint="name the modules instead.",
            )

    def _closure(self, states: Sequence[int] | frozenset[int], at: str) -> frozenset[int]:
        """All nodes that are reached without a letter; `at` has the signs of the place."""
        found: set[int] = set()
        waiting = list(states)
        while waiting:
            state = waiting.pop()
            if state in found:
                continue
            found.add(state)
            node = self._nodes[state]
            if node.letters is None and node.at in at:
                waiting += node.following
        self._visit(len(found))
        return frozenset(found)

    def _compiled(self, pattern: str, index: int) -> int:
        """The first node of a pattern."""
        try:
            if len(pattern) > MAX_LETTERS:
                raise _Refused(f"more than {MAX_LETTERS} letters")
            parser = _Parser(pattern, self._nodes)
            end = parser.node(_Node(None, (), accepts=index))
            return parser.parsed(end)
        except _Refused as error:
            shown = ascii(pattern)[1:-1][:100]
            raise UnsupportedModel(
                f"`{shown}` of `{self._key}` in the model's config has {error}, "
                "which is not implemented.",
                hint="name the modules, or use letters, `.`, `*`, `+`, `?`, `|`, `()` and `[]`.",
            ) from error


class _Parser:
    """Of one pattern; appends its nodes. Built back to front: a part is told what follows it."""

    def __init__(self, pattern: str, nodes: list[_Node]) -> None:
        self._tokens = _tokens(pattern)
        self._nodes = nodes

    def node(self, node: _Node) -> int:
        if len(self._nodes) >= MAX_NODES:
            raise _Refused("too many repeats or alternatives")
        self._nodes.append(node)
        return len(self._nodes) - 1

    def parsed(self, following: int) -> int:
        tree, stop = self._alternatives(0, 0)
        if stop < len(self._tokens):
            raise _Refused("a `)` that closes nothing")
        return self._build(tree, following)

    def _alternatives(self, at: int, depth: int) -> tuple[_Tree, int]:
        if depth > _MAX_DEPTH:
            raise _Refused("too many groups in one another")
        choices: list[_Tree] = []
        while True:
            parts: list[_Tree] = []
            while at < len(self._tokens) and self._tokens[at].kind not in {"|", ")"}:
                part, at = self._part(at, depth)
                parts.append(part)
            choices.append(_Tree("sequence", parts=tuple(parts)))
            if at == len(self._tokens) or self._tokens[at].kind == ")":
                return _Tree("choice", parts=tuple(choices)), at
            at += 1

    def _part(self, at: int, depth: int) -> tuple[_Tree, int]:
        token = self._tokens[at]
        at += 1
        if token.kind == "(":
            tree, at = self._alternatives(at, depth + 1)
            if at == len(self._tokens):
                raise _Refused("a `(` that is not closed")
            at += 1
        elif token.kind == "repeat":
            raise _Refused("a repeat of nothing")
        else:
            tree = _Tree(token.kind, letters=token.letters)
        if at < len(self._tokens) and self._tokens[at].kind == "repeat":
            if tree.kind in {"^", "$"}:
                raise _Refused("a repeat of nothing")
            tree = _Tree("repeat", parts=(tree,), bounds=self._tokens[at].bounds)
            at += 1
        return tree, at

    def _build(self, tree: _Tree, following: int) -> int:
        """Nodes of a part that is followed by the node `following`; its first one."""
        match tree.kind:
            case "letters":
                return self.node(_Node(tree.letters, (following,)))
            case "^" | "$":
                return self.node(_Node(None, (following,), at=tree.kind))
            case "sequence":
                for part in reversed(tree.parts):
                    following = self._build(part, following)
                return following
            case "choice":
                if len(tree.parts) == 1:
                    return self._build(tree.parts[0], following)
                starts = tuple(self._build(part, following) for part in tree.parts)
                return self.node(_Node(None, starts))
            case _:
                return self._repeated(tree, following)

    def _repeated(self, tree: _Tree, following: int) -> int:
        part, (low, high) = tree.parts[0], tree.bounds
        if high is None:
            loop = self.node(_Node(None, (following,)))
            start = self._build(part, loop)
            self._nodes[loop] = _Node(None, (start, following))
            following = loop
        else:
            leave = following
            for _ in range(high - low):
                start = self._build(part, following)
                following = self.node(_Node(None, (start, leave)))
        for _ in range(low):
            following = self._build(part, following)
        return following


class _Token(NamedTuple):
    kind: str  # "letters", "repeat", or the sign itself
    letters: _Letters | None = None
    bounds: tuple[int, int | None] = (1, 1)


class _Tree(NamedTuple):
    kind: str
    parts: tuple[_Tree, ...] = ()
    letters: _Letters | None = None
    bounds: tuple[int, int | None] = (1, 1)


def _tokens(pattern: str) -> list[_Token]:
    tokens: list[_Token] = []
    at = 0
    while at < len(pattern):
        token, at = _token(pattern, at)
        tokens.append(token)
    return tokens


def _token(pattern: str, at: int) -> tuple[_Token, int]:
    """The token at a place, and where the next one starts."""
    sign = pattern[at]
    if sign == "(":
        if pattern.startswith("(?", at) and not pattern.startswith("(?:", at):
            raise _Refused(f"`{ascii(pattern[at : at + 3])[1:-1]}`")
        return _Token("("), at + (3 if pattern.startswith("(?:", at) else 1)
    if sign in "|)^$":
        return _Token(sign), at + 1
    if sign in "*+?{":
        return _repeat(pattern, at)
    if sign == "[":
        return _class(pattern, at + 1)
    if sign == ".":
        return _Token("letters", _Letters(frozenset("\n"), True)), at + 1
    if sign == "\\":
        letters, at = _escaped(pattern, at + 1)
        return _Token("letters", letters), at
    return _Token("letters", _Letters(frozenset(sign))), at + 1


def _repeat(pattern: str, at: int) -> tuple[_Token, int]:
    sign = pattern[at]
    bounds: tuple[int, int | None]
    if sign == "{":
        stop = pattern.find("}", at)
        low, comma, high = pattern[at + 1 : max(stop, at + 1)].partition(",")
        if not low.isascii() or not low.isdigit() or not (high == "" or high.isdigit()):
            raise _Refused("a `{` that starts no `{m,n}`")
        if len(low + high) > 6:
            raise _Refused(f"a repeat of more than {_MAX_REPEATS}")
        bounds = (int(low), (int(high) if high else None) if comma else int(low))
        if max(bounds[0], bounds[1] or 0) > _MAX_REPEATS:
            raise _Refused(f"a repeat of more than {_MAX_REPEATS}")
        if bounds[1] is not None and bounds[1] < bounds[0]:
            raise _Refused("a repeat whose least is above its most")
        at = stop
    else:
        bounds = {"*": (0, None), "+": (1, None), "?": (0, 1)}[sign]
    at += 1
    if pattern.startswith("?", at):  # lazy: the same matches in another order
        at += 1
    if at < len(pattern) and pattern[at] in "*+?{":
        raise _Refused("a repeat of a repeat")
    return _Token("repeat", bounds=bounds), at


def _escaped(pattern: str, at: int) -> tuple[_Letters, int]:
    """What follows a backslash."""
    sign = pattern[at : at + 1]
    if sign.lower() in _CLASSES:
        return _Letters(_CLASSES[sign.lower()], sign.isupper()), at + 1
    if sign in _ESCAPES:
        return _Letters(frozenset(_ESCAPES[sign])), at + 1
    if not sign or sign.isalnum():
        raise _Refused(f"`\\{ascii(sign)[1:-1]}`")
    return _Letters(frozenset(sign)), at + 1


def _class(pattern: str, at: int) -> tuple[_Token, int]:
    """A class of letters; `at` is behind its bracket."""
    is_negated = pattern.startswith("^", at)
    at += is_negated
    members: set[str] = set()
    is_first = True
    while is_first or not pattern.startswith("]", at):
        is_first = False
        low, at = _member(pattern, at)
        if pattern.startswith("-", at) and not pattern.startswith("-]", at):
            high, at = _member(pattern, at + 1)
            if len(low) != 1 or len(high) != 1 or min(low) > max(high) or max(high) > "\x7f":
                raise _Refused("a range of letters that is none")
            members |= {chr(code) for code in range(ord(min(low)), ord(max(high)) + 1)}
        else:
            members |= low
    return _Token("letters", _Letters(frozenset(members), is_negated)), at + 1


def _member(pattern: str, at: int) -> tuple[frozenset[str], int]:
    if at >= len(pattern):
        raise _Refused("a `[` that is not closed")
    if pattern[at] != "\\":
        return frozenset(pattern[at]), at + 1
    letters, at = _escaped(pattern, at + 1)
    if letters.is_negated:
        raise _Refused("a negated class within a class")
    return letters.members, at
