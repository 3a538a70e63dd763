"""Builds mtl_fast. The metadata lives in pyproject.toml; here is what that file cannot say.

`mtl_fast/kernels` is a committed symbolic link to `kernels/`, so that one folder is both the house's
first floor and the package `mtl_fast.kernels`. The package finder follows the link, hence wheels hold
real files there; a checkout that lost the link would build a package without its floor, so it is refused.

A wheel also holds the native kernels, one library a vector width, where they can be compiled; without them
everything runs on plain PyTorch. An editable install compiles nothing: that is what `mtl-fast build` is for.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from pathlib import Path
from types import ModuleType

from setuptools import find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
NATIVE = Path("mtl_fast", "kernels", "native")

if not (ROOT / "mtl_fast" / "kernels" / "__init__.py").is_file():
    raise SystemExit(
        "mtl_fast/kernels must be a symbolic link to ../kernels, and this checkout has none; "
        "run `git config core.symlinks true && git checkout -- mtl_fast/kernels`"
    )


def native_build() -> ModuleType:
    """`kernels/native/build.py` by itself: the package around it needs not be installable yet.

    Raises:
        ImportError: torch is missing; pip builds in an environment of its own unless told --no-build-isolation.
    """
    spec = importlib.util.spec_from_file_location("mtl_fast_native_build", ROOT / NATIVE / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class BuildWithKernels(build_py):
    """Copies the Python files, then compiles the native kernels beside them."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        reason = self._compile()
        if reason:
            print(f"mtl_fast is built without native kernels: {reason}")

    def _compile(self) -> str | None:
        """Every variant of this machine; returns why none was compiled."""
        if os.environ.get("MTL_FAST_NO_NATIVE", "0") not in ("", "0"):
            return "MTL_FAST_NO_NATIVE is set"
        try:
            native = native_build()
        except ImportError as error:
            return f"{error} (torch is found with pip's --no-build-isolation)"
        variants = native.VARIANTS.get(platform.machine(), ())
        if not variants:
            return f"there are none for {platform.machine()}"
        objects = Path(self.get_finalized_command("build").build_temp, "native")
        try:
            native.build(Path(self.build_lib) / NATIVE, variants, objects=objects.resolve())
        except native.NoCompilerError as error:
            return str(error)
        return None


class WheelWithKernels(bdist_wheel):
    """A wheel with libraries is for one platform and for any Python: they link against torch alone."""

    def get_tag(self) -> tuple[str, str, str]:
        if not any(Path(self.bdist_dir).rglob("libmtl_fast*.so")):
            return super().get_tag()
        self.root_is_pure = False
        return "py3", "none", super().get_tag()[2]


setup(
    # Only what is under mtl_fast: top-level kernels, bench, examples, tests and tools are never installed by themselves.
    packages=find_packages(str(ROOT), include=["mtl_fast", "mtl_fast.*"]),
    cmdclass={"build_py": BuildWithKernels, "bdist_wheel": WheelWithKernels},
)
