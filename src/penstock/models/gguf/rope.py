"""How a GGUF file stretches rotary positions, as a Hugging Face config says it.

Owns the reading of `rope.*` keys and of the tensors of frequency factors. Knows no architecture.
Invariant: what the config makes of the frequencies is what the file says, or the file is refused.

llama.cpp's converter turns the rule of Llama 3.1 into one factor for each frequency. The rule is
found again where one with usual numbers makes just these factors; any others become the lists of
"longrope" (LongRoPE, Ding et al. 2024), with the same list for long and for short contexts.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.errors import ModelLoadError
from penstock.gguf.metadata import Metadata
from penstock.gguf.reader import GGUFTensor

_LOW_FREQUENCY_FACTOR = 1.0  # as in every model published: what was fitted is a multiple of it
_TOLERANCE = 1e-4  # relative, of a factor: float32 and the powers of another library


def rope_config(
    told: Metadata, tensors: dict[str, GGUFTensor], *, dim: int, context_len: int
) -> dict[str, Any]:
    """`rope_theta`, and `rope_scaling` where positions are scaled.

    Args:
        told: the metadata below the architecture's name.
        dim: numbers of a head that are rotated.

    Raises:
        ModelLoadError: the scaling is of a kind that is not known.
    """
    theta = told.number("rope.freq_base", 10000.0)
    if theta <= 0:
        raise told.error("rope.freq_base", "a positive number")
    found: dict[str, Any] = {"rope_theta": theta}
    scaling = _from_tensors(told, tensors, theta, dim, context_len)
    if scaling is None:
        scaling = _from_keys(told, context_len)
    elif told.text("rope.scaling.type", "") != "longrope" and _from_keys(told, context_len):
        key = "rope.scaling.type" if "rope.scaling.type" in told else "rope.scaling.factor"
        raise told.error(key, "absent beside a tensor of frequency factors: both are not read")
    if scaling is not None:
        found["rope_scaling"] = scaling
    return found


def _from_tensors(
    told: Metadata, tensors: dict[str, GGUFTensor], theta: float, dim: int, context_len: int
) -> dict[str, Any] | None:
    original_len = told.integer("rope.scaling.original_context_length", context_len)
    if (plain := tensors.get("rope_freqs.weight")) is not None:
        factors = _factors(told, plain, dim)
        if (factors == 1).all():
            return None
        return _llama3(factors, theta, dim) or {
            "rope_type": "longrope",
            "long_factor": factors.tolist(),
            "short_factor": factors.tolist(),
            "attention_factor": told.number("rope.scaling.attn_factor", 1.0),
            "original_max_position_embeddings": original_len,
        }
    long, short = (tensors.get(f"rope_factors_{name}.weight") for name in ("long", "short"))
    if long is None or short is None:
        return None
    scaling = {
        "rope_type": "longrope",
        "long_factor": _factors(told, long, dim).tolist(),
        "short_factor": _factors(told, short, dim).tolist(),
        "original_max_position_embeddings": original_len,
    }
    if "rope.scaling.attn_factor" in told:
        scaling["attention_factor"] = told.number("rope.scaling.attn_factor")
    return scaling


def _factors(told: Metadata, tensor: GGUFTensor, dim: int) -> NDArray[np.float64]:
    """One factor for each frequency, [dim / 2]."""
    if tensor.type_name != "F32" or tensor.shape != (dim // 2,):
        raise ModelLoadError(
            f"`{tensor.name}` in `{told.file}` is {tensor.type_name} of shape `{tensor.shape}`; "
            f"it must be F32 of shape `{(dim // 2,)}`."
        )
    numbers = tensor.data.view("<f4").astype(np.float64)
    if not (np.isfinite(numbers) & (numbers > 0)).all():
        raise ModelLoadError(f"`{tensor.name}` in `{told.file}` must be positive numbers.")
    # The shortest decimals that these float32 numbers stand for: what was in the config.
    return np.array([float(str(number)) for number in numbers.astype(np.float32)])


def _llama3(factors: NDArray[np.float64], theta: float, dim: int) -> dict[str, Any] | None:
    """The rule that makes these factors, if there is one.

    Between the fast waves (factor 1) and the slow ones (the largest factor), 1 / factor is linear
    in the frequency: (1 / f - 1 / most) / (1 - 1 / most) = (len / wave - low) / (high - low).
    """
    most = float(factors.max())
    waves = 2 * math.pi * theta ** (np.arange(0, dim, 2) / dim)
    smooth = (1 / factors - 1 / most) / (1 - 1 / most) if most > 1 else factors
    blended = (smooth > 1e-6) & (smooth < 1 - 1e-6)
    candidates = [(4.0, 8192)]
    frequencies, heights = 1 / waves[blended], smooth[blended]
    if len(set(frequencies)) > 1:  # the line through them, by least squares
        offsets = frequencies - frequencies.mean()
        slope = float((offsets * heights).sum() / (offsets * offsets).sum())
        start = float(heights.mean() - slope * frequencies.mean())
        if start < 0 < slope:
            high = _LOW_FREQUENCY_FACTOR * (1 - 1 / start)
            candidates.append((round(high, 2), round(slope * (high - _LOW_FREQUENCY_FACTOR))))
    candidates += [(4.0, 2**power) for power in range(10, 18)]
    for high, original_len in candidates:
        if high <= _LOW_FREQUENCY_FACTOR:
            continue
        share = (original_len / waves - _LOW_FREQUENCY_FACTOR) / (high - _LOW_FREQUENCY_FACTOR)
        share = share.clip(0, 1)
        if np.allclose(1 / (share + (1 - share) / most), factors, rtol=_TOLERANCE, atol=0):
            return {
                "rope_type": "llama3",
                "factor": most,
                "low_freq_factor": _LOW_FREQUENCY_FACTOR,
                "high_freq_factor": high,
                "original_max_position_embeddings": original_len,
            }
    return None


def _from_keys(told: Metadata, context_len: int) -> dict[str, Any] | None:
    """The scaling that is told by numbers alone."""
    kind = told.text("rope.scaling.type", "linear")  # what llama.cpp takes where none is named
    if kind == "none":
        return None
    if kind == "linear":
        old = told.number("rope.scale_linear", 0.0)  # before there were kinds
        factor = told.number("rope.scaling.factor", old)
        return {"rope_type": "linear", "factor": factor} if factor not in {0.0, 1.0} else None
    if kind == "yarn":
        return _yarn(told, context_len)
    if kind == "longrope":
        raise ModelLoadError(
            f"`rope.scaling.type` in `{told.file}` is `longrope`, without the tensors "
            "`rope_factors_long.weight` and `rope_factors_short.weight`."
        )
    raise told.error("rope.scaling.type", "`none`, `linear`, `yarn` or `longrope`")


def _yarn(told: Metadata, context_len: int) -> dict[str, Any]:
    """YaRN (Peng et al. 2023)."""
    found: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": told.number("rope.scaling.factor"),
        "original_max_position_embeddings": told.integer(
            "rope.scaling.original_context_length", context_len
        ),
    }
    for key, name in (
        ("yarn_attn_factor", "attention_factor"),
        ("yarn_beta_fast", "beta_fast"),
        ("yarn_beta_slow", "beta_slow"),
    ):
        if f"rope.scaling.{key}" in told:
            found[name] = told.number(f"rope.scaling.{key}")
    if told.number("rope.scaling.yarn_ext_factor", 1.0) != 1.0:
        raise told.error("rope.scaling.yarn_ext_factor", "`1`, because no other is implemented")
    return found
