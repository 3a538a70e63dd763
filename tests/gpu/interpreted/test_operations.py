"""Operations on the `triton` backend, interpreted; `device/test_operations.py` makes the same checks on a GPU."""

from __future__ import annotations

import pytest
import torch

from tests.gpu.checks import CONVOLUTIONS, check_base_learner, check_ss_conv

CPU = torch.device("cpu")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])


@DTYPES
@pytest.mark.parametrize("granularity", ["kernel", "filter"])
@pytest.mark.parametrize("shape", CONVOLUTIONS.values(), ids=CONVOLUTIONS.keys())
def test_ss_conv(shape: tuple[int, ...], granularity: str, dtype: torch.dtype) -> None:
    check_ss_conv(shape, granularity, dtype, CPU)


@DTYPES
@pytest.mark.parametrize("order", ["first", "second"])
def test_base_learner(order: str, dtype: torch.dtype) -> None:
    check_base_learner(dtype, CPU, order=order)
