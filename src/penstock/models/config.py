"""Typed access to a model's config: every failure names its key.

Owns `ConfigReader` and the readings that architectures share. Knows no architecture.
Invariant: a value that would change the result and is not implemented is refused by name, never
ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from penstock.errors import UnsupportedModel
from penstock.layers.specs import Activation, RopeSpec
from penstock.models.rope import FULL, SLIDING, RopeDefaults, read_rope
from penstock.models.spec import ITEM_BYTES

_T = TypeVar("_T")
_REQUIRED: Any = object()

MAX_SIZE = 2**40  # far beyond any model; what arithmetic and tensors can take
MAX_WIDTH = 2**22  # what one row index and the names of one layer may cost: tens of MB
MAX_HEADS = 1024
MAX_HEAD_DIM = 4096
MAX_EXPERTS = 4096
MAX_LAYERS = 4096
MAX_TOP_K = 64  # experts of a token: what the kernels have room for
MAX_LABELS = 65536
_TOLD = 80  # characters of a value that an error shows

# Activations as transformers calls them.
_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu_squared",
}


class ConfigReader:
    """A config or a section of one."""

    def __init__(self, config: Mapping[str, Any], prefix: str = "") -> None:
        self._config = config
        self._prefix = prefix

    def error(self, key: str, wanted: str) -> UnsupportedModel:
        """What to raise when a key has a value that cannot be used."""
        if key not in self._config:
            return UnsupportedModel(f"`{self._prefix}{key}` is missing in the model's config.")
        value = self._config[key]
        value = repr(value[:_TOLD] if isinstance(value, (str, list)) else value)
        value = value if len(value) <= _TOLD else value[:_TOLD] + "..."
        return UnsupportedModel(
            f"`{self._prefix}{key}` is `{value}` in the model's config; it must be {wanted}."
        )

    def __bool__(self) -> bool:
        """Whether there is anything in it."""
        return bool(self._config)

    def has(self, key: str) -> bool:
        """Whether the key is there and not null."""
        return self._config.get(key) is not None

    def is_a(self, kind: type, key: str) -> bool:
        """Whether the value of a key is of that type."""
        return type(self._config.get(key)) is kind

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

    def size(self, key: str, default: int = _REQUIRED, *, high: int | None = None) -> int:
        """A positive integer, of at most `high`, or of what such a key can mean."""
        value = self.value(int, key, default)
        high = _highest(key) if high is None else high
        if not 1 <= value <= high:
            raise self.error(key, f"a positive integer of at most `{high}`")
        return value

    def count(self, key: str, default: int = _REQUIRED, *, high: int = MAX_SIZE) -> int:
        """An integer that is not negative."""
        value = self.value(int, key, default)
        if not 0 <= value <= high:
            raise self.error(key, f"an integer from 0 to `{high}`")
        return value

    def flag(self, key: str, default: bool = False) -> bool:
        """True or false."""
        return self.value(bool, key, default)

    def optional(self, key: str, default: int | None) -> int | None:
        """A positive integer; absent is the default, and null is None."""
        if key not in self._config:
            return default
        return self.size(key) if self.has(key) else None

    def optional_factor(self, key: str, default: float) -> float:
        """A positive number; absent is the default, and null is 0."""
        if key not in self._config:
            return default
        return self.factor(key) if self.has(key) else 0.0

    def top_k(self, num_experts: int, default: int | None = None) -> int:
        """Experts that a token takes."""
        key = "num_experts_per_tok"
        most = min(num_experts, MAX_TOP_K)
        return self.size(key, _REQUIRED if default is None else default, high=most)

    def number(self, key: str, default: float = _REQUIRED) -> float:
        """A finite number."""
        value = self.value(float, key, default)
        if not -MAX_SIZE <= value <= MAX_SIZE:
            raise self.error(key, "a number")
        return value

    def factor(self, key: str, default: float = _REQUIRED) -> float:
        """A positive number."""
        value = self.value(float, key, default)
        if not 0.0 < value <= MAX_SIZE:
            raise self.error(key, "a positive number")
        return value

    def factors(self, key: str, length: int) -> tuple[float, ...]:
        """A list of that many positive numbers."""
        values = self.value(list, key)
        good = all(type(value) in (int, float) and 0 < value <= MAX_SIZE for value in values)
        if len(values) != length or not good:
            raise self.error(key, f"a list of `{length}` positive numbers")
        return tuple(float(value) for value in values)

    def kinds(self, key: str, length: int, allowed: set[str]) -> tuple[str, ...] | None:
        """A list of that many names, such as `layer_types`; None if it is absent."""
        values = self._config.get(key)
        if values is None:
            return None
        is_list = isinstance(values, list) and len(values) == length
        if not is_list or not all(isinstance(value, str) and value in allowed for value in values):
            raise self.error(key, f"a list of `{length}` names out of {sorted(allowed)}")
        return tuple(values)

    def expect(self, key: str, *wanted: Any) -> None:
        """Refuse any other value than these; absent and null are the first of them."""
        value = self._config.get(key)
        if value is not None and value not in wanted:
            raise self.error(key, " or ".join(f"`{value}`" for value in wanted))

    def refuse(self, *keys: str) -> None:
        """Refuse keys whose meaning is not implemented; absent, null and false are fine."""
        for key in keys:
            if self._config.get(key) not in (None, False):
                raise self.error(key, "absent, because it is not implemented")

    def section(self, key: str) -> ConfigReader | None:
        """A nested object, or None if it is absent."""
        value = self._config.get(key)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self.error(key, "an object")
        return ConfigReader(value, f"{self._prefix}{key}.")

    def part(self, key: str) -> ConfigReader:
        """The nested config of one part of a model, with what the whole says of all parts."""
        section = self.section(key)
        if section is None:
            raise self.error(key, "an object")
        shared = {
            key: self._config[key]
            for key in ("architectures", "dtype", "torch_dtype", "tie_word_embeddings")
            if key in self._config
        }
        return ConfigReader({**section._config, **shared}, section._prefix)

    def filled(self, **values: Any) -> ConfigReader:
        """This config with values for keys that it has not."""
        return ConfigReader({**values, **self._config}, self._prefix)

    def renamed(self, architecture: str) -> ConfigReader:
        """This config as that of another architecture."""
        return ConfigReader({**self._config, "architectures": [architecture]}, self._prefix)

    # What architectures share.

    @property
    def num_labels(self) -> int:
        """Of a classifier, as transformers counts them: the entries of `id2label`, 2 without it."""
        labels = self._config.get("id2label")
        if labels is None:
            return self.size("num_labels", 2, high=MAX_LABELS)
        if not isinstance(labels, Mapping) or not 1 <= len(labels) <= MAX_LABELS:
            raise self.error("id2label", f"an object of `1` to `{MAX_LABELS}` entries")
        return len(labels)

    @property
    def architecture(self) -> str:
        """The one name in `architectures`."""
        names = self._config.get("architectures")
        if not isinstance(names, list) or len(names) != 1:
            raise UnsupportedModel(
                f"`architectures` is `{names!r:.{_TOLD}}` in the model's config; it must be a list "
                "of one name."
            )
        return str(names[0])

    @property
    def dtype(self) -> str:
        """`dtype` since transformers 5, `torch_dtype` before."""
        key = "dtype" if self.value(str, "dtype", "") else "torch_dtype"
        name = self.value(str, key, "float32")
        if name not in ITEM_BYTES:
            raise self.error(key, f"one of {', '.join(ITEM_BYTES)}")
        return name

    def activation(self, key: str, default: str) -> Activation:
        """An activation by the name that transformers has for it."""
        name = self.value(str, key, default)
        if name not in _ACTIVATIONS:
            raise self.error(key, f"one of {', '.join(sorted(_ACTIVATIONS))}")
        return _ACTIVATIONS[name]

    def heads(
        self,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
    ) -> tuple[int, int, int]:
        """Query heads, KV heads and numbers of a head, under the names that most configs use.

        The arguments are what absent keys mean. Null, and absent without them, mean as many KV
        heads as query heads and an equal share of the hidden size.
        """
        num_heads = self.size("num_attention_heads")
        share = max(self.size("hidden_size") // num_heads, 1)
        num_kv_heads = self.optional("num_key_value_heads", num_kv_heads) or num_heads
        head_dim = self.optional("head_dim", head_dim) or share
        if num_heads % num_kv_heads:
            raise self.error("num_key_value_heads", f"a divisor of `{num_heads}`")
        return num_heads, num_kv_heads, head_dim

    def equal_heads(self, hidden_key: str, heads_key: str) -> tuple[int, int]:
        """Heads, and numbers of each, where these follow from the hidden size."""
        hidden_size, num_heads = self.size(hidden_key), self.size(heads_key)
        if hidden_size % num_heads:
            raise self.error(heads_key, f"a divisor of `{hidden_size}`")
        return num_heads, hidden_size // num_heads

    @property
    def num_layers(self) -> int:
        """Blocks."""
        return self.size("num_hidden_layers", high=MAX_LAYERS)

    def slides(self, num_layers: int, default: Callable[[int], bool]) -> tuple[bool, ...]:
        """Which layers have a window: by `layer_types`, or by `default` of a layer's index."""
        kinds = self.kinds("layer_types", num_layers, {FULL, SLIDING})
        if kinds is None:
            return tuple(default(index) for index in range(num_layers))
        return tuple(kind == SLIDING for kind in kinds)

    def window(self, default: int | None, max_context_len: int, slides: Sequence[bool] = ()) -> int:
        """Tokens that a query sees of a layer that slides, as `AttentionSpec.window` has it.

        0, all of them, if that many are never there. Null is refused if a layer slides.
        """
        window = self.optional("sliding_window", default)
        if window is None and any(slides):
            raise self.error("sliding_window", "a positive integer, because some layers slide")
        return window if window is not None and window < max_context_len else 0

    def rope(
        self,
        head_dim: int,
        *,
        theta: float = 10000.0,
        share: float | None = None,
        is_interleaved: bool = False,
    ) -> RopeSpec:
        """RoPE: `rope_parameters` since transformers 5, `rope_theta` and `rope_scaling` before.

        `theta` and `share` (of a head that is rotated) are what absent keys mean; without a
        `share` all of a head is rotated, and other values are refused.
        """
        return read_rope(self, head_dim, RopeDefaults(theta, share), is_interleaved=is_interleaved)


def _highest(key: str) -> int:
    """How large a size can be: what a model's rows and leaves are counted by is bounded.

    Lengths in tokens, which cost nothing here, are not.
    """
    if "head_dim" in key:
        return MAX_HEAD_DIM
    if "head" in key:
        return MAX_HEADS
    if "experts" in key:
        return MAX_EXPERTS
    is_length = any(word in key for word in ("position", "window", "max_seq_len"))
    return MAX_SIZE if is_length else MAX_WIDTH
