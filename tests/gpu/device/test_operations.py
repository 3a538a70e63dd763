"""Operations on the `triton` backend with their tensors on a GPU, in every dtype and by both routes, against float64."""

from __future__ import annotations

import pytest
import torch

from tests.gpu.checks import PRECISIONS, every_check, run_check

CASES = every_check(PRECISIONS)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_operation(name: str) -> None:
    run_check(*CASES[name], torch.device("cuda"))
