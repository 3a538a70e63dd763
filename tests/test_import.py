"""The names of the package: each found where the table says, and none loaded before it is asked for."""

from __future__ import annotations

import subprocess
import sys

import pytest

import mtl_fast


@pytest.mark.parametrize("name", mtl_fast.__all__)
def test_every_public_name_resolves(name: str) -> None:
    assert getattr(mtl_fast, name).__name__ == name


def test_table_and_public_names_agree() -> None:
    assert sorted(mtl_fast._HOME) == sorted(mtl_fast.__all__)
    assert set(mtl_fast.__all__) <= set(dir(mtl_fast))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'ResNet13'"):
        _ = mtl_fast.ResNet13  # type: ignore[attr-defined]


def test_importing_the_package_loads_no_torch() -> None:
    code = "import sys, mtl_fast; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
