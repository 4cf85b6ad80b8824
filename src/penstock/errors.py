"""The exception tree. Every error a user or a checkpoint can cause is one of these.

PenstockError
├── ConfigError                 a setting is wrong, or two settings cannot be combined
├── ModelLoadError              a checkpoint cannot be used
│   ├── UnsupportedModel        the architecture, or a value in its config, is not known
│   └── WeightMismatch          weights are missing, unexpected or misshapen (all are counted)
├── RequestError                one request is wrong; `.field` names the field
│   ├── InvalidField
│   ├── ContextTooLong
│   └── UnknownModel
├── Overloaded                  the queue is full or the server drains; `.retry_after_s`
└── EngineError
    ├── NotEnoughMemory         the memory plan does not fit
    └── EngineDead              the engine has stopped; the message names the cause

A message is one sentence with values in backticks; what to do about it goes into `hint`.
"""

from __future__ import annotations


class PenstockError(Exception):
    """Base of all errors of this package. `hint` says how to mend it."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\nhint: {self.hint}"


class ConfigError(PenstockError):
    """A setting is wrong, or two settings cannot be combined."""


class ModelLoadError(PenstockError):
    """A checkpoint cannot be used."""


class UnsupportedModel(ModelLoadError):
    """The architecture, or a value in its config, is not known."""


class WeightMismatch(ModelLoadError):
    """Weights are missing, unexpected or misshapen: how many of each, and the first 20."""


class RequestError(PenstockError):
    """One request is wrong. `field` names the field of the request."""

    def __init__(self, message: str, *, field: str, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.field = field


class InvalidField(RequestError):
    """A field has a value that cannot be honoured."""


class ContextTooLong(RequestError):
    """Prompt and answer do not fit into the model's context."""


class UnknownModel(RequestError):
    """The request names a model that is not served here."""


class Overloaded(PenstockError):
    """No capacity now; try again after `retry_after_s` seconds."""

    def __init__(self, message: str, *, retry_after_s: int, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.retry_after_s = retry_after_s


class EngineError(PenstockError):
    """The engine cannot do its work."""


class NotEnoughMemory(EngineError):
    """The memory plan does not fit; the message holds the arithmetic."""


class EngineDead(EngineError):
    """The engine has stopped; the message names the cause."""
