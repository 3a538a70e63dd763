"""The gradient of Φ_S1 as a product over pixels, in Triton's interpreter against float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.grad import conv2d_weight

from mtl_fast.kernels.contracts import ChannelNorm
from mtl_fast.kernels.triton import scale_gradient as kernels
from mtl_fast.kernels.triton.partial_sums import Sums, contracted
from mtl_fast.kernels.triton.scale_gradient import filter_products, scale_gradient
from tests.conv_cases import Random
from tests.gpu.conv_backward_cases import assert_within, images, poisoned

EPS32 = torch.finfo(torch.float32).eps
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
# n, n_in, n_out, height, width, k, padding: the first four take the kernel of few input channels
SIZES = {
    "one": (1, 1, 1, 1, 1, 3, 1),
    "images": (2, 3, 67, 5, 7, 3, 1),
    "images 1x1": (2, 31, 5, 3, 5, 1, 0),
    "images bare": (1, 2, 5, 5, 4, 3, 0),
    "prime": (2, 5, 7, 5, 7, 3, 1),
    "tiles": (1, 67, 71, 5, 3, 3, 1),
    "even": (1, 64, 128, 2, 3, 3, 1),
    "1x1": (2, 37, 17, 9, 5, 1, 0),
    "bare": (2, 5, 16, 5, 6, 3, 0),
    "wide": (2, 5, 16, 3, 4, 3, 2),
}
by_size = pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())


class Case:
    """Poisoned operands, dL/dΦ_S1 [O, I] in float64 and the root sum of the squares of its terms, norm included."""

    def __init__(self, size: tuple[int, ...], dtype: torch.dtype) -> None:
        n, n_in, n_out, height, width, k, padding = size
        random = Random(3)
        self.padding, self.n_terms = padding, k * k * n * height * width
        self.x = images(random, n, n_in, height, width, dtype=dtype)
        out = (height + 2 * padding - k + 1, width + 2 * padding - k + 1)
        self.grad = images(random, n, n_out, *out, dtype=dtype)
        weight = random.normal(n_out, n_in, k, k).float()
        self.taps = poisoned(weight.permute(0, 2, 3, 1).contiguous())
        var, gamma = random.positive(n_out).float(), random.normal(n_out).float()
        self.norm = ChannelNorm(None, poisoned(var), poisoned(gamma))
        ratio = (gamma.double() / (var.double() + 1e-5).sqrt())[:, None]
        self.ratio = ratio[:, 0]
        products = [
            conv2d_weight(x, weight.shape, g, padding=padding) * w
            for x, g, w in (
                (self.x.double(), self.grad.double(), weight.double()),
                (self.x.double() ** 2, self.grad.double() ** 2, weight.double() ** 2),
            )
        ]
        self.expected = products[0].sum(dim=(2, 3)) * ratio
        self.natural = products[1].sum(dim=(2, 3)).sqrt() * ratio.abs()

    @property
    def bound(self) -> Tensor:
        """The sum of k²·pixels products in float32, each of the operands' values exactly."""
        return EPS32 * (self.n_terms + 8) ** 0.5 * self.natural

    def by_kernel(self, sums: Sums | None = None, product: Callable[..., Tensor] = scale_gradient) -> Tensor:
        return product(
            self.x, self.grad, self.taps, padding=self.padding, norm=self.norm, dtype=torch.float32, sums=sums
        )

    def by_filter(self, lost: Tensor, scale_grad: Tensor) -> None:
        filter_products(
            self.x,
            self.grad,
            self.taps,
            padding=self.padding,
            norm=self.norm,
            lost=lost,
            scale_grad=scale_grad,
        )


@DTYPES
@by_size
def test_the_scale_of_a_kernel(dtype: torch.dtype, size: tuple[int, ...]) -> None:
    case = Case(size, dtype)
    assert_within(case.by_kernel(), case.expected, case.bound, "scale")


