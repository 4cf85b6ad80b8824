"""Frequencies of every kind of RoPE are those of transformers, at sizes that models have."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from penstock.models.config import ConfigReader

_LONG = [1.0 + 0.6 * index for index in range(64)]
SECTIONS: dict[str, dict[str, Any]] = {
    "linear": {"factor": 8.0},
    "dynamic": {"factor": 8.0},
    "llama3": {
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32768},
    "yarn-gpt-oss": {
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    },
    "yarn-deepseek": {
        "factor": 40,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096,
    },
    "yarn-olmo": {
        "attention_factor": 1.2079441541679836,
        "factor": 8.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn-ratio": {"factor": None, "original_max_position_embeddings": 8192},
    "longrope": {
        "long_factor": _LONG,
        "short_factor": [1.0] * 64,
        "original_max_position_embeddings": 4096,
    },
    "longrope-factor": {
        "long_factor": _LONG,
        "short_factor": [1.0] * 64,
        "factor": 4.0,
        "original_max_position_embeddings": 4096,
    },
}
MAX_LEN = 131072


@pytest.mark.parametrize("theta", [1e4, 5e5])
@pytest.mark.parametrize("name", SECTIONS)
def test_frequencies(name: str, theta: float) -> None:
    kind = name.partition("-")[0]
    section = SECTIONS[name] | {"rope_type": kind, "rope_theta": theta}
    config = LlamaConfig(max_position_embeddings=MAX_LEN)
    config.rope_parameters = dict(section)
    theirs, factor = ROPE_INIT_FUNCTIONS[kind](config, seq_len=MAX_LEN)
    reader = ConfigReader({"rope_scaling": section, "max_position_embeddings": MAX_LEN})
    ours = reader.rope(128)
    np.testing.assert_allclose(ours.frequencies(), theirs.numpy(), rtol=1e-6)
    assert ours.factor == pytest.approx(factor, rel=1e-12)


def test_longrope_is_short_where_all_texts_are() -> None:
    section = SECTIONS["longrope"] | {"rope_type": "longrope"}
    reader = ConfigReader({"rope_scaling": section, "max_position_embeddings": 4096})
    plain = ConfigReader({}).rope(128)
    np.testing.assert_array_equal(reader.rope(128).frequencies(), plain.frequencies())
    assert reader.rope(128).factor == 1.0


def test_the_whole_config_says_the_original_length_before_the_section() -> None:
    section = SECTIONS["longrope"] | {"rope_type": "su"}
    whole = {"max_position_embeddings": 4096, "original_max_position_embeddings": 2048}
    rope = ConfigReader({"rope_scaling": section, **whole}).rope(128)
    assert rope.frequencies()[1] < ConfigReader({}).rope(128).frequencies()[1]


@pytest.mark.parametrize("name", SECTIONS)
def test_extreme_values_give_numbers_or_are_refused(name: str) -> None:
    from penstock.errors import UnsupportedModel

    section = SECTIONS[name] | {"rope_type": name.partition("-")[0], "rope_theta": 1e4}
    for key in section:
        for value in (1e-30, 1e-9, 1, 1.0, 1.0000001, 2**40, 1e300, 10**400, float("nan"), [], ""):
            config = {"rope_scaling": section | {key: value}, "max_position_embeddings": MAX_LEN}
            try:
                rope = ConfigReader(config).rope(128)
            except UnsupportedModel:
                continue
            with np.errstate(all="ignore"):
                assert rope.frequencies().shape == (64,)
