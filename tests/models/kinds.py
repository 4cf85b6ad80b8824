"""Small specs that together ask for everything a leaf can do, and random weights for them.

No architecture stands behind a kind: the same composition is computed by two toolkits.
"""

from __future__ import annotations

import zlib
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from penstock.layers.specs import (
    AttentionSpec,
    ExpertsSpec,
    LatentSpec,
    MLPSpec,
    NormSpec,
    RopeSpec,
)
from penstock.layers.toolkit import Stored, StoredTensor
from penstock.models.blocks import Decoder
from penstock.models.loader import arranged
from penstock.models.spec import LayerSpec, ModelSpec, Names
from penstock.quantization.codes import CodedTensor, CodeForm, CodeRows

HIDDEN, VOCAB, HEADS, KV_HEADS, HEAD_DIM, SIZE = 48, 67, 4, 2, 16, 40
RMS = NormSpec(eps=1e-5)
LAYER = NormSpec(eps=1e-5, kind="layer", has_bias=True)
ROPE = RopeSpec(dim=HEAD_DIM, theta=1000.0)
MLP = MLPSpec(size=SIZE, activation="silu")
PLAIN_MLP = MLPSpec(size=SIZE, activation="gelu_tanh", is_gated=False, has_bias=True)


def attention(**changes: Any) -> AttentionSpec:
    """Grouped-query attention with these differences."""
    spec = AttentionSpec(
        num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, scale=0.3, rope=ROPE
    )
    return replace(spec, **changes)


def latent(**changes: Any) -> LatentSpec:
    """Latent attention with these differences."""
    spec = LatentSpec(
        num_heads=HEADS,
        query_rank=24,
        rank=20,
        nope_dim=10,
        value_dim=14,
        scale=0.3,
        rope=RopeSpec(dim=8, theta=1000.0, is_interleaved=True),
        norm=RMS,
    )
    return replace(spec, **changes)


def experts(**changes: Any) -> ExpertsSpec:
    """A mixture of experts with these differences."""
    return replace(ExpertsSpec(num_experts=8, top_k=3, size=20, activation="silu"), **changes)


def model(*layers: LayerSpec, **changes: Any) -> ModelSpec:
    """A model of these layers."""
    spec = ModelSpec(
        architecture="Kind",
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        layers=layers,
        norm=RMS,
        max_context_len=512,
        tied_embeddings=False,
        dtype="float32",
    )
    return replace(spec, **changes)


def _both(first: Any, mlp: Any, **changes: Any) -> ModelSpec:
    layer = LayerSpec(attention=first, mlp=mlp)
    return model(layer, layer, **changes)


_BEHIND = Names(after_attention="after_attention", after_mlp="after_mlp")
_ALIBI_FREE = attention(rope=None, num_kv_heads=HEADS, has_bias=True, has_output_bias=True)

KINDS = {
    "llama": _both(attention(), MLP, tied_embeddings=True),
    "qwen3": _both(
        attention(qk_norm=RMS, rope=RopeSpec(dim=8, theta=100.0, is_interleaved=True)), MLP
    ),
    "gemma2": model(
        LayerSpec(attention=attention(window=5, softcap=2.0), mlp=replace(MLP, activation="gelu")),
        LayerSpec(attention=attention(softcap=2.0), mlp=replace(MLP, activation="gelu_tanh")),
        norm=replace(RMS, offset=1.0),
        names=_BEHIND,
        arrangement="sandwich",
        embedding_scale=6.9,
        logit_softcap=3.0,
    ),
    "olmo2": _both(
        attention(qk_norm=RMS, qk_norm_over="all"), MLP, names=_BEHIND, arrangement="post"
    ),
    "neox": _both(
        attention(
            num_kv_heads=HEADS,
            rope=RopeSpec(dim=4, theta=100.0),
            has_bias=True,
            has_output_bias=True,
        ),
        PLAIN_MLP,
        norm=LAYER,
        names=Names(qkv="qkv", qkv_rows="heads"),
        arrangement="parallel",
    ),
    "falcon": _both(
        attention(),
        replace(PLAIN_MLP, activation="gelu", has_bias=False),
        norm=LAYER,
        names=Names(qkv="qkv", qkv_rows="groups", mlp_norm=""),
        arrangement="parallel",
    ),
    "cohere": _both(
        attention(
            qk_norm=NormSpec(eps=1e-5, kind="layer"),
            qk_norm_over="heads",
            rope=replace(ROPE, is_interleaved=True),
        ),
        MLP,
        norm=NormSpec(eps=1e-5, kind="layer"),
        names=Names(mlp_norm=""),
        arrangement="parallel",
        logit_scale=0.3,
    ),
    "gpt2": _both(
        _ALIBI_FREE,
        PLAIN_MLP,
        norm=LAYER,
        names=Names(qkv="qkv", positions="wpe", is_transposed=True),
        num_positions=30,  # fewer than tokens: the last one serves for what comes later
        first_position=2,
        has_head_bias=True,
    ),
    "granite": _both(attention(), replace(MLP, has_bias=True), residual_scale=0.4),
    "relu": _both(attention(), replace(PLAIN_MLP, activation="relu")),
    "relu_squared": _both(attention(), replace(PLAIN_MLP, activation="relu_squared")),
    "olmo": _both(attention(), MLP, norm=NormSpec(eps=1e-5, kind="layer", has_scale=False)),
    "bert": _both(
        replace(_ALIBI_FREE, is_causal=False),
        replace(PLAIN_MLP, activation="gelu"),
        norm=LAYER,
        names=Names(positions="wpe", token_types="types", embedding_norm="norm"),
        arrangement="encoder",
        has_final_norm=False,
        num_positions=64,
        num_token_types=2,
    ),
    "mixtral": _both(attention(), experts(is_normalised=True)),
    "qwen2_moe": _both(attention(), experts(shared_size=24, has_shared_gate=True, scale=1.5)),
    "gpt_oss": model(
        LayerSpec(
            attention=attention(has_sinks=True, window=7, has_bias=True),
            mlp=experts(
                activation="swiglu_oai",
                scoring="softmax_chosen",
                has_bias=True,
                has_router_bias=True,
            ),
        ),
        LayerSpec(attention=attention(has_sinks=True), mlp=MLP),
    ),
    "deepseek_v2": _both(latent(query_rank=0), MLP),
    "deepseek_v3": _both(
        latent(has_bias=True),
        experts(
            scoring="sigmoid",
            has_correction=True,
            is_normalised=True,
            scale=2.5,
            num_groups=4,
            top_groups=2,
            group_top=2,
            shared_size=20,
        ),
    ),
}


