"""Llama (Touvron et al. 2023, Dubey et al. 2024): its composition and its weights' names."""

from __future__ import annotations

from penstock.layers.toolkit import Linear, Norm, Part, Rotary, Toolkit
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

    def linear(in_size: int, parts: dict[str, int], bias: bool, gated: bool = False) -> Linear:
        named = [Part(f"{prefix}.{name}", num_rows) for name, num_rows in parts.items()]
        return toolkit.linear(in_size, named, bias=bias, gated=gated)

    def norm(name: str) -> Norm:
        return toolkit.norm(f"{prefix}.{name}", hidden, spec.norm_eps)

    qkv = {"self_attn.q_proj": q_size, "self_attn.k_proj": kv_size, "self_attn.v_proj": kv_size}
    gate_up = {"mlp.gate_proj": spec.intermediate_size, "mlp.up_proj": spec.intermediate_size}
    return DecoderBlock(
        attention_norm=norm("input_layernorm"),
        attention=SelfAttention(
            qkv=linear(hidden, qkv, spec.attention_bias),
            rotary=rotary,
            attention=toolkit.attention(index, *heads, spec.head_dim**-0.5),
            output=linear(q_size, {"self_attn.o_proj": hidden}, spec.attention_bias),
        ),
        mlp_norm=norm("post_attention_layernorm"),
        mlp=GatedMLP(
            linear(hidden, gate_up, spec.mlp_bias, gated=True),
            linear(spec.intermediate_size, {"mlp.down_proj": hidden}, spec.mlp_bias),
        ),
    )
