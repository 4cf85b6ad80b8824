"""`KVCache` against a naive model: a tree of linked nodes, and a list as the free queue."""

from __future__ import annotations

from collections import Counter

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from penstock.engine.kv_cache import KVCache
from penstock.engine.request import Request
from penstock.types import EngineRequest, SamplingParams


def make_request(token_ids: list[int], salt: str = "", name: str = "r") -> Request:
    asked = EngineRequest(
        request_id=name, prompt_token_ids=token_ids, params=SamplingParams(), salt=salt
    )
    return Request(asked, seed=0, arrival=0, arrival_s=0.0)


def fill(cache: KVCache, request: Request) -> list[int]:
    """Admit a request, compute all of it; the blocks that it found."""
    cache.match(request)
    found = list(request.blocks)
    assert cache.grow(request, request.num_tokens) is not None
    cache.commit(request, request.num_tokens)
    return found


# -- one thing at a time ---------------------------------------------------------------------------


def test_a_prompt_is_found_but_for_its_last_token() -> None:
    cache = KVCache(num_blocks=8, block_size=2, enable_prefix_caching=True)
    first, exact, longer, other = (
        make_request(ids) for ids in ([1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4, 5], [1, 2, 9, 9])
    )
    assert fill(cache, first) == []
    assert fill(cache, exact) == first.blocks[:1]
    assert fill(cache, longer) == first.blocks
    assert fill(cache, other) == first.blocks[:1]
    cache.check([first, exact, longer, other])


def test_prefixes_are_found_only_under_their_salt() -> None:
    cache = KVCache(num_blocks=8, block_size=1, enable_prefix_caching=True)
    mine, yours, mine_again = (make_request([1, 2, 3], salt) for salt in ("me", "you", "me"))
    fill(cache, mine)
    assert fill(cache, yours) == []
    assert fill(cache, mine_again) == mine.blocks[:2]


def test_a_salt_is_never_mistaken_for_a_node() -> None:
    cache = KVCache(num_blocks=8, block_size=1, enable_prefix_caching=True)
    fill(cache, make_request([1, 2, 3]))
    assert fill(cache, make_request([2, 3, 4], salt="0")) == []


def test_equal_blocks_below_unequal_prefixes_are_unequal() -> None:
    cache = KVCache(num_blocks=8, block_size=1, enable_prefix_caching=True)
    fill(cache, make_request([1, 7, 7]))
    assert fill(cache, make_request([2, 7, 7])) == []


def test_nothing_is_found_where_caching_is_off() -> None:
    cache = KVCache(num_blocks=8, block_size=1, enable_prefix_caching=False)
    fill(cache, make_request([1, 2, 3]))
    assert fill(cache, make_request([1, 2, 3])) == []


def test_a_chain_is_evicted_from_its_end_and_the_oldest_chain_first() -> None:
    cache = KVCache(num_blocks=6, block_size=1, enable_prefix_caching=True)
    old, new = make_request([1, 2, 3]), make_request([4, 5, 6])
    for request in (old, new):
        fill(cache, request)
    chains = {"old": list(old.blocks), "new": list(new.blocks)}
    cache.release(old)
    cache.release(new)
    taker = make_request([0] * 4)
    assert cache.grow(taker, 4) == [*reversed(chains["old"]), chains["new"][2]]
    cache.release(taker)
    assert fill(cache, make_request([4, 5, 9])) == chains["new"][:2]


def test_blocks_that_cache_nothing_are_reused_first() -> None:
    cache = KVCache(num_blocks=4, block_size=2, enable_prefix_caching=True)
    cached, partial = make_request([1, 2, 3, 4]), make_request([5, 6, 7])
    fill(cache, cached)
    assert cache.grow(partial, 3) is not None  # never committed
    blocks = set(partial.blocks)
    cache.release(cached)
    cache.release(partial)
    assert set(cache.grow(make_request([0] * 4), 4) or ()) == blocks


