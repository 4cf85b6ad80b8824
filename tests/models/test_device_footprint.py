"""What a rank is said to take on a GPU is what its tensors take: weights exactly, a step at most.

The tensors are on torch's `meta` device, which has sizes and no memory, and kernels are not
launched: so real shapes can be counted anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from tests.models.helpers_live import LiveBytes
from tests.models.llama_specs import SMALL, changed
from tests.models.test_device_kinds import TAKEN as SMALL_KINDS

from penstock.attention.paged import DeviceBatch, PagedAttention, choose
from penstock.attention.pages import KVPages
from penstock.kernels import split_k
from penstock.kernels.jit import triton
from penstock.layers.device_materials import DeviceMaterials
from penstock.layers.device_tables import DeviceTables
from penstock.layers.device_toolkit import DeviceToolkit
from penstock.layers.scaling import YarnScaling
from penstock.layers.specs import AttentionSpec, MLPSpec, NormSpec, RopeSpec
from penstock.models.blocks import Decoder
from penstock.models.compose import compose
from penstock.models.device_footprint import (
    DeviceStep,
    activation_bytes,
    graph_sizes,
    on_device,
    scratch_bytes,
    share_of,
    table_bytes,
)
from penstock.models.device_shapes import why_not_shared
from penstock.models.device_weights import weight_bytes
from penstock.models.spec import LayerSpec, ModelSpec
from penstock.quantization.schemes import DEVICE_NAMES, scheme

META = torch.device("meta")
TABLE = torch.zeros(512, 131_072 // 16, dtype=torch.int32, device=META)
LLAMA_8B = changed(
    SMALL,
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    num_layers=3,  # of 32, which are alike
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    attention_bias=False,
    mlp_bias=False,
    tied_embeddings=False,
)
SPECS = {
    "8B": LLAMA_8B,
    "0.6B": changed(
        LLAMA_8B,
        hidden_size=1024,
        intermediate_size=3072,
        num_heads=16,
        tied_embeddings=True,
        vocab_size=151_936,
    ),
    "biases": changed(LLAMA_8B, attention_bias=True, mlp_bias=True, vocab_size=32_003),
    "narrow MLP": changed(LLAMA_8B, intermediate_size=512, num_heads=64, num_kv_heads=64),
    "odd": changed(
        LLAMA_8B,
        hidden_size=1000,
        intermediate_size=1352,
        num_heads=12,
        num_kv_heads=2,
        head_dim=80,
        vocab_size=501,
    ),
}


YARN = RopeSpec(
    dim=128,
    theta=1e4,
    scaling=YarnScaling(factor=4.0, original_context_len=64, angle_factor=1.2),
)


def widened(spec: ModelSpec) -> ModelSpec:
    """A small spec with sizes of a real one: 32 times as wide, with heads of 128 numbers."""

    def layer(one: LayerSpec) -> LayerSpec:
        attention, mlp = one.attention, one.mlp
        assert isinstance(attention, AttentionSpec)
        assert isinstance(mlp, MLPSpec)
        rope = attention.rope and replace(attention.rope, dim=8 * attention.rope.dim)
        return LayerSpec(
            attention=replace(
                attention,
                num_heads=4 * attention.num_heads,
                num_kv_heads=2 * attention.num_kv_heads,
                head_dim=8 * attention.head_dim,
                rope=rope,
            ),
            mlp=replace(mlp, size=96 * mlp.size),
        )

    layers = tuple(map(layer, spec.layers))
    return replace(spec, layers=layers, hidden_size=32 * spec.hidden_size, vocab_size=5003)


def narrow(spec: ModelSpec, **changes: Any) -> ModelSpec:
    """The same with MLPs so small that attention, which these change, is the widest place."""
    mlp = MLPSpec(size=256, activation="gelu")
    layers = []
    for layer in spec.layers:
        assert isinstance(layer.attention, AttentionSpec)
        layers.append(LayerSpec(attention=replace(layer.attention, **changes), mlp=mlp))
    return replace(spec, layers=tuple(layers))


KINDS = {name: widened(spec) for name, spec in SMALL_KINDS.items()}
KINDS |= {
    "narrow": narrow(KINDS["cohere"]),
    "narrow qwen3": narrow(KINDS["qwen3"]),
    "turned": narrow(KINDS["cohere"], qk_norm=None, rope=YARN),
    "normed": replace(narrow(KINDS["cohere"]), norm=NormSpec(eps=1e-5, kind="layer", offset=1.0)),
}


@dataclass(frozen=True)
class OneOf:
    """Implements `Group`: one of several ranks, usually the first; the others are not there."""

    size: int
    rank: int = 0

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x] * self.size, -1) if self.size > 1 else x


@pytest.fixture(autouse=True)
def no_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are called and compute nothing: there is no memory behind the tensors."""
    if triton is None:
        pytest.skip("Triton is not installed")
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    for kind in (InterpretedFunction, JITFunction):
        monkeypatch.setattr(kind, "run", lambda self, *args, **kwargs: None)
    split_k.counters(META)  # made once a process


