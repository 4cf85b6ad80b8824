"""Finds and opens the native library, and chooses the instruction set of its kernels.

Owns the search ($PENSTOCK_NATIVE_LIBRARY, else beside this file), the check of the ABI version and
$PENSTOCK_ISA. What is missing is a reason to be told, not a crash: the package works without it.
Invariant: one library a process, opened once; its instruction set holds for the whole process.
"""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path
from typing import Any

from penstock.errors import ConfigError, EngineError
from penstock.native.structs import ABI_VERSION, FUNCTIONS, Isa

FILE_NAME = "libpenstock_native.so"


class Library:
    """The functions of the library, typed; called through ctypes, which gives the GIL away."""

    def __init__(self, path: Path) -> None:
        """Open the file.

        Raises:
            OSError: it cannot be loaded.
            ValueError: it is no such library, or one of another version, or incomplete.
        """
        self.path = path
        opened = ctypes.CDLL(str(path))
        try:
            version = opened.penstock_abi_version()
        except AttributeError as error:
            raise ValueError(f"`{path}` is not penstock's library") from error
        if version != ABI_VERSION:
            raise ValueError(
                f"`{path}` has ABI version `{version}`; this package needs `{ABI_VERSION}`"
            )
        self._functions: dict[str, Any] = {}
        for name, (result, arguments) in FUNCTIONS.items():
            function = self._functions[name] = getattr(opened, name, None)
            if function is None:
                raise ValueError(f"`{path}` lacks `{name}`")
            function.restype, function.argtypes = result, arguments

    def function(self, name: str) -> Any:
        """One function of `structs.FUNCTIONS`, for those who call it often."""
        return self._functions[name]

    def call(self, name: str, *arguments: Any) -> Any:
        """Call a function that tells a failure by -1 or a null pointer; its result.

        Raises:
            EngineError: it failed; the message is the library's.
        """
        result = self._functions[name](*arguments)
        if result is None or result == -1:
            raise self.error(name)
        return result

    def error(self, name: str) -> EngineError:
        """What to raise after `name` has failed on this thread."""
        told = self._functions["penstock_last_error"]().decode()
        return EngineError(f"`{name}` failed: {told}.")

    @property
    def available_isas(self) -> list[Isa]:
        """What this library holds and this machine runs, the slowest first."""
        bits = self._functions["penstock_available_isas"]()
        return [isa for isa in Isa if bits >> isa & 1]

    @property
    def isa(self) -> Isa:
        """The instruction set in use."""
        return Isa(self._functions["penstock_isa"]())

    def set_isa(self, isa: Isa) -> None:
        """Use another instruction set, in the whole process. Not while a program runs.

        Raises:
            EngineError: it is not available.
        """
        self.call("penstock_set_isa", isa)


def isa_name(isa: Isa) -> str:
    """How a user calls an instruction set: `avx512`, `amx-emulated`."""
    return isa.name.lower().replace("_", "-")


def load() -> Library:
    """The library of this process.

    Raises:
        ConfigError: it cannot be used; the message says why.
    """
    found = _find()
    if isinstance(found, str):
        raise ConfigError(
            f"The native backend cannot be used: {found}.",
            hint="build it with `make native`, or use `--backend torch`",
        )
    return found


def unavailable_reason() -> str | None:
    """Why there is no library to use; None if there is.

    Raises:
        ConfigError: $PENSTOCK_NATIVE_LIBRARY or $PENSTOCK_ISA asks for what cannot be had.
    """
    found = _find()
    return found if isinstance(found, str) else None


@functools.cache
def _find() -> Library | str:
    """The library, or why there is none. Looked for once."""
    named = os.environ.get("PENSTOCK_NATIVE_LIBRARY")
    found = _open(Path(named) if named else Path(__file__).parent / FILE_NAME)
    if isinstance(found, str):
        if named:  # who asks for a library gets that one or an error, and not torch
            raise ConfigError(f"`PENSTOCK_NATIVE_LIBRARY` is `{named}`: {found}.")
        return found
    wanted = os.environ.get("PENSTOCK_ISA")
    if wanted:
        by_name = {isa_name(isa): isa for isa in found.available_isas}
        if wanted not in by_name:
            names = ", ".join(f"`{name}`" for name in by_name)
            raise ConfigError(
                f"`PENSTOCK_ISA` is `{wanted}`, which is not available here.",
                hint=f"leave it out, or use one of {names}",
            )
        found.set_isa(by_name[wanted])
    return found


def _open(path: Path) -> Library | str:
    """The library of a file, or why it cannot be used."""
    try:
        return Library(path)
    except ValueError as error:
        return str(error)
    except OSError as error:
        if path.is_file():
            return f"`{path}` cannot be loaded: {error}"
        return f"this installation has no native library (`{path}` does not exist)"
