"""Images and norms for tests of fast batch statistics, and their comparison within derived bounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mtl_fast.kernels.contracts import ChannelNorm, Epilogue, Normalised
from mtl_fast.kernels.reference.ss_conv import apply_epilogue
from mtl_fast.ops import episode_norm
from tests.conv_cases import Random
from tests.native_cases import EPS, decided

NAMES = ("z", "weight", "bias", "residual")


def make(size: Sequence[int], seed: int = 0, affine: str = "both") -> tuple[Tensor, ChannelNorm, Tensor]:
    """Images of groups of unlike mean and spread, a norm and a residual; float32."""
    groups, per_group, channels, height, width = size
    random = Random(seed, torch.float32)
    z = random.images(groups * per_group, channels, height, width)
    z = z * random.positive(groups, 1, 1, 1).repeat_interleave(per_group, 0)
    z = z + random.normal(groups, 1, 1, 1).repeat_interleave(per_group, 0)
    return z, random.norm(channels, affine), random.images(*z.shape)


def leaves(
    z: Tensor, norm: ChannelNorm, residual: Tensor | None, dtype: torch.dtype = torch.float32
) -> tuple[dict[str, Tensor], ChannelNorm]:
    """Copies that require a gradient, by name; and the norm made of them."""
    given = dict(zip(NAMES, (z, norm.weight, norm.bias, residual), strict=True))
    named = {
        name: t.detach().to(dtype).clone().requires_grad_() for name, t in given.items() if t is not None
    }
    return named, replace(norm, weight=named.get("weight"), bias=named.get("bias"))


def run(
    z: Tensor,
    norm: ChannelNorm,
    residual: Tensor | None,
    *,
    n_groups: int,
    epilogue: Epilogue | None = None,
    mask: Tensor | None = None,
    backend: str = "native",
) -> Normalised:
    return episode_norm(
        z, norm, n_groups=n_groups, mask=mask, epilogue=epilogue, residual=residual, backend=backend
    )


def assert_agrees(
    z: Tensor,
    norm: ChannelNorm,
    residual: Tensor | None,
    epilogue: Epilogue,
    n_groups: int,
    mask: Tensor | None = None,
    backend: str = "native",
) -> None:
    """Values and gradients against the definition in float64.

    A sum over m values rounds like √m steps relative to the root of the sum of their squares. The mean rounds to
    float32 (eps·|mean|), and every value near it: z − mean is off by eps·(|z| + |mean|), so x̂ = (z − mean)/σ by
    eps·(|z| + |mean|)/σ, and what is made of x̂ by as much.
    """
    options: dict[str, Any] = {"n_groups": n_groups, "mask": mask}
    ours, given = leaves(z, norm, residual)
    exact, wide = leaves(z, norm, residual, torch.float64)
    out = run(ours["z"], given, ours.get("residual"), epilogue=epilogue, backend=backend, **options)
    plain = run(exact["z"], wide, None, backend="torch", **options)
    keep = torch.ones(len(z), dtype=torch.bool) if mask is None else mask
    m_image = keep.view(-1, 1, 1, 1)
    m = float(plain.n_values.max())
    mean, sigma = plain.mean, (plain.var + norm.eps).sqrt()
    biggest = z.double().where(m_image, 0).abs().amax(dim=(2, 3)).unflatten(0, (n_groups, -1)).amax(1)
    # [G, C]: how far off x̂ may be.
    off = 4 * EPS * (biggest + mean.abs()) / sigma + EPS * m**0.5
    assert ((out.mean - mean).abs() <= 2 * EPS * (biggest + mean.abs())).all(), "mean"
    assert ((out.var - plain.var).abs() <= 2 * off * sigma.square()).all(), "var"
    assert torch.equal(out.n_values.double(), plain.n_values), "n_values"

    gamma = torch.ones(z.shape[1]).double() if norm.weight is None else norm.weight.double()
    beta = torch.zeros(z.shape[1]).double() if norm.bias is None else norm.bias.double()
    margin = float((off * (gamma.abs() * (1 + biggest / sigma)) + EPS * beta.abs()).max())
    extra = None if residual is None else exact["residual"]
    expected = apply_epilogue(plain.output, epilogue, extra).where(m_image, 0)
    y_error = (out.output.double() - expected).detach().abs()
    largest = float(expected.detach().abs().max())
    assert out.output.isfinite().all()
    assert y_error.max() <= margin + 2 * EPS * largest, f"y: {y_error.max():.2e} > {margin:.2e}"

    clear = decided(plain.output.detach(), epilogue, None if extra is None else extra.detach(), margin)
    assert clear[keep].double().mean() > 0.9, "almost everywhere"
    cotangent = Random(7, torch.float32).normal(*out.output.shape) * clear
    names = list(ours)
    found = torch.autograd.grad(out.output, list(ours.values()), cotangent)
    inner = torch.autograd.grad(expected, plain.output, cotangent.double(), retain_graph=True)[0]
    wanted = torch.autograd.grad(expected, list(exact.values()), cotangent.double())
    inner, size = inner.where(m_image, 0), inner.square().sum(dim=(0, 2, 3)).sqrt()
    worst = float(off.max())
    # Σ d and Σ d·x̂, and dz = γ/σ·(d − Σ d/m − x̂·Σ d·x̂/m), which is at most three times as large as d.
    reach = float((biggest / sigma).max()) + 1
    slack = {
        "z": float((gamma.abs() / sigma).max()) * 3 * worst * reach * float(inner.abs().max()),
        "weight": float(size.max()) * (worst * m**0.5 * n_groups**0.5 + EPS * m**0.5 * reach),
        # Partial sums are as large as that root, or as the total where the terms are of one sign.
        "bias": float(torch.maximum(size, inner.sum(dim=(0, 2, 3)).abs()).max())
        * EPS
        * (m * n_groups) ** 0.5,
        "residual": EPS * float(cotangent.abs().max()),
    }
    for name, actual, value in zip(names, found, wanted, strict=True):
        error = (actual.double() - value).abs().max()
        assert actual.isfinite().all(), name
        assert error <= slack[name], f"{name}: {error:.2e} > {slack[name]:.2e}"
    if mask is not None:
        for name, actual in zip(names, found, strict=True):
            if name in ("z", "residual"):
                assert actual[~mask].count_nonzero() == 0, name
