"""What the ops compute, in numpy and float64. Shares no code with the library."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]
Array = NDArray[np.generic]


def to_bits(x: Array) -> NDArray[np.uint16]:
    """bfloat16 bits of x, rounded to nearest even."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bits(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def rounded(x: Array) -> F64:
    """x as bfloat16 holds it."""
    return from_bits(to_bits(x)).astype(np.float64)


def quantized_rows(x: Array) -> F64:
    """x as int8 with a scale a row holds it. Its product with 127 / peak is float32."""
    x = np.asarray(x, np.float32)
    peak = np.abs(x).max(1, keepdims=True)
    values = np.rint(x * (np.float32(127) / peak)).astype(np.float64)
    return values * (peak / np.float32(127))


def norm(x: F64, weight: Array, eps: float) -> F64:
    return x / np.sqrt((x * x).mean(1, keepdims=True) + eps) * weight


def silu(x: F64) -> F64:
    return x / (1 + np.exp(-x))


def rotated(x: F64, positions: Array, frequencies: Array) -> F64:
    """x [T, H, 2 * half]."""
    angles = (positions[:, None] * frequencies.astype(np.float32)).astype(np.float32)
    cos, sin = np.cos(angles.astype(np.float64)), np.sin(angles.astype(np.float64))
    cos, sin = cos[:, None], sin[:, None]
    first, second = np.split(x, 2, axis=2)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=2)


def attention(
    q: F64,
    k: F64,
    v: F64,
    scale: float,
    *,
    window: int = 0,
    softcap: float = 0.0,
    sinks: F64 | None = None,
    is_causal: bool = True,
) -> F64:
    """The last queries of one request over its context: q [t, H, D], k [c, Hkv, D], v [c, Hkv, Dv].

    `sinks` [H]: scores without a value. Not causal: every query sees the whole context.
    """
    group = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, group, 1), np.repeat(v, group, 1)
    scores = np.einsum("thd,chd->htc", q, k) * scale
    if softcap:
        scores = softcap * np.tanh(scores / softcap)
    num, context = q.shape[0], k.shape[0]
    ages = np.arange(context - num, context)[:, None] - np.arange(context)
    hidden = np.full(ages.shape, False)
    if is_causal:
        hidden = (ages < 0) | (ages >= (window or context))
    scores = np.where(hidden, -np.inf, scores)
    peaks = scores.max(2, keepdims=True)
    weights = np.exp(scores - peaks)
    totals = weights.sum(2, keepdims=True)
    if sinks is not None:
        totals += np.exp(sinks[:, None, None] - peaks)
    return np.einsum("htc,chd->thd", weights / totals, v)
