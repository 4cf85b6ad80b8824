"""penstock: serve open LLMs fast on hardware you own.

Importing this package loads neither torch nor the engine; `LLM` does, when it is first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from penstock.errors import PenstockError
    from penstock.llm import LLM, Answer, Output
    from penstock.types import FinishReason, SamplingParams

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "Answer",
    "FinishReason",
    "Output",
    "PenstockError",
    "SamplingParams",
    "__version__",
]

_HOMES = {
    "LLM": "penstock.llm",
    "Answer": "penstock.llm",
    "Output": "penstock.llm",
    "FinishReason": "penstock.types",
    "SamplingParams": "penstock.types",
    "PenstockError": "penstock.errors",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'penstock' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