def decoder(spec: ModelSpec, dtype: str, quantization: str, group: OneOf) -> Decoder:
    kind = getattr(torch, dtype)
    materials = DeviceMaterials(kind, META, group, scheme(quantization, dtype))
    made = compose(spec, DeviceToolkit(materials))
    for layer in made.layers():
        layer.finish()
    return made


@pytest.mark.parametrize("quantization", DEVICE_NAMES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("group_size", [1, 2, 4])
def test_weights_are_exact(name: str, dtype: str, quantization: str, group_size: int) -> None:
    spec = SPECS[name]
    with torch.inference_mode(), LiveBytes() as live:
        made = decoder(spec, dtype, quantization, OneOf(group_size))
    told = on_device(spec, dtype, quantization, DeviceStep(1, 1), group_size)
    assert told.weight_bytes == live.live > 0
    assert f"{spec.num_parameters:,} parameters in" in told.weights
    assert ("share" in told.weights) == (group_size > 1)
    del made


@pytest.mark.parametrize("quantization", ["none", "int4-a16", "fp8-block"])
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("group_size", [1, 2])
def test_weights_of_every_kind_are_exact(name: str, quantization: str, group_size: int) -> None:
    spec = KINDS[name]
    if why_not_shared(spec, group_size) is not None:
        return
    with torch.inference_mode(), LiveBytes() as live:
        made = decoder(spec, "bfloat16", quantization, OneOf(group_size))
    told = on_device(spec, "bfloat16", quantization, DeviceStep(1, 1), group_size)
    assert told.weight_bytes == live.live > 0
    del made


@pytest.mark.parametrize("rank", [0, 1, 2, 3])
def test_no_rank_has_more_than_the_first(rank: int) -> None:
    """Which alone keeps the biases of what is summed over the ranks."""
    spec = SPECS["biases"]
    with torch.inference_mode(), LiveBytes() as live:
        made = decoder(spec, "bfloat16", "none", OneOf(4, rank))
    told = weight_bytes(share_of(spec, 4), "bfloat16", "none")
    first_alone = 0 if rank == 0 else 2 * 2 * spec.hidden_size * spec.num_layers
    assert live.live == told - first_alone
    del made


@pytest.mark.parametrize("group_size", [1, 2, 4])
@pytest.mark.parametrize("kv_cache_dtype", ["float32", "bfloat16", "float16", "int8", "fp8"])
def test_pages_are_exact(kv_cache_dtype: str, group_size: int) -> None:
    """One block more than there is for requests: the dummy."""
    for spec in SPECS.values():
        share = share_of(spec, group_size)
        heads = share.num_kv_heads, share.head_dim
        pages = KVPages(share.num_layers, 7, 16, *heads, kv_cache_dtype, META)
        assert pages.num_bytes == 8 * 16 * share.kv_bytes_per_token(kv_cache_dtype)


@pytest.mark.parametrize(("num_rows", "max_model_len", "block_size"), [(64, 4096, 16), (3, 7, 1)])
def test_tables_are_exact(num_rows: int, max_model_len: int, block_size: int) -> None:
    tables = DeviceTables(num_rows, max_model_len, block_size, 5, META)
    settings = 64 * (num_rows + 1)  # of the sampler
    assert table_bytes(num_rows, max_model_len, block_size) == tables.num_bytes + settings


def batch_of(
    lengths: list[int], context: int, kv: KVPages, attention: PagedAttention
) -> DeviceBatch:
    def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=META)

    num_tokens, num_rows = sum(lengths), len(lengths)
    return DeviceBatch(
        input_ids=zeros(num_tokens),
        positions=zeros(num_tokens),
        slots=zeros(num_tokens, dtype=torch.int64),
        rows=zeros(num_rows),
        query_start=zeros(num_rows + 1),
        context_len=zeros(num_rows),
        block_table=TABLE[:, : context // 16],
        logit_rows=zeros(num_rows, dtype=torch.int64),
        lengths=lengths,
        max_context_len=context,
        kv=kv,
        attention=attention,
    )


def step_bytes(
    spec: ModelSpec, quantization: str, group_size: int, lengths: list[int], context: int = 4096
) -> int:
    """The peak of a step in bfloat16."""
    share, dtype = share_of(spec, group_size), "bfloat16"
    kv = KVPages(share.num_layers, 7, 16, share.num_kv_heads, share.head_dim, dtype, META)
    attention = choose("triton", share, dtype, 16, META)
    with torch.inference_mode():
        made = decoder(spec, dtype, quantization, OneOf(group_size))
        attention.plan(batch_of(lengths, context, kv, attention))  # which keeps some things
        with LiveBytes() as live:
            batch = batch_of(lengths, context, kv, attention)
            batch.meta = attention.plan(batch)
            hidden = made.forward(batch)
            del batch
    assert hidden.shape == (sum(lengths), spec.hidden_size)
    assert live.live == hidden.nbytes, "what a step made is gone behind it"
    return live.peak


@pytest.mark.parametrize("group_size", [1, 2])
@pytest.mark.parametrize("quantization", DEVICE_NAMES)
@pytest.mark.parametrize("name", SPECS)
def test_a_prompt_takes_no_more_and_hardly_less(
    name: str, quantization: str, group_size: int
) -> None:
    spec = SPECS[name]
    told = activation_bytes(share_of(spec, group_size), "bfloat16", quantization, 8192)
    taken = step_bytes(spec, quantization, group_size, [8192], context=8192)
    assert taken <= told <= taken * 1.03, f"{told / taken:.3f} of what it took"


@pytest.mark.parametrize("group_size", [1, 2])
@pytest.mark.parametrize("quantization", ["none", "int4-a16", "fp8"])
@pytest.mark.parametrize("name", KINDS)
def test_a_prompt_of_every_kind_takes_no_more(
    name: str, quantization: str, group_size: int
) -> None:
    spec = KINDS[name]
    if why_not_shared(spec, group_size) is not None:
        return
    told = activation_bytes(share_of(spec, group_size), "bfloat16", quantization, 4096)
    taken = step_bytes(spec, quantization, group_size, [4096], context=4096)
    assert taken <= told <= taken * 1.4, f"{told / taken:.3f} of what it took"


@pytest.mark.parametrize("lengths", [[1], [1] * 16, [1] * 256, [1500, *[1] * 100]])
@pytest.mark.parametrize("context", [4096, 131_072])
@pytest.mark.parametrize("quantization", ["none", "int4-a16", "fp8"])
@pytest.mark.parametrize("name", ["8B", "0.6B", "odd"])
def test_decode_takes_no_more_than_a_step_and_its_scratch(
    name: str, quantization: str, context: int, lengths: list[int]
) -> None:
    spec = SPECS[name]
    share = share_of(spec, 1)
    told = activation_bytes(share, "bfloat16", quantization, sum(lengths)) + scratch_bytes(share)
    assert step_bytes(spec, quantization, 1, lengths, context) <= told


def test_weights_alone_do_not_hide_the_step() -> None:
    told = on_device(LLAMA_8B, "bfloat16", "none", DeviceStep(2048, 64, 3), 1)
    assert told.workspace_bytes == activation_bytes(
        share_of(LLAMA_8B, 1), "bfloat16", "none", 2048
    ) + scratch_bytes(share_of(LLAMA_8B, 1))
    assert "3 CUDA graphs" in told.runtime
    eager = on_device(LLAMA_8B, "bfloat16", "none", DeviceStep(2048, 64), 1)
    assert eager.runtime_bytes < told.runtime_bytes
    assert weight_bytes(share_of(LLAMA_8B, 1), "bfloat16", "fp8") < told.weight_bytes


@pytest.mark.parametrize("num_rows", [1, 2, 3, 8, 63, 64, 65, 100, 256, 257, 511, 512])
def test_graphs_are_close_together(num_rows: int) -> None:
    sizes = graph_sizes(num_rows)
    assert sizes == sorted(set(sizes))
    assert (sizes[0], sizes[-1]) == (1, num_rows)
    previous: Any = 0
    for size in sizes:
        assert size - previous <= max(8, size // 4), "at most a quarter of a step is padding"
        previous = size


def test_the_largest_steps_are_not_captured() -> None:
    for num_rows in (513, 1000, 100_000):
        assert graph_sizes(num_rows) == graph_sizes(512)
