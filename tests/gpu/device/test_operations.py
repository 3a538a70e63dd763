"""Operations on the `triton` backend with their tensors on a GPU, in every dtype, against float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.gpu.checks import CONVOLUTIONS, check_base_learner, check_ss_conv

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["tf32", "fp16", "bf16"]
)


@pytest.fixture(autouse=True)
def tf32() -> Iterator[None]:
    """Without TF32 float32 convolutions are cuDNN's."""
    with torch.backends.cudnn.flags(allow_tf32=True):
        yield


@DTYPES
@pytest.mark.parametrize("granularity", ["kernel", "filter"])
@pytest.mark.parametrize("shape", CONVOLUTIONS.values(), ids=CONVOLUTIONS.keys())
def test_ss_conv(shape: tuple[int, ...], granularity: str, dtype: torch.dtype) -> None:
    check_ss_conv(shape, granularity, dtype, CUDA)


@DTYPES
@pytest.mark.parametrize("order", ["first", "second"])
def test_base_learner(order: str, dtype: torch.dtype) -> None:
    check_base_learner(dtype, CUDA, order=order)
