"""The PTX of the inner loop and of its gradients, executed, against the loop through autograd in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mtl_fast.kernels.triton.base_learner import fit
from mtl_fast.kernels.triton.base_learner_backward import fit_backward
from tests.base_learner_cases import ORDERS, Problem, Size, assert_near, make, plain, tolerance
from tests.gpu.conv_backward_cases import poisoned
from tests.gpu.execution.cases import EPS32, by_chip
from tests.gpu.ptx.launcher import emulated

pytestmark = pytest.mark.proof
LR = 0.1
SIZES = {
    "primes": Size(2, 5, 13, 11, 37, 3),
    "one row more than a block": Size(1, 9, 17, 3, 33, 2),
    "streamed": Size(1, 20, 65, 5, 19, 2),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


# The largest kernels take long: they are executed in one dtype.
CASES = {
    f"{name}, {kind}": (size, kind)
    for name, size in SIZES.items()
    for kind in DTYPES
    if name == "primes" or kind == "fp32"
}


def problem(size: Size, dtype: torch.dtype) -> Problem:
    """Embeddings of norm about 3 in a dtype, a float32 head; NaN and a wrong label where masked out."""
    p = make(size, masked=True)
    scale = 3 / size.n_features**0.5
    support = torch.where(p.mask.unsqueeze(2), p.support * scale, math.nan)
    return Problem(
        poisoned(support.to(dtype)),
        poisoned(torch.where(p.mask, p.labels, -7)),
        poisoned((p.query * scale).to(dtype)),
        poisoned(p.weight.float()),
        poisoned(p.bias.float()),
        poisoned(p.mask),
    )


@by_chip
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("size", "kind"), CASES.values(), ids=CASES)
def test_values_and_gradients(chip: str, kind: str, order: str, size: Size) -> None:
    check(chip, chip, kind, order, size)


def test_the_configuration_of_sm_120() -> None:
    """Its stages are others: executed as sm_80's code."""
    check("sm_80", "sm_120", "fp32", "first", SIZES["one row more than a block"])


def check(chip: str, configured: str, kind: str, order: str, size: Size) -> None:
    p, second = problem(size, DTYPES[kind]), order == "second"
    exact = p.to(torch.float64).with_graph()
    expected = plain(exact, inner_lr=LR, n_steps=size.n_steps, order=order)
    g = torch.Generator().manual_seed(1)
    d_logits = poisoned(torch.randn(expected.shape, generator=g))
    gradients: list[Tensor] = list(
        torch.autograd.grad(expected, exact.leaves, d_logits.double(), allow_unused=True)
    )
    with emulated(chip, configured) as launches:
        logits, head, _, kernel, trajectory = fit(
            p.support, p.labels, p.query, p.weight, p.bias, p.mask, LR, size.n_steps, second
        )
        given = (d_logits, None, None, p.support, p.labels, p.query, p.weight, p.bias, p.mask)
        found = fit_backward(*given, head, kernel, trajectory, LR, size.n_steps, second, [True, True, True])
    assert len(launches) == (4 if second else 2)
    # The steps' roundings; the sums over queries and, for the shared head, tasks; one rounding to the dtype.
    bound = tolerance(size, LR * 9 / size.n_features, torch.float32) + EPS32 * math.sqrt(
        size.m * size.n_tasks
    )
    assert_near(logits, expected, bound)
    for name, actual, wanted in zip(("support", "query", "weight", "bias"), found, gradients, strict=True):
        wanted = torch.zeros_like(actual).double() if wanted is None else wanted
        assert_near(actual.double(), wanted, bound + torch.finfo(actual.dtype).eps, name)
