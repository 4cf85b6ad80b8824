"""Typed access to the metadata of a GGUF file.

Owns how a wrong value is told: by its key and the file. Knows no key. Invariant: what a method
returns has the type that it says; absent is the default, and where there is none, an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from penstock.errors import ModelLoadError
from penstock.gguf.header import shown

_REQUIRED: Any = object()
_MAX_FLOAT32 = float(np.finfo(np.float32).max)


class Metadata:
    """The metadata of one file.

    Args:
        file: named in errors.
        values: as `penstock.gguf.reader` has them.
        prefix: put in front of every key.
    """

    def __init__(self, file: Path, values: Mapping[str, Any], prefix: str = "") -> None:
        self.file = file
        self._values = values
        self._prefix = prefix

    def under(self, prefix: str) -> Metadata:
        """The same, for keys that begin so."""
        return Metadata(self.file, self._values, f"{self._prefix}{prefix}")

    def __contains__(self, key: str) -> bool:
        return f"{self._prefix}{key}" in self._values

    def raw(self, key: str) -> Any:
        """The value as it is, whatever it is; None if there is none."""
        return self._values.get(f"{self._prefix}{key}")

    def error(self, key: str, wanted: str) -> ModelLoadError:
        """What to raise where a key is missing, or its value cannot be used."""
        name = f"{self._prefix}{key}"
        if name not in self._values:
            return ModelLoadError(f"`{shown(name)}` is missing in the metadata of `{self.file}`.")
        value = self._values[name]
        if isinstance(value, (list, np.ndarray)):
            told = f"has `{len(value)}` entries"
        else:
            told = f"is `{shown(str(value))}`"
        return ModelLoadError(f"`{shown(name)}` {told} in `{self.file}`; it must be {wanted}.")

    def text(self, key: str, default: str = _REQUIRED) -> str:
        """A string."""
        value = self._value(key, default)
        if not isinstance(value, str):
            raise self.error(key, "a string")
        return value

    def integer(self, key: str, default: int = _REQUIRED, *, high: int = 2**40) -> int:
        """An integer from 0 to `high`."""
        value = self._value(key, default)
        if type(value) is not int or not 0 <= value <= high:
            raise self.error(key, f"an integer from `0` to `{high}`")
        return value

    def number(self, key: str, default: float = _REQUIRED) -> float:
        """A finite number. Of a float32, the shortest decimal that it stands for."""
        value = self._value(key, default)
        if value is default:
            return value
        if type(value) not in {int, float} or not abs(value) <= _MAX_FLOAT32:
            raise self.error(key, "a number")
        return float(str(np.float32(value)))

    def flag(self, key: str, default: bool = _REQUIRED) -> bool:
        """True or false."""
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self.error(key, "true or false")
        return value

    def strings(self, key: str, default: list[str] = _REQUIRED) -> list[str]:
        """An array of strings."""
        value = self._value(key, default)
        if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
            raise self.error(key, "an array of strings")
        return value

    def integers(self, key: str, default: list[int] = _REQUIRED) -> list[int]:
        """An array of integers or of flags."""
        value = self._value(key, default)
        if isinstance(value, np.ndarray) and value.dtype.kind in "iub":
            return [int(number) for number in value.tolist()]
        if key in self:
            raise self.error(key, "an array of integers")
        return list(default)

    def numbers(self, key: str, default: list[float] = _REQUIRED) -> list[float]:
        """An array of finite numbers."""
        value = self._value(key, default)
        if isinstance(value, np.ndarray) and np.isfinite(value).all():
            return [float(number) for number in value.tolist()]
        if key in self:
            raise self.error(key, "an array of finite numbers")
        return list(default)

    def _value(self, key: str, default: Any) -> Any:
        value = self._values.get(f"{self._prefix}{key}", default)
        if value is _REQUIRED:
            raise self.error(key, "there")
        return value
