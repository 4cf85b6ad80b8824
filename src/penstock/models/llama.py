"""Llama (Touvron et al. 2023, Dubey et al. 2024): its composition and its weights' names."""

from __future__ import annotations

from penstock.layers.toolkit import Norm, Part, Rotary, Toolkit
from penstock.models.blocks import Decoder, DecoderBlock, GatedMLP, SelfAttention
from penstock.models.spec import ModelSpec


def build(spec: ModelSpec, toolkit: Toolkit) -> Decoder:
    """Build the model; its weights are still to be loaded."""
    hidden = spec.hidden_size
    embedding = toolkit.embedding("model.embed_tokens", spec.vocab_size, hidden)
    rotary = toolkit.rotary(
        spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.rope_theta, spec.rope_scaling
    )
    tied_to = embedding if spec.tied_embeddings else None
    return Decoder(
        spec,
        embedding=embedding,
        blocks=[_block(spec, index, rotary, toolkit) for index in range(spec.num_layers)],
        norm=toolkit.norm("model.norm", hidden, spec.norm_eps),
        head=toolkit.head("lm_head", spec.vocab_size, hidden, tied_to),
    )


def _block(spec: ModelSpec, index: int, rotary: Rotary, toolkit: Toolkit) -> DecoderBlock:
    prefix, hidden = f"model.layers.{index}", spec.hidden_size
    heads = spec.num_heads, spec.num_kv_heads, spec.head_dim
    q_size, kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim

    def part(name: str, num_rows: int, num_units: int = 0) -> Part:
        return Part(f"{prefix}.{name}", num_rows, num_units)

    def norm(name: str) -> Norm:
        return toolkit.norm(f"{prefix}.{name}", hidden, spec.norm_eps)

    qkv = [
        part("self_attn.q_proj", q_size, spec.num_heads),
        part("self_attn.k_proj", kv_size, spec.num_kv_heads),
        part("self_attn.v_proj", kv_size, spec.num_kv_heads),
    ]
    output = [part("self_attn.o_proj", hidden)]
    middle = spec.intermediate_size
    gate_up = [part("mlp.gate_proj", middle), part("mlp.up_proj", middle)]
    down = [part("mlp.down_proj", hidden)]
    return DecoderBlock(
        attention_norm=norm("input_layernorm"),
        attention=SelfAttention(
            qkv=toolkit.linear(hidden, qkv, bias=spec.attention_bias),
            rotary=rotary,
            attention=toolkit.attention(index, *heads, spec.head_dim**-0.5),
            output=toolkit.linear(q_size, output, bias=spec.attention_bias, reduces=True),
        ),
        mlp_norm=norm("post_attention_layernorm"),
        mlp=GatedMLP(
            toolkit.linear(hidden, gate_up, bias=spec.mlp_bias, gated=True),
            toolkit.linear(middle, down, bias=spec.mlp_bias, reduces=True),
        ),
    )
