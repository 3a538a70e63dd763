"""Operations on the `triton` backend, interpreted; `device/test_operations.py` makes the same checks on a GPU."""

from __future__ import annotations

import pytest
import torch

from tests.gpu.checks import PRECISIONS, every_check, run_check

# The interpreter has no TF32, and computes bfloat16 wrongly; cuDNN's route in float16 is `test_routes.py`'s.
CASES = {
    name: check
    for name, check in every_check({name: PRECISIONS[name] for name in ("fp32", "fp16")}).items()
    if check[2:] != ("fp16", "cudnn")
}


@pytest.mark.parametrize("name", CASES)
def test_operation(name: str) -> None:
    run_check(*CASES[name], torch.device("cpu"))
