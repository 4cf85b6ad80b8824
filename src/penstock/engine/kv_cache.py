"""The paged KV cache's books: which block belongs to whom, and which prefix lies where.

Owns block numbers only; the tensors are `attention.kv_store`'s, the requests the scheduler's.

The prefix cache is an exact trie of full blocks in one dict: (parent node, the block's tokens) ->
(node, block). Tokens are compared, not hashes, so a hit is never false. The parent of a first block
is the salt; node numbers are never used twice, so what hangs below an evicted node is out of reach
until it is evicted as well. Invariant: a block has references or is in the free queue, never both.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable

from penstock.engine.request import Request


class KVCache:
    """A pool of `num_blocks` blocks of `block_size` tokens each; a size of 1 is token attention."""

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool) -> None:
        assert num_blocks > 0
        assert block_size > 0
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        # Blocks ever released and nodes ever made (it numbers them, too). To a request that lacks n
        # blocks, each of either gives one at most: until this has grown by n, it need not try.
        self.num_gains = 0
        self.clear()

    def clear(self) -> None:
        """Free all blocks and forget what they cache; requests must forget theirs as well."""
        self.num_gains += self.num_blocks
        self._references = [0] * self.num_blocks
        # Blocks without references, to be reused from the front: those that cache nothing first,
        # then the least recently used. A cached one keeps its node until it is reused.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(self.num_blocks))
        self._nodes: dict[tuple[int | str, tuple[int, ...]], tuple[int, int]] = {}
        # The inverse of `_nodes`: the key under which a block is cached.
        self._keys: list[tuple[int | str, tuple[int, ...]] | None] = [None] * self.num_blocks

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds; some of them cache a prefix."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Blocks that live requests hold."""
        return self.num_blocks - len(self._free)

    def match(self, request: Request) -> None:
        """Start the table of a request without blocks with its longest cached prefix.

        At most `(num_tokens - 1) // block_size` blocks: one token at least is left to compute,
        since a token can be sampled only behind a computed one.
        """
        assert not request.blocks
        size, token_ids, node = self.block_size, request.token_ids, request.node
        for start in range(0, (len(token_ids) - 1) // size * size, size):
            found = self._nodes.get((node, tuple(token_ids[start : start + size])))
            if found is None:
                break
            node, block = found
            if self._references[block] == 0:
                del self._free[block]
            self._references[block] += 1
            request.blocks.append(block)
        request.node, request.num_chained = node, len(request.blocks)

    def grow(self, request: Request, num_tokens: int) -> list[int] | None:
        """Make `request.blocks` cover `num_tokens` tokens.

        Returns:
            The appended blocks; None, and nothing has changed, if the pool holds too few.
        """
        num_missing = -(-num_tokens // self.block_size) - len(request.blocks)
        if num_missing > len(self._free):
            return None
        blocks: list[int] = []
        for _ in range(num_missing):
            block, _ = self._free.popitem(last=False)
            key = self._keys[block]
            if key is not None:
                del self._nodes[key]
                self._keys[block] = None
            self._references[block] = 1
            blocks.append(block)
        request.blocks.extend(blocks)
        return blocks

    def commit(self, request: Request, num_tokens: int) -> None:
        """Offer the full blocks among the request's first `num_tokens` tokens to other requests.

        Their KV is computed, or will be in the step that is being planned: a layer writes the KV of
        the whole step before it attends, so a request admitted to the same step may read it. If
        that step is not carried out to its end, what was offered is false: `clear` the cache.

        A block whose tokens are cached already stays a private copy (tables only grow), and the
        chain goes on below the node that is there: equal prefixes have one chain.
        """
        if not self.enable_prefix_caching:
            return
        size, token_ids, node = self.block_size, request.token_ids, request.node
        num_full = num_tokens // size
        for index in range(request.num_chained, num_full):
            key = (node, tuple(token_ids[index * size : (index + 1) * size]))
            found = self._nodes.get(key)
            if found is None:
                block = request.blocks[index]
                found = self._nodes[key] = (self.num_gains, block)
                self._keys[block] = key
                self.num_gains += 1
            node = found[0]
        request.node, request.num_chained = node, num_full

    def release(self, request: Request) -> None:
        """Give back all blocks of the request.

        The tail is queued first, so that a chain is evicted from its end and stays usable.
        """
        references, free, keys = self._references, self._free, self._keys
        for block in reversed(request.blocks):
            references[block] -= 1
            if references[block] == 0:
                self.num_gains += 1
                free[block] = None
                if keys[block] is None:
                    free.move_to_end(block, last=False)
        request.blocks = []
        request.node, request.num_chained = request.salt, 0

    def check(self, requests: Iterable[Request]) -> None:
        """Assert the invariants; `requests` are all live ones.

        1. A block's references are its occurrences in the block lists of live requests.
        2. A block without references is in the free queue, exactly once; no other block is.
        3. Nodes and their blocks map one to one, and no node number occurs twice.
        4. A request's chain covers full blocks of tokens that it has.
        """
        held: Counter[int] = Counter()
        for request in requests:
            assert len(set(request.blocks)) == len(request.blocks), (request.id, request.blocks)
            held.update(request.blocks)
            assert request.num_chained <= len(request.blocks)
            assert request.num_chained * self.block_size <= request.num_tokens
            assert (request.node == request.salt) == (request.num_chained == 0)
        assert self._references == [held[block] for block in range(self.num_blocks)]
        assert set(self._free) == {b for b in range(self.num_blocks) if not held[b]}
        assert {block: key for key, (_, block) in self._nodes.items()} == {
            block: key for block, key in enumerate(self._keys) if key is not None
        }
        assert len({node for node, _ in self._nodes.values()}) == len(self._nodes)
        assert all(len(tokens) == self.block_size for _, tokens in self._nodes)
