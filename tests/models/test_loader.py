"""What the loader accepts, what it refuses, and that it says everything at once."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tests.models.helpers import Sessions, load

from penstock.errors import ModelLoadError, UnsupportedModel, WeightMismatch
from penstock.layers.materials import Materials
from penstock.layers.specs import NormSpec
from penstock.layers.toolkit import StoredTensor, Weight
from penstock.layers.torch_toolkit import TorchToolkit
from penstock.models import loader
from penstock.models.compose import compose
from penstock.models.files import read_config, read_generation_eos
from penstock.models.loader import load_weights
from penstock.models.registry import read_spec
from penstock.models.safetensors import map_tensors
from penstock.quantization.codes import CodeForm
from penstock.quantization.drawn import drawn

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 13,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
LAYER = "model.layers.0"
SHAPES = {
    "model.embed_tokens.weight": (13, 8),
    f"{LAYER}.input_layernorm.weight": (8,),
    f"{LAYER}.post_attention_layernorm.weight": (8,),
    **{f"{LAYER}.self_attn.{name}_proj.weight": (8, 8) for name in "qkvo"},
    f"{LAYER}.mlp.gate_proj.weight": (12, 8),
    f"{LAYER}.mlp.up_proj.weight": (12, 8),
    f"{LAYER}.mlp.down_proj.weight": (8, 12),
    "model.norm.weight": (8,),
    "lm_head.weight": (13, 8),
}
FILE = "model.safetensors"


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def write(path: Path, content: dict[str, torch.Tensor], **config: Any) -> Path:
    (path / "config.json").write_text(json.dumps(CONFIG | config))
    save_file(content, path / FILE)
    return path


def logits(path: Path, dtype: str = "float32") -> torch.Tensor:
    model = load(path, dtype)
    return Sessions(model, block_size=4).step({"a": [1, 5, 12, 3]})["a"]


def test_every_problem_is_reported_at_once(tmp_path: Path) -> None:
    content = tensors()
    del content["model.norm.weight"]
    del content[f"{LAYER}.self_attn.k_proj.weight"]
    content[f"{LAYER}.mlp.up_proj.weight"] = torch.zeros(12, 9)
    content[f"{LAYER}.self_attn.q_proj.bias"] = torch.zeros(8)
    content["lm_head.weight"] = torch.zeros(13, 8, dtype=torch.int8)
    with pytest.raises(WeightMismatch) as caught:
        load(write(tmp_path, content))
    message = caught.value.message
    assert message.startswith("`5` weights")
    assert "missing: `model.norm.weight`, [8]" in message
    assert f"missing: `{LAYER}.self_attn.k_proj.weight`, [8, 8]" in message
    assert f"misshapen: `{LAYER}.mlp.up_proj.weight` is [12, 9], the config says [12, 8]" in message
    assert f"unexpected: `{LAYER}.self_attn.q_proj.bias`, [8]" in message
    assert "unreadable: `lm_head.weight` is of type I8" in message


def test_many_problems_are_counted_and_the_first_are_named(tmp_path: Path) -> None:
    content = tensors() | {f"stray.{i:02}": torch.zeros(1) for i in range(25)}
    with pytest.raises(WeightMismatch) as caught:
        load(write(tmp_path, content, num_hidden_layers=4))
    lines = caught.value.message.splitlines()
    assert lines[0].startswith(f"`{3 * 9 + 25}` weights")
    assert [line.strip() for line in lines if "more" in line] == [
        "missing: and 7 more",
        "unexpected: and 5 more",
    ]
    assert sum("missing: `" in line for line in lines) == 20
    assert sum("unexpected: `" in line for line in lines) == 20
    assert len(lines) == 1 + 2 * 21


def test_old_rotary_buffers_are_ignored(tmp_path: Path) -> None:
    content = tensors()
    plain = logits(write(tmp_path, content))
    content[f"{LAYER}.self_attn.rotary_emb.inv_freq"] = torch.zeros(2)
    assert torch.equal(logits(write(tmp_path, content)), plain)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
def test_formats_are_converted(tmp_path: Path, stored: torch.dtype) -> None:
    rounded = {name: tensor.to(stored) for name, tensor in tensors().items()}
    exact = logits(write(tmp_path, {name: t.float() for name, t in rounded.items()}))
    write(tmp_path, rounded)
    assert torch.equal(logits(tmp_path), exact)
    near = logits(tmp_path, "bfloat16")
    assert near.dtype == torch.float32
    assert (near - exact).abs().max() < 0.1 * exact.abs().max()


def test_shards_follow_the_index(tmp_path: Path) -> None:
    content = tensors()
    whole = logits(write(tmp_path, content))
    (tmp_path / FILE).unlink()
    names = list(content)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: content[name] for name in part}, tmp_path / file)
    # A file that the index does not name is not read.
    save_file({"stray": torch.zeros(1)}, tmp_path / "c.safetensors")
    with pytest.raises(ModelLoadError, match="`3` safetensors files and no"):
        load(tmp_path)
    index = {"weight_map": {name: file for file, part in halves.items() for name in part}}
    index_file = tmp_path / "model.safetensors.index.json"
    index_file.write_text(json.dumps(index))
    assert torch.equal(logits(tmp_path), whole)
    save_file(content, tmp_path / "b.safetensors")
    with pytest.raises(WeightMismatch, match=r"repeated: `model.embed_tokens.weight` is in `a\."):
        load(tmp_path)
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(ModelLoadError, match=r"names `b\.safetensors`, which is not a file"):
        load(tmp_path)


@pytest.mark.parametrize(
    "index",
    [
        [],
        {},
        {"weight_map": {"a": 1}},
        *({"weight_map": {"a": name}} for name in ("../x", "x" * 5000, "\ud800", "a\0", "")),
    ],
)
def test_a_bad_index_is_refused(tmp_path: Path, index: Any) -> None:
    write(tmp_path, tensors())
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelLoadError) as caught:
        load(tmp_path)
    caught.value.message.encode()  # it can be printed


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_files_are_refused(tmp_path: Path, keep: int) -> None:
    file = write(tmp_path, tensors()) / FILE
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ModelLoadError, match="cannot be read") as caught:
        load(tmp_path)
    assert caught.value.hint is not None


def test_garbage_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path, tensors()) / FILE
    file.write_bytes(b"\xff" * 400)
    with pytest.raises(ModelLoadError, match="cannot be read"):
        load(tmp_path)


def test_pickles_are_refused_and_not_opened(tmp_path: Path) -> None:
    write(tmp_path, tensors())
    (tmp_path / FILE).rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelLoadError, match=r"`pytorch_model\.bin`, a pickle") as caught:
        load(tmp_path)
    assert caught.value.hint is not None
    assert "safe_serialization" in caught.value.hint
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(ModelLoadError, match="has no safetensors file"):
        load(tmp_path)


def test_tied_head(tmp_path: Path) -> None:
    content = tensors()
    untied = logits(write(tmp_path, content))
    own = content.pop("lm_head.weight")
    with pytest.raises(WeightMismatch, match=r"missing: `lm_head\.weight`"):
        load(write(tmp_path, content))
    tied = logits(write(tmp_path, content, tie_word_embeddings=True))
    assert not torch.allclose(tied, untied)
    content["lm_head.weight"] = content["model.embed_tokens.weight"].clone()
    assert torch.equal(logits(write(tmp_path, content, tie_word_embeddings=True)), tied)
    content["lm_head.weight"] = own
    with pytest.raises(WeightMismatch, match="differs from the table"):
        load(write(tmp_path, content, tie_word_embeddings=True))


def test_dummy_weights_need_the_config_only(tmp_path: Path) -> None:
    write(tmp_path, tensors(), hidden_size=64, attention_bias=True, mlp_bias=True)
    (tmp_path / FILE).unlink()

    def dummy(seed: int) -> torch.Tensor:
        model = load(tmp_path, load_format="dummy", seed=seed)
        assert 0.015 < model.decoder.embedding.weight.std() < 0.025
        return Sessions(model, block_size=4).step({"a": [1, 2]})["a"]

    assert dummy(1).isfinite().all()
    assert torch.equal(dummy(1), dummy(1))
    assert not torch.equal(dummy(1), dummy(2))


class Recorder:
    """A leaf that notes what the loader does with it."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], copies: dict[str, str]) -> None:
        self.shapes = shapes
        self.copies = copies
        self.loaded: dict[str, bytes] = {}
        self.num_finished = 0

    def weights(self) -> Iterator[Weight]:
        for name, shape in self.shapes.items():
            yield Weight(name, shape, self.load, self.copies.get(name))

    def load(self, stored: StoredTensor) -> None:
        assert self.num_finished == 0
        assert stored.name not in self.loaded
        assert stored.shape == self.shapes[stored.name]
        self.loaded[stored.name] = stored.data.tobytes()

    def finish(self) -> None:
        self.num_finished += 1


