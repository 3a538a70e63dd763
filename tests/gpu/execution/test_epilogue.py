"""The PTX of the pass that follows cuDNN's products, executed, against float64."""

from __future__ import annotations

import pytest
import torch

from mtl_fast.kernels.contracts import Epilogue
from mtl_fast.kernels.triton.epilogue import finished
from tests.conv_cases import Random
from tests.gpu.conv_backward_cases import images, poisoned
from tests.gpu.execution.cases import assert_epilogue, by_chip
from tests.gpu.ptx.launcher import emulated

pytestmark = pytest.mark.proof
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
EPILOGUES = {
    "plain": Epilogue(),
    "common": Epilogue("after_residual", 0.1),
    "common pooled": Epilogue("after_residual", 0.1, pool=True),
    "tensorflow pooled": Epilogue("before_residual", 0.1, pool=True),
}
# [N, O, H, W], the epilogue, whether there is a residual, and programs by rows and by channels: the last with a rest.
CASES = {
    "one value": ((1, 1, 1, 1), "plain", False, (1, 1)),
    "prime": ((3, 67, 7, 5), "common", True, (4, 2)),
    "prime pooled": ((3, 67, 7, 5), "common pooled", False, (3, 2)),
    "160 pooled": ((1, 160, 11, 7), "tensorflow pooled", True, (2, 3)),
    "few channels": ((5, 7, 5, 7), "common pooled", True, (1, 1)),
}


@by_chip
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("shape", "form", "added", "grid"), CASES.values(), ids=CASES)
def test_what_follows_a_product(
    chip: str,
    dtype: torch.dtype,
    shape: tuple[int, int, int, int],
    form: str,
    added: bool,
    grid: tuple[int, int],
) -> None:
    epilogue = EPILOGUES[form]
    random = Random(7)
    z = images(random, *shape, dtype=dtype)
    residual = images(random, *shape, dtype=dtype) if added else None
    shift = random.normal(shape[1]).float()
    with emulated(chip) as launches:
        # Evaluation has no way back and keeps no codes.
        got = finished(z, poisoned(shift), residual=residual, epilogue=epilogue, save=added)
    assert [(launch.name, launch.grid) for launch in launches] == [("epilogue_kernel", grid)]
    assert (got[1] is not None) == (added and epilogue.activation != "none")
    # What is read is known to the bit: only the sums that follow it round.
    exact = z.double() + shift.double().view(-1, 1, 1)
    assert_epilogue(got, exact, torch.zeros_like(exact), epilogue, residual)
