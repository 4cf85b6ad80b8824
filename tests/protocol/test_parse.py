"""Reading request bodies: the errors name their field, and depth is measured without recursion."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.errors import InvalidField
from penstock.protocol.openai import ChatRequest, CompletionRequest
from penstock.protocol.parse import MAX_DEPTH, decode_request, nested_deeper_than


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "messages"),
        ({"messages": 1}, "messages"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 1}]}, "messages[0].content"),
        ({"messages": [], "n": "1"}, "n"),
        ({"messages": [], "n": True}, "n"),
        ({"messages": [], "logit_bias": {"x": 1}}, "logit_bias"),
        ({"messages": [], "stop": [1]}, "stop[0]"),
        ({"messages": [], "stream_options": {"x": 1}}, "stream_options.x"),
        ({"messages": [], "x" * 1000: 1}, "x" * 64 + "..."),
        ({"messages": [], "tools": [{}]}, "tools"),
        ({"messages": [], "parallel_tool_calls": 1}, "parallel_tool_calls"),
        ([], "body"),
    ],
)
def test_errors_name_their_field(body: Any, field: str) -> None:
    with pytest.raises(InvalidField) as caught:
        decode_request(ChatRequest, json.dumps(body).encode())
    assert caught.value.field == field


def test_null_means_not_given() -> None:
    request = decode_request(CompletionRequest, b'{"prompt": "x", "n": null, "suffix": null}')
    assert request == CompletionRequest(prompt="x")


def test_what_asks_for_nothing_passes() -> None:
    for value in (b"null", b"false", b"[]", b"{}", b"1"):
        decode_request(CompletionRequest, b'{"prompt": "x", "best_of": %s}' % value)
    for value in (b"0", b"1.0", b"true", b'""', b"[0]", b"2"):
        with pytest.raises(InvalidField, match="best_of"):
            decode_request(CompletionRequest, b'{"prompt": "x", "best_of": %s}' % value)


def depth_of(value: Any) -> int:
    if isinstance(value, dict):
        return 1 + max(map(depth_of, value.values()), default=0)
    if isinstance(value, list):
        return 1 + max(map(depth_of, value), default=0)
    return 0


NESTED = st.recursive(
    st.one_of(st.integers(), st.text('[]{}\\"a', max_size=6)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.text('[]"\\', max_size=3), inner, max_size=3),
    ),
    max_leaves=30,
)


@given(value=NESTED, limit=st.integers(0, 6))
def test_depth(value: Any, limit: int) -> None:
    body = json.dumps(value).encode()
    assert nested_deeper_than(body, limit) == (depth_of(value) > limit)


def test_a_long_flat_body_is_not_deep() -> None:
    body = json.dumps({"prompt": [[1, 2]] * 10_000}).encode()
    assert not nested_deeper_than(body, MAX_DEPTH)
    assert nested_deeper_than(b"[" * 10**6, MAX_DEPTH)


def test_a_string_without_an_end_takes_linear_time() -> None:
    """With a regex that tries again at every quote this takes hours."""
    brackets = b"[" * (MAX_DEPTH + 1)
    assert nested_deeper_than(brackets + b'"' + b'\\"' * 500_000, MAX_DEPTH)
    assert not nested_deeper_than(b'"' + b'[\\"' * 500_000, MAX_DEPTH)
    assert not nested_deeper_than(b'"' + b"[" * 50 + b"\\", MAX_DEPTH)
