"""Which extra brings what the base install lacks: a missing package is told as a sentence."""

from __future__ import annotations

from penstock.errors import ConfigError

_EXTRAS = {
    "torch": "torch",
    **dict.fromkeys(("jinja2", "numpy", "sentencepiece", "tokenizers", "tqdm"), "engine"),
    **dict.fromkeys(("httptools", "httpx", "prometheus_client"), "serve"),
    **dict.fromkeys(("starlette", "uvicorn", "uvloop"), "serve"),
}


def explain(error: ModuleNotFoundError) -> ConfigError:
    """The error to show instead; `error` itself is raised if no extra of ours brings the module."""
    if error.name not in _EXTRAS:
        raise error
    return ConfigError(
        f"This needs `{error.name}`, which is not installed.",
        hint=f"pip install 'penstock[{_EXTRAS[error.name]}]'",
    )
