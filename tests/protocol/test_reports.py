"""What is told of an error elsewhere: ours in its own words, any other without them."""

from __future__ import annotations

import pytest

from penstock.errors import EngineDead, NotEnoughMemory, PenstockError
from penstock.protocol.reports import ErrorReport


@pytest.mark.parametrize("error", [EngineDead("Rank `1` died.", hint="look"), NotEnoughMemory("m")])
def test_the_death_of_an_engine_by_an_error_of_ours_keeps_its_words(error: PenstockError) -> None:
    told = ErrorReport.of_death(error).error
    assert (type(told), told.message, told.hint) == (type(error), error.message, error.hint)


def test_any_other_error_is_told_without_its_words() -> None:
    def stumble() -> None:
        raise RuntimeError("a prompt")

    with pytest.raises(RuntimeError) as caught:
        stumble()
    told = ErrorReport.of_death(caught.value, "Rank `3`").error
    assert isinstance(told, EngineDead)
    assert told.message.startswith("Rank `3` stopped with `RuntimeError` in `stumble`")
    assert "prompt" not in str(told)
