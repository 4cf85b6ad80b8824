"""Checkpoints as they are published, in every format: from the files to logits, and to an answer.

Each is written with random codes by `benchmarks.stored`, beside the same numbers as a plain
checkpoint in float32, which the torch backend computes: the expected logits.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from benchmarks.peers.shapes import Shape
from tests.models.helpers import MAX_TOKENS, Sessions, load
from tests.models.test_parity import LEN, chunked, full, ragged, token_by_token
from transformers import LlamaForCausalLM

from benchmarks import stored, stored_gguf
from penstock import LLM, SamplingParams, builtin
from penstock.engine.config import EngineConfig
from penstock.engine.core import EngineCore
from penstock.errors import ConfigError
from penstock.models.checkpoint import precision
from penstock.models.files import read_config
from penstock.models.footprint import weight_bytes
from penstock.models.native_model import NativeModel
from penstock.models.shapes import shapes_of
from penstock.models.spec import ModelSpec
from penstock.native import library
from penstock.native.memory import ALIGNMENT
from penstock.quantization.placing import Formats
from penstock.quantization.schemes import scheme

pytestmark = [
    pytest.mark.skipif(library.unavailable_reason() is not None, reason="no native library here"),
    pytest.mark.usefixtures("batch_invariant_isa"),
]

SHAPE = Shape(
    name="small",
    hidden_size=256,
    intermediate_size=512,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    vocab_size=2048,  # brook's
    max_len=256,
    rope_theta=10000.0,
    quantization_group=32,
)
SPREAD = 0.05
HF_FORMATS = dict(stored.all_formats())
MIXES = (*stored_gguf.TYPES, "Q4_K_M")
NAMES = [*HF_FORMATS, *(f"GGUF {mix}" for mix in MIXES)]


class Held(NamedTuple):
    """What the library holds of some columns of a row, in bits."""

    code: int
    group: int = 0  # scale, and minimum if there is one
    group_size: int = 0  # 0: the whole row
    unit: int = 0  # of 256 columns, where scales are integers

    def num_bytes(self, num_rows: int, num_columns: int) -> int:
        groups = num_columns // (self.group_size or num_columns)
        bits = num_columns * self.code + groups * self.group + num_columns // 256 * self.unit
        return num_rows * bits // 8


HELD = {
    "W4A16 sym": Held(4, 32, 128),
    "W4A16 asym": Held(4, 64, 128),
    "W8A16 sym": Held(8, 32),
    "W8A16 asym": Held(8, 64),
    "AWQ": Held(4, 64, 128),
    "W8A8": Held(8, 32),
    "fp8 tensor": Held(8, 32),
    "fp8 channel": Held(8, 32),
    "fp8 block": Held(8, 32, 128),
    "fp8 DeepSeek": Held(8, 32, 128),
    "nf4": Held(4, 32, 64),
    "bitsandbytes int8": Held(8, 32),
    "GGUF F32": Held(32),
    "GGUF F16": Held(32),  # as activations are: in float32
    "GGUF BF16": Held(32),
    "GGUF Q8_0": Held(8, 16, 32),
    "GGUF Q4_0": Held(4, 16, 32),
    "GGUF Q4_1": Held(4, 32, 32),
    "GGUF Q5_0": Held(8, 16, 32),
    "GGUF Q5_1": Held(8, 32, 32),
    "GGUF Q2_K": Held(4, 16, 16, 64),
    "GGUF Q3_K": Held(4, 8, 16, 32),
    "GGUF Q4_K": Held(4, 16, 32, 64),
    "GGUF Q5_K": Held(8, 16, 32, 64),
    "GGUF Q6_K": Held(8, 8, 16, 32),
    "GGUF MXFP4": Held(4, 32, 32),
} | {
    f"GPTQ {bits} bits {kind} {size or 'row'}": Held(bits, scales, size)
    for bits in (4, 8)
    for kind, scales in (("sym", 32), ("asym", 64))
    for size in (32, 128, 0)
}
TOLD = {
    "GPTQ 4 bits sym 128": "GPTQ, 4 bits in groups of 128",
    "AWQ": "AWQ, 4 bits in groups of 128",
    "nf4": "bitsandbytes nf4, activations in 16 bits",
    "GGUF Q4_K": "GGUF, Q4_K",
    "GGUF Q4_K_M": "GGUF, Q6_K and Q4_K",
    "GGUF F16": "none",
}

Rows = dict[str, list[int]]
Logits = dict[str, torch.Tensor]
WAYS: list[Callable[[Sessions, Rows], list[Logits]]] = [full, chunked, token_by_token, ragged]


class Case(NamedTuple):
    name: str
    path: Path
    twin: Path  # the same numbers in float32
    model: NativeModel
    whole: Logits  # of the native backend, each row alone, [LEN, V]


def rows() -> Rows:
    ids = torch.randint(SHAPE.vocab_size, (4, LEN), generator=torch.Generator().manual_seed(3))
    return dict(zip("abcd", ids.tolist(), strict=True))


def joined(sessions: Sessions, way: Callable[[Sessions, Rows], list[Logits]]) -> Logits:
    parts: dict[str, list[torch.Tensor]] = {}
    for logits in way(sessions, rows()):
        for name, part in logits.items():
            parts.setdefault(name, []).append(part)
    return {name: torch.cat(pieces) for name, pieces in parts.items()}


def native(path: Path, **options: Any) -> NativeModel:
    model = load(path, backend="native", **options)
    assert isinstance(model, NativeModel)
    return model


def written(name: str, directory: Path) -> tuple[Path, Path]:
    """The checkpoint with a tokenizer, and its twin."""
    tokenizer = builtin.path("brook") / "tokenizer.json"
    plain = directory / "plain"
    if name.startswith("GGUF "):
        shutil.copy(tokenizer, directory)
        mix = name.removeprefix("GGUF ")
        return stored_gguf.write(SHAPE, mix, directory / "model.gguf", SPREAD, plain), plain
    path = stored.write(SHAPE, HF_FORMATS[name], directory / "coded", SPREAD, plain)
    shutil.copy(tokenizer, path)
    return path, plain


@pytest.fixture(scope="module", params=NAMES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    path, twin = written(request.param, tmp_path_factory.mktemp("model"))
    model = native(path)
    whole = joined(Sessions(model, block_size=16), full)
    return Case(request.param, path, twin, model, whole)


def expected(path: Path) -> Logits:
    return joined(Sessions(load(path), block_size=16), full)


def test_logits_are_those_of_the_numbers(case: Case) -> None:
    if case.name == "W8A8":
        pytest.skip("its activations are quantized: `test_activations_of_8_bits`")
    for name, wanted in expected(case.twin).items():
        assert wanted.std() > 0.1  # logits that hardly vary would agree with anything
        assert (case.whole[name] - wanted).abs().max() < 1e-4 * max(1.0, wanted.std().item())


def test_torch_takes_the_same_numbers(case: Case) -> None:
    found = expected(case.path)
    for name, wanted in expected(case.twin).items():
        assert (found[name] - wanted).abs().max() < 1e-5 * max(1.0, wanted.std().item())


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_row_is_the_same_in_any_batch(
    case: Case, way: Callable[[Sessions, Rows], list[Logits]]
) -> None:
    """To the last bit."""
    for name, found in joined(Sessions(case.model, block_size=3), way).items():
        assert torch.equal(found, case.whole[name])


def test_memory_is_what_was_planned(case: Case) -> None:
    config = read_config(case.path)
    spec = ModelSpec.from_hf(config)
    taken = case.model._materials.arena
    formats = Formats(scheme("none", "float32"), precision(case.path, config))
    planned = weight_bytes(spec, formats)
    assert planned <= taken.num_bytes <= planned + ALIGNMENT * len(taken.reserved)
    blocks_bytes = planned - 4 * shapes_of(spec).num_vector_parameters
    blocks_bytes -= held(case.name, "token_embd").num_bytes(SHAPE.vocab_size, SHAPE.hidden_size)
    parts = [(name, shape) for name, shape in SHAPE.tensors() if "_proj" in name]
    assert blocks_bytes == sum(held(case.name, name).num_bytes(*shape) for name, shape in parts)
    if held(case.name, "").code == 4:
        assert blocks_bytes < SHAPE.linear_parameters * 2 / 2  # half of what bfloat16 takes


def held(name: str, matrix: str) -> Held:
    """What a matrix is held in."""
    if name == "GGUF Q4_K_M":
        is_dear = any(part in matrix for part in ("v_proj", "down_proj", "token_embd"))
        return HELD[f"GGUF Q{6 if is_dear else 4}_K"]
    is_plain = matrix == "token_embd" and not name.startswith("GGUF")
    return Held(32) if is_plain else HELD[name]


def test_an_engine_tells_the_format(case: Case) -> None:
    llm = LLM(str(case.path), **SETTINGS)
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    (output,) = llm.generate("The sum of", params, progress=False)
    info = llm.core.info
    logits = full(Sessions(case.model, block_size=16), {"a": output.prompt_token_ids})[0]["a"]
    assert output.outputs[0].token_ids[0] == int(logits[-1].argmax())
    assert len(output.outputs[0].token_ids) == 8
    assert info.backend == "native"
    assert info.quantization == TOLD.get(case.name, info.quantization)
    (line,) = (line for line in info.plan if line.startswith("weights "))
    if info.quantization == "none":
        assert case.name in {"GGUF F32", "GGUF F16", "GGUF BF16"}
        assert "float32, packed" in line
    else:
        assert f"in {info.quantization}, packed" in line


SETTINGS: dict[str, Any] = {
    "dtype": "float32",
    "max_num_batched_tokens": MAX_TOKENS,
    "max_num_seqs": 4,
    "num_blocks": 32,
}
SOME = ["GPTQ 4 bits asym 128", "W8A8", "fp8 DeepSeek", "nf4", "GGUF Q4_K_M", "GGUF MXFP4"]


@pytest.fixture(scope="module", params=SOME)
def some(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(request.param, tmp_path_factory.mktemp("some"))[0]


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_drawn_codes_take_what_stored_ones_do(some: Path, backend: str) -> None:
    """`--load-format dummy` of a quantized checkpoint: the same formats, other numbers."""
    models = [load(some, backend=backend, load_format=way) for way in ("auto", "dummy")]
    stored_logits, drawn = (joined(Sessions(model, block_size=16), full) for model in models)
    assert drawn["a"].isfinite().all()
    assert drawn["a"].std() > 0.01
    assert not torch.equal(stored_logits["a"], drawn["a"])
    again = load(some, backend="native", load_format="dummy")  # on whatever backend
    assert isinstance(again, NativeModel)
    if backend == "native":
        assert isinstance(models[0], NativeModel)
        assert again._materials.arena.reserved == models[0]._materials.arena.reserved
    same = joined(Sessions(again, block_size=16), full)
    bound = 0.2 if again._materials.formats.activation_bits == 8 else 1e-4
    assert (same["a"] - drawn["a"]).abs().max() < bound * drawn["a"].std()
    core = EngineCore.from_config(
        EngineConfig(model=str(some), backend=backend, load_format="dummy", **SETTINGS)
    )
    assert core.info.quantization != "none"


@pytest.mark.parametrize("quantization", ["int8", "int4-a16"])
def test_a_quantized_checkpoint_is_not_quantized_again(some: Path, quantization: str) -> None:
    name = EngineCore.from_config(EngineConfig(model=str(some), **SETTINGS)).info.quantization
    config = EngineConfig(model=str(some), quantization=quantization, **SETTINGS)
    told = f"`quantization` is `{quantization}`, and the checkpoint is quantized already: {name}."
    with pytest.raises(ConfigError, match=re.escape(told)) as error:
        EngineCore.from_config(config)
    assert "leave it out" in str(error.value.hint)


def test_a_weight_cache_has_nothing_to_keep(some: Path, tmp_path: Path) -> None:
    config = EngineConfig(model=str(some), weight_cache=str(tmp_path), **SETTINGS)
    with pytest.raises(ConfigError, match="nothing would be kept there") as error:
        EngineCore.from_config(config)
    assert "leave it out" in str(error.value.hint)


def in_8_bits(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
    """Inputs as integers from -127 to 127 with a scale a token, and back."""
    (x,) = inputs
    scale = x.abs().amax(-1, keepdim=True) / 127
    return ((x / scale).round() * scale,)


def test_activations_of_8_bits(tmp_path: Path) -> None:
    """W8A8 against transformers with every map's input quantized by token.

    A quotient that lies between two integers may be rounded either way, and one that is moves
    everything behind it, by as much as quantizing does. So the rows are short, and most are exact.
    """
    path, twin = written("W8A8", tmp_path)
    cut = {f"{name}{first}": ids[first : first + 3]
           for name, ids in rows().items() for first in range(0, LEN - 2, 3)}  # fmt: skip
    found, exact = (
        Sessions(model, block_size=16).step(cut) for model in (native(path), load(twin))
    )
    theirs = LlamaForCausalLM.from_pretrained(twin, dtype=torch.float32)
    for name, module in theirs.named_modules():
        if name.endswith("_proj"):
            module.register_forward_pre_hook(in_8_bits)
    with torch.no_grad():
        logits = theirs(torch.tensor(list(cut.values()))).logits
    wanted = dict(zip(cut, logits, strict=True))
    errors = torch.stack([(found[name] - wanted[name]).abs().amax() for name in cut])
    rounding = torch.stack([(exact[name] - wanted[name]).abs().amax() for name in cut])
    assert rounding.min() > 5e-3 * logits.std()  # quantized activations are no detail
    assert (errors < 1e-4 * logits.std()).float().mean() > 0.6
    assert errors.max() < 2 * rounding.max()
