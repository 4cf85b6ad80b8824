"""Shares cover everything once, in the order of the ranks; only key heads are replicated."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.errors import ConfigError
from penstock.layers import shards
from penstock.layers.toolkit import Part

sizes = st.integers(1, 16)


@dataclass(frozen=True)
class Shape:
    num_heads: int
    num_kv_heads: int
    intermediate_size: int


LLAMA_8B = Shape(32, 8, 14336)


def numbers(rows: slice) -> list[int]:
    assert rows.step is None
    return list(range(rows.start, rows.stop))


@given(sizes, st.integers(1, 6), st.integers(1, 5), st.booleans())
def test_rows_are_covered_once_and_in_order(
    size: int, units_each: int, unit_rows: int, are_units: bool
) -> None:
    num_units = size * units_each
    part = Part("p", num_units * unit_rows, num_units if are_units else 0)
    shares = [numbers(shards.part_rows(part, size, rank)) for rank in range(size)]
    assert [row for share in shares for row in share] == list(range(part.num_rows))
    assert {len(share) for share in shares} == {units_each * unit_rows}


@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 5))
def test_fewer_units_than_ranks_are_held_by_neighbours(
    num_units: int, copies: int, unit_rows: int
) -> None:
    size = num_units * copies
    part = Part("k", num_units * unit_rows, num_units)
    for rank in range(size):
        unit = rank // copies
        wanted = list(range(unit * unit_rows, (unit + 1) * unit_rows))
        assert numbers(shards.part_rows(part, size, rank)) == wanted


@given(sizes, st.integers(1, 8), st.integers(1, 8), st.integers(1, 4))
def test_every_query_head_finds_its_keys_on_its_rank(
    size: int, num_kv_heads: int, group: int, head_dim: int
) -> None:
    num_heads = num_kv_heads * group
    try:
        own = shards.heads(num_heads, num_kv_heads, size)
    except ConfigError:
        fits = num_kv_heads % size == 0 or size % num_kv_heads == 0
        assert num_heads % size or not fits
        return
    query = Part("q", num_heads * head_dim, num_heads)
    key = Part("k", num_kv_heads * head_dim, num_kv_heads)
    for rank in range(size):
        rows = numbers(shards.part_rows(query, size, rank))
        key_rows = numbers(shards.part_rows(key, size, rank))
        assert len(rows) == own.num_heads * head_dim
        assert len(key_rows) == own.num_kv_heads * head_dim
        assert own.num_heads % own.num_kv_heads == 0
        assert rows == numbers(shards.column_range(num_heads * head_dim, size, rank))
        for index, row in enumerate(rows):
            own_head, head = index // head_dim, row // head_dim
            own_key = own_head // (own.num_heads // own.num_kv_heads)  # as attention pairs them
            assert key_rows[own_key * head_dim] == head // group * head_dim


@given(sizes, st.integers(1, 700))
def test_the_joined_vocabulary_begins_with_all_ids(size: int, num_rows: int) -> None:
    joined: list[int] = []
    for rank in range(size):
        share = shards.vocabulary(num_rows, size, rank)
        rows = numbers(share.rows)
        assert len(rows) <= share.num_rows
        joined += rows + [-1] * (share.num_rows - len(rows))
    assert joined[:num_rows] == list(range(num_rows))
    assert set(joined[num_rows:]) <= {-1}
    if size == 1:
        assert len(joined) == num_rows
    else:
        assert len(joined) % (size * shards.VOCABULARY_MULTIPLE) == 0
        assert len(joined) < num_rows + size * shards.VOCABULARY_MULTIPLE


@given(
    sizes, sizes.flatmap(lambda kv: st.tuples(st.just(kv), st.integers(1, 8))), st.integers(1, 99)
)
def test_what_has_no_problem_can_be_split(size: int, heads: tuple[int, int], middle: int) -> None:
    shape = Shape(heads[0] * heads[1], heads[0], middle)
    parts = [
        Part("q", shape.num_heads * 4, shape.num_heads),
        Part("k", shape.num_kv_heads * 4, shape.num_kv_heads),
        Part("up", middle),
    ]

    def split() -> None:
        for part in parts:
            shards.part_rows(part, size, 0)
        shards.heads(shape.num_heads, shape.num_kv_heads, size)
        shards.column_range(middle, size, 0)

    reason = shards.problem(shape, size)
    if reason is None:
        split()
        return
    assert "cannot be shared by" in reason
    with pytest.raises(ConfigError, match="`tensor_parallel_size` is") as caught:
        split()
    assert caught.value.hint is not None
    assert caught.value.hint.startswith("sizes that work: `1`")


def test_a_model_knows_the_sizes_that_work() -> None:
    assert shards.problem(LLAMA_8B, 4) is None
    assert shards.problem(LLAMA_8B, 16) is None  # each key head on two ranks
    assert shards.problem(LLAMA_8B, 3) == (
        "`32` heads, `8` of keys and values, and `14336` rows of the MLP cannot be shared by `3` "
        "ranks"
    )
    assert shards.sizes(LLAMA_8B) == [1, 2, 4, 8, 16, 32]
    assert shards.problem(Shape(12, 6, 48), 4) is not None  # 6 heads on 4 ranks
    assert shards.problem(Shape(16, 8, 36), 8) is not None  # 36 rows


@pytest.mark.parametrize(
    ("part", "size", "told"),
    [
        (Part("k_proj", 24, 6), 4, "the `6` heads of `k_proj`"),
        (Part("up_proj", 10), 4, "the `10` rows of `up_proj`"),
    ],
)
def test_a_part_that_cannot_be_split_is_named(part: Part, size: int, told: str) -> None:
    with pytest.raises(ConfigError, match=f"`tensor_parallel_size` is `{size}`, and {told}"):
        shards.part_rows(part, size, 0)


def test_columns_that_cannot_be_split() -> None:
    with pytest.raises(ConfigError, match="`10` columns") as caught:
        shards.column_range(10, 4, 1)
    assert caught.value.hint == "sizes that work: `1`, `2`, `5`, `10`"
