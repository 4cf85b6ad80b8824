"""Every registered architecture computes what transformers computes, through our own loader.

One checkpoint a variant, saved by `save_pretrained` and read by `load_model`; the same tokens are
then computed whole, in chunks, one by one and in ragged batches, over blocks of 1, 3 and 16.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tests.models.configs import CONFIGS
from tests.models.configs_dense import classes
from tests.models.helpers import BACKENDS, Sessions, load
from tests.models.layouts import published

from penstock.models.architectures import ARCHITECTURES
from penstock.models.base import Model

TOLERANCE = 1e-4
LEN = 41
VARIANTS = [(name, variant) for name, variants in CONFIGS.items() for variant in variants]


class Case(NamedTuple):
    model: Model
    rows: dict[str, list[int]]
    expected: dict[str, torch.Tensor]  # logits of every position, [LEN, V], by transformers


def oracle(architecture: str, variant: str, seed: int) -> Any:
    """A transformers model with random weights; biases and scales are random as well."""
    torch.manual_seed(seed)
    kind, config_kind = classes(architecture)
    config = config_kind(**CONFIGS[architecture][variant])
    config._attn_implementation = "eager"  # the only one that has everything, such as soft caps
    model = kind(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 or "norm" in name or "bias" in name or "sinks" in name:
            parameter.data.add_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module", params=VARIANTS, ids=lambda variant: "-".join(variant))
def case(
    request: pytest.FixtureRequest, backend: str, tmp_path_factory: pytest.TempPathFactory
) -> Case:
    seed = VARIANTS.index(request.param)
    path = tmp_path_factory.mktemp("model")
    architecture, variant = request.param
    theirs = oracle(architecture, variant, seed)
    # Every other checkpoint is sharded.
    theirs.save_pretrained(path, max_shard_size="20KB" if seed % 2 else "1GB")
    assert (len(list(path.glob("*.safetensors"))) > 1) == bool(seed % 2)
    published(architecture, path)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(theirs.config.get_text_config().vocab_size, (4, LEN), generator=generator)
    with torch.no_grad():
        expected = theirs(ids).logits
    names = ["a", "b", "c", "d"]
    return Case(
        load(path, backend=backend),
        dict(zip(names, ids.tolist(), strict=True)),
        dict(zip(names, expected, strict=True)),
    )


def full(sessions: Sessions, rows: dict[str, list[int]]) -> list[dict[str, torch.Tensor]]:
    return [sessions.step({name: tokens}) for name, tokens in rows.items()]


def chunked(sessions: Sessions, rows: dict[str, list[int]]) -> list[dict[str, torch.Tensor]]:
    cuts = [0, 1, 2, 7, 23, 24, 40, LEN]
    return [sessions.step({"a": rows["a"][first:last]}) for first, last in pairwise(cuts)]


def token_by_token(sessions: Sessions, rows: dict[str, list[int]]) -> list[dict[str, torch.Tensor]]:
    return [sessions.step({"b": [token]}) for token in rows["b"]]


def ragged(sessions: Sessions, rows: dict[str, list[int]]) -> list[dict[str, torch.Tensor]]:
    """Rows that decode, rows with a chunk and rows with a whole prompt meet, in any order."""
    steps = [
        {"a": (0, 5)},
        {"b": (0, 17), "a": (5, 6), "c": (0, 1)},
        {"c": (1, 2), "a": (6, 7), "b": (17, 18)},
        {"d": (0, 40), "c": (2, 3), "b": (18, 29), "a": (7, 8)},
        {"a": (8, 9), "d": (40, 41), "b": (29, 30), "c": (3, 4)},
        {"c": (4, LEN), "b": (30, LEN), "a": (9, LEN)},
    ]
    return [
        sessions.step({name: rows[name][first:last] for name, (first, last) in step.items()})
        for step in steps
    ]


@pytest.mark.parametrize("block_size", [1, 3, 16])
@pytest.mark.parametrize("way", [full, chunked, token_by_token, ragged])
def test_logits_equal_transformers(
    case: Case,
    way: Callable[[Sessions, dict[str, list[int]]], list[dict[str, torch.Tensor]]],
    block_size: int,
) -> None:
    sessions = Sessions(case.model, block_size=block_size)
    parts: dict[str, list[torch.Tensor]] = {}
    for logits in way(sessions, case.rows):
        for name, part in logits.items():
            parts.setdefault(name, []).append(part)
    for name, pieces in parts.items():
        ours, theirs = torch.cat(pieces), case.expected[name]
        assert ours.dtype == torch.float32
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().max() < TOLERANCE
        # A model whose logits hardly vary would agree with anything.
        assert theirs.std() > 0.1


def test_every_architecture_has_a_config() -> None:
    assert set(CONFIGS) == set(ARCHITECTURES)
    assert all(len(variants) >= 1 for variants in CONFIGS.values())
    assert len(CONFIGS["LlamaForCausalLM"]) >= 8


@pytest.mark.parametrize(
    ("architecture", "variant"),
    [("CohereForCausalLM", "normed"), ("GPT2LMHeadModel", "plain"), ("GptOssForCausalLM", "sinks")],
)
def test_what_would_hide_a_mistake_is_random(architecture: str, variant: str) -> None:
    """Biases, scales of norms and sinks: zeros and ones would not show where they go."""
    found = [
        float(parameter.detach().std())
        for name, parameter in oracle(architecture, variant, 1).named_parameters()
        if parameter.dim() == 1 or "norm" in name or "sinks" in name or "bias" in name
    ]
    assert len(found) > 4
    assert min(found) > 0.05


@pytest.mark.parametrize(
    ("architecture", "variant"),
    [
        ("LlamaForCausalLM", "gqa"),
        ("CohereForCausalLM", "normed"),
        ("FalconForCausalLM", "new"),
        ("GPT2LMHeadModel", "plain"),
        ("Gemma2ForCausalLM", "plain"),
        ("Olmo3ForCausalLM", "plain"),
    ],
)
def test_bfloat16_is_near(tmp_path: Path, backend: str, architecture: str, variant: str) -> None:
    theirs = oracle(architecture, variant, 5)
    theirs.to(torch.bfloat16).save_pretrained(tmp_path)
    tokens = torch.randint(101, (1, LEN), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        exact = theirs.float()(tokens).logits[0]
    model = load(tmp_path, "bfloat16", backend=backend)
    sessions = Sessions(model, block_size=3)
    whole = sessions.step({"a": tokens[0].tolist()})["a"]
    single = torch.cat([sessions.step({"b": [token]})["b"] for token in tokens[0].tolist()])
    for ours in (whole, single):
        error = (ours - exact).abs()
        assert error.max() > TOLERANCE  # it is not fp32 in disguise
        assert error.mean() < 0.03 * exact.std()
