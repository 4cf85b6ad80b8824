"""Checkpoints in Mistral's own form compute what transformers computes, and bad ones are named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tests.models.configs_dense import BASE
from tests.models.helpers import Sessions, load

from penstock.errors import ModelLoadError, UnsupportedModel, WeightMismatch
from penstock.models.checkpoint import open_checkpoint, weight_files
from penstock.models.consolidated import BOS_ID, EOS_ID, config_of, name_of
from penstock.models.files import read_config, read_generation_eos
from penstock.models.spec import ModelSpec
from penstock.text.tokenizer import load_tokenizer

TOLERANCE = 1e-4
LEN = 33
_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "dim",
    "intermediate_size": "hidden_dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "head_dim": "head_dim",
    "rms_norm_eps": "norm_eps",
}
_PLACES = {  # of a block
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "block_sparse_moe.": "feed_forward.",
    "model.layers": "layers",
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 32,
}
_THETA = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
_PLAIN = BASE | _THETA | {"head_dim": 12, "sliding_window": None}
PARAMS: dict[str, Any] = {"dtype": "float32"}
# Name: transformers' class, its config, and what params.json says beside the usual.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "plain": ("MistralForCausalLM", _PLAIN, {"rope_theta": 5e5, "max_seq_len": 128}),
    "wide heads": (
        "MistralForCausalLM",
        _PLAIN | {"head_dim": 20, "num_key_value_heads": 1, "tie_word_embeddings": True},
        {"rope_theta": 5e5, "tied_embeddings": True, "sliding_window": None},
    ),
    "window": (
        "MistralForCausalLM",
        BASE | {"head_dim": 12, "sliding_window": 7},  # and theta of 10,000, as it is not said
        {"sliding_window": "7"},
    ),
    "pattern": (
        "MinistralForCausalLM",
        _PLAIN
        | {
            "num_hidden_layers": 4,
            "sliding_window": 7,
            "layer_types": ["full_attention", "sliding_attention"] * 2,
        },
        {"rope_theta": 5e5, "sliding_window": [None, 7]},
    ),
    "yarn": (
        "MistralForCausalLM",
        _PLAIN | {"rope_parameters": _YARN},
        {
            "rope_theta": 1e4,
            "yarn": {
                "factor": 4,
                "original_max_position_embeddings": 32,
                "alpha": 1.0,
                "beta": 32.0,
            },
        },
    ),
    "yarn without a scale": (
        "MistralForCausalLM",
        _PLAIN | {"rope_parameters": _YARN | {"attention_factor": 1.0}},
        {
            "rope_theta": 1e4,
            "yarn": {
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "apply_scale": False,
            },
        },
    ),
    "experts": (
        "MixtralForCausalLM",
        _PLAIN | {"num_local_experts": 5, "num_experts_per_tok": 2},
        {"rope_theta": 5e5, "moe": {"num_experts": 5, "num_experts_per_tok": 2}},
    ),
}


def interleaved(tensor: torch.Tensor, num_heads: int) -> torch.Tensor:
    """The inverse of `permute_for_rope` of transformers' convert_mistral_weights_to_hf.py."""
    rows, columns = tensor.shape
    halves = tensor.view(num_heads, 2, rows // num_heads // 2, columns)
    return halves.transpose(1, 2).reshape(rows, columns)


def as_consolidated(saved: Path, directory: Path, extra: dict[str, Any]) -> Path:
    """Rewrite what `save_pretrained` wrote; two files with an index."""
    config = json.loads((saved / "config.json").read_text())
    heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}
    made: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(saved / "model.safetensors").items():
        for kind, count in heads.items():
            if f".{kind}_proj." in name:
                tensor = interleaved(tensor, count)
        for old, new in _PLACES.items():
            name = name.replace(old, new)
        made[name] = tensor.contiguous()
    params = {new: config[old] for old, new in _KEYS.items() if old in config}
    (directory / "params.json").write_text(json.dumps(params | PARAMS | extra))
    names = sorted(made)
    files = {name: f"consolidated-0000{1 + (i % 2)}-of-00002.safetensors"
             for i, name in enumerate(names)}  # fmt: skip
    for file in set(files.values()):
        save_file({name: made[name] for name in names if files[name] == file}, directory / file)
    index = {"metadata": {}, "weight_map": files}
    (directory / "consolidated.safetensors.index.json").write_text(json.dumps(index))
    return directory


