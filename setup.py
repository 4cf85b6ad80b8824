"""Builds the native CPU library with CMake beside the Python sources.

A machine without a C++ compiler gets a package that works without it, on torch: the extension is
optional, and `penstock doctor` says what is missing. Everything else is in pyproject.toml.
"""

from __future__ import annotations

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

    def build_extension(self, ext: Extension) -> None:
        """Configure, build and copy the library. A failure is a warning: `ext` is optional."""
        build = Path(self.build_temp).resolve() / "native"
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        configure = ["cmake", "-S", str(ROOT / "csrc"), "-B", str(build), *generator]
        try:
            subprocess.run([*configure, "-DCMAKE_BUILD_TYPE=Release"], check=True)
            subprocess.run(
                ["cmake", "--build", str(build), "--parallel", "--target", "penstock_native"],
                check=True,
            )
        except (OSError, subprocess.CalledProcessError) as error:
            from setuptools.errors import CompileError

            raise CompileError(f"the native CPU library was not built: {error}") from error
        target = Path(self.get_ext_fullpath(ext.name))
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


setup(
    ext_modules=[Extension("penstock.native.library_file", sources=[], optional=True)],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel},
)
