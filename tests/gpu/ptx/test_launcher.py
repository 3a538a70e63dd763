"""Launches executed, their memory followed from one to the next: with a small kernel, not the project's."""

from __future__ import annotations

import pytest
import torch

from mtl_fast.kernels.triton.launch import Launch
from tests.gpu.ptx.faults import Uninitialised
from tests.gpu.ptx.launcher import emulated, run
from tests.gpu.ptx.samples import soft_maximum_launch

pytestmark = pytest.mark.proof
by_chip = pytest.mark.parametrize("chip", ["sm_80", "sm_90"])


def made(dtype: torch.dtype = torch.float32, warps: int = 4) -> tuple[Launch, torch.Tensor]:
    x = torch.randn(19, 13, generator=torch.Generator().manual_seed(0)).to(dtype)
    out, best = torch.empty_like(x), torch.empty(19, dtype=torch.uint8)
    return soft_maximum_launch(x, out, best, torch.empty(19), warps=warps), x


@by_chip
@pytest.mark.parametrize("warps", [1, 4], ids=["a warp", "four warps"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_reductions_and_functions(chip: str, warps: int, dtype: torch.dtype) -> None:
    launch, x = made(dtype, warps)
    _, out, best, total = (launch.arguments[name] for name in ("p_x", "p_out", "p_best", "p_sum"))
    run(launch, chip, [out, best, total])
    expected = x.double().softmax(1)
    # exp of a sum of two, 13 terms, a quotient, each rounded; then the store.
    bound = 8 * torch.finfo(torch.float32).eps * (1 + x.double().abs().max()) + torch.finfo(dtype).eps / 2
    assert ((out.double() - expected).abs() <= bound * expected).all()
    ties = x == x.max(1, keepdim=True).values
    assert torch.equal(best.long(), ties.int().argmax(1))
    denominator = (x.double() - x.double().max(1, keepdim=True).values).exp().sum(1).log()
    assert (total.double() - denominator).abs().max() <= 8 * torch.finfo(torch.float32).eps * 4


def test_what_counts_as_never_written() -> None:
    launch, x = made()
    with pytest.raises(Uninitialised, match="p_x"):
        run(launch, uninitialised=[x])


def test_empty_tensors_are_followed_through_launches() -> None:
    with emulated("sm_80") as launches:
        launch, _ = made()
        launch.run()
        out = launch.arguments["p_out"]
        again = soft_maximum_launch(
            out, torch.empty_like(out), torch.empty(19, dtype=torch.uint8), torch.empty(19)
        )
        again.run()
        unknown = torch.empty(19, 13)
        third = soft_maximum_launch(unknown, out, torch.empty(19, dtype=torch.uint8), torch.empty(19))
        with pytest.raises(Uninitialised):
            third.run()
        unknown.zero_()
        third.run()
    assert len(launches) == 4
