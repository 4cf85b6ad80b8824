"""Which format a config names, which modules its lists mean, and patterns of strangers."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.quantization.helpers_stored import message_of
from transformers.quantizers.quantizers_utils import should_convert_module

from penstock.errors import UnsupportedModel
from penstock.quantization.modules import Listed
from penstock.quantization.patterns import Patterns
from penstock.quantization.stored import precision_of

NAMES = [
    "lm_head",
    "model.embed_tokens",
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.mlp.gate",
    "model.layers.1.mlp.gate_proj",
    "model.layers.11.mlp.experts.3.down_proj",
    "visual.blocks.0.attn.qkv",
]


@pytest.mark.parametrize(
    "config",
    [{}, {"quantization_config": None}, {"quantization_config": {}}, {"dtype": "bfloat16"}],
)
def test_no_quantization(config: dict[str, Any]) -> None:
    assert precision_of(config) is None


@pytest.mark.parametrize(
    "method", ["hqq", "quark", "torchao", "fbgemm_fp8", "exl2", "auto-round", 4, None, ["gptq"]]
)
def test_a_method_that_is_not_implemented(method: Any) -> None:
    with pytest.raises(UnsupportedModel, match=r"quantization_config\.quant_method"):
        precision_of({"quantization_config": {"quant_method": method, "bits": 4}})
    with pytest.raises(UnsupportedModel, match="`quantization_config` is `'gptq'`"):
        precision_of({"quantization_config": "gptq"})


PATTERNS = [
    ".*lm_head",
    "lm_head",
    "visual.*",
    r".*mlp\.gate$",
    r"model\.layers\.\d+\.mlp\.(gate|up|down)_proj",
    r"^model\.layers\.1\..*",
    r".*self_attn\.(?:q|k|v)_proj$",
    r".*[.]experts[.][0-9]{1,2}[.]down_proj",
    r".*layers\.(?:1|2).*",
    "",
    "a|",
    "model$|lm_head$",
    r".*\.layers\.1{2}\.[^.]+\.experts",
    r"(model\.)?embed.*",
    r"(?:model\.)+?embed",
    r".*[\w.]{3,}proj",
    r"m[a-p]+l\.l",
    r".*\Dgate",
    r"x*?model",
    r"((a|b|)*)*model",
    r"[^]a]odel",
    r"$|^lm",
    r"^^l(?:$)?m",
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_what_re_matches(pattern: str) -> None:
    compiled = Patterns([pattern], "key")
    for name in [*NAMES, "", "m", "mod", "amodel"]:
        assert (compiled.first(name) == 0) == bool(re.match(pattern, name)), name
        ends = {end for end in range(len(name) + 1) if _ends(pattern, name, end)}
        assert compiled.ends(name) == ends, name


def _ends(pattern: str, name: str, end: int) -> bool:
    """Whether a match can take `end` letters; `$` means the end of the whole name."""
    return bool(re.match(f"(?:{pattern})(?<=(?s:^.{{{end}}}))", name)) if end else bool(
        re.match(f"(?:{pattern})(?!(?<=.))", name)
    )  # fmt: skip


PIECES = st.recursive(
    st.sampled_from(["a", "b", ".", "[ab]", "[^a]", r"\.", r"\w", "", "^", "$"]),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda two: f"(?:{two[0]}|{two[1]})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,2}", "*?"])).map(
            lambda two: f"(?:{two[0]}){two[1]}"
        ),
    ),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(patterns=st.lists(PIECES, min_size=1, max_size=3), text=st.text("ab._", max_size=8))
def test_any_pattern_matches_as_re_does(patterns: list[str], text: str) -> None:
    wanted = [index for index, pattern in enumerate(patterns) if re.match(pattern, text)]
    assert Patterns(patterns, "key").first(text) == min(wanted, default=None)


@settings(max_examples=300, deadline=None)
@given(pattern=st.text("ab(|)[]^-*+?{}1,\\d.$:", max_size=12), text=st.text("ab1-", max_size=6))
def test_any_text_is_a_pattern_or_refused(pattern: str, text: str) -> None:
    try:
        found = Patterns([pattern], "key").first(text)
    except UnsupportedModel as error:
        message_of(error)
        return
    assert (found == 0) == bool(re.match(pattern, text))


@pytest.mark.parametrize(
    "pattern",
    [
        "(?!a)", "(?=a)", "(?<=a)b", "(?i)a", "(?P<x>a)", r"(a)\1", r"\bgate", r"a\Z", "a**", "a++",
        "*a", "(a", "a)", "[a", "[b-a]", r"[\d-z]", "a{", "a{,2}", "a{2,1}", "a{101}", "a{9999999}",
        "a" * 1001, "(" * 60 + ")" * 60, "((a{100}){100}){100}", "\\", r"[\D]",
    ],
)  # fmt: skip
def test_a_pattern_that_is_refused(pattern: str) -> None:
    with pytest.raises(UnsupportedModel) as caught:
        Patterns([pattern], "quantization_config.ignore")
    assert "`quantization_config.ignore`" in message_of(caught.value)


@pytest.mark.parametrize(
    "patterns",
    [
        ["(a+)+$"],
        ["(a|a)*$"],
        [".*" * 400 + "x"],
        ["(?:.?){100}" * 60],
        [f".*{index}.*{index}.*x" for index in range(500)],
        [".*a.{99}" * 3 + "x", ".*b.{99}" * 3 + "x"],
    ],
)
def test_patterns_that_would_run_for_minutes(patterns: list[str]) -> None:
    """They match at once, or are refused once they have taken their share."""
    started = time.process_time()
    try:
        compiled = Patterns(patterns, "key")
        for index in range(3000):
            name = f"{index}.{index * 7919 % 2048:b}.".replace("0", "b").replace("1", "a") * 6
            compiled.first("a" * 60 + name + "!")
    except UnsupportedModel as error:
        message_of(error)
    assert time.process_time() - started < 20  # it would be hours


LISTS = [
    ["lm_head"],
    ["gate"],
    ["model.layers.1"],
    ["model.layers.*.self_attn", "model.embed_tokens"],
    ["model.layers.*.mlp.gate"],
    ["visual"],
    ["layer.*", "q_proj"],
    ["(model|visual)"],
    [".*gate"],
]


@pytest.mark.parametrize("names", LISTS)
def test_lists_are_read_as_transformers_does(names: list[str]) -> None:
    listed = Listed(names, "key")
    for name in NAMES:
        assert listed.has(name) == (not should_convert_module(name, names)), name


def test_lists_are_read_as_other_tools_do() -> None:
    listed = Listed(["self_attn", "model.layers.1.", "re:.*down", ""], "key")
    found = {name for name in NAMES if listed.has(name)}
    assert found == {NAMES[2], NAMES[3], NAMES[4], NAMES[5]}
    assert not Listed([], "key").has("model")


def test_long_lists_are_quick() -> None:
    listed = Listed([f"model.layers.{index}.mlp.gate" for index in range(50_000)], "key")
    started = time.process_time()
    for index in range(5000):
        assert listed.has(f"model.layers.{index}.mlp.gate")
        assert not listed.has(f"model.layers.{index}.mlp.up_proj")
    assert time.process_time() - started < 20  # one by one it would be minutes


def test_a_name_of_very_many_parts_is_looked_up_at_once() -> None:
    """The file of a stranger may have thousands of them."""
    listed = Listed(["a.c", "lm_head"], "key")
    name = "a." * 499 + "b"
    started_s = time.monotonic()
    assert not any(listed.has(name) for _ in range(1000))
    assert time.monotonic() - started_s < 2
