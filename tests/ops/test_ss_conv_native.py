"""The native `ss_conv` against the float64 reference: values, gradients, edges, memory, threads, torch's own checks."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mtl_fast.kernels.contracts import ConvOperands, Epilogue, FrozenFilters
from mtl_fast.ops import ss_conv
from tests.conv_cases import Random
from tests.native_cases import (
    TILES,
    amplification,
    assert_native_agrees,
    double,
    leaves,
    matrices,
    n_threads,
    needs_native,
)

pytestmark = needs_native

NAN = float("nan")
FROZEN = ("x", "scale", "shift")
ALL = ("x", "weight", "bias", "scale", "shift", "gamma", "beta")
LEAKY = Epilogue("after_residual", 0.1, pool=True)
by_granularity = pytest.mark.parametrize("granularity", ["kernel", "filter"])
# n, n_in, n_out, height, width, k
SIZES = {
    "ones": (1, 1, 1, 1, 1, 3),
    "ones_1x1": (1, 1, 1, 1, 1, 1),
    "primes": (3, 5, 7, 11, 13, 3),
    "one_to_many": (2, 1, 33, 6, 5, 3),
    "many_to_one": (2, 64, 1, 5, 6, 3),
    "images": (2, 3, 16, 42, 42, 3),
    "sixes": (1, 64, 33, 21, 21, 3),
    "wide": (1, 16, 160, 32, 32, 3),
    "wide_in": (1, 160, 16, 10, 10, 3),
    "many_tiles": (13, 3, 5, 32, 32, 3),
    "shortcut": (3, 33, 64, 9, 7, 1),
    "shortcut_wide": (2, 64, 160, 10, 10, 1),
}


def case(
    size: tuple[int, ...], granularity: str | None = "kernel", seed: int = 0
) -> tuple[Tensor, ConvOperands]:
    """Float32 images and operands, norm included."""
    random = Random(seed, torch.float32)
    n, n_in, n_out, height, width, k = size
    return random.images(n, n_in, height, width), random.conv(n_in, n_out, k, granularity=granularity)


def residual_of(x: Tensor, conv: ConvOperands, seed: int = 50) -> Tensor:
    return Random(seed, torch.float32).images(*ss_conv(x, conv).shape)


def results(
    x: Tensor, conv: ConvOperands, epilogue: Epilogue, trained: tuple[str, ...], factor: float = 1.0
) -> list[Tensor]:
    """Value and gradients of what is trained and of the residual, for a fixed random cotangent times `factor`."""
    named, given = leaves(x, conv, trained)
    residual = residual_of(x, conv).requires_grad_()
    y = ss_conv(named["x"], given, epilogue=epilogue, residual=residual, backend="native")
    cotangent = Random(51, torch.float32).normal(*y.shape) * factor
    wanted = [named[name] for name in trained if name in named]
    return [y.detach(), *torch.autograd.grad(y, [*wanted, residual], cotangent)]


def assert_same_bits(ours: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(ours, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("tile", TILES)
def test_the_matrices_convolve_exactly(tile: int) -> None:
    """Σ_p A[m,p]·G[p,r]·B[p,t] is 1 where t = m + r and 0 elsewhere: the identity behind values and gradients."""
    m = matrices(tile)
    points = range(tile + 2)
    assert [len(m["at"]), len(m["g"]), len(m["bt"])] == [tile, tile + 2, tile + 2]
    for output, a in enumerate(m["at"]):
        for tap in range(3):
            for pixel in points:
                total = sum(a[p] * m["g"][p][tap] * m["bt"][p][pixel] for p in points)
                assert total == (pixel == output + tap), (output, tap, pixel)


def test_amplification_grows_with_the_tile() -> None:
    for of in ("images", "taps"):
        two, four, six = (amplification(of, 3, [tile]) for tile in TILES)
        assert 1 < two < four < six < 50
        assert amplification(of, 1) == 1


@by_granularity
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize("trained", [FROZEN, ALL], ids=["frozen", "trained"])
def test_values_and_gradients(size: tuple[int, ...], granularity: str, trained: tuple[str, ...]) -> None:
    x, conv = case(size, granularity)
    epilogue = LEAKY if min(x.shape[2:]) > 1 else replace(LEAKY, pool=False)
    assert_native_agrees(x, conv, epilogue, residual_of(x, conv), trained=trained)


@pytest.mark.parametrize("side", range(1, 14))
@pytest.mark.parametrize("n_in", [3, 33])
def test_every_small_map(side: int, n_in: int) -> None:
    x, conv = case((2, n_in, 5, side, side, 3), seed=side)
    assert_native_agrees(x, conv, Epilogue("before_residual", 0.1, pool=side > 1), residual_of(x, conv))


@pytest.mark.parametrize(
    ("k", "padding"), [(3, 0), (3, 1), (3, 2), (1, 0)], ids=["none", "one", "two", "1x1"]
)
@pytest.mark.parametrize("map_size", [(3, 3), (6, 5), (4, 13)], ids=str)
@pytest.mark.parametrize("trained", [FROZEN, ALL], ids=["frozen", "trained"])
def test_paddings(k: int, padding: int, map_size: tuple[int, int], trained: tuple[str, ...]) -> None:
    random = Random(1, torch.float32)
    x, conv = random.images(2, 5, *map_size), random.conv(5, 16, k, padding=padding)
    assert_native_agrees(x, conv, Epilogue("after_residual"), residual_of(x, conv), trained=trained)


@by_granularity
@pytest.mark.parametrize("activation", ["none", "before_residual", "after_residual"])
@pytest.mark.parametrize("slope", [0.0, 0.1])
@pytest.mark.parametrize("pool", [False, True], ids=["whole", "pooled"])
@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
def test_every_epilogue(
    granularity: str, activation: Any, slope: float, pool: bool, with_residual: bool
) -> None:
    x, conv = case((2, 5, 17, 7, 9, 3), granularity, seed=2)
    residual = residual_of(x, conv) if with_residual else None
    assert_native_agrees(x, conv, Epilogue(activation, slope, pool), residual)


@pytest.mark.parametrize("norm", ["both", "bias", "none", None], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("granularity", ["kernel", "filter", None], ids=str)
def test_what_is_absent_counts_as_identity(norm: str | None, bias: bool, granularity: str | None) -> None:
    random = Random(3, torch.float32)
    x, conv = random.images(2, 3, 6, 5), random.conv(3, 4, granularity=granularity, norm=norm, bias=bias)
    assert_native_agrees(x, conv, Epilogue("after_residual"))
    assert_native_agrees(x, conv, Epilogue("after_residual"), trained=ALL)


@pytest.mark.parametrize(
    "trained", [("x",), ("scale",), ("shift",), ("x", "shift"), ("weight",), ("gamma",), ()]
)
@by_granularity
def test_any_selection_of_gradients(granularity: str, trained: tuple[str, ...]) -> None:
    x, conv = case((2, 5, 7, 6, 6, 3), granularity, seed=4)
    assert_native_agrees(x, conv, LEAKY, residual_of(x, conv), trained=trained)


@by_granularity
@pytest.mark.parametrize("sizes", [(-1.0,), (1e-3,), (0.0,), (1.0, 1e-3, 0.0, -1e-5, -2.0)], ids=str)
def test_negative_tiny_and_zero_scales(granularity: str, sizes: tuple[float, ...]) -> None:
    x, conv = case((2, 5, 16, 6, 7, 3), granularity, seed=5)
    factors = torch.tensor(sizes).repeat(16)[:16].view(16, 1, 1, 1)
    conv = replace(conv, scale=conv.scale * factors)
    for activation in ("none", "after_residual", "before_residual"):
        epilogue = Epilogue(activation, 0.1)  # type: ignore[arg-type]
        assert_native_agrees(x, conv, epilogue, residual_of(x, conv))


@pytest.mark.parametrize("gamma", [0.0, 1e-6, -1e-3])
def test_a_norm_that_scales_by_almost_nothing(gamma: float) -> None:
    x, conv = case((2, 5, 16, 6, 7, 3), "filter", seed=6)
    norm = replace(conv.norm, weight=torch.full((16,), gamma))
    assert_native_agrees(x, replace(conv, norm=norm), Epilogue("after_residual"), residual_of(x, conv))


@pytest.mark.parametrize("gamma", [1.0, 1e-1, 1e-2, 1e-4, 1e-6])
def test_a_small_norm_costs_a_filters_scale_gradient_six_bits_at_most(gamma: float) -> None:
    """Adam divides by a gradient's own size: each filter's must be right relative to itself, however small."""
    x, conv = case((4, 5, 16, 8, 8, 3), "filter", seed=7)
    conv = replace(conv, norm=replace(conv.norm, weight=torch.full((16,), gamma)))
    # Along the convolution itself, so that its sum over pixels cancels nothing.
    cotangent = ss_conv(x, replace(conv, norm=None, shift=None, filters=replace(conv.filters, bias=None)))
    gradients = []
    for images, given in ((x, conv), (x.double(), double(conv))):
        _, given = leaves(images, given, ("scale",))
        y = ss_conv(images, given)
        gradients.append(torch.autograd.grad(y, given.scale, cotangent.to(y.dtype))[0].flatten())
    ours, exact = gradients
    length = 5 * 9 + 4 * 8 * 8
    bound = 64 * torch.finfo(torch.float32).eps * length**0.5 * amplification("images", 3)
    assert ((ours - exact).abs() <= bound * exact.abs()).all(), ((ours - exact) / exact).abs().max()
    assert bound < 0.01


@by_granularity
@pytest.mark.parametrize(
    "size",
    [(3, 512, 512, 4, 4, 3), (200, 520, 512, 2, 2, 3), (1, 384, 400, 5, 9, 3)],
    ids=["512@4", "520@2", "uneven"],
)
def test_large_filters_on_few_pixels(size: tuple[int, ...], granularity: str) -> None:
    """Threads share the tiles, in more than one round of them at 520@2."""
    x, conv = case(size, granularity, seed=7)
    assert_native_agrees(x, conv, LEAKY)


def test_a_large_weight_gradient_shares_its_tiles() -> None:
    x, conv = case((9, 192, 200, 12, 20, 3), None, seed=8)  # in more than one round
    assert_native_agrees(x, conv, LEAKY, trained=("x", "weight", "bias"))


# Tiles of 6 and of 4, cut off on both sides; what is pooled has odd sides.
@pytest.mark.parametrize(
    "size", [(4, 16, 32, 107, 109, 3), (92, 16, 32, 21, 19, 3), (120, 16, 48, 15, 15, 3)]
)
@pytest.mark.parametrize("form", [Epilogue(), LEAKY, Epilogue("before_residual", 0.1, pool=True)])
def test_results_past_the_caches(size: tuple[int, ...], form: Epilogue) -> None:
    """Of a megabyte and more, in whole lines: the output, its gradient before the epilogue, the images'."""
    x, conv = case(size, seed=6)
    images, _, channels, height, width, _ = size
    step = 2 if form.pool else 1
    assert min(images * channels * (height // step) * (width // step), x.numel()) * 4 >= 2**20
    assert_native_agrees(
        x, conv, form, residual_of(x, conv) if form.activation == "before_residual" else None
    )


def test_any_memory_layout_gives_the_same_bits() -> None:
    x, conv = case((2, 5, 7, 6, 8, 3), seed=9)
    expected = results(x, conv, LEAKY, ALL)
    assert_same_bits(results(x.contiguous(), conv, LEAKY, ALL), expected)
    strided = torch.empty(4, 5, 6, 16)[::2, :, :, ::2].copy_(x)
    assert_same_bits(results(strided, conv, LEAKY, ALL), expected)
    transposed = replace(conv, scale=conv.scale.transpose(0, 1).contiguous().transpose(0, 1))
    assert_same_bits(results(x, transposed, LEAKY, ALL), expected)
    # A cotangent of stride 0, as that of a sum.
    named, given = leaves(x, conv, FROZEN)
    y = ss_conv(named["x"], given, epilogue=LEAKY, backend="native")
    inputs = [named[name] for name in FROZEN]
    ones = torch.autograd.grad(y, inputs, torch.ones_like(y), retain_graph=True)
    assert_same_bits(list(torch.autograd.grad(y.sum(), inputs)), list(ones))


SPECIAL = [0.0, -0.0, 1.0, 1.0, -1.0, NAN, float("inf"), -float("inf"), 2.0]


@pytest.mark.parametrize("activation", ["none", "before_residual", "after_residual"])
@pytest.mark.parametrize("slope", [0.0, 0.1])
def test_ties_zeros_nan_and_infinity_pool_as_in_torch(activation: Any, slope: float) -> None:
    """Zero images leave the residual alone; every window of four special values in some order."""
    choice = torch.randint(len(SPECIAL), (3, 19, 8, 6), generator=torch.Generator().manual_seed(0))
    residual = torch.tensor(SPECIAL)[choice].requires_grad_()
    filters = FrozenFilters(torch.ones(19, 2, 3, 3), padding=1)
    epilogue = Epilogue(activation, slope, pool=True)
    results = []
    for backend in ("native", "torch"):
        y = ss_conv(
            torch.zeros(3, 2, 8, 6),
            ConvOperands(filters),
            epilogue=epilogue,
            residual=residual,
            backend=backend,
        )
        cotangent = Random(10, torch.float32).normal(*y.shape)
        # PyTorch's own ReLU lets the gradient of a NaN through, its leaky one does not.
        cotangent = cotangent.where(~y.isnan(), 0)
        results.append((y, *torch.autograd.grad(y, residual, cotangent)))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours.isnan(), theirs.isnan())
        assert torch.equal(ours.nan_to_num(7.0), theirs.nan_to_num(7.0))


def test_an_empty_batch_gives_empty_images_and_zero_gradients() -> None:
    for granularity in ("kernel", "filter"):
        for trained in (FROZEN, ALL):
            x, conv = case((0, 3, 5, 6, 6, 3), granularity)
            y, *gradients = results(x, conv, LEAKY, trained)
            assert y.shape == (0, 5, 3, 3)
            for gradient in gradients:
                assert torch.equal(gradient, torch.zeros_like(gradient))


@by_granularity
@pytest.mark.parametrize(
    "size", [(2, 5, 16, 7, 9, 3), (4, 64, 80, 32, 32, 3), (2, 384, 400, 4, 4, 3)], ids=str
)
def test_nothing_uninitialised_is_read(size: tuple[int, ...], granularity: str) -> None:
    """What calls with NaN leave behind, in buffers and in the memory of their results, reaches no later one."""
    x, conv = case(size, granularity, seed=11)
    for trained in (FROZEN, ALL):
        expected = results(x, conv, LEAKY, trained)
        for images, factor in ((x * NAN, 1.0), (x, NAN)):
            poisoned = results(images, conv, LEAKY, trained, factor)
            assert any(t.isnan().all() for t in poisoned[:2])
        again = results(x, conv, LEAKY, trained)
        assert all(t.isfinite().all() for t in again)
        assert_same_bits(again, expected)


def test_anomaly_detection_finds_no_nan() -> None:
    """Nor in the columns that pad packed taps, whatever was in the buffers before."""
    for n_out in (7, 16, 40):
        results(*case((8, 64, 64, 7, 9, 3), None), LEAKY, ALL, NAN)
        x, conv = case((2, 5, n_out, 7, 9, 3), None, seed=12)
        with torch.autograd.set_detect_anomaly(True, check_nan=True):
            results(x, conv, LEAKY, ALL)


@by_granularity
@pytest.mark.parametrize(
    "size", [(5, 16, 33, 21, 21, 3), (3, 384, 400, 4, 4, 3), (3, 64, 33, 9, 9, 1)], ids=str
)
def test_one_two_and_five_threads_give_the_same_bits(size: tuple[int, ...], granularity: str) -> None:
    x, conv = case(size, granularity, seed=13)
    for trained in (FROZEN, ALL):
        expected = results(x, conv, LEAKY, trained)
        for n in (2, 5):
            with n_threads(n):
                assert_same_bits(results(x, conv, LEAKY, trained), expected)


def test_calls_from_several_threads_do_not_meet() -> None:
    cases = [case((3, n_in, 33, 10, 10, 3), seed=n_in) for n_in in (5, 16, 64, 33)]
    expected = [results(x, conv, LEAKY, FROZEN) for x, conv in cases]
    with n_threads(2), ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            calls = [pool.submit(results, x, conv, LEAKY, FROZEN) for x, conv in cases]
            for call, wanted in zip(calls, expected, strict=True):
                assert_same_bits(call.result(), wanted)


@pytest.mark.parametrize("shift", [-0.5, 0.0, 0.5])
@pytest.mark.parametrize("slope", [0.0, 0.1])
@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
def test_a_filter_scaled_by_nothing_has_the_gradient_of_its_products(
    shift: float, slope: float, with_residual: bool
) -> None:
    """Its output tells nothing of it, whatever follows."""
    x, conv = case((2, 5, 48, 6, 7, 3), "filter", seed=9)
    scale = conv.scale.clone()
    scale[3] = 0
    filters = replace(conv.filters, bias=None)
    conv = replace(conv, scale=scale, shift=torch.full((48,), shift), norm=None, filters=filters)
    epilogue = Epilogue("after_residual", slope)
    assert_native_agrees(x, conv, epilogue, residual_of(x, conv) if with_residual else None)
