"""Each gate of a compiled kernel lets a good one pass, and sees its fault in one that has it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mtl_fast.kernels.triton import inspection, interpreted
from mtl_fast.kernels.triton.ahead import CHIPS
from mtl_fast.kernels.triton.inspection import Inspection, faults, inspect, kept_or_inspected, resident

pytest.importorskip("triton")
from mtl_fast.kernels.triton import ss_conv
from tests.gpu import planted

pytestmark = [
    pytest.mark.proof,
    pytest.mark.skipif(interpreted(), reason="in this process kernels are interpreted, not compiled"),
]


def faults_of(chip: str, longest_loop: int | None = 1000, **fault: Any) -> list[str]:
    launch = planted.launch(**fault)
    return faults(launch, inspect(launch, chip), longest_loop)


@pytest.mark.parametrize("chip", CHIPS)
def test_a_good_kernel_passes_every_gate(chip: str) -> None:
    assert faults_of(chip) == []


@pytest.mark.parametrize("chip", ["sm_80", "sm_90"])
def test_planted_spilling_configuration(chip: str) -> None:
    """A shipped convolution, and a tile of it that its warps have no registers for."""
    launch = next(launch for _, launch in ss_conv.shipped() if launch.name == "ss_conv_kernel")
    assert faults(launch, inspect(launch, chip), 10_000) == []
    wide = replace(
        launch, constants=launch.constants | {"BLOCK_M": 256, "BLOCK_N": 128}, num_warps=4, num_stages=2
    )
    (fault,) = faults(wide, inspect(wide, chip), 10_000)
    assert fault.startswith("spills: ")


def test_planted_launch_bounds_beyond_the_registers() -> None:
    """Sixteen programs of four warps leave a thread 32 registers: the assembler is told, and spills."""
    launch = planted.launch()
    assert inspect(replace(launch, programs=2), "sm_80").spilled == 0
    found = inspect(replace(launch, programs=16), "sm_80")
    assert found.registers <= 32
    assert found.spilled > 0


@pytest.mark.parametrize("chip", ["sm_80", "sm_90"])
def test_planted_missing_tensor_core(chip: str) -> None:
    found = faults_of(
        chip, longest_loop=100_000, dtype=torch.float32, precision="ieee", block_m=16, block_n=16
    )
    assert found == [f"its products run on no tensor core, not on {CHIPS[chip].matrix}"]


def test_planted_instruction_of_an_older_chip() -> None:
    """Of 16 rows the compiler makes no instruction for four warps together."""
    assert faults_of("sm_90", block_m=16) == ["its products run on HMMA.16816.F32.BF16, not on HGMMA"]


def test_planted_shared_memory_beyond_the_chip() -> None:
    deep = {"block_m": 128, "block_n": 128, "num_stages": 5, "num_warps": 8}
    assert faults_of("sm_80", **deep) == []
    (fault,) = faults_of("sm_86", block_k=64, **deep)
    assert fault == f"{4 * 2 * 128 * 64 * 2} bytes of shared memory; sm_86 gives a program {99 * 1024}"


@pytest.mark.parametrize("chip", ["sm_80", "sm_90"])
def test_planted_synchronous_loads(chip: str) -> None:
    assert faults_of(chip, scatters=True) == [
        "3 stages are asked for, and the main loop waits for its loads: nothing is copied asynchronously"
    ]
    assert faults_of(chip, scatters=True, num_stages=1) == []


@pytest.mark.parametrize("chip", ["sm_80", "sm_90"])
def test_planted_division_in_the_main_loop(chip: str) -> None:
    assert faults_of(chip, divides=True) == ["the main loop divides whole numbers"]


def test_planted_loop_longer_than_its_budget() -> None:
    length = inspect(planted.launch(), "sm_80").loop
    assert length > 20
    assert faults_of("sm_80", longest_loop=length) == []
    (fault,) = faults_of("sm_80", longest_loop=length - 1)
    assert fault == f"the main loop has {length} instructions, more than the {length - 1} allowed"
    (fault,) = faults_of("sm_80", longest_loop=None)
    assert fault.startswith("no budget is stored")


def test_a_multiprocessor_holds_what_its_scarcest_resource_allows() -> None:
    chip = CHIPS["sm_80"]
    assert resident(chip, num_warps=4, registers=32, shared=0) == 2048 // 128
    assert resident(chip, num_warps=8, registers=128, shared=0) == 65536 // (128 * 256)
    assert resident(chip, num_warps=8, registers=129, shared=0) == 65536 // (136 * 256)
    assert resident(chip, num_warps=1, registers=16, shared=40 * 1024) == 4
    assert resident(chip, num_warps=1, registers=16, shared=163 * 1024) == 1
    assert resident(chip, num_warps=1, registers=16, shared=164 * 1024) == 0


def test_what_was_inspected_is_plain_data() -> None:
    found = inspect(planted.launch(), "sm_90")
    assert found == Inspection(**vars(found))
    assert (found.chip, found.num_warps, found.spilled) == ("sm_90", 4, 0)
    assert found.matrix.startswith("HGMMA.64x64x16")
    # One pass is one step of BLOCK_K.
    assert found.loop_flop == 2 * 64 * 64 * 32


def test_a_code_is_inspected_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = planted.launch()
    found = kept_or_inspected(launch, "sm_80", tmp_path)
    assert found == inspect(launch, "sm_80")
    monkeypatch.setattr(inspection, "inspect", lambda *_: pytest.fail("compiled again"))
    assert kept_or_inspected(launch, "sm_80", tmp_path) == found
    # Another size of the grid is the same code.
    assert kept_or_inspected(replace(launch, grid=(7,)), "sm_80", tmp_path) == found


def test_what_compiles_differently_is_another_code() -> None:
    launch = planted.launch()
    others = [
        replace(launch, num_warps=8),
        replace(launch, num_stages=2),
        replace(launch, programs=2),
        planted.launch(block_k=16),
        planted.launch(dtype=torch.float16),
        planted.launch(k=520),
    ]
    digests = {inspection.digest(launch, chip) for chip in CHIPS}
    digests |= {inspection.digest(other, "sm_80") for other in others}
    assert len(digests) == len(CHIPS) + len(others)