def test_any_leaf_gets_its_bytes_in_the_order_of_the_file(tmp_path: Path) -> None:
    content = {name: torch.full((3,), float(i)) for i, name in enumerate("dacb")}
    save_file(content | {"copy": content["a"].clone()}, tmp_path / FILE)
    order = [tensor.name for tensor in map_tensors(tmp_path / FILE) if tensor.name != "copy"]
    leaf = Recorder(dict.fromkeys(["b", "c", "copy", "a", "d"], (3,)), {"copy": "a"})
    load_weights([leaf], tmp_path)
    assert list(leaf.loaded) == order  # and not the copy
    assert leaf.loaded == {name: content[name].numpy().tobytes() for name in order}
    assert leaf.num_finished == 1


def test_nothing_is_loaded_if_anything_is_wrong(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2), "stray": torch.zeros(2)}, tmp_path / FILE)
    leaf = Recorder({"a": (2,)}, {})
    with pytest.raises(WeightMismatch, match="unexpected: `stray`"):
        load_weights([leaf], tmp_path)
    assert (leaf.loaded, leaf.num_finished) == ({}, 0)


def test_a_vector_has_no_codes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    coded = drawn("norm.weight", CodeForm("int8", 0), (1, 8), (0,), 0.02)
    monkeypatch.setattr(loader, "open_checkpoint", lambda path: [(path / FILE, [coded])])
    norm = TorchToolkit(Materials(torch.float32)).norm("norm", 8, NormSpec(eps=1e-6))
    with pytest.raises(WeightMismatch, match=r"misshapen: `norm.weight` is \[1, 8\]"):
        load_weights([norm], tmp_path)


