"""Faults put in on purpose are caught: the same launches pass without them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from mtl_fast.kernels.contracts import Epilogue
from mtl_fast.kernels.triton import base_learner, epilogue_backward, ss_conv, ss_conv_product
from mtl_fast.kernels.triton.launch import Launch, observed
from tests.base_learner_cases import Size
from tests.conv_cases import Random
from tests.gpu.altered import altered
from tests.gpu.conv_backward_cases import assert_within, images, poisoned
from tests.gpu.execution.cases import EPS32, assert_epilogue, by_chip, convolved
from tests.gpu.execution.test_base_learner import problem
from tests.gpu.execution.test_epilogue_backward import CASES as UNWOUND
from tests.gpu.execution.test_epilogue_backward import check_unwinding
from tests.gpu.ptx.faults import EarlyAccess, MissingFence, OutOfBounds, Race, Uninitialised
from tests.gpu.ptx.launcher import emulated, run

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
    """PTX with every match in the first loop changed, from its label to the branch back: a version may have it twice."""

    def alter(ptx: str) -> str:
        (label,) = re.findall(r"(\S+):[^\n]*Inner Loop Header", ptx)[:1]
        start, end = ptx.index(f"\n{label}:"), ptx.rindex(f"{label};")
        changed, n = re.subn(pattern, new, ptx[start:end])
        assert n, pattern
        return ptx[:start] + changed + ptx[end:]

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


def assert_convolution(product: Any, chip: str) -> None:
    """A pooled convolution of 5×6 pixels, whose last row is not computed, by a launcher of the kernel."""
    random = Random(2)
    x = images(random, 2, 32, 5, 6, dtype=torch.bfloat16)
    weight = (random.normal(40, 32, 3, 3) / 17).bfloat16()
    epilogue = Epilogue("after_residual", 0.1, pool=True)
    taps = poisoned(weight.permute(0, 2, 3, 1).contiguous())
    with emulated(chip):
        got = product(x, taps, None, padding=1, epilogue=epilogue, save=True)
    assert_epilogue(got, *convolved(x, weight, 1, "bf16"), epilogue, None)


OF_A_TAP = "m_x = ((m_taps >> tap) & 1)[:, None] != 0"
VALUES = "maxima|signs|output"
MASKS = {
    "of the next tap": ("m_taps >> (tap + 1)", OutOfBounds, "p_x"),
    # These read inside the images, where only values tell: a column to the right is let in, or left out.
    "too wide": ("(m_taps | ((m_taps << 1) & 36)) >> tap", AssertionError, VALUES),
    "too narrow": ("(m_taps & (m_taps >> 1)) >> tap", AssertionError, VALUES),
}


@by_chip
@pytest.mark.parametrize("mask", [None, *MASKS])
def test_planted_shifted_mask(chip: str, mask: str | None) -> None:
    """The masks of the taps are of other pixels than the taps."""
    if mask is None:
        return assert_convolution(ss_conv_product.product, chip)
    shifted, error, words = MASKS[mask]
    fault = OF_A_TAP.replace("m_taps >> tap", shifted)
    with altered(ss_conv_product, OF_A_TAP, fault) as faulty, pytest.raises(error, match=words):
        assert_convolution(faulty.product, chip)


def assert_gram(fit: Any, chip: str) -> None:
    """H = r·(x·xᵀ + 1) of the base-learner, in float32."""
    size = Size(1, 5, 13, 11, 160, 1)
    p, rate = problem(size, torch.float32), 0.1
    # Rows that are masked out are 0 in H as well as in x.
    x = torch.where(p.mask.unsqueeze(2), p.support.double(), 0.0)
    r = rate / p.mask.double().sum(1)[:, None, None]
    norms = x.square().sum(2)
    # Partial sums of up to |x|·|x'|, each rounded once.
    bound = r * EPS32 * (168**0.5 * (norms[:, :, None] * norms[:, None]).sqrt() + 4)
    with emulated(chip):
        *_, kernel, _ = fit(p.support, p.labels, p.query, p.weight, p.bias, p.mask, rate, size.n_steps, True)
    assert_within(kernel[:, : size.n, : size.n], r * (x @ x.mT + 1), bound, "Gram matrix")


@by_chip
def test_planted_missing_input_precision(chip: str) -> None:
    """The Gram matrix passes with the precision said, and does not without: it is TF32's then."""
    assert_gram(base_learner.fit, chip)
    said = "b_h = tl.dot(b_x, tl.trans(b_x), b_h, input_precision=PRECISION)"
    with (
        altered(base_learner, said, said.replace(", input_precision=PRECISION", "")) as faulty,
        pytest.raises(AssertionError, match="Gram matrix"),
    ):
        assert_gram(faulty.fit, chip)


@by_chip
@pytest.mark.parametrize("form", ["common pooled, odd", "tensorflow pooled, prime"])
def test_planted_residual_not_subtracted(chip: str, form: str) -> None:
    """Without it the gradient of a filter's scale is a sum of other terms."""
    subtracted = "b_r += tl.load(p_residual + o_pixel, mask=m_here, other=0.0).to(tl.float32)"
    with (
        altered(epilogue_backward, subtracted, subtracted.replace("b_r +=", "b_r += 0.0 *")) as faulty,
        pytest.raises(AssertionError, match="scale"),
    ):
        check_unwinding(faulty.unwind, chip, "tf32", *UNWOUND[form])


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
