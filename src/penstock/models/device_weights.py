"""The bytes of a rank's weights on a device, leaf by leaf: a toolkit whose leaves only count.

Owns what each leaf of `layers.device_*` holds, as arithmetic. Imports no torch.
Invariant: exact for the first rank (`tests/models/test_device_footprint.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from penstock.layers import shards, toolkit
from penstock.layers.specs import (
    Activation,
    AttentionSpec,
    ExpertsSpec,
    LatentSpec,
    NormSpec,
    RopeSpec,
)
from penstock.layers.toolkit import ExpertNames, Part, PositionTable, RowMap
from penstock.models.compose import compose
from penstock.models.device_shapes import Share
from penstock.models.spec import ITEM_BYTES
from penstock.quantization import schemes

_WIDE_BYTES = 4  # of a number in float32


def weight_bytes(share: Share, dtype: str, quantization: str) -> int:
    """Of the matrices as `quantization.device` holds them, norms, biases and frequencies."""
    counting = _Counting(share.group_size, ITEM_BYTES[dtype], schemes.scheme(quantization, dtype))
    compose(share.spec, counting)
    return counting.num_bytes


class _Leaf:
    """Stands for any leaf: holds nothing and computes nothing."""


@dataclass
class _Counting:
    """Implements `Toolkit`."""

    group_size: int
    item_bytes: int
    scheme: schemes.Scheme
    num_bytes: int = 0

    def embedding(
        self,
        name: str,
        num_rows: int,
        size: int,
        *,
        scale: float = 1.0,
        positions: PositionTable | None = None,
    ) -> Any:
        self._table(num_rows, size)
        if positions is not None:
            self.num_bytes += positions.num_rows * size * self.item_bytes
        return _Leaf()

    def linear(
        self,
        in_size: int,
        parts: Sequence[Part],
        *,
        bias: bool,
        gated: bool = False,
        activation: Activation | None = None,
        reduces: bool = False,
    ) -> Any:
        if reduces:
            num_rows = sum(part.num_rows for part in parts)
            num_columns = in_size // self.group_size
        else:
            own = (shards.part_rows(part, self.group_size, 0) for part in parts)
            num_rows = sum(rows.stop - rows.start for rows in own)
            num_columns = in_size
        self.num_bytes += schemes.device_bytes(self.scheme.linear, num_rows, num_columns)
        self.num_bytes += num_rows * bias * self.item_bytes
        return _Leaf()

    def norm(self, name: str, size: int, spec: NormSpec) -> Any:
        item_bytes = _WIDE_BYTES if spec.offset else self.item_bytes
        has_scale = spec.has_scale or spec.kind == "rms"
        self.num_bytes += size * item_bytes * (has_scale + spec.has_bias)
        return _Leaf()

    def slice_norm(
        self,
        name: str,
        spec: NormSpec,
        *,
        first: int,
        num_runs: int,
        size: int,
        is_shared: bool = True,
        rows: RowMap | None = None,
    ) -> Any:
        num_own = 1 if is_shared else max(num_runs // self.group_size, 1)
        self.num_bytes += size * num_own * _WIDE_BYTES
        return _Leaf()

    def rotary(
        self, spec: RopeSpec, *, first: int, num_heads: int, head_dim: int, offset: int = 0
    ) -> Any:
        self.num_bytes += spec.dim // 2 * _WIDE_BYTES
        if spec.dim != head_dim or spec.factor != 1.0:  # turned by torch: zeros for the kernel
            self.num_bytes += head_dim // 2 * _WIDE_BYTES
        return _Leaf()

    def add(self, residual: Any, x: Any, scale: float = 1.0) -> None:
        raise AssertionError("a toolkit that only counts")

    def attention(self, kv_index: int, spec: AttentionSpec, sinks: str | None = None) -> Any:
        if sinks is not None:
            self.num_bytes += spec.num_heads // self.group_size * _WIDE_BYTES
        if spec.rope is None:
            self.num_bytes += spec.head_dim // 2 * _WIDE_BYTES
        return _Leaf()

    def latent_attention(self, kv_index: int, spec: LatentSpec, name: str) -> Any:
        raise AssertionError("`why_not_on_device` refuses such models")

    def experts(self, in_size: int, spec: ExpertsSpec, names: ExpertNames) -> Any:
        raise AssertionError("`why_not_on_device` refuses such models")

    def head(
        self,
        name: str,
        num_rows: int,
        size: int,
        tied_to: toolkit.Embedding | None,
        *,
        bias: bool = False,
        scale: float = 1.0,
        softcap: float = 0.0,
    ) -> Any:
        if tied_to is None:
            self._table(num_rows, size)
        padded = shards.vocabulary(num_rows, self.group_size, 0).num_rows
        self.num_bytes += padded * bias * self.item_bytes
        return _Leaf()

    def _table(self, num_rows: int, size: int) -> None:
        padded = shards.vocabulary(num_rows, self.group_size, 0).num_rows
        self.num_bytes += schemes.device_bytes(self.scheme.table, padded, size)
