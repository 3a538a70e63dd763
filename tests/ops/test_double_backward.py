"""Gradients with a graph (``create_graph=True``) where operands depend on each other, and gradients of those."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mtl_fast.kernels.contracts import ChannelNorm, ConvOperands, FrozenFilters
from mtl_fast.ops import base_learner, episode_norm, ss_conv
from tests.conv_cases import Random
from tests.native_cases import needs_native

LABELS = torch.arange(5).repeat(2, 1)
# Float32 beside float64 through two derivatives; a path that is counted twice is off by hundredths or more.
NEAR = 1e-4

Function = Callable[[Tensor, str], Tensor]


def prototypes(x: Tensor, backend: str) -> Tensor:
    """A head that starts from its support features [2, 5, D]."""
    bias = -x.square().sum(-1) / 2
    return base_learner(x, LABELS, x, 2 * x.roll(1, 1), bias, inner_lr=0.1, n_steps=5, backend=backend)


def attended(x: Tensor, backend: str) -> Tensor:
    """Queries that were made from the support features."""
    query = x @ x.mT @ x / 5
    weight, bias = (torch.ones(2, 5, x.shape[-1]).to(x), torch.zeros(2, 5).to(x))
    return base_learner(x, LABELS, query, weight, bias, inner_lr=0.1, n_steps=5, backend=backend)


def convolution(granularity: str, x: Tensor) -> ConvOperands:
    """Four channels to four, of x's dtype."""
    random = Random(0, torch.float64)
    filters = FrozenFilters(random.normal(4, 4, 3, 3).to(x.dtype), torch.zeros(4).to(x), padding=1)
    scale = random.normal(4, 4 if granularity == "kernel" else 1, 1, 1).to(x.dtype)
    return ConvOperands(filters, scale, random.normal(4).to(x.dtype))


def images_of(x: Tensor) -> Tensor:
    return x.reshape(1, 4, 5, 8)[..., :5]


def twice(granularity: str) -> Function:
    """One layer that is used twice, its scale and shift made from x."""

    def run(x: Tensor, backend: str) -> Tensor:
        conv = convolution(granularity, x)
        conv = replace(conv, scale=conv.scale * x[0, 0, 0], shift=conv.shift * x[0, 0, 1])
        hidden = ss_conv(images_of(x), conv, backend=backend).tanh()
        return ss_conv(hidden, conv, backend=backend)

    return run


def generated(x: Tensor, backend: str) -> Tensor:
    """A scale that was made from the images."""
    images = images_of(x)
    scale = 3 * images.mean((0, 2, 3)).view(4, 1, 1, 1)
    return ss_conv(images, replace(convolution("filter", x), scale=scale), backend=backend)


def normalised_twice(x: Tensor, backend: str) -> Tensor:
    norm = ChannelNorm(None, None, x[0, 0, :4], x[1, 0, :4], 1e-5)
    images = Random(1, torch.float64).normal(2, 4, 3, 3).to(x.dtype)
    for _ in range(2):
        images = episode_norm(images, norm, n_groups=1, backend=backend).output.tanh()
    return images


CASES: dict[str, Function] = {
    "a head from prototypes": prototypes,
    "queries from the support": attended,
    "a layer used twice, kernel": twice("kernel"),
    "a layer used twice, filter": twice("filter"),
    "a scale from the images": generated,
    "a norm used twice": normalised_twice,
}


@needs_native
@pytest.mark.parametrize("case", CASES)
def test_a_path_between_operands_counts_once(case: str) -> None:
    found = []
    for dtype, backend in ((torch.float32, "native"), (torch.float64, "torch")):
        x = Random(2, torch.float64).normal(2, 5, 16).to(dtype).requires_grad_()
        y = CASES[case](x, backend)
        cotangent = Random(3, torch.float64).normal(*y.shape).to(dtype)
        (first,) = torch.autograd.grad(y, x, cotangent, create_graph=True)
        (second,) = torch.autograd.grad((first * first.detach().sin()).sum(), x, retain_graph=True)
        (plain,) = torch.autograd.grad(y, x, cotangent)
        found.append([t.detach().double() for t in (plain, first, second)])
    for ours, expected in zip(*found, strict=True):
        assert float((ours - expected).norm() / expected.norm()) <= NEAR