def test_a_duplicate_goes_on_below_the_node_that_is_there() -> None:
    """Two requests compute the same block apart; what the second adds is found by a third."""
    cache = KVCache(num_blocks=8, block_size=1, enable_prefix_caching=True)
    first, second = make_request([1, 2]), make_request([1, 2])
    for request in (first, second):
        assert cache.grow(request, 2) is not None
    for request in (first, second):
        cache.commit(request, 2)
    second.token_ids.append(3)
    assert cache.grow(second, 3) is not None
    cache.commit(second, 3)
    assert fill(cache, make_request([1, 2, 3, 4])) == [*first.blocks, second.blocks[2]]


def test_grow_changes_nothing_where_it_fails() -> None:
    cache = KVCache(num_blocks=2, block_size=2, enable_prefix_caching=True)
    request = make_request([1] * 5)
    assert cache.grow(request, 5) is None
    assert (request.blocks, cache.num_free) == ([], 2)
    assert cache.grow(request, 4) == [0, 1]
    assert cache.grow(request, 3) == []
    assert (cache.num_free, cache.num_used) == (0, 2)


def test_clear_frees_all_blocks_and_forgets_what_they_cache() -> None:
    cache = KVCache(num_blocks=4, block_size=1, enable_prefix_caching=True)
    gone, held = make_request([1, 2]), make_request([1, 2])
    fill(cache, gone)
    cache.release(gone)
    fill(cache, held)
    cache.clear()
    cache.check([])
    assert (cache.num_free, cache.num_used) == (4, 0)
    assert fill(cache, make_request([1, 2, 3])) == []


# -- everything at once ----------------------------------------------------------------------------


class Node:
    """A prefix. It knows its parent only to be cut off when it is evicted."""

    def __init__(self, parent: Node | None = None, tokens: tuple[int, ...] = ()) -> None:
        self.parent, self.tokens = parent, tokens
        self.children: dict[tuple[int, ...], Node] = {}
        self.block = -1


