"""The Llama architecture in plain torch: small enough to read, fast enough to train on two cores.

The projections of queries, keys and values, and the gate and up projections, are fused here because
one wide product is faster on a CPU than several narrow ones; `hf_state` splits them again into the
names and shapes of transformers' `LlamaForCausalLM`, and `load_hf` fuses them back.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

Cache = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class ModelConfig:
    """Shapes of one model. `heads` must be a multiple of `kv_heads`."""

    vocab: int = 2048
    dim: int = 256
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    ffn: int = 640
    max_len: int = 1024
    rope_theta: float = 10000.0
    eps: float = 1e-5

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class RMSNorm(nn.Module):
    """x / rms(x) * weight, with the statistics in fp32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)
        return h.to(x.dtype) * self.weight


def rope_tables(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """cos and sin of shape [max_len, head_dim], halves repeated as in transformers."""
    steps = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    angles = torch.outer(torch.arange(config.max_len).float(), config.rope_theta**-steps)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding on [batch, heads, time, head_dim]."""
    first, second = x.chunk(2, dim=-1)
    turned: Tensor = x * cos + torch.cat((-second, first), dim=-1) * sin
    return turned


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of the last positions, written out: faster on a CPU than the fused op."""
    group, new, old = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    hidden = torch.full((new, old), -30000.0, dtype=q.dtype).triu(old - new + 1)
    weights: Tensor = (scores + hidden).softmax(-1)
    return torch.matmul(weights, v)


class Layer(nn.Module):
    """One pre-norm decoder layer: grouped-query attention, then SwiGLU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        kv = config.kv_heads * config.head_dim
        self.norm1 = RMSNorm(config.dim, config.eps)
        self.qkv = nn.Linear(config.dim, config.dim + 2 * kv, bias=False)
        self.out = nn.Linear(config.dim, config.dim, bias=False)
        self.norm2 = RMSNorm(config.dim, config.eps)
        self.gate_up = nn.Linear(config.dim, 2 * config.ffn, bias=False)
        self.down = nn.Linear(config.ffn, config.dim, bias=False)

    def attend(
        self, x: Tensor, cos: Tensor, sin: Tensor, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        c = self.config
        batch, time, _ = x.shape
        kv = c.kv_heads * c.head_dim
        q, k, v = self.qkv(x).split((c.dim, kv, kv), dim=-1)
        q = rotate(q.view(batch, time, c.heads, c.head_dim).transpose(1, 2), cos, sin)
        k = rotate(k.view(batch, time, c.kv_heads, c.head_dim).transpose(1, 2), cos, sin)
        v = v.view(batch, time, c.kv_heads, c.head_dim).transpose(1, 2)
        if past is not None:
            k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
        y = attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(batch, time, c.dim)), (k, v)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        past: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        y, present = self.attend(self.norm1(x), cos, sin, past)
        x = x + y
        gate, up = self.gate_up(self.norm2(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up), present


class Llama(nn.Module):
    """Decoder with tied embeddings."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab, config.dim)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.dim, config.eps)
        cos, sin = rope_tables(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.apply(self._init)

    def _init(self, module: nn.Module) -> None:
        if isinstance(module, nn.Embedding | nn.Linear):
            nn.init.normal_(module.weight, std=0.02 if isinstance(module, nn.Embedding) else 0.04)

    def hidden(self, ids: Tensor) -> Tensor:
        """Final hidden states of whole sequences (training)."""
        x = self.embed(ids)
        cos, sin = self.cos[: ids.shape[1]].to(x.dtype), self.sin[: ids.shape[1]].to(x.dtype)
        for layer in self.layers:
            x, _ = layer(x, cos, sin)
        return self.final(x)

    def extend(self, ids: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        """Final hidden states of the next tokens after those in the cache, and the longer cache."""
        start = cache[0][0].shape[2] if cache else 0
        x = self.embed(ids)
        cos = self.cos[start : start + ids.shape[1]].to(x.dtype)
        sin = self.sin[start : start + ids.shape[1]].to(x.dtype)
        longer: Cache = []
        for index, layer in enumerate(self.layers):
            x, present = layer(x, cos, sin, cache[index] if cache else None)
            longer.append(present)
        return self.final(x), longer

    def final(self, x: Tensor) -> Tensor:
        """The norm before the output."""
        normed: Tensor = self.norm(x)
        return normed

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.embed.weight)


_MLP = {"mlp.down_proj": "down", "self_attn.o_proj": "out"}
_NORMS = {"input_layernorm": "norm1", "post_attention_layernorm": "norm2"}


def hf_state(model: Llama) -> dict[str, Tensor]:
    """The weights in bf16 under the names of transformers' LlamaForCausalLM."""
    c = model.config
    kv = c.kv_heads * c.head_dim
    own = {name: tensor.detach().bfloat16() for name, tensor in model.state_dict().items()}
    out = {
        "model.embed_tokens.weight": own["embed.weight"],
        "model.norm.weight": own["norm.weight"],
    }
    for i in range(c.layers):
        new, old = f"model.layers.{i}.", f"layers.{i}."
        q, k, v = own[old + "qkv.weight"].split((c.dim, kv, kv))
        gate, up = own[old + "gate_up.weight"].chunk(2)
        for name, tensor in (("q", q), ("k", k), ("v", v)):
            out[f"{new}self_attn.{name}_proj.weight"] = tensor
        out[f"{new}mlp.gate_proj.weight"], out[f"{new}mlp.up_proj.weight"] = gate, up
        for theirs, ours in (_MLP | _NORMS).items():
            out[f"{new}{theirs}.weight"] = own[f"{old}{ours}.weight"]
    return {name: tensor.contiguous().clone() for name, tensor in out.items()}


def hf_config(c: ModelConfig, token_ids: dict[str, int]) -> dict[str, Any]:
    """config.json; `token_ids` holds bos, eos and pad."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": c.vocab,
        "hidden_size": c.dim,
        "intermediate_size": c.ffn,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": c.max_len,
        "rope_theta": c.rope_theta,
        "rope_scaling": None,
        "rms_norm_eps": c.eps,
        "initializer_range": 0.02,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "use_cache": True,
        "torch_dtype": "bfloat16",
        "bos_token_id": token_ids["bos"],
        "eos_token_id": token_ids["eos"],
        "pad_token_id": token_ids["pad"],
    }


def load_hf(folder: Path, dtype: torch.dtype = torch.float32) -> Llama:
    """The model of an exported directory."""
    raw = json.loads((folder / "config.json").read_text())
    config = ModelConfig(
        vocab=raw["vocab_size"],
        dim=raw["hidden_size"],
        layers=raw["num_hidden_layers"],
        heads=raw["num_attention_heads"],
        kv_heads=raw["num_key_value_heads"],
        ffn=raw["intermediate_size"],
        max_len=raw["max_position_embeddings"],
        rope_theta=raw["rope_theta"],
        eps=raw["rms_norm_eps"],
    )
    saved = load_file(folder / "model.safetensors")
    own = {
        "embed.weight": saved["model.embed_tokens.weight"],
        "norm.weight": saved["model.norm.weight"],
    }
    for i in range(config.layers):
        theirs, ours = f"model.layers.{i}.", f"layers.{i}."
        parts = [saved[f"{theirs}self_attn.{name}_proj.weight"] for name in "qkv"]
        own[f"{ours}qkv.weight"] = torch.cat(parts)
        halves = [saved[f"{theirs}mlp.{name}_proj.weight"] for name in ("gate", "up")]
        own[f"{ours}gate_up.weight"] = torch.cat(halves)
        for name, new in (_MLP | _NORMS).items():
            own[f"{ours}{new}.weight"] = saved[f"{theirs}{name}.weight"]
    model = Llama(config).to(dtype)
    model.load_state_dict(own)
    return model.requires_grad_(False)
