"""Faults put in on purpose are caught: the same launches pass without them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from mtl_fast.kernels.contracts import Epilogue
from mtl_fast.kernels.triton import ss_conv
from mtl_fast.kernels.triton.launch import Launch, observed
from tests.conv_cases import Random
from tests.gpu.conv_backward_cases import assert_within
from tests.gpu.execution.cases import EPS32, by_chip, convolved, rounded
from tests.gpu.ptx.faults import EarlyAccess, MissingFence, OutOfBounds, Race, Uninitialised
from tests.gpu.ptx.launcher import emulated, run
from tests.gpu.ptx.samples import convolution_launch, gram_launch

pytestmark = pytest.mark.proof


def shipped_launch() -> Launch:
    """A shipped convolution with a pipeline of copies, in bfloat16; 70 rows of tiles of 64."""
    random = Random(0)
    x = random.images(2, 64, 5, 7).bfloat16()
    weight = random.normal(64, 3, 3, 64).bfloat16()
    with observed() as launches:
        ss_conv.forward(x, weight, None, epilogue=Epilogue(), padding=1, save=False)
    return launches[0]


def without_nth(pattern: str, n: int) -> Callable[[str], str]:
    """PTX without the n-th line that begins so."""

    def alter(ptx: str) -> str:
        found = list(re.finditer(rf"^\s*{pattern}[^\n]*\n", ptx, re.M))
        assert len(found) > n, f"{pattern} occurs {len(found)} times"
        return ptx[: found[n].start()] + ptx[found[n].end() :]

    return alter


def in_the_loop(pattern: str, new: Callable[[re.Match[str]], str]) -> Callable[[str], str]:
    """PTX with the first match behind the label of a loop changed."""

    def alter(ptx: str) -> str:
        start = ptx.index("Inner Loop Header")
        changed, n = re.subn(pattern, new, ptx[start:], count=1)
        assert n == 1, pattern
        return ptx[:start] + changed

    return alter


@by_chip
def test_planted_nothing(chip: str) -> None:
    run(shipped_launch(), chip)


@by_chip
def test_planted_dropped_barrier(chip: str) -> None:
    """Without the loop's barrier threads read what others have copied, or copy over what others still read."""
    with pytest.raises(Race, match="no barrier"):
        run(shipped_launch(), chip, alter=in_the_loop(r"bar\.sync[^;]*;", lambda _: ""))


@by_chip
def test_planted_early_read_of_a_copy(chip: str) -> None:
    """One more group may be under way than there is room for."""
    weaker = in_the_loop(
        r"cp\.async\.wait_group\s+(\d+)", lambda match: f"cp.async.wait_group {int(match[1]) + 1}"
    )
    with pytest.raises(EarlyAccess, match="has not delivered"):
        run(shipped_launch(), chip, alter=weaker)


def test_planted_missing_fence_of_proxies() -> None:
    with pytest.raises(MissingFence, match=r"fence\.proxy\.async"):
        run(shipped_launch(), "sm_90", alter=in_the_loop(r"fence\.proxy\.async[^;]*;", lambda _: ""))


def test_planted_product_not_waited_for() -> None:
    """Either its registers are read too early, or copies go where it still reads."""
    with pytest.raises(EarlyAccess):
        run(shipped_launch(), "sm_90", alter=in_the_loop(r"wgmma\.wait_group[^;]*;", lambda _: ""))
    with pytest.raises(EarlyAccess, match="belongs to an asynchronous product"):
        run(shipped_launch(), "sm_90", alter=without_nth(r"wgmma\.wait_group", 1))


@by_chip
@pytest.mark.parametrize("what", ["n_rows", "height"])
def test_planted_out_of_range_row(chip: str, what: str) -> None:
    launch = shipped_launch()
    wrong: dict[str, Any] = {what: launch.arguments[what] + 1}  # type: ignore[operator]
    with pytest.raises(OutOfBounds, match=r"p_(x|out)"):
        run(replace(launch, arguments=launch.arguments | wrong), chip)


@by_chip
def test_planted_missing_input_precision(chip: str) -> None:
    """A Gram matrix in float32 passes with the precision said, and does not without."""
    x = Random(1, torch.float32).normal(2, 25, 640)
    expected = x.double() @ x.double().mT + 1
    norms = x.double().square().sum(2)
    # Partial sums of up to |x|·|x'|, each rounded once.
    bound = EPS32 / 2 * 648**0.5 * (norms[:, :, None] * norms[:, None]).sqrt()
    out = torch.empty(2, 25, 25)
    run(gram_launch(x, out, "ieee"), chip, [out])
    assert_within(out, expected, bound, "Gram matrix")
    run(gram_launch(x, out, None), chip, [out])
    with pytest.raises(AssertionError, match="Gram matrix"):
        assert_within(out, expected, bound, "Gram matrix")


@by_chip
def test_planted_shifted_mask(chip: str) -> None:
    """A mask of the neighbour's column reads other pixels of the same tensor: only the values tell."""
    random = Random(2)
    x, weight = random.images(2, 64, 5, 7).bfloat16(), (random.normal(40, 64, 3, 3) / 24).bfloat16()
    pixels, taps = x.permute(0, 2, 3, 1), weight.permute(0, 2, 3, 1).contiguous()
    expected, bound = convolved(x, weight, 1, "bf16")
    expected = torch.where(expected > 0, expected, 0.1 * expected)
    bound = bound + rounded(expected, torch.bfloat16) + EPS32 * expected.abs()
    for slip in (0, 1):
        out = torch.empty(2, 5, 7, 40, dtype=torch.bfloat16)
        try:
            run(convolution_launch(pixels, taps, torch.zeros(40), out, slip=slip), chip, [out])
            assert_within(out.permute(0, 3, 1, 2), expected, bound, "output")
        except (AssertionError, OutOfBounds):
            assert slip, "the launch without the fault fails"
        else:
            assert not slip, "the fault is not seen"


def test_planted_read_of_what_a_launch_left_out() -> None:
    """Between launches too: what `torch.empty` made and the first launch did not write, the second may not read."""
    random = Random(3)
    weight = random.normal(64, 3, 3, 64).bfloat16()
    with emulated("sm_80"):
        x = random.images(2, 64, 5, 7).bfloat16()
        y, _ = ss_conv.forward(x, weight, None, epilogue=Epilogue(), padding=1, save=False)
        ss_conv.forward(y, weight, None, epilogue=Epilogue(), padding=1, save=False)
        left_out = torch.empty_like(x)
        with pytest.raises(Uninitialised, match="p_x"):
            ss_conv.forward(left_out, weight, None, epilogue=Epilogue(), padding=1, save=False)
