"""The assembler moves what the emulator lets pass: no register of a product is written behind its fence."""

from __future__ import annotations

import pytest

from mtl_fast.kernels.triton.ahead import compile_launch
from mtl_fast.kernels.triton.machine_code import count, instructions_and_loops
from mtl_fast.kernels.triton.shipped import configurations, shipped
from tests.gpu.ptx.warpgroup_order import FENCE, late_writes

pytestmark = pytest.mark.proof

LAUNCHES = {name: launch for name, launch in shipped("sm_90").items() if launch.work.matrix}
PRODUCTS = configurations({name: LAUNCHES[name] for name in configurations(LAUNCHES)}, by_switch=False)


@pytest.mark.parametrize("name", PRODUCTS)
def test_shipped_products_get_no_register_behind_their_fence(name: str) -> None:
    instructions, _ = instructions_and_loops(compile_launch(LAUNCHES[name], "sm_90").machine_code)
    assert count(instructions, FENCE)
    assert count(instructions, "HGMMA")
    assert late_writes(instructions) == []


GOOD = [
    "MOV R24, RZ",
    "WARPGROUP.ARRIVE",
    "IMAD.MOV.U32 R22, RZ, RZ, R4",
    "HGMMA.64x64x16.F32.BF16 R24, R4, gdesc[UR8].tnspB, R24, gsb0",
    "STG.E R24, R30",
    "WARPGROUP.DEPBAR.LE gsb0, 0x0",
    "MOV R24, R3",
    "WARPGROUP.ARRIVE",
    "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24, gsb0",
]


@pytest.mark.parametrize(
    "late",
    [
        "MOV R55, RZ",
        "LDS.128 R4, [R60]",
        "IMAD.WIDE R54, R2, R3, R6",
        "ISETP.GE.AND P0, PT, R6, 0x4, PT",
        "VIADD R7, R0, 0x1",
    ],
)
def test_planted_write_behind_the_fence(late: str) -> None:
    assert late_writes(GOOD) == []
    found = late_writes([*GOOD[:3], late, *GOOD[3:]])
    assert found == ([] if late.startswith("ISETP") else [late])
