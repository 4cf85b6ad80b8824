"""Architectures that only transformers has compute what they compute there, over our pages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tests.models.helpers import Sessions, load
from tests.models.test_parity import LEN, TOLERANCE, chunked, full, ragged, token_by_token

from penstock.errors import ModelLoadError, UnsupportedModel, WeightMismatch
from penstock.models.architectures import ARCHITECTURES
from penstock.models.base import Model
from penstock.models.files import read_config
from penstock.models.load import Backends
from penstock.models.spec import ModelSpec

SMALL = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
# Dense ones, a mixture of experts whose head passes the router's scores on, and one with windows.
WORKING = ["Ernie4_5ForCausalLM", "BitNetForCausalLM", "GraniteMoeForCausalLM", "CwmForCausalLM"]
EXTRA: dict[str, dict[str, Any]] = {
    "CwmForCausalLM": {"sliding_window": 7},
    "DogeForCausalLM": {"is_moe": False, "num_experts": 4},
    "Lfm2ForCausalLM": {"layer_types": ["conv", "full_attention"]},
    "Llama4ForCausalLM": {"attention_chunk_size": 8, "num_local_experts": 2},
    "PhimoeForCausalLM": {"num_local_experts": 2, "sliding_window": 7},
}


def oracle(architecture: str) -> Any:
    torch.manual_seed(3)
    kind = getattr(transformers, architecture)
    model = kind(kind.config_class(**SMALL, **EXTRA.get(architecture, {}))).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.add_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.fixture(scope="module", params=WORKING)
def saved(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Any]:
    assert request.param not in ARCHITECTURES
    path = tmp_path_factory.mktemp("foreign")
    theirs = oracle(request.param)
    theirs.save_pretrained(path)
    return path, theirs


def test_logits_equal_transformers(saved: tuple[Path, Any]) -> None:
    path, theirs = saved
    model: Model = load(path)
    ids = torch.randint(1, 101, (4, LEN), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = dict(zip("abcd", theirs(ids).logits, strict=True))
    rows = dict(zip("abcd", ids.tolist(), strict=True))
    for way in (full, chunked, token_by_token, ragged):
        sessions = Sessions(model, block_size=3)
        parts: dict[str, list[torch.Tensor]] = {}
        for logits in way(sessions, rows):
            for name, part in logits.items():
                parts.setdefault(name, []).append(part)
        for name, pieces in parts.items():
            assert (torch.cat(pieces) - expected[name]).abs().max() < TOLERANCE


def test_memory_is_planned_for_what_is_loaded(saved: tuple[Path, Any]) -> None:
    path, theirs = saved
    spec = ModelSpec.from_hf(read_config(path))
    assert spec.num_parameters == pytest.approx(theirs.num_parameters(), rel=0.1)


def test_it_is_said(saved: tuple[Path, Any]) -> None:
    path, theirs = saved
    assert f"{type(theirs).__name__} of transformers" in load(path).description
    backends = Backends(ModelSpec.from_hf(read_config(path)))
    for name in ("native", "triton"):
        assert "transformers' modules compute it" in str(backends.problem(name))


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        ("BloomForCausalLM", "does not let others compute its attention"),
        ("NoSuchForCausalLM", "neither one of ours nor one that an installed transformers has"),
    ],
)
def test_what_cannot_be_used_is_told(architecture: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps(SMALL | {"architectures": [architecture], "model_type": "bloom"})
    )
    with pytest.raises(UnsupportedModel) as caught:
        load(tmp_path)
    assert reason in caught.value.message


def test_a_config_that_says_too_little(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="num_attention_heads"):
        ModelSpec.from_hf({"architectures": ["MambaForCausalLM"], "vocab_size": 5})


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        ("Lfm2ForCausalLM", "computes something else"),  # convolutions, which remember
        ("DiffLlamaForCausalLM", "computes something else"),  # heads in an order of its own
        ("DogeForCausalLM", "decides itself which tokens it sees"),  # a mask of its own
        ("PhimoeForCausalLM", "has a window that it does not tell"),  # in the mask alone
        ("Llama4ForCausalLM", "cannot be used"),
    ],
)
def test_what_our_pages_cannot_hold_is_refused_when_it_is_loaded(
    architecture: str, reason: str, tmp_path: Path
) -> None:
    oracle(architecture).save_pretrained(tmp_path)
    for load_format in ("auto", "dummy"):
        with pytest.raises(UnsupportedModel) as caught:
            load(tmp_path, load_format=load_format)
        assert reason in caught.value.message


def test_the_angles_of_longrope_change_with_the_texts_beside() -> None:
    factors = {"short_factor": [1.0] * 6, "long_factor": [2.0] * 6}
    config = SMALL | {"architectures": ["Ernie4_5ForCausalLM"]}
    for rope in ({"type": "su", **factors}, {"full_attention": {"rope_type": "longrope"}}):
        for key in ("rope_scaling", "rope_parameters"):
            with pytest.raises(UnsupportedModel, match="type"):
                ModelSpec.from_hf(config | {key: rope})


def test_an_adapter_is_not_followed(saved: tuple[Path, Any], tmp_path: Path) -> None:
    path, _ = saved
    for file in path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "/elsewhere"}')
    with pytest.raises(ModelLoadError, match=r"adapter_config.json"):
        load(tmp_path)


def test_missing_weights_are_not_drawn(saved: tuple[Path, Any], tmp_path: Path) -> None:
    path, _ = saved
    (tmp_path / "config.json").write_bytes((path / "config.json").read_bytes())
    tensors = load_file(path / "model.safetensors")
    name = next(name for name in tensors if name.endswith("o_proj.weight"))
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightMismatch) as caught:
        load(tmp_path)
    assert f"`{name}`" in caught.value.message