def test_a_copy_of_another_dtype_is_no_copy(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2), "copy": torch.zeros(2).half()}, tmp_path / FILE)
    with pytest.raises(WeightMismatch, match="`copy` differs"):
        load_weights([Recorder({"a": (2,), "copy": (2,)}, {"copy": "a"})], tmp_path)


def test_a_copy_needs_its_original(tmp_path: Path) -> None:
    save_file({"copy": torch.zeros(2)}, tmp_path / FILE)
    with pytest.raises(WeightMismatch, match="missing: `a`"):
        load_weights([Recorder({"a": (2,), "copy": (2,)}, {"copy": "a"})], tmp_path)


def test_dummy_weights_hang_on_name_and_seed_only(tmp_path: Path) -> None:
    shapes = {"a": (4, 50), "b": (4, 50), "vector": (4,), "copy": (4, 50)}

    def drawn(names: list[str], seed: int) -> dict[str, bytes]:
        leaf = Recorder({name: shapes[name] for name in names}, {"copy": "a"})
        load_weights([leaf], tmp_path, "dummy", seed)
        assert leaf.num_finished == 1
        return leaf.loaded

    first = drawn(["a", "b", "vector", "copy"], 1)
    assert list(first) == ["a", "b"]
    assert first["a"] != first["b"]
    assert drawn(["b", "a"], 1) == first
    assert drawn(["a", "b"], 2)["a"] != first["a"]