def make(path: Path, name: str) -> tuple[Any, Path]:
    torch.manual_seed(3)
    kind, told, extra = CASES[name]
    model_class = getattr(transformers, kind)
    config = model_class.config_class(**told)
    config._attn_implementation = "eager"
    theirs = model_class(config).eval()
    for weight_name, parameter in theirs.named_parameters():
        if "norm" in weight_name:
            parameter.data.add_(torch.randn_like(parameter) * 0.2)
    (path / "theirs").mkdir()
    theirs.save_pretrained(path / "theirs", max_shard_size="1GB")
    (path / "ours").mkdir()
    return theirs, as_consolidated(path / "theirs", path / "ours", extra)


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers(tmp_path: Path, name: str) -> None:
    theirs, path = make(tmp_path, name)
    ids = torch.randint(101, (1, LEN), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = theirs(ids).logits[0]
    ours = Sessions(load(path), block_size=3).step({"a": ids[0].tolist()})["a"]
    assert expected.std() > 0.1
    assert (ours - expected).abs().max() < TOLERANCE


def test_ends_and_lengths(tmp_path: Path) -> None:
    _, path = make(tmp_path, "plain")
    assert read_generation_eos(path) == (2,)
    assert ModelSpec.from_hf(read_config(path)).max_context_len == 128
    params = json.loads((path / "params.json").read_text())
    params.pop("max_seq_len")
    assert config_of(params)["max_position_embeddings"] == 32768


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_formats_keep_their_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    """What is read is what transformers' own checkpoint has, bit by bit."""
    theirs, path = make(tmp_path, "plain")
    theirs.to(dtype).save_pretrained(tmp_path / "theirs")
    as_consolidated(tmp_path / "theirs", path, {})
    expected = {
        tensor.name: tensor.data.tobytes()
        for _, tensors in open_checkpoint(tmp_path / "theirs")
        for tensor in tensors
        if hasattr(tensor, "data")
    }
    found = {
        tensor.name: (tensor.copied() if hasattr(tensor, "copied") else tensor).data.tobytes()
        for _, tensors in open_checkpoint(path)
        for tensor in tensors
    }
    assert found == expected


def test_one_file_and_a_part_for_images(tmp_path: Path) -> None:
    _, path = make(tmp_path, "plain")
    whole: dict[str, torch.Tensor] = {}
    for file in weight_files(path):
        whole |= load_file(file)
        file.unlink()
    (path / "consolidated.safetensors.index.json").unlink()
    whole["vision_encoder.ln_pre.weight"] = torch.ones(3)
    whole["patch_merger.merging_layer.weight"] = torch.ones(3, 3)
    save_file(whole, path / "consolidated.safetensors")
    save_file({"x": torch.ones(1)}, path / "extra.safetensors")  # of something else
    params = json.loads((path / "params.json").read_text())
    (path / "params.json").write_text(json.dumps(params | {"vision_encoder": {"dim": 3}}))
    assert weight_files(path) == [path / "consolidated.safetensors"]
    load(path)


def test_config_json_goes_first_with_weights_of_its_own(tmp_path: Path) -> None:
    _, path = make(tmp_path, "plain")
    shutil.copyfile(tmp_path / "theirs" / "config.json", path / "config.json")
    assert "model_type" not in read_config(path)
    load(path)
    shutil.copytree(tmp_path / "theirs", path, dirs_exist_ok=True)
    assert read_config(path)["model_type"] == "mistral"
    assert weight_files(path) == [path / "model.safetensors"]
    load(path)


def test_names() -> None:
    assert name_of("layers.11.block_sparse_moe.experts.3.w2.weight") == (
        "model.layers.11.block_sparse_moe.experts.3.w2.weight"
    )
    assert name_of("layers.1.feed_forward.gate.weight") == (
        "model.layers.1.block_sparse_moe.gate.weight"
    )
    for unknown in ("layers.1.attention.wq.qscale_weight", "x", "", "norm", "layers..norm.weight"):
        assert name_of(unknown) == unknown


GOOD: dict[str, Any] = {
    "dim": 48,
    "n_layers": 4,
    "hidden_dim": 88,
    "n_heads": 4,
    "n_kv_heads": 2,
    "vocab_size": 101,
    "norm_eps": 1e-5,
}
_PARTS = {"factor": 2.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"dim": "48"}, "dim"),
        ({"dim": None}, "dim"),
        ({"n_layers": 10**9}, "n_layers"),
        ({"n_heads": 0}, "n_heads"),
        ({"vocab_size": 2}, "vocab_size"),
        ({"quantization": {"qformat_weight": "fp8_e4m3"}}, "quantization"),
        ({"model_type": "mamba"}, "model_type"),
        ({"use_biases": True}, "use_biases"),
        ({"kv_lora_rank": 512}, "kv_lora_rank"),
        ({"tied_embeddings": 1}, "tied_embeddings"),
        ({"activation": "x"}, "hidden_act"),
        ({"dtype": "int8"}, "dtype"),
        ({"sliding_window": "x"}, "sliding_window"),
        ({"sliding_window": "9" * 5000}, "sliding_window"),
        ({"sliding_window": []}, "sliding_window"),
        ({"sliding_window": [None, 7, None]}, "sliding_window"),
        ({"sliding_window": [8, 7]}, "sliding_window"),
        ({"sliding_window": [None, {}]}, "sliding_window"),
        ({"sliding_window": {}}, "sliding_window"),
        ({"sliding_window": [None, 7], "moe": {"num_experts": 2}}, "sliding_window"),
        ({"moe": 8}, "moe"),
        ({"moe": {"num_experts": 8}}, "moe.num_experts_per_tok"),
        ({"moe": {"num_experts": 10**9, "num_experts_per_tok": 2}}, "moe.num_experts"),
        ({"moe": {"num_experts": 8, "num_shared_experts": 1}}, "moe.num_shared_experts"),
        ({"yarn": {"factor": 2.0}}, "yarn.original_max_position_embeddings"),
        ({"yarn": _PARTS | {"delta": 1}}, "yarn.delta"),
        ({"yarn": _PARTS | {"apply_scale": 0}}, "yarn.apply_scale"),
        ({"yarn": [1]}, "yarn"),
        ({"llama_4_scaling": {"beta": 0.1}}, "llama_4_scaling"),
        (
            {"yarn": _PARTS, "llama_4_scaling": {"beta": 0.1}},
            "llama_4_scaling.original_max_position_embeddings",
        ),
    ],
)
def test_what_is_not_implemented_is_named(
    tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    (tmp_path / "params.json").write_text(json.dumps(GOOD | changes))
    with pytest.raises(UnsupportedModel) as caught:
        ModelSpec.from_hf(read_config(tmp_path))
    assert f"`{named}`" in caught.value.message


def test_ministral_3() -> None:
    """Its context ends where its queries would be scaled."""
    scaled = {"beta": 0.1, "original_max_position_embeddings": 32}
    spec = ModelSpec.from_hf(
        config_of(GOOD | {"yarn": _PARTS, "llama_4_scaling": scaled, "max_seq_len": 64})
    )
    assert spec.architecture == "Ministral3ForCausalLM"
    assert spec.max_context_len == 32


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    _, path = make(tmp_path, "plain")
    file = weight_files(path)[0]
    tensors = load_file(file)
    name = next(name for name in tensors if "attention" in name and tensors[name].dim() == 2)
    tensors[name] = torch.ones(7, 5)
    tensors["layers.0.attention.wq.qscale_weight"] = torch.ones(1)
    save_file(tensors, file)
    with pytest.raises(WeightMismatch) as caught:
        load(path)
    assert "misshapen" in caught.value.message
    assert "`layers.0.attention.wq.qscale_weight`" in caught.value.message
    file.unlink()
    with pytest.raises(ModelLoadError, match=r"consolidated\.safetensors\.index\.json"):
        load(path)


def test_rows_are_not_copied_before_they_are_asked_for(tmp_path: Path) -> None:
    _, path = make(tmp_path, "plain")
    turned = [
        tensor
        for _, tensors in open_checkpoint(path)
        for tensor in tensors
        if tensor.name.endswith(("q_proj.weight", "k_proj.weight"))
    ]
    assert len(turned) == 4
    assert all(not np.shares_memory(t.copied().data, t.numbers) for t in turned)  # type: ignore[union-attr]
    assert all(t.numbers.base is not None for t in turned)  # type: ignore[union-attr]


def test_ends_are_those_of_the_published_tokenizers(data_dir: Path) -> None:
    files = sorted((data_dir / "tokenizer-mistral" / "data").glob("*.model.v*"))
    assert files
    for file in files:
        tokenizer = load_tokenizer(file)
        assert tokenizer.token_str(EOS_ID) == "</s>"
        assert tokenizer.bos_id == BOS_ID
