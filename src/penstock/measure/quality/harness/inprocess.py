"""Access to a model on our engine, in this process. Imports the engine only when called."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from penstock.measure.quality.harness.access import Access

if TYPE_CHECKING:
    from penstock.llm import LLM


def load(
    model: str = "brook", *, max_length: int | None = None, seed: int = 0, **options: Any
) -> Access:
    """Load a built-in model or a directory; `options` are fields of `EngineConfig`.

    Raises:
        ConfigError, ModelLoadError, NotEnoughMemory: it cannot be loaded.
    """
    from penstock.llm import LLM

    return wrap(LLM(model, **options), max_length=max_length, seed=seed)


def wrap(llm: LLM, *, max_length: int | None = None, seed: int = 0) -> Access:
    """Access to a model that is loaded; see `EngineLM` for `max_length` and `seed`."""
    from penstock.measure.quality.harness.model import EngineLM

    lm = EngineLM(llm, max_length=max_length, seed=seed)
    template = llm.tokenizer.chat_templates.get("default")
    info = llm.core.info
    return Access(
        lm=lm,
        name=str(llm.config.model),
        context_len=info.max_model_len,
        facts={
            "access": "inprocess",
            "max_length": lm.max_length,
            "dtype": info.dtype,
            "quantization": info.quantization,
            "chat_template_sha256": None
            if template is None
            else hashlib.sha256(template.encode()).hexdigest(),
        },
        troubles=lm.troubles,
    )
