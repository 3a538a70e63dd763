"""Blocks, warps and stages of every kernel compile for an A100 and an H100 and pass the gates.

`make gpu-proof` takes every configuration, and all chips.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mtl_fast.kernels.triton import interpreted

pytest.importorskip("triton")
if interpreted():
    pytest.skip("in this process kernels are interpreted, not compiled", allow_module_level=True)

from mtl_fast.kernels.triton import shipped as shipping
from mtl_fast.kernels.triton.ahead import CHIPS
from mtl_fast.kernels.triton.inspection import faults, kept_or_inspected
from mtl_fast.kernels.triton.shipped import configurations, distinct, shipped
from tests.gpu import budgets
from tools.gpu_proof import INSPECTIONS

pytestmark = pytest.mark.proof

LAUNCHES = {chip: shipped(chip) for chip in ("sm_80", "sm_90")}
CONFIGURATIONS = {chip: configurations(launches) for chip, launches in LAUNCHES.items()}
BUDGETS = budgets.read()


@pytest.mark.parametrize(
    ("name", "chip"),
    [
        (name, chip)
        for chip, names in CONFIGURATIONS.items()
        for name in configurations({name: LAUNCHES[chip][name] for name in names}, by_switch=False)
    ],
)
def test_shipped_launch_passes_the_gates(name: str, chip: str) -> None:
    launch = LAUNCHES[chip][name]
    found = kept_or_inspected(launch, chip, INSPECTIONS)
    # A Triton that nobody stored budgets for has the other gates; `make gpu-proof` asks for budgets of its two.
    longest = (
        budgets.longest_loop(BUDGETS, name, chip) if budgets.version("triton") in BUDGETS else found.loop
    )
    wrong = faults(launch, found, longest)
    assert not wrong, f"{name} for {chip}: {'; '.join(wrong)}"


def test_every_kernel_is_shipped() -> None:
    """One that nobody compiles would be proven by nothing; what kernels share has other names."""
    folder = Path(str(shipping.__file__)).parent
    kernels = {
        name
        for path in folder.glob("*.py")
        for name in re.findall(r"^def (\w+_kernel)\(", path.read_text("utf-8"), re.MULTILINE)
    }
    assert kernels == {launch.name for launch in LAUNCHES["sm_80"].values()}


@pytest.mark.parametrize("chip", CHIPS)
def test_budgets_are_those_of_the_shipped_configurations(chip: str) -> None:
    launches = LAUNCHES.get(chip) or shipped(chip)
    for version, stored in BUDGETS.items():
        known = {name for name, row in stored.items() if row[list(CHIPS).index(chip)] is not None}
        assert known == set(configurations(launches)), f"Triton {version}: run make kernel-budgets"
        assert set(launches) == set(LAUNCHES["sm_80"]), "a chip has other launches"


def test_what_compiles_alike_is_compiled_once() -> None:
    launches, chosen = LAUNCHES["sm_80"], CONFIGURATIONS["sm_80"]
    groups = distinct(launches)
    assert sorted(name for names in groups.values() for name in names) == sorted(launches)
    assert len(chosen) <= len(groups) < len(launches)
    # One kernel for half types and one for float32 products: their blocks are not the same.
    products = {name for name in chosen if launches[name].work.matrix}
    assert {launches[name].constants.get("PRECISION") for name in products} >= {"ieee", "tf32"}


def test_budgets_are_written_as_they_are_read(tmp_path: Path) -> None:
    path = tmp_path / "budgets.json"
    lengths = {"b": dict.fromkeys(CHIPS, 7), "a": {c: i for i, c in enumerate(CHIPS)}}
    budgets.write(lengths, CHIPS, path)
    budgets.write(lengths, CHIPS, path)
    assert list(budgets.read(path)) == [budgets.version("triton")]
    assert budgets.longest_loop(budgets.read(path), "a", "sm_90") == list(CHIPS).index("sm_90")
    assert budgets.longest_loop(budgets.read(path), "c", "sm_90") is None
    # Of the chips that were looked at, what another launch stands for now goes.
    budgets.write({"a": {"sm_80": 100}, "c": {"sm_80": 5}}, ["sm_80"], path)
    stored = budgets.read(path)
    found = {
        name: [budgets.longest_loop(stored, name, chip) for chip in ("sm_80", "sm_86")] for name in "abc"
    }
    assert found == {"a": [100, 1], "b": [None, 7], "c": [5, None]}
    assert len(path.read_text().splitlines()) == 7
    budgets.write({"a": {"sm_80": 1}}, CHIPS, path)
    assert budgets.read(path) == {budgets.version("triton"): {"a": [1] + [None] * 5}}
