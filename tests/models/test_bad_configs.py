"""A config with one value that is wrong, or several: it is read, or refused by name, at once.

Every key of the parity configs of every architecture. No memory is taken for what is only claimed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.models.bad_input import JSON, refusal, sentence, soon
from tests.models.configs import CONFIGS
from tests.models.configs_dense import classes
from tests.models.configs_pooling import POOLING_CONFIGS

from penstock.errors import UnsupportedModel
from penstock.models.checkpoint import precision
from penstock.models.registry import MAX_ALL_EXPERTS, read_spec
from penstock.models.shapes import shapes_of

ALL = {**CONFIGS, **POOLING_CONFIGS}
# Never right, whatever the key; the others can be, and then another key may not fit them.
WRONG: list[Any] = [-1, 10**30, 1e308, math.nan, "x", []]
STRANGE: list[Any] = [None, 0, True, {}, 10**9]
GONE = object()


@lru_cache(maxsize=1)  # tests of one architecture follow one another
def whole(architecture: str, variant: str) -> dict[str, Any]:
    """A config as transformers saves it, with all its keys."""
    with np.errstate(all="ignore"):
        made = classes(architecture)[1](**ALL[architecture][variant]).to_dict()
    return {**made, "architectures": [architecture]}


def changed(config: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    key, *inner = path
    if inner:
        return {**config, key: changed(config[key], tuple(inner), value)}
    return {k: v for k, v in config.items() if k != key} | ({} if value is GONE else {key: value})


def paths(config: dict[str, Any], only: set[str] | None) -> Iterator[tuple[str, ...]]:
    for key, value in config.items():
        if only is None or key in only:
            yield (key,)
            if isinstance(value, dict):
                yield from ((key, *rest) for rest in paths(value, None))


def read_or_refused(config: dict[str, Any]) -> str:
    """The sentence of a refusal; "" if the model can be counted, in time and within reason."""
    with soon():
        try:
            spec = read_spec(config)
            shapes = shapes_of.__wrapped__(spec)  # not the one in the cache
            assert 0 < shapes.num_parameters < 2**80
            assert spec.kv_bytes_per_token("float32") > 0
            assert spec.num_layers * spec.num_heads * spec.num_kv_heads > 0
            assert spec.max_context_len > 0
        except UnsupportedModel as error:
            return sentence(error)
    return ""


@pytest.mark.parametrize("architecture", ALL)
def test_any_value_of_any_key(architecture: str) -> None:
    names = set()
    for number, variant in enumerate(ALL[architecture]):
        config = whole(architecture, variant)
        base = ALL[architecture][next(iter(ALL[architecture]))]
        own = {k for k, v in ALL[architecture][variant].items() if base.get(k, GONE) != v}
        for path in paths(config, own if number else None):
            for value in [*WRONG, *STRANGE, GONE]:
                message = read_or_refused(changed(config, path, value))
                if not message:
                    continue
                # NaN is no equal of itself: by identity.
                keys = [path[-1]] if any(value is bad for bad in WRONG) else [*config, *path]
                if not any(key in message for key in keys):
                    names.add((variant, ".".join(path), repr(value), message))
    assert not names


def test_values_are_refused_at_all() -> None:
    """Else the test above would pass with a reader that reads nothing."""
    config = whole("LlamaForCausalLM", next(iter(CONFIGS["LlamaForCausalLM"])))
    for key in ("vocab_size", "hidden_size", "num_hidden_layers", "rms_norm_eps", "hidden_act"):
        for value in WRONG:
            assert f"`{key}`" in read_or_refused(config | {key: value})


@pytest.mark.parametrize(
    ("architecture", "key", "value"),
    [
        ("MixtralForCausalLM", "num_local_experts", 10**9),
        ("DeepseekV3ForCausalLM", "n_routed_experts", 10**9),
        ("OlmoeForCausalLM", "num_experts", 10**9),
        ("LlamaForCausalLM", "num_hidden_layers", 10**9),
        ("Cohere2ForCausalLM", "num_attention_heads", 10**9),
        ("DeepseekV3ForCausalLM", "qk_nope_head_dim", 10**9),
        ("GPT2LMHeadModel", "n_embd", 10**9),
        ("FalconForCausalLM", "hidden_size", 10**9),
        ("Phi3ForCausalLM", "intermediate_size", 10**9),
        ("Gemma3ForCausalLM", "layer_types", ["sliding_attention"] * 10**7),
        ("Cohere2ForCausalLM", "layer_types", "x" * 10**7),
        ("Gemma2ForCausalLM", "layer_types", {"a" * 10**6: 1}),
        ("LlamaForCausalLM", "hidden_act", "silu" * 10**6),
    ],
)
def test_claims_take_no_memory(architecture: str, key: str, value: Any) -> None:
    config = whole(architecture, next(iter(CONFIGS[architecture]))) | {key: value}
    message = read_or_refused(config)
    assert f"`{key}`" in message
    assert len(message) < 400


def test_many_layers_of_many_experts() -> None:
    config = whole("MixtralForCausalLM", "top2")
    config |= {"num_local_experts": 4096, "num_hidden_layers": 4096}
    assert f"more than `{MAX_ALL_EXPERTS}`" in read_or_refused(config)


@settings(max_examples=250, deadline=None)
@given(data=st.data())
def test_any_json_in_a_config(data: st.DataObject) -> None:
    """Several keys at once, of any architecture, as any JSON."""
    architecture = data.draw(st.sampled_from(sorted(ALL)))
    config = {**whole(architecture, next(iter(ALL[architecture])))}
    for key in data.draw(st.lists(st.sampled_from(sorted(config)), min_size=1, max_size=3)):
        config[key] = data.draw(JSON)
    read_or_refused(config)


@settings(max_examples=100, deadline=None)
@given(value=JSON, key=st.sampled_from(["quantization_config", "compression_config"]))
def test_any_json_as_quantization(value: Any, key: str) -> None:
    message = refusal(lambda: precision(Path("no directory is looked at"), {key: value}))
    assert not message or key in message