def test_names_of_a_stranger_can_be_printed(tmp_path: Path) -> None:
    header = '{"\\ud800%s": {"dtype": "\\n", "shape": [], "data_offsets": [0, 0]}}' % ("x" * 999)
    (tmp_path / FILE).write_bytes(len(header).to_bytes(8, "little") + header.encode())
    with pytest.raises(WeightMismatch, match="unexpected") as caught:
        load_weights([Recorder({}, {})], tmp_path)
    caught.value.message.encode()
    assert len(caught.value.message) < 300


def test_read_config_errors(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="is neither a directory"):
        read_config(tmp_path / "nowhere")
    with pytest.raises(ModelLoadError, match=r"has no `config\.json`"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelLoadError, match="is not JSON"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"a":' * 100_000)
    with pytest.raises(ModelLoadError, match="is not JSON"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ModelLoadError, match="JSON object"):
        read_config(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ModelLoadError, match="cannot be read"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        (None, None, ()),
        (None, 2, (2,)),
        (7, 2, (7, 2)),
        ([7, 2, 9], 2, (7, 2, 9)),
        ([0], [0, 3], (0, 3)),
    ],
)
def test_eos_ids_are_merged(
    tmp_path: Path, generation: Any, config: Any, expected: tuple[int, ...]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 10, "eos_token_id": config}))
    if generation is not None:
        content = json.dumps({"eos_token_id": generation})
        (tmp_path / "generation_config.json").write_text(content)
    assert read_generation_eos(tmp_path) == expected


@pytest.mark.parametrize("value", ["2", [1, "x"], -1, 1.5, True, 10, [2, 10**400]])
def test_bad_eos_ids_are_refused(tmp_path: Path, value: Any) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 10, "eos_token_id": value}))
    with pytest.raises(ModelLoadError, match="`eos_token_id`"):
        read_generation_eos(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 10, "eos_token_id": 9}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(ModelLoadError, match="`eos_token_id`"):
        read_generation_eos(tmp_path)


def test_unknown_architecture_lists_the_known(tmp_path: Path) -> None:
    write(tmp_path, tensors(), architectures=["NoSuchModel"])
    with pytest.raises(UnsupportedModel, match="`NoSuchModel`") as caught:
        load(tmp_path)
    assert "LlamaForCausalLM" in str(caught.value.hint)
    with pytest.raises(UnsupportedModel):
        read_spec({"architectures": [""]})


def test_loaded_weights_are_what_the_spec_counts(tmp_path: Path) -> None:
    for extra in ({}, {"attention_bias": True}, {"mlp_bias": True}, {"tie_word_embeddings": True}):
        (tmp_path / "config.json").write_text(json.dumps(CONFIG | extra))
        spec = load(tmp_path, load_format="dummy").spec
        model = compose(spec, TorchToolkit(Materials(torch.float32)))
        weights = [weight for layer in model.layers() for weight in layer.weights()]
        total = sum(math.prod(weight.shape) for weight in weights if weight.duplicate_of is None)
        assert total == spec.num_parameters


def test_progress_is_shown_on_a_terminal_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, tensors())
    monkeypatch.setattr(loader, "_SHOWN_AFTER_S", 0)
    logits(tmp_path)
    assert capfd.readouterr() == ("", "")
    ours, theirs = os.openpty()
    monkeypatch.setenv("PENSTOCK_TERMINAL", os.ttyname(theirs))
    logits(tmp_path)
    os.close(theirs)
    assert b"loading weights" in os.read(ours, 10_000)
    os.close(ours)
    assert capfd.readouterr() == ("", "")
    monkeypatch.setenv("PENSTOCK_TERMINAL", "/dev/pts/none")  # it has been closed
    logits(tmp_path)
    file, fifo = tmp_path / "file", tmp_path / "fifo"
    file.write_text("what somebody needs")
    os.mkfifo(fifo)
    for no_terminal in (file, fifo, Path("/dev/null")):
        monkeypatch.setenv("PENSTOCK_TERMINAL", str(no_terminal))
        logits(tmp_path)
    assert file.read_text() == "what somebody needs"
