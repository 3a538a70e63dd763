"""Forward and input gradient of the convolution kernels, in the interpreter, against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mtl_fast.kernels.contracts import Epilogue
from mtl_fast.kernels.triton import ss_conv, ss_conv_product
from mtl_fast.kernels.triton.launch import observed
from tests.conv_cases import Random
from tests.gpu.conv_backward_cases import assert_within, images, poisoned
from tests.gpu.conv_forward_cases import DTYPES, Layer, Sum, assert_epilogue, by_epilogue, packed, rotated

pytestmark = pytest.mark.proof

# N, I, O, H, W, k and the padding
SHAPES = {
    "one": (1, 1, 1, 1, 1, 3, 1),
    "first layer": (2, 3, 17, 7, 5, 3, 1),
    "first layer, four channels, bare": (1, 4, 5, 4, 6, 3, 0),
    "prime": (3, 5, 7, 5, 7, 3, 1),
    "bare": (1, 11, 13, 5, 3, 3, 0),
    "padded more": (1, 6, 3, 3, 2, 3, 2),
    "two accumulators": (1, 32, 160, 3, 3, 3, 1),
    "masked chunk": (1, 70, 20, 2, 3, 3, 1),
    "1x1": (2, 20, 16, 3, 5, 1, 0),
    "1x1 of images": (2, 3, 9, 3, 3, 1, 0),
}
by_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


@DTYPES
@by_epilogue
@by_shape
def test_forward(shape: tuple[int, ...], epilogue: Epilogue, dtype: torch.dtype) -> None:
    layer = Layer(shape[:6], shape[6], dtype)
    z = layer.sum()
    residual = images(Random(7), *z.value.shape, dtype=dtype)
    output, codes = ss_conv.forward(
        layer.x,
        packed(layer.weight),
        layer.shift,
        residual=residual,
        epilogue=epilogue,
        padding=layer.padding,
        save=True,
    )
    added = Sum(residual.double(), residual.double().abs(), 1)
    if not output.numel():
        assert epilogue.pool
        assert 1 in z.value.shape[2:]
        return
    assert_epilogue(output, codes, z, epilogue, added, save=True)


@by_epilogue
@pytest.mark.parametrize("save", [True, False], ids=["saved", "unsaved"])
@pytest.mark.parametrize("n_in", [3, 8], ids=["first layer", "later layer"])
def test_forward_without_a_residual(n_in: int, epilogue: Epilogue, save: bool) -> None:
    layer = Layer((2, n_in, 5, 5, 6, 3), 1, torch.float32)
    output, codes = ss_conv.forward(
        layer.x, packed(layer.weight), layer.shift, epilogue=epilogue, padding=1, save=save
    )
    assert_epilogue(output, codes, layer.sum(), epilogue, None, save=save)


@pytest.mark.parametrize("n_out", [64, 96, 160], ids=lambda n: f"{n} channels")
def test_tiles_of_a_full_chip(n_out: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many rows take larger tiles; so do these."""
    monkeypatch.setattr(ss_conv_product, "FEW_PROGRAMS", 0)
    layer = Layer((1, 16, n_out, 13, 10, 3), 1, torch.float32)
    with observed() as launches:
        ss_conv.forward(layer.x, packed(layer.weight), None, epilogue=Epilogue(), padding=1, save=False)
    assert launches[0].constants["BLOCK_M"] == 128
    assert launches[0].constants["BLOCK_N2"] == (32 if n_out == 160 else 0)
    assert launches[0].grid == (2 * (2 if n_out == 96 else 1),)
    for epilogue in (Epilogue("after_residual", 0.1, pool=True), Epilogue("before_residual", 0.1)):
        output, codes = ss_conv.forward(
            layer.x, packed(layer.weight), layer.shift, epilogue=epilogue, padding=1, save=True
        )
        assert_epilogue(output, codes, layer.sum(), epilogue, None, save=True)


def test_the_first_of_equal_values_wins_to_the_bit() -> None:
    """Small whole numbers are exact: windows with ties, and zeros of a ReLU, give PyTorch's places."""
    g = torch.Generator().manual_seed(0)
    x = torch.randint(-1, 2, (2, 8, 6, 8), generator=g).float().contiguous(memory_format=torch.channels_last)
    weight = torch.randint(-1, 2, (5, 8, 3, 3), generator=g).float()
    epilogue = Epilogue("after_residual", 0.0, pool=True)
    output, codes = ss_conv.forward(x, packed(weight), None, epilogue=epilogue, padding=1, save=True)
    z = F.conv2d(x, weight, padding=1)
    expected, index = F.max_pool2d(z.relu(), 2, return_indices=True)
    assert torch.equal(output, expected)
    place = index // 8 % 2 * 2 + index % 2
    assert codes is not None
    assert torch.equal(codes.long() & 3, place)
    assert torch.equal((codes & 4) != 0, expected > 0)


