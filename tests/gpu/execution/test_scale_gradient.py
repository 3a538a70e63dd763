"""The PTX of the gradient of Φ_S1 as a product over pixels, executed, against float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.grad import conv2d_weight

from mtl_fast.kernels.contracts import ChannelNorm
from mtl_fast.kernels.triton import scale_gradient as kernels
from mtl_fast.kernels.triton.launch import Launch
from mtl_fast.kernels.triton.partial_sums import Sums, contracted
from mtl_fast.kernels.triton.scale_gradient import filter_products, scale_gradient
from tests.conv_cases import Random
from tests.gpu.conv_backward_cases import assert_within, images, poisoned
from tests.gpu.execution.cases import EPS32, TYPES, by_chip, by_type, precision, taken
from tests.gpu.ptx.launcher import emulated

pytestmark = pytest.mark.proof
# n, n_in, n_out, height, width, k
SIZES = {
    "images": (2, 3, 67, 5, 7, 3),
    "prime": (2, 37, 71, 5, 7, 3),
    "even": (2, 64, 64, 6, 5, 3),
    "1x1": (2, 37, 17, 9, 5, 1),
}


@by_chip
@by_type
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_both_granularities(chip: str, kind: str, size: tuple[int, ...]) -> None:
    check_both_granularities(chip, kind, size)


@pytest.mark.parametrize(("chip", "kind"), [("sm_80", "bf16"), ("sm_80", "tf32"), ("sm_90", "bf16")])
@pytest.mark.parametrize("size", [(3, 37, 67, 11, 5, 3), (3, 3, 67, 11, 5, 3)], ids=["chunks", "images"])
def test_many_pixels_a_program(
    chip: str, kind: str, size: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several rounds of the pipeline; in bfloat16 three, in two chunks of two, so that one is beyond the pixels."""
    monkeypatch.setattr(kernels, "PROGRAMS", 1)
    config = kernels.product_config
    monkeypatch.setattr(kernels, "product_config", lambda *given: replace(config(*given), chunk=2))
    product, *_ = check_both_granularities(chip, kind, size)
    steps = -(-3 * 11 * 5 // product.constants["BLOCK_K"])
    assert steps == (3 if kind == "bf16" else 6)
    if size[1] == 3:
        assert (product.grid, product.arguments["n_steps"]) == ((2, 1), steps)
    else:
        assert product.grid == (4, 1), "two tiles of each kind of channels, one share of the pixels"
        assert (product.arguments["n_chunks"], product.arguments["n_steps"]) == (-(-steps // 2), 2)


@by_chip
def test_160_to_320_channels(chip: str) -> None:
    check_both_granularities(chip, "bf16", (1, 160, 320, 5, 3, 1))


def check_both_granularities(chip: str, kind: str, size: tuple[int, ...]) -> list[Launch]:
    """Against sums in float64; the launches."""
    n, n_in, n_out, height, width, k = size
    random = Random(3)
    x = images(random, n, n_in, height, width, dtype=TYPES[kind])
    grad = images(random, n, n_out, height, width, dtype=TYPES[kind])
    weight = random.normal(n_out, n_in, k, k).float()
    taps = poisoned(weight.permute(0, 2, 3, 1).contiguous())
    norm = ChannelNorm(None, poisoned(random.positive(n_out).float()))
    lost = (torch.arange(n_out) % 3 == 0).to(torch.uint8)
    kept = torch.full((n_out,), -7.0)
    by_filter = kept.clone()
    with precision(kind), emulated(chip) as launches:
        got = scale_gradient(x, grad, taps, padding=k // 2, norm=norm, dtype=torch.float32)
        filter_products(x, grad, taps, padding=k // 2, norm=norm, lost=poisoned(lost), scale_grad=by_filter)
    factor = 1 / (norm.var.double() + norm.eps).sqrt()[:, None]
    values, squares = (
        (
            conv2d_weight(f(taken(x, kind)), weight.shape, f(taken(grad, kind)), padding=k // 2)
            * f(weight.double())
        )
        for f in (lambda t: t, torch.square)
    )
    expected = values.sum(dim=(2, 3)) * factor
    natural = squares.sum(dim=(2, 3)).sqrt() * factor
    n_terms = k * k * n * height * width + 8
    assert_within(got, expected, EPS32 * n_terms**0.5 * natural, "kernel")
    bound = EPS32 * (n_in * n_terms) ** 0.5 * natural.square().sum(1).sqrt()
    chosen = lost != 0
    assert_within(by_filter[chosen], expected.sum(1)[chosen], bound[chosen], "filter")
    assert torch.equal(by_filter[~chosen], kept[~chosen])
    return launches


@by_chip
@by_type
@pytest.mark.parametrize("size", ["images", "prime"])
def test_a_weight_gradient_contracted_while_the_shift_is_added(chip: str, kind: str, size: str) -> None:
    n, n_in, n_out, height, width, k = SIZES[size]
    random = Random(4)
    x = images(random, n, n_in, height, width, dtype=TYPES[kind])
    grad = images(random, n, n_out, height, width, dtype=TYPES[kind])
    taps = poisoned(random.normal(n_out, k, k, n_in).float())
    norm = ChannelNorm(None, poisoned(random.positive(n_out).float()))
    sums = Sums(poisoned(random.normal(70, 1, n_out).float()), torch.empty(n_out))
    # What PyTorch gives is the operand here, not what is looked at.
    given = conv2d_weight(x, (n_out, n_in, k, k), grad, padding=k // 2).permute(0, 2, 3, 1)
    with emulated(chip) as launches:
        got = contracted(x, grad, taps, padding=k // 2, norm=norm, dtype=torch.float32, sums=sums)
    assert len(launches) == 1
    factor = 1 / (norm.var.double() + norm.eps).sqrt()
    terms = given.double() * taps.double() * factor.view(-1, 1, 1, 1)
    # Products and sums round independently; what γ/σ is off by, 4 units (√ one, its inverse two), is that of all terms.
    total = terms.sum(dim=(1, 2))
    bound = EPS32 * (k * terms.square().sum(dim=(1, 2)).sqrt() + 4 * total.abs())
    assert_within(got, total, bound, "scale")
    rows = sums.partial.double()[:, 0] * factor
    assert_within(sums.out, rows.sum(0), EPS32 * 78**0.5 * rows.square().sum(0).sqrt(), "shift")
