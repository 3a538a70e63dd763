"""Builds mtl_fast. The metadata lives in pyproject.toml; here is what that file cannot say.

`mtl_fast/kernels` is a committed symbolic link to `kernels/`, so that one folder is both the house's
first floor and the package `mtl_fast.kernels`. The package finder follows the link, hence wheels hold
real files there; a checkout that lost the link would build a package without its floor, so it is refused.
"""

from __future__ import annotations

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent

if not (ROOT / "mtl_fast" / "kernels" / "__init__.py").is_file():
    raise SystemExit(
        "mtl_fast/kernels must be a symbolic link to ../kernels, and this checkout has none; "
        "run `git config core.symlinks true && git checkout -- mtl_fast/kernels`"
    )

# Only what is under mtl_fast: top-level kernels, bench, tests and tools are never installed by themselves.
setup(packages=find_packages(str(ROOT), include=["mtl_fast", "mtl_fast.*"]))
