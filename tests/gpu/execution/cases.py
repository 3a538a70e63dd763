"""What execution tests share: chips, types, the numbers that a tensor core takes, and error bounds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

EPS32 = torch.finfo(torch.float32).eps
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32}
by_chip = pytest.mark.parametrize("chip", ["sm_80", "sm_90"])
by_type = pytest.mark.parametrize("kind", TYPES)


@contextmanager
def precision(kind: str) -> Iterator[None]:
    """Within it, convolutions of float32 take TF32 if that is the type."""
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "tf32" if kind == "tf32" else "ieee"
    try:
        yield
    finally:
        torch.backends.cudnn.conv.fp32_precision = before


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