def numbers(name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Random weights, the same for the same name: scales around 1, biases small."""
    drawn = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, np.float32)
    if len(shape) > 1:
        return drawn * np.float32(1.2 / np.sqrt(HIDDEN))
    return drawn * np.float32(0.2) + np.float32(name.endswith("norm.weight"))


class Coded(NamedTuple):
    """A `StoredPrecision` in which maps and the tables of tokens have codes of one form."""

    code: CodeForm
    is_transposed: bool = False  # codes are never stored that way
    activation_bits: int = 16
    name: str = "coded"

    def form(self, name: str, shape: tuple[int, int]) -> CodeForm | None:
        """Of one weight; None: it is plain."""
        is_plain = name.startswith(("wpe", "types")) or name.endswith("mlp.gate.weight")
        return None if is_plain or self.is_transposed else self.code

    def join(self, tensors: Any) -> Any:
        """They are whole already."""
        return tensors

    def tensor(self, name: str, shape: tuple[int, int]) -> CodedTensor:
        """Random codes, the same for the same name."""
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        form, (num_rows, num_columns) = self.code, shape
        codes = rng.integers(0, 2**form.bits, shape).astype(np.uint8)
        groups = num_rows, -(-num_columns // form.group_size)
        spread = np.float32(0.17) / form.numbers.std()

        def some(size: tuple[int, int]) -> Any:
            """Scales, or integers if units multiply them."""
            if form.scales == "int8":
                return rng.integers(1, 64, size).astype(np.float32)
            return rng.uniform(0.5, 1.5, size).astype(np.float16).astype(np.float32) * spread

        spread = np.exp2(np.round(np.log2(spread))).astype(np.float32)  # exact in float16
        rows = CodeRows(codes, some(groups))
        if form.scales == "int8":
            units = rng.uniform(0.5, 1.5, (num_rows, -(-num_columns // 256))).astype(np.float32)
            rows = rows._replace(units=units * spread / 32)
            if form.has_minima:
                middle = -spread / 32 * form.numbers.mean()
                rows = rows._replace(minima=rows.scales, minimum_units=units * middle)

        def read(first: int, last: int) -> CodeRows:
            parts: Any = (None if part is None else part[first:last] for part in rows)
            return CodeRows(*parts)

        return CodedTensor(name, form, shape, codes.nbytes, read)


def fill(decoder: Decoder, precision: Coded | None = None) -> None:
    """Load the leaves of a model, each from its own names, and finish them."""
    layers = list(decoder.layers())
    for layer in layers:
        for weight in layer.weights():
            if weight.duplicate_of is None:
                stored = _stored(weight.name, weight.stored_shape, precision)
                weight.load(arranged(stored, weight.rows))
    for layer in layers:
        layer.finish()


def _stored(name: str, shape: tuple[int, ...], precision: Coded | None) -> Stored:
    if precision is not None and len(shape) == 2 and precision.form(name, (shape[0], shape[1])):
        return precision.tensor(name, (shape[0], shape[1]))
    values = numbers(name, shape)
    return StoredTensor(name, "F32", shape, values.reshape(-1).view(np.uint8))
