from __future__ import annotations

from collections.abc import Sequence

from hypothesis import event, given, settings
from hypothesis import strategies as st

from penstock.text.detokenizer import Detokenizer
from penstock.text.tokenizer import Tokenizer

id_lists = st.lists(st.integers(0, 2**32), max_size=30)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


def cut(whole: str, stop: tuple[str, ...], *, include: bool, exempt: int = 0) -> str:
    """The text up to the stop string that is complete first; none within `exempt` characters."""
    for end in range(exempt + 1, len(whole) + 1):
        found = [s for s in stop if whole[:end].endswith(s)]
        if found:
            return whole[: end if include else end - max(map(len, found))]
    return whole


def groups(ids: Sequence[int], data: st.DataObject) -> list[Sequence[int]]:
    """The ids in calls of random size."""
    ends = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=5)))
    return [ids[a:b] for a, b in zip([0, *ends], [*ends, len(ids)], strict=True)]


@given(raw=id_lists, skip=st.booleans(), data=st.data())
@settings(max_examples=50)
def test_pieces_joined_are_the_text_of_any_ids(loaded, raw, skip, data) -> None:
    tokenizer = loaded.tokenizer
    ids = [i % (tokenizer.vocab_size + 2) for i in raw]
    whole = tokenizer.decode(ids, skip_special_tokens=skip)
    letters = st.text(st.sampled_from(whole), min_size=1, max_size=3) if whole else texts
    stop = data.draw(st.lists(letters.filter(bool), max_size=3).map(tuple))
    include = data.draw(st.booleans())
    detokenizer = Detokenizer(
        tokenizer, skip_special_tokens=skip, stop=stop, include_stop_str_in_output=include
    )
    pieces = [detokenizer.push(group) for group in groups(ids, data)]
    pieces.append(detokenizer.flush())
    assert "".join(pieces) == cut(whole, stop, include=include)
    assert (detokenizer.stopped is not None) == (cut(whole, stop, include=False) != whole)
    event(f"stopped={detokenizer.stopped is not None}")
    if detokenizer.stopped is not None:
        assert detokenizer.push(ids) == detokenizer.flush() == ""


@given(text=texts, data=st.data())
@settings(max_examples=50)
def test_streams_real_text(loaded, text: str, data) -> None:
    """Token by token: no half character, nothing of a stop string, nothing held without need."""
    tokenizer = loaded.tokenizer
    ids = tokenizer.encode(text, add_special_tokens=False, parse_special=False)
    whole = tokenizer.decode(ids)
    parts = st.builds(lambda i, n: whole[i : i + n], st.integers(0, 30), st.integers(1, 4))
    stop = data.draw(st.lists(parts.filter(bool), max_size=2).map(tuple)) if whole else ()
    expected = cut(whole, stop, include=False)
    detokenizer = Detokenizer(tokenizer, stop=stop)
    sent = ""
    for num, token_id in enumerate(ids, 1):
        sent += detokenizer.push([token_id])
        assert expected.startswith(sent)
        if detokenizer.stopped is not None:
            break
        known = tokenizer.decode(ids[:num])
        known = known if whole.startswith(known) else known.rstrip("\ufffd")
        held = known.removeprefix(sent)
        assert not held or any(s.startswith(held) for s in stop)
        assert detokenizer.num_chars == len(known)
    assert sent + detokenizer.flush() == expected


def test_half_characters_wait(tiny: Tokenizer) -> None:
    ids = [tiny.token_id(piece) or 0 for piece in "ðŁĺĢ"]  # the four bytes of 😀
    detokenizer = Detokenizer(tiny)
    assert [detokenizer.push([i]) for i in ids] == ["", "", "", "😀"]
    assert detokenizer.push(ids[:2]) == ""
    assert detokenizer.flush() == "\ufffd"


def test_the_longest_of_equal_stop_strings_wins(tiny: Tokenizer) -> None:
    detokenizer = Detokenizer(tiny, stop=("c", "bc", "abcd"))
    assert detokenizer.push(tiny.encode("xab")) == "x"
    assert detokenizer.push(tiny.encode("cd")) == "a"
    assert detokenizer.stopped == "bc"


def test_a_stop_string_can_hold_a_replaced_character(tiny: Tokenizer) -> None:
    half = [tiny.token_id("ð") or 0]
    detokenizer = Detokenizer(tiny, stop=("o\ufffd",))
    assert detokenizer.push(tiny.encode("hello") + half) == "hell"
    assert detokenizer.flush() == ""
    assert detokenizer.stopped == "o\ufffd"


@given(data=st.data(), min_tokens=st.integers(0, 12))
def test_min_tokens_exempts_what_they_complete(tiny: Tokenizer, data, min_tokens: int) -> None:
    text = data.draw(st.text("ab", max_size=12))
    ids = [tiny.token_id(char) or 0 for char in text]  # one token a character
    detokenizer = Detokenizer(tiny, stop=("ab", "bba"), min_tokens=min_tokens)
    joined = "".join(map(detokenizer.push, groups(ids, data))) + detokenizer.flush()
    assert joined == cut(text, ("ab", "bba"), include=False, exempt=min_tokens)


def test_leading_space(tiny_llama: Tokenizer) -> None:
    ids = tiny_llama.encode("hello")
    special = tiny_llama.special_ids

    def text(prompt: list[int], *, skip: bool = True) -> str:
        detokenizer = Detokenizer(tiny_llama, skip_special_tokens=skip, prompt_ids=prompt)
        return detokenizer.push(ids)

    assert text([]) == "hello"
    assert text(tiny_llama.encode("Oh,")) == " hello"
    assert text(list(special)) == "hello"  # nothing visible came before
    assert text(list(special), skip=False) == " hello"
