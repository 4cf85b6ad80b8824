"""An architecture that only transformers has: what the engine must know, by the usual keys."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from penstock.errors import UnsupportedModel
from penstock.layers.specs import AttentionSpec, ExpertsSpec, MLPSpec, NormSpec
from penstock.models.config import ConfigReader
from penstock.models.rope import FULL, SLIDING
from penstock.models.spec import LayerSpec, ModelSpec

_NAME = re.compile(r"[A-Za-z0-9_]{1,80}")


def is_known(architecture: str) -> bool:
    """Whether the transformers that is installed has such a model, without importing it."""
    found = importlib.util.find_spec("transformers")
    if found is None or found.origin is None or not _NAME.fullmatch(architecture):
        return False
    needle = f"\nclass {architecture}(".encode()
    sources = (Path(found.origin).parent / "models").glob("*/modeling_*.py")
    return any(needle in source.read_bytes() for source in sources)


def read(config: ConfigReader) -> ModelSpec:
    """Read any decoder's config, as far as memory is planned by it.

    Raises:
        UnsupportedModel: it does not say what is needed, or asks for code of its own.
    """
    config.refuse("quantization_config", "compression_config", "is_encoder_decoder")
    _refuse_longrope(config)
    try:
        num_heads, num_kv_heads, head_dim = config.heads()
        hidden_size = config.size("hidden_size")
        layer = LayerSpec(
            attention=AttentionSpec(
                num_heads=num_heads,
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
                scale=head_dim**-0.5,
                rope=None,
            ),
            mlp=_mlp(config, hidden_size),
        )
        return ModelSpec(
            architecture=config.architecture,
            vocab_size=config.size("vocab_size"),
            hidden_size=hidden_size,
            layers=(layer,) * config.num_layers,
            norm=NormSpec(eps=1e-6),
            max_context_len=config.size("max_position_embeddings", 2048),
            tied_embeddings=config.flag("tie_word_embeddings"),
            dtype=config.dtype,
            is_foreign=True,
        )
    except UnsupportedModel as error:
        raise UnsupportedModel(
            f"`{config.architecture:.80}` is not one of our architectures, and its config does not "
            f"say what transformers' own modules would need here: {error.message}",
            hint="docs/models.md lists the architectures of our own.",
        ) from error


def _mlp(config: ConfigReader, hidden_size: int) -> MLPSpec | ExpertsSpec:
    """What memory is planned for: an MLP, or experts by the names that most configs have."""
    size = config.size("intermediate_size", 4 * hidden_size)
    for key in ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"):
        if config.is_a(int, key):
            num_experts = config.size(key)
            if config.is_a(int, "moe_intermediate_size"):
                size = config.size("moe_intermediate_size")
            return ExpertsSpec(
                num_experts=num_experts,
                top_k=min(config.size("num_experts_per_tok", 1), num_experts),
                size=size,
                activation="silu",
            )
    return MLPSpec(size=size, activation="silu")


def _refuse_longrope(config: ConfigReader) -> None:
    """Refuse angles that transformers changes when some text of a step grows long."""
    for key in ("rope_scaling", "rope_parameters"):
        section = config.section(key)
        if section is None:
            continue
        for part in (section, section.section(FULL), section.section(SLIDING)):
            for name in ("rope_type", "type"):
                if part is not None and part.value(str, name, "") in {"longrope", "su"}:
                    raise part.error(name, "another one where transformers' modules compute")
