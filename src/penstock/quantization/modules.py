"""What configs of quantized checkpoints have in common: typed keys, and which modules are meant.

Knows no format. A config says in lists and patterns which modules stay as they were; what it leaves
unsaid (the head, the routers of experts, tables) is the custom of the tools that write checkpoints.

Invariant: a value that cannot be used is refused by the name of its key. Patterns are matched in
bounded time.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from penstock.errors import UnsupportedModel
from penstock.quantization.patterns import Patterns

# The last part of a module's name. Tables are looked up in; heads are Linear, and as a rule stay.
TABLES = frozenset({
    "embed_tokens", "embed_in", "embed_positions", "embeddings", "embed_tokens_per_layer",
    "position_embeddings", "tok_embeddings", "token_type_embeddings", "word_embeddings", "wpe",
    "wte",
})  # fmt: skip
HEADS = frozenset({"lm_head", "embed_out", "output", "score"})
ROUTERS = frozenset({"gate", "router", "shared_expert_gate"})  # of experts: never quantized
MAX_NAMES = 100_000
_MAX_LETTERS, _MAX_PARTS = 1000, 32  # of a module's name that a list can mean
_NOT_LINEAR = TABLES | ROUTERS
_PLAIN = re.compile(r"[A-Za-z0-9_.-]*")


class Keys:
    """Typed access to a part of a config; every failure names its key."""

    def __init__(self, config: Mapping[str, Any], prefix: str) -> None:
        self.config = config
        self.prefix = prefix

    def error(self, key: str, wanted: str) -> UnsupportedModel:
        """What to raise when a key has a value that cannot be used."""
        name = ascii(self.prefix + key)[1:-1][:200]
        if self.config.get(key) is None:
            return UnsupportedModel(f"`{name}` is missing in the model's config.")
        try:
            value = ascii(self.config[key])
        except RecursionError:
            value = "..."
        value = value if len(value) <= 80 else value[:80] + "..."
        return UnsupportedModel(
            f"`{name}` is `{value}` in the model's config; it must be {wanted}."
        )

    def choice(self, key: str, choices: Iterable[Any], default: Any = None) -> Any:
        """One of some values; text in any case. Absent and null are the default, if any."""
        value = self.config.get(key)
        value = default if value is None else value
        value = value.lower() if isinstance(value, str) else value
        choices = list(choices)
        if not any(type(value) is type(choice) and value == choice for choice in choices):
            raise self.error(key, "one of " + ", ".join(f"`{choice}`" for choice in choices))
        return value

    def flag(self, key: str, default: bool) -> bool:
        """true or false."""
        return bool(self.choice(key, (True, False), default))

    def group_size(self, key: str, default: int | None = None) -> int:
        """Columns that share a scale: 0 for the whole row, which configs call -1."""
        value = self.config.get(key)
        value = default if value is None else value
        if type(value) is not int or not (
            value == -1 or (0 < value <= 2**20 and (value == 16 or value % 32 == 0))
        ):
            raise self.error(key, "-1, 16 or a multiple of 32")
        return max(value, 0)

    def names(self, key: str) -> list[str] | None:
        """A list of names, or None if it is absent."""
        value = self.config.get(key)
        if value is None:
            return None
        if not (
            isinstance(value, list)
            and len(value) <= MAX_NAMES
            and all(isinstance(name, str) for name in value)
        ):
            raise self.error(key, f"a list of at most {MAX_NAMES} names")
        return value

    def refuse(self, *keys: str) -> None:
        """Refuse keys whose meaning is not implemented, unless they are absent, false or empty."""
        for key in keys:
            if self.config.get(key):
                raise self.error(key, "absent, because it is not implemented")

    def part(self, key: str) -> Keys | None:
        """A nested object, or None if it is absent."""
        value = self.config.get(key)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self.error(key, "an object")
        return Keys(value, f"{self.prefix}{key}.")


class Listed:
    """The modules that a list like `modules_to_not_convert` names.

    Tools read such lists differently. An entry means a module here if it does by one of these
    rules: it is its name, a run of whole parts of it (vLLM, AutoAWQ), the end of it or, as a
    regular expression, its start up to the end of a part (transformers). `re:` before an entry
    makes it a regular expression that matches from the start (compressed-tensors).
    """

    def __init__(self, names: Sequence[str], key: str) -> None:
        self._plain = {name.strip(".") for name in names if _PLAIN.fullmatch(name)} - {""}
        self._lengths = {len(name) for name in self._plain if len(name) <= _MAX_LETTERS}
        self._starts = Patterns([name[3:] for name in names if name.startswith("re:")], key)
        others = [name for name in names if not (_PLAIN.fullmatch(name) or name.startswith("re:"))]
        self._others = Patterns(others, key)

    def has(self, module: str) -> bool:
        """Whether the list means the module of this name."""
        if len(module) > _MAX_LETTERS or module.count(".") >= _MAX_PARTS:
            return False
        return self._is_plain(module) or self._starts.first(module) is not None or any(
            end == len(module) or module[end] == "." or module[end - 1 : end] == "."
            for end in self._others.ends(module)
        )  # fmt: skip

    def _is_plain(self, module: str) -> bool:
        if not self._plain:
            return False
        if any(module[-length:] in self._plain for length in self._lengths):
            return True
        stops = [at for at, letter in enumerate(module) if letter == "."]
        return any(
            module[start:stop] in self._plain
            for start in (0, *(stop + 1 for stop in stops))
            for stop in stops
        )


def last_part(module: str) -> str:
    """The last part of a module's name."""
    return module.rpartition(".")[2]


def is_linear(module: str) -> bool:
    """Whether a matrix of this name is that of a linear map, the head's too, not of a router."""
    return last_part(module) not in _NOT_LINEAR


def is_in_block(module: str) -> bool:
    """Whether it is a linear map within the model's numbered blocks."""
    return is_linear(module) and any(part.isdecimal() for part in module.split("."))
