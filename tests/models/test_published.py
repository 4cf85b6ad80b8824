"""Published configs are read as they are, and give the published numbers of parameters."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from tests.models.published import PUBLISHED

from penstock.layers.scaling import LinearScaling, LongRopeScaling
from penstock.layers.specs import AttentionSpec
from penstock.models.registry import read_spec
from penstock.models.spec import ModelSpec


def spec_of(name: str) -> ModelSpec:
    return read_spec(PUBLISHED[name][0])


def attention(spec: ModelSpec, layer: int = 0) -> AttentionSpec:
    found = spec.layers[layer].attention
    assert isinstance(found, AttentionSpec)
    return found


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_of_the_card(name: str) -> None:
    config, num_parameters = PUBLISHED[name]
    assert read_spec(config).num_parameters == num_parameters


def test_windows() -> None:
    def windows(name: str) -> list[int]:
        spec = spec_of(name)
        return [attention(spec, layer).window for layer in range(spec.num_layers)]

    assert windows("mistralai/Mistral-7B-v0.1") == [4096] * 32
    assert windows("mistralai/Mistral-7B-v0.3") == [0] * 32
    assert windows("Qwen/Qwen2.5-7B") == [0] * 28
    assert windows("google/gemma-2-9b") == [4096, 0] * 21
    assert windows("google/gemma-3-1b-pt") == ([512] * 5 + [0]) * 4 + [512] * 2
    assert windows("microsoft/Phi-3-mini-128k-instruct") == [0] * 32  # longer than the context
    assert windows("CohereForAI/c4ai-command-r7b-12-2024") == [4096, 4096, 4096, 0] * 8


def test_positions() -> None:
    def ropes(name: str) -> list[Any]:
        spec = spec_of(name)
        return [attention(spec, layer).rope for layer in range(spec.num_layers)]

    command = ropes("CohereForAI/c4ai-command-r7b-12-2024")
    assert [rope is None for rope in command] == [False, False, False, True] * 8
    assert command[0].is_interleaved
    smol = ropes("HuggingFaceTB/SmolLM3-3B")
    assert [rope is None for rope in smol] == [False, False, False, True] * 9
    gemma = ropes("google/gemma-3-4b-it")
    assert (gemma[0].theta, gemma[0].scaling) == (1e4, None)
    assert (gemma[5].theta, gemma[5].scaling) == (1e6, LinearScaling(8.0))
    phi = ropes("microsoft/Phi-4-mini-instruct")[0]
    assert phi.dim == 96
    assert isinstance(phi.scaling, LongRopeScaling)
    assert phi.scaling.factors[11] == 1.5  # the long ones
    assert phi.factor == pytest.approx(math.sqrt(1 + math.log(32) / math.log(4096)))
    assert ropes("EleutherAI/pythia-1.4b")[0].dim == 32
    assert ropes("microsoft/phi-2")[0].dim == 32
    assert ropes("microsoft/phi-4")[0].scaling is None


def test_factors() -> None:
    granite = spec_of("ibm-granite/granite-3.1-8b-instruct")
    assert (granite.embedding_scale, granite.residual_scale) == (12.0, 0.22)
    assert (granite.logit_scale, attention(granite).scale) == (1 / 16, 0.0078125)
    gemma = spec_of("google/gemma-2-9b")
    assert gemma.embedding_scale == math.sqrt(3584)
    assert (gemma.logit_softcap, attention(gemma).softcap) == (30.0, 50.0)
    assert attention(gemma).scale == 1 / 16
    assert spec_of("CohereForAI/c4ai-command-r-v01").logit_scale == 0.0625


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("google/gemma-2-9b", "float32"), ("google/gemma-3-4b-it", "bfloat16")],
)
def test_dtypes(name: str, dtype: str) -> None:
    assert spec_of(name).dtype == dtype


@pytest.mark.parametrize(
    ("file", "keys", "num_parameters"),
    [
        ("gpt2", "n_embd n_layer n_head n_positions", 124_439_808),
        ("gpt2-medium", "n_embd n_layer n_head n_positions", 354_823_168),
        ("gpt2-large", "n_embd n_layer n_head n_positions", 774_030_080),
        ("gpt2-xl", "n_embd n_layer n_head n_positions", 1_557_611_200),
        ("distilgpt2", "n_embd n_layer n_head n_positions", 81_912_576),
        ("EleutherAI_gpt-j-6b", "n_embd n_layer n_head n_positions", 6_050_882_784),
    ],
)
def test_shapes_that_others_have_collected(
    data_dir: Path, file: str, keys: str, num_parameters: int
) -> None:
    """llm-analysis has them under names of its own."""
    path = data_dir / "model-and-gpu-configs" / "model_configs" / f"{file}.json"
    told = json.loads(path.read_text())
    shape = [told[key] for key in ("hidden_dim", "num_layers", "n_head", "max_seq_len")]
    kind = {"gpt2": "GPT2LMHeadModel", "gptj": "GPTJForCausalLM"}[told["model_type"]]
    config = dict(zip(keys.split(), shape, strict=True)) | {"architectures": [kind]}
    assert read_spec(config | {"vocab_size": told["vocab_size"]}).num_parameters == num_parameters
