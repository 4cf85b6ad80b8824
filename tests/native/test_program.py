"""Values of a program: where they are placed."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from penstock.native.program import Buffer, place
from penstock.native.structs import Rows

lives = st.tuples(st.integers(0, 20), st.integers(0, 20), st.integers(1, 9)).map(
    lambda drawn: (min(drawn[:2]), max(drawn[:2]), drawn[2] * 64)
)


def buffers(drawn: list[tuple[int, int, int]]) -> list[Buffer]:
    made = []
    for first, last, _ in drawn:
        made.append(Buffer(1, "float32", Rows.TOKENS))
        made[-1].first_op, made[-1].last_op = first, last
    return made


@given(st.lists(lives, max_size=30))
def test_values_that_live_together_lie_apart(drawn: list[tuple[int, int, int]]) -> None:
    values, sizes = buffers(drawn), [size for _, _, size in drawn]
    total = place(values, sizes)
    pairs = list(zip(values, sizes, strict=True))
    for index, (value, size) in enumerate(pairs):
        assert 0 <= value.offset <= total - size
        assert value.offset % 64 == 0
        for other, other_size in pairs[:index]:
            if value.first_op <= other.last_op and other.first_op <= value.last_op:
                assert (
                    value.offset + size <= other.offset or other.offset + other_size <= value.offset
                )


def test_a_chain_of_layers_takes_the_place_of_two_values() -> None:
    chain = [(index, index + 1, 64) for index in range(100)]
    assert place(buffers(chain), [64] * 100) == 128
