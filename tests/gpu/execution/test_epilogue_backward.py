"""The PTX of the way back through activation and pooling, executed, against float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from mtl_fast.kernels.contracts import ChannelNorm, Epilogue
from mtl_fast.kernels.triton import epilogue_backward
from mtl_fast.kernels.triton.epilogue_backward import SavedOutput, unwind
from mtl_fast.kernels.triton.launch import Launch
from tests.conv_cases import Random
from tests.gpu.conv_backward_cases import Saved, assert_within, poisoned, root_sum_of_squares
from tests.gpu.execution.cases import EPS32, TYPES, by_chip, by_type, rounded
from tests.gpu.ptx.launcher import emulated

pytestmark = pytest.mark.proof
# An epilogue, and images whose last windows and channels are masked or not.
CASES = {
    "common, even": (Epilogue("after_residual", 0.1), (2, 64, 6, 4)),
    "common pooled, odd": (Epilogue("after_residual", 0.1, pool=True), (2, 5, 7, 5)),
    "tensorflow pooled, prime": (Epilogue("before_residual", 0.1, pool=True), (3, 67, 3, 5)),
}


@by_chip
@by_type
@pytest.mark.parametrize(("epilogue", "size"), CASES.values(), ids=CASES)
def test_gradients_and_sums(
    chip: str, kind: str, epilogue: Epilogue, size: tuple[int, int, int, int]
) -> None:
    check_unwinding(unwind, chip, kind, epilogue, size)


@by_chip
def test_several_blocks_a_program(chip: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two programs along the windows and three along 160 channels, the last block past the end."""
    few = replace(epilogue_backward.unwind_config(160, True), programs=6)
    monkeypatch.setattr(epilogue_backward, "unwind_config", lambda *_: few)
    pooled = Epilogue("after_residual", 0.1, pool=True)
    launches = check_unwinding(unwind, chip, "bf16", pooled, (2, 160, 7, 11))
    assert launches[0].grid == (2, 3)
    assert launches[0].arguments["n_blocks"] == 2


def check_unwinding(
    unwind: Any, chip: str, kind: str, epilogue: Epilogue, size: tuple[int, int, int, int]
) -> list[Launch]:
    """Images, sums and a filter's scale by a launcher of the kernel, whose launches it returns."""
    dtype = TYPES[kind]
    saved = Saved(size, epilogue, dtype, residual=True)
    random, n_channels = Random(5, torch.float32), size[1]
    norm = ChannelNorm(random.normal(n_channels), poisoned(random.positive(n_channels)), None, None)
    scale, shift = random.positive(n_channels, 1, 1, 1), random.normal(n_channels)
    by_output = SavedOutput(poisoned(scale), saved.y, saved.residual, poisoned(shift))
    with emulated(chip) as launches:
        got = unwind(
            saved.grad,
            saved.codes,
            epilogue=epilogue,
            size=saved.size,
            norm=norm,
            dtype=torch.float32,
            saved=by_output,
        )
    assert len(launches) == 2
    inner = saved.inner()
    expected = saved.scattered(inner)
    # The slope itself is rounded to float32.
    assert_within(got.inner, expected, rounded(expected, dtype) + EPS32 * expected.abs(), "G")
    factor = 1 / (norm.var.double() + norm.eps).sqrt()
    n_terms = inner[:, 0].numel() + 8
    bound = EPS32 * n_terms**0.5 * root_sum_of_squares(inner) * factor
    assert_within(got.shift, inner.sum(dim=(0, 2, 3)) * factor, bound, "shift")
    wide = [t.double().view(1, -1, 1, 1) for t in (scale, shift)]
    terms = inner * (saved.at_codes(saved.z) - wide[1]) / wide[0]
    up = torch.where((saved.codes & 4) != 0, 1.0, 1 / epilogue.slope)
    residual = saved.at_codes(saved.residual.double()).abs()
    parts = (saved.y.double().abs() + residual) * up + wide[1].abs()
    relative = torch.finfo(dtype).eps + EPS32 * n_terms**0.5
    assert_within(
        got.scale, terms.sum(dim=(0, 2, 3)), relative * root_sum_of_squares(inner * parts / wide[0]), "scale"
    )
    return launches
