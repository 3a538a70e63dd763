"""The PTX of batch statistics and normalisation and of their gradients, executed, against float64."""

from __future__ import annotations

import pytest
import torch

from mtl_fast.kernels.contracts import ChannelNorm, Epilogue
from mtl_fast.kernels.reference.episode_norm import _plainly
from mtl_fast.kernels.reference.ss_conv import apply_epilogue
from mtl_fast.kernels.triton.episode_norm import episode_norm
from mtl_fast.kernels.triton.episode_norm_backward import episode_norm_backward
from mtl_fast.kernels.triton.launch import Launch
from mtl_fast.ops._epilogue_codes import ACTIVATIONS
from tests.base_learner_cases import assert_near
from tests.conv_cases import Random
from tests.gpu.conv_backward_cases import images, poisoned
from tests.gpu.execution.cases import EPS32, by_chip
from tests.gpu.ptx.launcher import emulated

pytestmark = pytest.mark.proof
EPS = 1e-5


@by_chip
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"]
)
@pytest.mark.parametrize(("form", "masked"), [("common pooled", True), ("tensorflow", False)])
def test_values_and_gradients(chip: str, dtype: torch.dtype, form: str, masked: bool) -> None:
    check_values_and_gradients(chip, dtype, form, masked, (6, 17, 5, 3))


@by_chip
def test_groups_in_parts(chip: str) -> None:
    """Two parts of several blocks with a rest, joined by a launch of its own; two blocks of channels with a rest."""
    launches = check_values_and_gradients(chip, torch.bfloat16, "tensorflow", True, (6, 37, 23, 31))
    assert [(launch.name, launch.grid) for launch in launches[:2]] == [
        ("statistics_kernel", (2, 2, 2)),
        ("merge_kernel", (2, 3)),
    ]


def check_values_and_gradients(
    chip: str, dtype: torch.dtype, form: str, masked: bool, shape: tuple[int, int, int, int]
) -> list[Launch]:
    """Of two groups of three images, against float64; the launches."""
    epilogue = Epilogue("after_residual", 0.1, pool=True) if "common" in form else Epilogue("before_residual")
    random = Random(1)
    z, residual = (images(random, *shape, dtype=dtype) for _ in range(2))
    weight, bias = (poisoned(random.normal(shape[1]).float()) for _ in range(2))
    mask = poisoned(torch.tensor([True, False, True, True, True, False])) if masked else None
    leaves = [t.double().requires_grad_() for t in (z, weight, bias, residual)]
    normalised = _plainly(leaves[0], ChannelNorm(None, None, leaves[1], leaves[2], EPS), 2, mask)
    expected = apply_epilogue(normalised.output, epilogue, leaves[3])
    grad = images(random, *expected.shape, dtype=dtype)
    counted = torch.ones(6, dtype=torch.bool) if mask is None else mask
    if masked:
        grad[~counted] = 0
    place = ACTIVATIONS.index(epilogue.activation)
    rest = (place, epilogue.slope, epilogue.pool)
    with emulated(chip) as launches:
        out, mean, var, n_values, codes = episode_norm(z, weight, bias, EPS, 2, mask, residual, *rest, True)
        found = episode_norm_backward(
            grad, z, codes, mean, var, n_values, weight, EPS, mask, *rest, True, True
        )
    bound = 8 * EPS32 * (3 * shape[2] * shape[3]) ** 0.5
    assert_near(mean, normalised.mean, bound, "mean")
    assert_near(var, normalised.var, bound, "variance")
    assert torch.equal(n_values.double(), normalised.n_values)
    bound += torch.finfo(dtype).eps
    assert_near(out[counted], expected[counted], bound, "output")
    wanted = torch.autograd.grad(expected, leaves, grad.double())
    for name, actual, exact in zip(("z", "weight", "bias", "residual"), found, wanted, strict=True):
        assert_near(actual, exact, bound, name)
    return launches
