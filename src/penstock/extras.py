"""Which extra brings what the base install lacks: a package that fails is told as a sentence."""

from __future__ import annotations

from penstock.errors import ConfigError

_EXTRAS = {
    "torch": "torch",
    "triton": "gpu",
    **dict.fromkeys(("jinja2", "numpy", "sentencepiece", "tokenizers", "tqdm"), "engine"),
    **dict.fromkeys(("httpx", "prometheus_client"), "serve"),
    **dict.fromkeys(("starlette", "uvicorn", "uvloop"), "serve"),
    **dict.fromkeys(("cronsim", "httptools", "jsonschema", "psutil"), "measure"),
    **dict.fromkeys(("scipy", "sqlalchemy"), "measure"),
    **dict.fromkeys(("datasets", "langdetect", "lm_eval", "rouge_score", "sacrebleu"), "eval"),
    "psycopg": "postgres",
    "pyarrow": "parquet",
    "pynvml": "nvml",
}


def explain(error: ModuleNotFoundError) -> ConfigError:
    """The error to show instead; `error` itself is raised if no extra of ours brings the module."""
    if error.name not in _EXTRAS:
        raise error
    return ConfigError(
        f"This needs `{error.name}`, which is not installed.",
        hint=f"pip install 'penstock[{_EXTRAS[error.name]}]'",
    )


def why_not(package: str, error: ImportError | OSError) -> str:
    """Why importing a package failed, as a reason: it is missing, or what it brings is broken."""
    if isinstance(error, ModuleNotFoundError) and error.name is not None:
        extra = _EXTRAS.get(error.name)
        return f"{error.name} is not installed" + (
            f"; pip install 'penstock[{extra}]'" if extra else ""
        )
    first = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
    package = (getattr(error, "name", None) or package).partition(".")[0]
    return f"{package} is installed and cannot be imported: {first}"
