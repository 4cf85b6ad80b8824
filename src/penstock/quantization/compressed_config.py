"""What the config of a compressed-tensors checkpoint says: a scheme for each module.

Knows the keys of `QuantizationConfig` in compressed-tensors 0.20 and of the versions before it. A
module gets the scheme whose target is its name, else whose pattern matches, else whose class it
has; `ignore` takes modules out in the same three ways. Only names are known here: a matrix is taken
for that of an `Embedding` if it is named like a table, for that of a `Linear` otherwise.

Invariant: what would change a value and is not implemented is refused by the name of its key.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from penstock.quantization.codes import Code, CodeForm
from penstock.quantization.modules import ROUTERS, TABLES, Keys, last_part
from penstock.quantization.patterns import Patterns

_PACKED = "pack-quantized"
_FORMATS = (_PACKED, "int-quantized", "float-quantized", "naive-quantized")
_MAX_BLOCK = 2**20
_MAX_GROUPS = 1000
Strategy = Literal["tensor", "channel", "group", "block"]


@dataclass(frozen=True, slots=True)
class Scheme:
    """How the weight of a module is stored and what its activations should be."""

    is_float: bool
    bits: int
    strategy: Strategy
    group_size: int  # of "group", and the columns of "block"; 0: the whole row
    block_rows: int  # of "block"
    is_symmetric: bool
    is_packed: bool
    activation_bits: int

    @property
    def form(self) -> CodeForm:
        """Codes of asymmetric integers count from the least one."""
        if self.is_float:
            return CodeForm("e4m3", self.group_size)
        codes: tuple[Code, Code] = ("int4", "uint4") if self.bits == 4 else ("int8", "uint8")
        return CodeForm(
            codes[not self.is_symmetric], self.group_size, has_minima=not self.is_symmetric
        )

    @property
    def told(self) -> str:
        """For people."""
        kind = "fp8" if self.is_float else f"integers of {self.bits} bits"
        places = {
            "tensor": "a scale each",
            "channel": "a scale a row",
            "group": f"groups of {self.group_size}",
            "block": f"blocks of {self.block_rows} x {self.group_size}",
        }
        return f"{kind}, {places[self.strategy]}"


class Schemes:
    """The schemes of a checkpoint, by module."""

    def __init__(self, keys: Keys) -> None:
        keys.refuse("kv_cache_scheme", "transform_config", "moe_sparsity_config")
        sparsity = keys.part("sparsity_config")
        if sparsity is not None:
            sparsity.choice("format", ("dense",), "dense")
        groups = keys.part("config_groups")
        if groups is None or not 0 < len(groups.config) <= _MAX_GROUPS:
            raise keys.error("config_groups", "an object with at least one group")
        targets: dict[str, Scheme] = {}
        for name in groups.config:
            group = groups.part(name)
            if group is None:
                raise groups.error(name, "an object")
            scheme = _scheme(group, keys)
            targets |= dict.fromkeys(group.names("targets") or [], scheme)
        self.all = list(dict.fromkeys(targets.values()))
        if not self.all:
            raise keys.error("config_groups", "an object of groups that have `targets`")
        self._targets = targets
        self._sought = _Sought(list(targets), f"{keys.prefix}config_groups")
        self._ignored = _Sought(keys.names("ignore") or [], f"{keys.prefix}ignore")

    def of(self, module: str, is_coded: bool = False) -> Scheme | None:
        """The scheme of a module by its name; None: its weight is stored plainly.

        Routers of experts are not expected to be coded; `is_coded` says that this one is.
        """
        target = self._sought.first(module)
        if target == "Linear" and last_part(module) in ROUTERS and not is_coded:
            return None
        if target is None or self._ignored.first(module) is not None:
            return None
        return self._targets[target]


class _Sought:
    """Names, patterns and classes of modules."""

    def __init__(self, targets: Sequence[str], key: str) -> None:
        self._names = frozenset(targets)
        self._ordered = sorted(target for target in targets if target.startswith("re:"))
        self._patterns = Patterns([target[3:] for target in self._ordered], key)

    def first(self, module: str) -> str | None:
        """What means the module: its name before patterns, in their order, before its class."""
        if module in self._names:
            return module
        index = self._patterns.first(module)
        if index is not None:
            return self._ordered[index]
        kind = "Embedding" if last_part(module) in TABLES else "Linear"
        return kind if kind in self._names else None


def _scheme(group: Keys, keys: Keys) -> Scheme:
    """Of one group; `keys` are those of the whole config."""
    group.refuse("output_activations")
    source = keys if group.config.get("format") is None else group
    stored = source.choice("format", _FORMATS)
    weights = group.part("weights")
    if weights is None:
        raise group.error("weights", "an object")
    weights.refuse("dynamic")
    weights.choice("actorder", ("weight", "static", False), False)
    is_float = weights.choice("type", ("int", "float"), "int") == "float"
    bits = weights.choice("num_bits", (8,) if is_float else (4, 8), 8)
    is_symmetric = weights.flag("symmetric", True)
    if is_float and not is_symmetric:
        raise weights.error("symmetric", "`True` for floats")
    if is_float and stored in (_PACKED, "int-quantized"):
        raise source.error("format", "`float-quantized` or `naive-quantized` for floats")
    strategy, group_size, block_rows = _strategy(weights)
    if strategy == "block" and not is_float:
        raise weights.error("strategy", "`tensor`, `channel` or `group` for integers")
    return Scheme(
        is_float=is_float,
        bits=bits,
        strategy=strategy,
        group_size=group_size,
        block_rows=block_rows,
        is_symmetric=is_symmetric,
        is_packed=stored == _PACKED,
        activation_bits=_activation_bits(group.part("input_activations")),
    )


def _strategy(weights: Keys) -> tuple[Strategy, int, int]:
    """What shares a scale: strategy, columns of a group and rows of a block."""
    size = weights.config.get("group_size")
    default = "tensor" if size is None else "channel" if size == -1 else "group"
    strategy = weights.choice("strategy", ("tensor", "channel", "group", "block"), default)
    if strategy == "block":
        rows, columns = _block(weights)
        return strategy, columns, rows
    if strategy != "group":
        return strategy, 0, 1
    if size == -1:
        raise weights.error("group_size", "16 or a multiple of 32, where the strategy is `group`")
    return strategy, weights.group_size("group_size"), 1


def _block(weights: Keys) -> tuple[int, int]:
    """Rows and columns; versions before 0.10 write them as text."""
    key = "block_structure"
    value = weights.config.get(key)
    if isinstance(value, str):
        parts = value.split("x")
        value = [int(part) for part in parts if part.isascii() and part.isdigit() and len(part) < 8]
    if not (
        isinstance(value, list)
        and len(value) == 2
        and all(type(size) is int and 0 < size <= _MAX_BLOCK for size in value)
        and (value[1] == 16 or value[1] % 32 == 0)
    ):
        raise weights.error(key, "a number of rows and one of columns, 16 or a multiple of 32")
    return value[0], value[1]


def _activation_bits(inputs: Keys | None) -> int:
    """8 for integers with a scale for each token, found as they come; all others: 16."""
    if inputs is None:
        return 16
    wanted = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    found = {"type": "int", "symmetric": True, "num_bits": 8, **inputs.config}
    return 8 if all(found.get(key) == value for key, value in wanted.items()) else 16
