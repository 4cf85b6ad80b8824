"""How a config says what RoPE is: every spelling that published configs have.

Owns the reading of `rope_parameters` (since transformers 5, flat or by kind of layer) and of
`rope_scaling`, `rope_theta` and their kin (before). Knows no architecture: theirs are the defaults.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from penstock.layers.scaling import (
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    RopeScaling,
    YarnScaling,
    yarn_factor,
)
from penstock.layers.specs import RopeSpec

if TYPE_CHECKING:
    from penstock.models.config import ConfigReader

FULL, SLIDING = "full_attention", "sliding_attention"  # kinds of layers, as `layer_types` has them
_KINDS = "`default`, `linear`, `dynamic`, `llama3`, `yarn` or `longrope`"
_ORIGINAL = "original_max_position_embeddings"


class RopeDefaults(NamedTuple):
    """What an architecture's config class has where a config says nothing, and its own keys."""

    theta: float = 10000.0
    share: float | None = None  # of each head that is rotated; None: always all of it
    theta_key: str = "rope_theta"
    share_key: str = "partial_rotary_factor"


def read_rope(
    config: ConfigReader,
    head_dim: int,
    defaults: RopeDefaults,
    *,
    is_interleaved: bool = False,
    kind: str | None = None,
) -> RopeSpec:
    """Read RoPE; with a `kind` of layer that of those layers, where a config may tell them apart.

    `dynamic` changes nothing up to `max_position_embeddings`, which is all that is served: the keys
    in a cache cannot turn again when a text grows.

    Raises:
        UnsupportedModel: a value is missing, wrong or not implemented.
    """
    theta = config.factor(defaults.theta_key, defaults.theta)
    share = config.factor(defaults.share_key, defaults.share or 1.0)
    section = _section(config, kind)
    scaling: RopeScaling | None = None
    if section is not None:
        theta = section.factor("rope_theta", theta)
        share = section.factor("partial_rotary_factor", share)
    if share != 1.0 and defaults.share is None:
        where, key = config, defaults.share_key
        if section is not None and section.has("partial_rotary_factor"):
            where, key = section, "partial_rotary_factor"
        raise where.error(key, "absent or `1.0` in this architecture")
    dim = int(head_dim * share) if share <= 1.0 else 0
    if head_dim % 2 or dim % 2 or not 2 <= dim <= head_dim:
        raise config.error(
            "head_dim" if config.has("head_dim") else "hidden_size",
            f"such that RoPE rotates an even part of each head, where `{defaults.share_key}` and "
            f"`num_attention_heads` make it `{dim}` of `{head_dim}`",
        )
    if section is not None:
        scaling = _scaling(config, section, dim, theta)
    return RopeSpec(dim=dim, theta=theta, scaling=scaling, is_interleaved=is_interleaved)


def _section(config: ConfigReader, kind: str | None) -> ConfigReader | None:
    """The object that describes RoPE, if there is one with anything in it.

    By kind, `rope_scaling` is that of layers that see everything (Gemma 3, OLMo 3).
    """
    old, new = (config.section(key) for key in ("rope_scaling", "rope_parameters"))
    if kind is None:
        return old or new or None
    if old and kind == FULL:
        return old
    if not new:
        return None
    if not (new.has(FULL) or new.has(SLIDING)):
        raise config.error("rope_parameters", f"an object with `{FULL}` and `{SLIDING}`")
    return new.section(kind)


def _scaling(
    config: ConfigReader, section: ConfigReader, dim: int, theta: float
) -> RopeScaling | None:
    kind_key = "rope_type" if section.value(str, "rope_type", "") else "type"
    kind = section.value(str, kind_key, "default")
    section.refuse("alpha", "attn_factor", "mrope_section", "short_mscale", "long_mscale")
    if kind == "default":
        return None
    if kind in {"longrope", "su"} or (kind == "yarn" and section.has("long_factor")):
        return _longrope(config, section, dim)
    if kind == "yarn":
        return _yarn(config, section, theta)
    if kind in {"linear", "dynamic"}:
        factor = section.factor("factor")
        return LinearScaling(factor) if kind == "linear" else None
    if kind == "llama3":
        scaling = Llama3Scaling(
            factor=section.factor("factor"),
            low_freq_factor=section.factor("low_freq_factor"),
            high_freq_factor=section.factor("high_freq_factor"),
            original_context_len=_original_len(config, section),
        )
        if scaling.low_freq_factor >= scaling.high_freq_factor:
            raise section.error("low_freq_factor", f"below `{scaling.high_freq_factor}`")
        return scaling
    raise section.error(kind_key, _KINDS)


def _original_len(config: ConfigReader, section: ConfigReader) -> int:
    """Tokens of training: as transformers, that of the whole config goes before the section's."""
    for where in (config, section):
        if where.has(_ORIGINAL):
            return where.size(_ORIGINAL)
    return config.size("max_position_embeddings")


def _ratio(config: ConfigReader, section: ConfigReader, original_len: int) -> float:
    """`factor`, or by how much the context is longer than that of training."""
    if section.has("factor"):
        return section.factor("factor")
    return config.size("max_position_embeddings") / original_len


def _yarn(config: ConfigReader, section: ConfigReader, theta: float) -> YarnScaling:
    if theta <= 1.0:
        raise section.error("rope_theta", "above `1` with `yarn`")
    original_len = _original_len(config, section)
    factor = _ratio(config, section, original_len)
    scales = [section.number(key, 0.0) for key in ("mscale", "mscale_all_dim")]
    if section.has("attention_factor"):
        angle_factor = section.factor("attention_factor")
    elif all(scales):
        angle_factor = yarn_factor(factor, scales[0]) / yarn_factor(factor, scales[1])
    else:
        angle_factor = yarn_factor(factor)
    return YarnScaling(
        factor=factor,
        original_context_len=original_len,
        beta_fast=section.factor("beta_fast", 32.0),
        beta_slow=section.factor("beta_slow", 1.0),
        is_truncated=section.flag("truncate", True),
        angle_factor=angle_factor,
    )


def _longrope(config: ConfigReader, section: ConfigReader, dim: int) -> LongRopeScaling:
    original_len = _original_len(config, section)
    factors = {name: section.factors(name, dim // 2) for name in ("short_factor", "long_factor")}
    is_long = config.size("max_position_embeddings") > original_len
    factor = _ratio(config, section, original_len)
    if section.has("attention_factor"):
        angle_factor = section.factor("attention_factor")
    elif factor <= 1.0:
        angle_factor = 1.0
    elif original_len > 1:
        angle_factor = math.sqrt(1 + math.log(factor) / math.log(original_len))
    else:
        raise section.error(_ORIGINAL, "above `1`")
    return LongRopeScaling(
        factors=factors["long_factor" if is_long else "short_factor"], angle_factor=angle_factor
    )
