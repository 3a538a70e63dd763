"""What tests of the forward kernels share: packed weights, and a float64 convolution with the bound of its rounding."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mtl_fast.kernels.contracts import Epilogue
from mtl_fast.kernels.reference.ss_conv import apply_epilogue
from mtl_fast.ops._epilogue_codes import PLACE, POSITIVE
from tests.conv_cases import Random
from tests.gpu.conv_backward_cases import assert_within, poisoned
from tests.native_cases import windows

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
ACTIVATIONS = ("none", "before_residual", "after_residual")
EPILOGUES = [Epilogue(activation, 0.1, pool) for activation in ACTIVATIONS for pool in (False, True)]
by_epilogue = pytest.mark.parametrize(
    "epilogue", EPILOGUES, ids=lambda e: e.activation + ("-pooled" if e.pool else "")
)


def packed(weight: Tensor) -> Tensor:
    """[O, I, k, k] → [O, k, k, I'], poisoned around."""
    n_in = weight.shape[1]
    width = 4 if n_in <= 4 else -(-n_in // 8) * 8
    return poisoned(F.pad(weight.permute(0, 2, 3, 1), (0, width - n_in)).contiguous())


def rotated(weight: Tensor) -> Tensor:
    """[O, I, k, k] → [I, k, k, O] with the taps turned round, poisoned around."""
    return poisoned(weight.flip(2, 3).permute(1, 2, 3, 0).contiguous())


class Layer:
    """Images, a weight of `dtype` and a shift, all poisoned around.

    Args:
        shape: N, I, O, H, W, k.
    """

    def __init__(self, shape: tuple[int, ...], padding: int, dtype: torch.dtype, seed: int = 0) -> None:
        n, n_in, n_out, height, width, k = shape
        random = Random(seed)
        self.padding = padding
        self.x = poisoned(random.images(n, n_in, height, width).to(dtype))
        self.weight = (random.normal(n_out, n_in, k, k) / (n_in * k * k) ** 0.5).to(dtype)
        self.shift = poisoned(random.normal(n_out).float())

    def sum(self) -> Sum:
        """z = conv(x, W) + t."""
        x, weight, shift = self.x.double(), self.weight.double(), self.shift.double()
        value = F.conv2d(x, weight, shift, padding=self.padding)
        terms = F.conv2d(x.abs(), weight.abs(), shift.abs(), padding=self.padding)
        return Sum(value, terms, weight[0].numel() + 1)


class Sum(NamedTuple):
    """A sum in float64, that of its terms' absolute values, and how many they are."""

    value: Tensor
    terms: Tensor
    n_terms: int

    def plus(self, other: Sum | None) -> Sum:
        """Both together."""
        if other is None:
            return self
        n_terms = self.n_terms + other.n_terms
        return Sum(self.value + other.value, self.terms + other.terms, n_terms)

    @property
    def bound(self) -> Tensor:
        """Of the error of a sum in float32 in any order; what follows the sum rounds a few times more."""
        return (self.n_terms + 4) * torch.finfo(torch.float32).eps * self.terms


def assert_epilogue(
    output: Tensor, codes: Tensor | None, z: Sum, epilogue: Epilogue, residual: Sum | None, *, save: bool
) -> None:
    """Output within its bound; codes that name a maximum and the sign of what was activated there."""
    added = None if residual is None else residual.value
    expected = apply_epilogue(z.value, epilogue, added)
    bound = z.plus(residual).bound
    largest = F.max_pool2d(bound, 2) if epilogue.pool else bound
    rounding = torch.finfo(output.dtype).eps * (expected.abs() + largest)
    assert output.is_contiguous(memory_format=torch.channels_last)
    assert_within(output, expected, largest + rounding, "output")
    if not save or (epilogue.activation == "none" and not epilogue.pool):
        assert codes is None
        return
    assert codes is not None
    assert codes.dtype == torch.uint8
    assert int(codes.max()) <= PLACE | POSITIVE
    activated = z.value if epilogue.activation == "before_residual" or added is None else z.value + added
    if epilogue.pool:
        place = (codes & PLACE).long()[..., None]
        whole = apply_epilogue(z.value, Epilogue(epilogue.activation, epilogue.slope), added)
        assert_within(windows(whole).gather(-1, place)[..., 0], expected, 2 * largest, "maximum")
        activated, bound = (windows(t).gather(-1, place)[..., 0] for t in (activated, bound))
    else:
        assert int((codes & PLACE).max()) == 0
    clear = activated.abs() > bound
    if epilogue.activation != "none":
        assert torch.equal(((codes & POSITIVE) != 0)[clear], (activated > 0)[clear])
