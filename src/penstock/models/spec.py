"""What a model is, read strictly from its config: shapes, constants and what they cost.

Owns the reading of `config.json`. Knows no weights and no files, and imports no torch: what a model
needs is known before anything is loaded.

Invariant: a value that would change the result and is not implemented is refused by name here,
never ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from penstock.errors import UnsupportedModel
from penstock.layers.scaling import LinearScaling, Llama3Scaling, RopeScaling

_T = TypeVar("_T")
_REQUIRED: Any = object()

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}  # by dtype

MAX_SIZE = 2**40  # far beyond any model; what arithmetic and tensors can take
MAX_LAYERS = 4096

# Keys that change what a Llama computes. They may be absent, null or false, and nothing else.
_REFUSED = (
    "attention_sinks",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "layer_types",
    "logit_scale",
    "num_experts",
    "num_local_experts",
    "partial_rotary_factor",
    "quantization_config",
    "rope_interleaved",
    "sliding_window",
    "use_qk_norm",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Shapes and constants of a decoder-only transformer."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_context_len: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    attention_bias: bool
    mlp_bias: bool
    tied_embeddings: bool
    dtype: str  # what the checkpoint says its weights are: a key of ITEM_BYTES

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> ModelSpec:
        """Read a Hugging Face config.

        Raises:
            UnsupportedModel: a key is missing, has the wrong type or a value that is not
                implemented; the message names the key.
        """
        read = _Reader(config)
        read.refuse(_REFUSED)
        read.expect("hidden_act", "silu")
        hidden_size = read.size("hidden_size")
        num_heads = read.size("num_attention_heads")
        theta, scaling = _rope(read)
        spec = cls(
            architecture=_architecture(config),
            vocab_size=read.size("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=read.size("intermediate_size"),
            num_layers=read.size("num_hidden_layers", high=MAX_LAYERS),
            num_heads=num_heads,
            num_kv_heads=read.size("num_key_value_heads", num_heads),
            head_dim=read.size("head_dim", hidden_size // num_heads),
            max_context_len=read.size("max_position_embeddings", 2048),
            norm_eps=read.factor("rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            attention_bias=read.value(bool, "attention_bias", False),
            mlp_bias=read.value(bool, "mlp_bias", False),
            tied_embeddings=read.value(bool, "tie_word_embeddings", False),
            dtype=_dtype(read),
        )
        if spec.num_heads % spec.num_kv_heads:
            raise read.error("num_key_value_heads", f"a divisor of `{spec.num_heads}`")
        if spec.head_dim % 2:
            raise read.error("head_dim", "even, because RoPE rotates its halves")
        return spec

    @property
    def block_matrices(self) -> tuple[tuple[int, int], ...]:
        """Rows and columns of the matrices of a block; the fused one of attention is one."""
        hidden, q_size = self.hidden_size, self.num_heads * self.head_dim
        return (
            (q_size + 2 * self.num_kv_heads * self.head_dim, hidden),
            (hidden, q_size),
            (self.intermediate_size, hidden),  # gate
            (self.intermediate_size, hidden),  # up
            (hidden, self.intermediate_size),
        )

    @property
    def num_vector_parameters(self) -> int:
        """Numbers in the scales of norms and in biases."""
        qkv, output, gate, up, down = (rows for rows, _ in self.block_matrices)
        block = 2 * self.hidden_size
        if self.attention_bias:
            block += qkv + output
        if self.mlp_bias:
            block += gate + up + down
        return self.num_layers * block + self.hidden_size

    @property
    def num_parameters(self) -> int:
        """Numbers in the weights; tied tables count once."""
        block = sum(rows * columns for rows, columns in self.block_matrices)
        tables = self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        return tables + self.num_layers * block + self.num_vector_parameters

    def kv_bytes_per_token(self, dtype: str) -> int:
        """Bytes of one token in the KV store; int8 and fp8 have a float32 scale for each vector."""
        is_scaled = dtype in {"int8", "fp8"}
        vector_bytes = self.head_dim + 4 if is_scaled else self.head_dim * ITEM_BYTES[dtype]
        return self.num_layers * 2 * self.num_kv_heads * vector_bytes


class _Reader:
    """Typed access to a config; every failure names its key."""

    def __init__(self, config: Mapping[str, Any], prefix: str = "") -> None:
        self._config = config
        self._prefix = prefix

    def error(self, key: str, wanted: str) -> UnsupportedModel:
        """What to raise when a key has a value that cannot be used."""
        if key not in self._config:
            return UnsupportedModel(f"`{self._prefix}{key}` is missing in the model's config.")
        value = repr(self._config[key])
        value = value if len(value) <= 80 else value[:80] + "..."
        return UnsupportedModel(
            f"`{self._prefix}{key}` is `{value}` in the model's config; it must be {wanted}."
        )

    def value(self, kind: type[_T], key: str, default: _T = _REQUIRED) -> _T:
        """The value of a key; absent and null are the default. An int will do for a float."""
        value = self._config.get(key)
        if value is None:
            if default is _REQUIRED:
                raise self.error(key, f"of type {kind.__name__}")
            return default
        if kind is float and type(value) is int and abs(value) <= MAX_SIZE:
            value = float(value)
        if type(value) is not kind:
            raise self.error(key, f"of type {kind.__name__}")
        return value

    def size(self, key: str, default: int = _REQUIRED, *, high: int = MAX_SIZE) -> int:
        """A positive integer."""
        value = self.value(int, key, default)
        if not 1 <= value <= high:
            raise self.error(key, f"a positive integer of at most `{high}`")
        return value

    def factor(self, key: str, default: float = _REQUIRED) -> float:
        """A positive number."""
        value = self.value(float, key, default)
        if not 0.0 < value < float("inf"):
            raise self.error(key, "a positive number")
        return value

    def expect(self, key: str, wanted: str) -> None:
        """Refuse any other value than this one; absent is this one."""
        if self._config.get(key, wanted) != wanted:
            raise self.error(key, f"`{wanted}`")

    def refuse(self, keys: tuple[str, ...]) -> None:
        """Refuse keys whose meaning is not implemented."""
        for key in keys:
            if self._config.get(key) not in (None, False):
                raise self.error(key, "absent, because it is not implemented")

    def section(self, key: str) -> _Reader | None:
        """A nested object, or None if it is absent."""
        value = self._config.get(key)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self.error(key, "an object")
        return _Reader(value, f"{self._prefix}{key}.")


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    if not isinstance(names, list) or len(names) != 1:
        raise UnsupportedModel(
            f"`architectures` is `{names!r}` in the model's config; it must be a list of one name."
        )
    return str(names[0])


def _dtype(read: _Reader) -> str:
    """`dtype` since transformers 5, `torch_dtype` before."""
    key = "dtype" if read.value(str, "dtype", "") else "torch_dtype"
    name = read.value(str, key, "float32")
    if name not in ITEM_BYTES:
        raise read.error(key, f"one of {', '.join(ITEM_BYTES)}")
    return name


def _rope(read: _Reader) -> tuple[float, RopeScaling | None]:
    """Base and scaling: `rope_parameters` since transformers 5, `rope_scaling` before."""
    theta = read.factor("rope_theta", 10000.0)
    section = read.section("rope_parameters") or read.section("rope_scaling")
    if section is None:
        return theta, None
    theta = section.factor("rope_theta", theta)
    section.refuse(("partial_rotary_factor",))
    kind_key = "rope_type" if section.value(str, "rope_type", "") else "type"
    kind = section.value(str, kind_key, "default")
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, LinearScaling(section.factor("factor"))
    if kind == "llama3":
        scaling = Llama3Scaling(
            factor=section.factor("factor"),
            low_freq_factor=section.factor("low_freq_factor"),
            high_freq_factor=section.factor("high_freq_factor"),
            original_context_len=section.size("original_max_position_embeddings"),
        )
        if scaling.low_freq_factor >= scaling.high_freq_factor:
            raise section.error("low_freq_factor", f"below `{scaling.high_freq_factor}`")
        return theta, scaling
    raise section.error(kind_key, "`default`, `linear` or `llama3`")
