"""Builds the native CPU library with CMake beside the Python sources.

A machine without a C++ compiler gets a package that works without it, on torch: the extension is
optional, and `penstock doctor` says what is missing. With PENSTOCK_REQUIRE_NATIVE=1, as the
Makefile sets it for developers, it is not optional. Everything else is in pyproject.toml.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
LIBRARY = "libpenstock_native.so"


class BuildNative(build_ext):
    """Runs CMake; the library has no Python in it and so no Python version in its name."""

    def get_ext_filename(self, fullname: str) -> str:
        """Where the library lies in the package."""
        return str(Path(*fullname.split(".")[:-1]) / LIBRARY)

    def run(self) -> None:
        """Build anew: where that fails there is no library, rather than an older one."""
        for ext in self.extensions:
            built = Path(self.build_lib, self.get_ext_filename(self.get_ext_fullname(ext.name)))
            built.unlink(missing_ok=True)
            Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
        super().run()

    def build_extension(self, ext: Extension) -> None:
        """Configure, build and copy the library. A failure is a warning if `ext` is optional."""
        try:
            self._build(Path(self.get_ext_fullpath(ext.name)))
        except (OSError, subprocess.CalledProcessError) as error:
            from setuptools.errors import CompileError

            raise CompileError(f"the native CPU library was not built: {error}") from error

    def _build(self, target: Path) -> None:
        build = Path(self.build_temp).resolve() / "native"
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        configure = ["cmake", "-S", str(ROOT / "csrc"), "-B", str(build), *generator]
        # Where pip built last time, ninja and this directory may have been elsewhere, or not at
        # all; CMake would insist on what it remembers. What was compiled is kept.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        subprocess.run([*configure, "-DCMAKE_BUILD_TYPE=Release"], check=True)
        jobs = ["--parallel", str(os.cpu_count() or 1), "--target", "penstock_native"]
        subprocess.run(["cmake", "--build", str(build), *jobs], check=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        # A new file in place of the old one: a process that has mapped the old one keeps it.
        fresh = target.with_suffix(".new")
        shutil.copy(build / LIBRARY, fresh)
        fresh.replace(target)


class PlatformWheel(bdist_wheel):
    """One wheel for every Python 3 on this platform."""

    def get_tag(self) -> tuple[str, str, str]:
        """Python, ABI and platform tags."""
        return ("py3", "none", super().get_tag()[2])


IS_REQUIRED = os.environ.get("PENSTOCK_REQUIRE_NATIVE", "0") not in {"", "0"}

setup(
    ext_modules=[
        Extension("penstock.native.library_file", sources=[], optional=not IS_REQUIRED),
    ],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel},
)