class Model:
    """The naive cache: what `KVCache` must do, without references, numbers and dictionaries."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.size = block_size
        self.free = list(range(num_blocks))
        self.tables: dict[str, list[int]] = {}
        self.places: dict[str, list[Node]] = {}  # root first
        self.roots: dict[str, Node] = {}
        self.cached: dict[int, Node] = {}

    def chunk(self, request: Request, index: int) -> tuple[int, ...]:
        return tuple(request.token_ids[index * self.size : (index + 1) * self.size])

    def match(self, request: Request, looks: bool) -> None:
        place = [self.roots.setdefault(request.salt, Node())]
        for index in range((request.num_tokens - 1) // self.size if looks else 0):
            child = place[-1].children.get(self.chunk(request, index))
            if child is None:
                break
            place.append(child)
        self.tables[request.id] = [node.block for node in place[1:]]
        self.places[request.id] = place
        self.free = [block for block in self.free if block not in self.tables[request.id]]

    def grow(self, request: Request, num_tokens: int) -> list[int] | None:
        missing = max(0, -(-num_tokens // self.size) - len(self.tables[request.id]))
        if missing > len(self.free):
            return None
        blocks, self.free = self.free[:missing], self.free[missing:]
        for block in blocks:
            node = self.cached.pop(block, None)
            if node is not None and node.parent is not None:
                del node.parent.children[node.tokens]
        self.tables[request.id] += blocks
        return blocks

    def commit(self, request: Request, num_tokens: int) -> None:
        place = self.places[request.id]
        for index in range(len(place) - 1, num_tokens // self.size):
            tokens = self.chunk(request, index)
            child = place[-1].children.get(tokens)
            if child is None:
                child = place[-1].children[tokens] = Node(place[-1], tokens)
                child.block = self.tables[request.id][index]
                self.cached[child.block] = child
            place.append(child)

    def release(self, request: Request) -> None:
        blocks = self.tables.pop(request.id)
        del self.places[request.id]
        held = {block for table in self.tables.values() for block in table}
        for block in reversed(blocks):
            if block in held:
                continue
            if block in self.cached:
                self.free.append(block)
            else:
                self.free.insert(0, block)


seen: Counter[str] = Counter()


class KVCacheMachine(RuleBasedStateMachine):
    requests = Bundle("requests")

    @initialize(num_blocks=st.integers(4, 24), block_size=st.sampled_from([1, 2, 3]))
    def start(self, num_blocks: int, block_size: int) -> None:
        self.cache = KVCache(num_blocks, block_size, enable_prefix_caching=True)
        self.model = Model(num_blocks, block_size)
        self.live: list[Request] = []
        self.num_made = 0

    @rule(
        target=requests,
        token_ids=st.integers(1, 12).map(lambda length: [0] * length)
        | st.lists(st.integers(0, 1), min_size=1, max_size=12),
        salt=st.sampled_from(["", "", "tenant"]),
        matches=st.sampled_from([True, True, False]),
        computes=st.sampled_from([True, True, False]),
    )
    def admit(self, token_ids: list[int], salt: str, matches: bool, computes: bool) -> Request:
        request = make_request(token_ids, salt, str(self.num_made))
        self.num_made += 1
        if matches:
            self.cache.match(request)
        self.model.match(request, matches)
        self.live.append(request)
        seen["hits"] += bool(request.blocks)
        seen["deep hits"] += len(request.blocks) > 2
        seen["shared"] += any(set(request.blocks) & set(r.blocks) for r in self.live[:-1])
        if computes:
            self.grow(request, [])
            self.commit(request, 0)
        return request

    @rule(request=requests, token_ids=st.lists(st.integers(0, 1), max_size=4))
    def grow(self, request: Request, token_ids: list[int]) -> None:
        request.token_ids += token_ids
        num_cached = len(self.model.cached)
        blocks = self.cache.grow(request, request.num_tokens)
        assert blocks == self.model.grow(request, request.num_tokens)
        seen["failures"] += blocks is None
        seen["evictions"] += len(self.model.cached) < num_cached

    @rule(request=requests, num_uncommitted=st.sampled_from([0, 0, 1, 4]))
    def commit(self, request: Request, num_uncommitted: int) -> None:
        size = self.cache.block_size
        num_covered = min(len(request.blocks) * size, request.num_tokens)
        num_tokens = max(num_covered - num_uncommitted, request.num_chained * size)
        num_new = num_tokens // size - request.num_chained
        num_cached = len(self.model.cached)
        self.cache.commit(request, num_tokens)
        self.model.commit(request, num_tokens)
        assert request.num_chained == len(self.model.places[request.id]) - 1
        seen["duplicates"] += num_new > len(self.model.cached) - num_cached

    @rule(request=consumes(requests))
    def release(self, request: Request) -> None:
        self.live.remove(request)
        self.cache.release(request)
        self.model.release(request)
        assert (request.blocks, request.node, request.num_chained) == ([], request.salt, 0)

    @invariant()
    def is_sound(self) -> None:
        if hasattr(self, "cache"):
            self.cache.check(self.live)
            assert self.cache.num_free == len(self.model.free)
            assert {r.id: r.blocks for r in self.live} == self.model.tables


def test_equals_the_naive_model() -> None:
    seen.clear()
    run_state_machine_as_test(
        KVCacheMachine, settings=settings(max_examples=160, stateful_step_count=40, deadline=None)
    )
    for event in ("hits", "deep hits", "shared", "failures", "evictions", "duplicates"):
        assert seen[event] > 20, seen


@pytest.mark.parametrize("spoil", ["references", "free", "node", "table"])
def test_check_finds_what_is_spoilt(spoil: str) -> None:
    cache = KVCache(num_blocks=4, block_size=1, enable_prefix_caching=True)
    request = make_request([1, 2])
    fill(cache, request)
    cache.check([request])
    if spoil == "references":
        cache._references[request.blocks[0]] += 1
    elif spoil == "free":
        cache._free[request.blocks[0]] = None
    elif spoil == "node":
        cache._keys[request.blocks[0]] = None
    else:
        request.blocks = request.blocks[:1]
    with pytest.raises(AssertionError):
        cache.check([request])
