"""GPT-OSS as it is published, its experts in MXFP4, against transformers' own numbers of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.models.configs import CONFIGS
from tests.models.helpers import BACKENDS, Sessions, load
from tests.models.test_parity import LEN, chunked, full, oracle, ragged, token_by_token
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from penstock.engine.config import EngineConfig
from penstock.engine.core import EngineCore
from penstock.models.checkpoint import precision
from penstock.models.files import read_config
from penstock.models.footprint import weight_bytes
from penstock.models.native_model import NativeModel
from penstock.models.spec import ModelSpec
from penstock.native import library
from penstock.native.memory import ALIGNMENT
from penstock.quantization.placing import Formats
from penstock.quantization.schemes import scheme

pytestmark = pytest.mark.skipif(
    library.unavailable_reason() is not None, reason="no native library here"
)

ARCHITECTURE, VARIANT = "GptOssForCausalLM", "mxfp4"
SIZES = {"hidden_size": 64, "intermediate_size": 96}  # groups of 32 must fit
PLAIN = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]

Logits = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def published(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, dict[str, list[int]], Logits]:
    """The checkpoint, rows of tokens and the logits that transformers has for them."""
    config = CONFIGS[ARCHITECTURE]["sinks"] | SIZES
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CONFIGS[ARCHITECTURE], VARIANT, config)
        theirs = oracle(ARCHITECTURE, VARIANT, 7)
    generator = torch.Generator().manual_seed(7)
    coded: Logits = {}
    for name, weight in theirs.state_dict().items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            continue
        num_experts, num_columns, num_rows = weight.shape
        shape = (num_experts, num_rows, num_columns // 32)
        blocks = torch.randint(256, (*shape, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(122, 125, shape, generator=generator, dtype=torch.uint8)
        coded |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        weight.copy_(convert_moe_packed_tensors(blocks, scales, dtype=torch.float32))
    path = tmp_path_factory.mktemp("model")
    theirs.save_pretrained(path)
    tensors = load_file(path / "model.safetensors")
    kept = {name: part for name, part in tensors.items() if f"{name}_blocks" not in coded}
    assert len(kept) == len(tensors) - len(coded) // 2
    save_file(kept | coded, path / "model.safetensors")
    saved = json.loads((path / "config.json").read_text())
    saved["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": PLAIN}
    (path / "config.json").write_text(json.dumps(saved))
    ids = torch.randint(config["vocab_size"], (4, LEN), generator=generator)
    with torch.no_grad():
        expected = theirs(ids).logits
    rows = dict(zip("abcd", ids.tolist(), strict=True))
    return path, rows, dict(zip("abcd", expected, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("batch_invariant_isa")
def test_logits_are_those_of_transformers(
    published: tuple[Path, dict[str, list[int]], Logits], backend: str
) -> None:
    path, rows, expected = published
    model = load(path, backend=backend)
    whole: Logits = {}
    for way in (full, chunked, token_by_token, ragged):
        parts: dict[str, list[torch.Tensor]] = {}
        for logits in way(Sessions(model, block_size=16), rows):
            for name, part in logits.items():
                parts.setdefault(name, []).append(part)
        for name, pieces in parts.items():
            found = torch.cat(pieces)
            assert expected[name].std() > 0.1
            assert (found - expected[name]).abs().max() < 2e-4 * max(
                1.0, expected[name].std().item()
            )
            if backend == "native":
                assert torch.equal(found, whole.setdefault(name, found))


def test_memory_is_what_was_planned(
    published: tuple[Path, dict[str, list[int]], Logits],
) -> None:
    path, _, _ = published
    model = load(path, backend="native")
    assert isinstance(model, NativeModel)
    config = read_config(path)
    spec = ModelSpec.from_hf(config)
    stored = precision(path, config)
    arena = model._materials.arena
    planned = weight_bytes(spec, Formats(scheme("none", "float32"), stored))
    assert planned <= arena.num_bytes <= planned + ALIGNMENT * len(arena.reserved)
    plain = weight_bytes(spec, Formats(scheme("none", "float32")))
    num_layers, num_experts = spec.num_layers, config["num_local_experts"]
    columns = {64: 2 * 96, 128: 64}  # padded to 64 or, of 96, to 128: the rows that have so many
    coded = sum(rows * size * 5 // 8 for size, rows in columns.items()) * num_experts * num_layers
    numbers = 4 * sum(rows * size for size, rows in columns.items()) * num_experts * num_layers
    assert plain - planned == numbers - coded


def test_an_engine_tells_the_format(
    published: tuple[Path, dict[str, list[int]], Logits],
) -> None:
    core = EngineCore.from_config(
        EngineConfig(model=str(published[0]), dtype="float32", num_blocks=16, max_num_seqs=2)
    )
    assert (core.info.backend, core.info.quantization) == ("native", "MXFP4 experts")
    assert any("in MXFP4 experts, packed" in line for line in core.info.plan)
