"""The PTX of `images`, executed: equal to the bit to the reference."""

from __future__ import annotations

import pytest
import torch

from mtl_fast.kernels.reference.images import images as reference
from mtl_fast.kernels.triton.images import images
from tests.gpu.conv_backward_cases import poisoned
from tests.gpu.execution.cases import by_chip
from tests.gpu.ptx.launcher import emulated
from tests.ops.test_images import MEAN, STD, arguments, make

pytestmark = pytest.mark.proof


@by_chip
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"]
)
@pytest.mark.parametrize("augment", [False, True], ids=["centre", "cropped and flipped"])
def test_equal_to_the_bit_to_the_reference(chip: str, dtype: torch.dtype, augment: bool) -> None:
    store, size, padding = poisoned(make(5, 23, 31)), (22, 29), 3
    index = torch.tensor([4, 0, 2])
    options = arguments(store, 3, size, padding, augment, augment)
    crop, flip = options.get("crop"), options.get("flip")
    with emulated(chip) as launches:
        got = images(store, poisoned(index), MEAN, STD, crop, flip, size, padding, dtype)
    assert len(launches) == 1
    assert torch.equal(got, reference(store, index, mean=MEAN, std=STD, dtype=dtype, **options))