@pytest.mark.parametrize("slope", [0.0, 0.1], ids=["ReLU", "leaky"])
def test_what_is_not_finite_passes_as_in_pytorch(slope: float) -> None:
    x = torch.zeros(1, 1, 8, 8).contiguous(memory_format=torch.channels_last)
    x[0, 0, 1, 1], x[0, 0, 3, 6], x[0, 0, 6, 2] = float("nan"), float("inf"), float("-inf")
    weight = torch.zeros(1, 1, 1, 1) + 1
    epilogue = Epilogue("after_residual", slope, pool=True)
    output, _ = ss_conv.forward(x, packed(weight), None, epilogue=epilogue, padding=0, save=True)
    expected = F.max_pool2d(F.leaky_relu(x, slope) if slope else F.relu(x), 2)
    assert torch.equal(output.isnan(), expected.isnan())
    assert torch.equal(output.nan_to_num(7.0), expected.nan_to_num(7.0))
    below = torch.full_like(x, float("-inf"))
    output, _ = ss_conv.forward(below, packed(weight), None, epilogue=epilogue, padding=0, save=True)
    assert torch.equal(output, F.max_pool2d(F.leaky_relu(below, slope) if slope else F.relu(below), 2))


@DTYPES
@pytest.mark.parametrize("with_other", [True, False], ids=["with shortcut", "alone"])
@by_shape
def test_input_gradient(shape: tuple[int, ...], with_other: bool, dtype: torch.dtype) -> None:
    n, n_in, n_out, height, width, k, padding = shape
    random = Random(3)
    size = [length + 2 * padding - k + 1 for length in (height, width)]
    grad = images(random, n, n_out, *size, dtype=dtype)
    weight = (random.normal(n_out, n_in, k, k) / (n_out * k * k) ** 0.5).to(dtype)
    expected, terms = _transposed(grad, weight, padding)
    other = other_rotated = None
    if with_other:
        other = images(random, n, 9, height, width, dtype=dtype)
        shortcut = (random.normal(9, n_in, 1, 1) / 3).to(dtype)
        other_rotated = rotated(shortcut)
        more = _transposed(other, shortcut, 0)
        expected, terms = expected + more[0], terms + more[1]
    found = ss_conv.input_gradient(
        grad, rotated(weight), padding=padding, other_grad=other, other_rotated=other_rotated
    )
    n_terms = n_out * k * k + 9
    bound = n_terms * torch.finfo(torch.float32).eps * terms
    assert found.shape == (n, n_in, height, width)
    assert_within(found, expected, bound + torch.finfo(dtype).eps * expected.abs(), "gradient")


def _transposed(grad: Tensor, weight: Tensor, padding: int) -> tuple[Tensor, Tensor]:
    """conv_transpose in float64, and the sum of its terms' absolute values."""
    signed, absolute = (
        F.conv_transpose2d(g, w, padding=padding)
        for g, w in (
            (grad.double(), weight.double()),
            (grad.double().abs(), weight.double().abs()),
        )
    )
    return signed, absolute


def test_images_in_another_memory_format_are_made_dense() -> None:
    layer = Layer((2, 8, 5, 4, 3, 3), 1, torch.float32)
    options = {"epilogue": Epilogue(), "padding": 1, "save": False}
    dense, _ = ss_conv.forward(layer.x, packed(layer.weight), layer.shift, **options)
    other, _ = ss_conv.forward(layer.x.contiguous(), packed(layer.weight), layer.shift, **options)
    assert torch.equal(dense, other)


def test_no_images_no_launch() -> None:
    x = torch.empty(0, 8, 4, 4)
    with observed() as launches:
        output, codes = ss_conv.forward(
            x, poisoned(torch.zeros(5, 3, 3, 8)), None, epilogue=Epilogue(), padding=1, save=True
        )
    assert launches == []
    assert output.shape == (0, 5, 4, 4)
    assert codes is None


def test_shipped_launches_say_their_work() -> None:
    launches = dict(ss_conv.shipped())
    launch = launches["forward/64-64@84 3x3 training bf16"]
    pixels = 80 * 84 * 84
    assert launch.work.flop == 2 * pixels * 64 * 64 * 9
    assert launch.work.read == 2 * (pixels * 64 + 64 * 64 * 9) + 4 * 64
    assert launch.work.written == (2 + 1) * pixels * 64
    assert launch.work.matrix
    assert "forward/3-64@84 3x3 training fp16" in launches
    assert "input gradient/64-160@42 3x3 and shortcut fp32" in launches
    assert not any("gradient/3-" in name for name in launches)