@DTYPES
@by_size
def test_a_weight_gradient_contracted_with_the_taps(dtype: torch.dtype, size: tuple[int, ...]) -> None:
    case = Case(size, dtype)
    n_out, k, _, n_in = case.taps.shape
    # What PyTorch gives is the operand here, not what is looked at.
    given = conv2d_weight(case.x, (n_out, n_in, k, k), case.grad, padding=case.padding).permute(0, 2, 3, 1)
    terms = given.double() * case.taps.double() * case.ratio.view(-1, 1, 1, 1)
    # PyTorch may sum over the pixels in two orders.
    bound = EPS32 * (k * k + 8) ** 0.5 * terms.square().sum(dim=(1, 2)).sqrt() + case.bound
    assert_within(case.by_kernel(product=contracted), terms.sum(dim=(1, 2)), bound, "scale")


@by_size
@pytest.mark.parametrize("product", [scale_gradient, contracted])
@pytest.mark.parametrize("n_programs", [0, 1, 70])
def test_the_same_launch_adds_the_shift(
    size: tuple[int, ...], product: Callable[..., Tensor], n_programs: int
) -> None:
    case = Case(size, torch.float32)
    n_out = case.taps.shape[0]
    partial = poisoned(Random(4).normal(n_programs, 1, n_out).float())
    sums = Sums(partial, torch.full((n_out,), float("nan")))
    assert torch.equal(case.by_kernel(sums, product), case.by_kernel(product=product))
    terms = partial.double()[:, 0] * case.ratio
    bound = EPS32 * (n_programs + 8) ** 0.5 * terms.square().sum(0).sqrt()
    assert_within(sums.out, terms.sum(0), bound, "shift")


@DTYPES
@by_size
def test_lost_channels_of_a_filter_and_no_others(dtype: torch.dtype, size: tuple[int, ...]) -> None:
    case = Case(size, dtype)
    n_out = case.taps.shape[0]
    lost = (torch.arange(n_out) % 3 == 0).to(torch.uint8)
    given = torch.full((n_out,), -7.0)
    scale_grad = given.clone()
    case.by_filter(poisoned(lost), scale_grad)
    kept = lost == 0
    assert torch.equal(scale_grad[kept], given[kept])
    n_in = case.taps.shape[3]
    bound = EPS32 * (n_in * case.n_terms + 8) ** 0.5 * case.natural.square().sum(1).sqrt()
    assert_within(scale_grad[~kept], case.expected.sum(1)[~kept], bound[~kept], "scale")


def test_tiles_without_a_lost_channel_read_nothing() -> None:
    case = Case(SIZES["tiles"], torch.float32)
    case.x.fill_(float("nan"))
    lost = torch.zeros(71, dtype=torch.uint8)
    lost[70] = 1
    scale_grad = torch.zeros(71)
    case.by_filter(lost, scale_grad)
    assert torch.equal(scale_grad[:70], torch.zeros(70))
    assert scale_grad[70].isnan()


@pytest.mark.parametrize("size", ["images", "prime", "1x1"])
def test_any_cut_of_the_pixels(size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shares and chunks that end anywhere, and pixels past the last."""
    case = Case(SIZES[size], torch.float32)
    for name, chunk in (("product_config", {"chunk": 2}), ("image_config", {})):
        config = getattr(kernels, name)
        monkeypatch.setattr(
            kernels, name, lambda *a, config=config, chunk=chunk: replace(config(*a), block_k=16, **chunk)
        )
    for programs in (1, 5):
        monkeypatch.setattr(kernels, "PROGRAMS", programs)
        assert_within(case.by_kernel(), case.expected, case.bound, "scale")


def test_an_empty_batch_gives_zeros() -> None:
    case = Case(SIZES["prime"], torch.float32)
    case.x, case.grad = case.x[:0], case.grad[:0]
    for product in (scale_gradient, contracted):
        assert torch.equal(case.by_kernel(product=product), torch.zeros(7, 5))
