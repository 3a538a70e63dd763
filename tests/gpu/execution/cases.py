"""What execution tests share: chips, types, the numbers that a tensor core takes, and error bounds."""

from __future__ import annotations

from contextlib import AbstractContextManager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mtl_fast.kernels.contracts import Epilogue
from mtl_fast.kernels.reference.ss_conv import activate
from mtl_fast.ops._epilogue_codes import PLACE, POSITIVE
from tests.conv_cases import convolutions_take
from tests.gpu.conv_backward_cases import assert_within
from tests.native_cases import windows

EPS32 = torch.finfo(torch.float32).eps
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32}
by_chip = pytest.mark.parametrize("chip", ["sm_80", "sm_90"])
by_type = pytest.mark.parametrize("kind", TYPES)


def precision(kind: str) -> AbstractContextManager[None]:
    """Within it, convolutions of float32 take TF32 if that is the type."""
    return convolutions_take("tf32" if kind == "tf32" else "ieee")


def taken(t: Tensor, kind: str) -> Tensor:
    """What a product takes of an operand, in float64: in TF32 the low 13 bits of float32 do not count."""
    if kind == "tf32":
        return (t.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32).view(t.shape).double()
    return t.double()


def rounded(expected: Tensor, dtype: torch.dtype) -> Tensor:
    """The error of one rounding to a type."""
    info = torch.finfo(dtype)
    return info.eps / 2 * expected.abs() + info.smallest_normal * info.eps


def convolved(x: Tensor, weight: Tensor, padding: int, kind: str) -> tuple[Tensor, Tensor]:
    """(conv(x, W) in float64 of what the product takes, bound of its sum in float32).

    A sum of n products in float32 is wrong by some machine epsilons × √n × the root of the sum of their squares.
    """
    x, weight = taken(x, kind), taken(weight, kind)
    squares = F.conv2d(x.square(), weight.square(), padding=padding).sqrt()
    return F.conv2d(x, weight, padding=padding), EPS32 * (weight[0].numel() + 8) ** 0.5 * squares


def assert_epilogue(
    got: tuple[Tensor, Tensor | None], z: Tensor, bound: Tensor, epilogue: Epilogue, residual: Tensor | None
) -> None:
    """y and its codes against z in float64, known within a bound; a tie within it may fall either way."""
    output, codes = got
    r = torch.zeros_like(z) if residual is None else residual.double()
    first = activate(z, epilogue.slope) if epilogue.activation == "before_residual" else z
    whole = first + r
    sign = z if epilogue.activation == "before_residual" else whole
    if epilogue.activation == "after_residual":
        whole = activate(whole, epilogue.slope)
    # Activation, addition and the folded shift each round once in float32.
    bound = bound + 4 * EPS32 * (z.abs() + r.abs())
    if epilogue.pool:
        whole, bound, sign = windows(whole), windows(bound), windows(sign)
        if codes is not None:
            place = (codes & PLACE).long()[..., None]
            chosen, worst = whole.gather(-1, place)[..., 0], bound.amax(-1)
            assert (chosen >= whole.amax(-1) - 2 * worst).all(), "places of the maxima"
            sign = sign.gather(-1, place)[..., 0]
        whole, bound = whole.amax(-1), bound.amax(-1)
    if codes is not None:
        sure = sign.abs() > bound
        assert torch.equal((codes & POSITIVE != 0)[sure], (sign > 0)[sure]), "signs"
    assert_within(output, whole, bound + rounded(whole, output.dtype), "output")
