"""Llama (Touvron et al. 2023, Dubey et al. 2024): its composition and its weights' names."""

from __future__ import annotations

from penstock.layers.embedding import Embedding, LMHead
from penstock.layers.linear import Linear, Part
from penstock.layers.norm import RMSNorm
from penstock.layers.rotary import Rotary
from penstock.layers.weights import Materials
from penstock.models.blocks import Attention, Decoder, DecoderBlock, GatedMLP
from penstock.models.spec import ModelSpec


def build(spec: ModelSpec, materials: Materials) -> Decoder:
    """Build the model; its weights are still to be filled."""
    hidden = spec.hidden_size
    embedding = Embedding("model.embed_tokens", spec.vocab_size, hidden, materials)
    rotary = Rotary(
        spec.head_dim,
        spec.rope_theta,
        spec.rope_scaling,
        dtype=materials.dtype,
        device=materials.device,
    )
    return Decoder(
        spec,
        embedding=embedding,
        rotary=rotary,
        blocks=[_block(spec, index, rotary, materials) for index in range(spec.num_layers)],
        norm=RMSNorm("model.norm", hidden, spec.norm_eps, materials),
        head=LMHead(
            "lm_head",
            spec.vocab_size,
            hidden,
            materials,
            tied_to=embedding if spec.tied_embeddings else None,
        ),
    )


def _block(spec: ModelSpec, index: int, rotary: Rotary, materials: Materials) -> DecoderBlock:
    prefix, hidden = f"model.layers.{index}", spec.hidden_size
    q_size, kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim

    def linear(in_size: int, parts: dict[str, int], bias: bool) -> Linear:
        named = [Part(f"{prefix}.{name}", num_rows) for name, num_rows in parts.items()]
        return Linear(in_size, named, bias=bias, materials=materials)

    def norm(name: str) -> RMSNorm:
        return RMSNorm(f"{prefix}.{name}", hidden, spec.norm_eps, materials)

    qkv = {"self_attn.q_proj": q_size, "self_attn.k_proj": kv_size, "self_attn.v_proj": kv_size}
    gate_up = {"mlp.gate_proj": spec.intermediate_size, "mlp.up_proj": spec.intermediate_size}
    return DecoderBlock(
        attention_norm=norm("input_layernorm"),
        attention=Attention(
            spec,
            index,
            qkv=linear(hidden, qkv, spec.attention_bias),
            output=linear(q_size, {"self_attn.o_proj": hidden}, spec.attention_bias),
            rotary=rotary,
        ),
        mlp_norm=norm("post_attention_layernorm"),
        mlp=GatedMLP(
            linear(hidden, gate_up, spec.mlp_bias),
            linear(spec.intermediate_size, {"mlp.down_proj": hidden}, spec.mlp_bias),
        ),
    )
