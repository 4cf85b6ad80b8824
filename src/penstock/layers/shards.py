"""What share of a model a rank holds: arithmetic on numbers of rows, columns and heads.

Owns the rule of tensor parallelism (Megatron-LM, Shoeybi et al. 2019): a linear map is split by
rows, the one behind it by columns, and the sum over the ranks is the same as without ranks. Knows
neither tensors nor checkpoints, and imports no torch, so that what cannot be split is refused
before anything is loaded.

Invariant: all ranks have equal shares, in the order of the ranks, and together they cover
everything once. Only heads of keys and values that are fewer than the ranks are held more than
once: each by `group_size / num_units` neighbours, which have the query heads that read it.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from penstock.errors import ConfigError
from penstock.layers.toolkit import Part

VOCABULARY_MULTIPLE = 16  # rows of a padded share: matmuls and vector loads like such addresses

_MAX_SIZE_TOLD = 64  # an error lists the sizes that work up to this one


class Shape(Protocol):
    """What is split of a model; a `ModelSpec` is one."""

    @property
    def num_heads(self) -> int:
        """Query heads."""

    @property
    def num_kv_heads(self) -> int:
        """Heads of keys and of values."""

    @property
    def intermediate_size(self) -> int:
        """Rows of gate and of up."""


class Heads(NamedTuple):
    """Heads of attention that each rank has; the cache of keys and values is as narrow."""

    num_heads: int
    num_kv_heads: int


class Vocabulary(NamedTuple):
    """A rank's share of a table with one row for each token id.

    Tables are padded, so that the logits of all ranks, joined, begin with the whole vocabulary.
    """

    rows: slice  # of the whole table; with more padding than ids it is empty
    num_rows: int  # of the padded share, the same on every rank; those behind `rows` are unused


def problem(shape: Shape, group_size: int) -> str | None:
    """Why a model cannot be split between so many ranks; None if it can."""
    if _splits(shape, group_size):
        return None
    return (
        f"`{shape.num_heads}` heads, `{shape.num_kv_heads}` of keys and values, and "
        f"`{shape.intermediate_size}` rows of the MLP cannot be shared by `{group_size}` ranks"
    )


def sizes(shape: Shape) -> list[int]:
    """Numbers of ranks that can share a model, up to 64."""
    return [size for size in _SIZES if _splits(shape, size)]


def heads(num_heads: int, num_kv_heads: int, group_size: int) -> Heads:
    """How many heads each of `group_size` ranks has.

    Raises:
        ConfigError: they cannot be shared.
    """
    if not _splits_heads(num_heads, num_kv_heads, group_size):
        raise _refusal(
            group_size,
            f"`{num_heads}` heads, `{num_kv_heads}` of keys and values,",
            [size for size in _SIZES if _splits_heads(num_heads, num_kv_heads, size)],
        )
    return Heads(num_heads // group_size, max(num_kv_heads // group_size, 1))


def part_rows(part: Part, group_size: int, rank: int) -> slice:
    """The rows of a part that `rank` holds: whole units, at least one.

    Units fewer than the ranks are replicated; `heads` sees to it that those are of keys and values.

    Raises:
        ConfigError: the units cannot be shared.
    """
    num_units = part.num_units or part.num_rows
    assert part.num_rows % num_units == 0, f"{part.name}: units of unequal size"
    if not _splits_part(part, group_size):
        kind = "heads" if part.num_units else "rows"
        raise _refusal(
            group_size,
            f"the `{num_units}` {kind} of `{part.name}`",
            [size for size in _SIZES if _splits_part(part, size)],
        )
    unit_rows = part.num_rows // num_units
    share = max(num_units // group_size, 1)
    first = rank * num_units // group_size  # exact, or the replicated unit
    return slice(first * unit_rows, (first + share) * unit_rows)


def column_range(in_size: int, group_size: int, rank: int) -> slice:
    """The columns that `rank` holds of a map that sums over the ranks.

    They are the rows that `part_rows` gives it of the map in front, whose units are not replicated.

    Raises:
        ConfigError: the columns cannot be shared.
    """
    if in_size % group_size:
        sizes = [size for size in _SIZES if in_size % size == 0]
        raise _refusal(group_size, f"`{in_size}` columns", sizes)
    share = in_size // group_size
    return slice(rank * share, (rank + 1) * share)


def vocabulary(num_rows: int, group_size: int, rank: int) -> Vocabulary:
    """The token ids of `rank`. Any number of ids can be shared: the last shares are padded."""
    if group_size == 1:
        return Vocabulary(slice(0, num_rows), num_rows)
    share = -(-num_rows // group_size)
    share += -share % VOCABULARY_MULTIPLE
    start = min(rank * share, num_rows)
    return Vocabulary(slice(start, min(start + share, num_rows)), share)


_SIZES = range(1, _MAX_SIZE_TOLD + 1)


def _splits(shape: Shape, size: int) -> bool:
    return (
        _splits_heads(shape.num_heads, shape.num_kv_heads, size)
        and shape.intermediate_size % size == 0
    )


def _splits_heads(num_heads: int, num_kv_heads: int, size: int) -> bool:
    """Query heads are never replicated: what they give is summed over the ranks."""
    return num_heads % size == 0 and (num_kv_heads % size == 0 or size % num_kv_heads == 0)


def _splits_part(part: Part, size: int) -> bool:
    if part.num_units:
        return part.num_units % size == 0 or size % part.num_units == 0
    return part.num_rows % size == 0


def _refusal(group_size: int, what: str, sizes: list[int]) -> ConfigError:
    return ConfigError(
        f"`tensor_parallel_size` is `{group_size}`, and {what} cannot be shared by so many ranks.",
        hint=f"sizes that work: {_told(sizes)}",
    )


def _told(sizes: list[int]) -> str:
    return ", ".join(f"`{size}`" for size in sizes)
