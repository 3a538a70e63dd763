"""What an operation on the `triton` backend must give, wherever its tensors are: interpreted on the CPU, or on a GPU.

Operands are rounded to the dtype first; the expected values are the reference's in float64. A value is a sum of K
products: its error is bounded by the sum of their absolute values, times the dtype's epsilon for what was stored
in it (operands made on the way, the value itself) and TF32's where float32 products go through it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from mtl_fast.ops import ConvOperands, Epilogue, FrozenFilters, base_learner, ss_conv
from tests.conv_cases import Random

TF32 = 2.0**-11
# (N, I, O, height, width, k): small, odd and prime, and some with whole blocks.
CONVOLUTIONS = {
    "one": (1, 1, 1, 1, 1, 1),
    "images": (2, 3, 8, 5, 7, 3),
    "prime": (2, 5, 7, 7, 5, 3),
    "blocks": (1, 64, 64, 6, 4, 3),
}


def unit(dtype: torch.dtype) -> float:
    """Relative error of one operand or result."""
    return max(torch.finfo(dtype).eps, TF32 if dtype == torch.float32 else 0.0)


def check_ss_conv(
    shape: tuple[int, ...], granularity: str, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> None:
    """Value and gradients of x, Φ_S1, Φ_S2 with activation and a residual."""
    n, n_in, n_out, height, width, k = shape
    random = Random(seed)
    conv = random.conv(n_in, n_out, k, granularity=granularity)
    assert conv.scale is not None
    assert conv.shift is not None
    assert conv.norm is not None
    images = {"x": random.images(n, n_in, height, width), "residual": random.images(n, n_out, height, width)}
    cotangent = random.images(n, n_out, height, width).to(dtype)
    vectors = {"scale": conv.scale, "shift": conv.shift}
    rounded = {name: t.to(dtype) for name, t in images.items()} | {n: t.float() for n, t in vectors.items()}
    norm = {name: getattr(conv.norm, name).float() for name in ("mean", "var", "weight", "bias")}
    fixed = {
        "w": conv.filters.weight.float(),
        "b": None if conv.filters.bias is None else conv.filters.bias.float(),
    }

    def run(to: Callable[[Tensor], Tensor], backend: str, absolute: bool) -> dict[str, Tensor]:
        """Of the operands as `to` gives them; with their absolute values, a linear bound on every sum."""

        def given(t: Tensor) -> Tensor:
            return to(t.abs() if absolute else t)

        leaves = {name: given(t).requires_grad_() for name, t in rounded.items()}
        own_norm = type(conv.norm)(  # type: ignore[misc]
            to(norm["mean"]) if not absolute else -to(norm["mean"].abs()),
            to(norm["var"]),
            given(norm["weight"]),
            given(norm["bias"]),
            conv.norm.eps,
        )
        filters = FrozenFilters(
            given(fixed["w"]), None if fixed["b"] is None else given(fixed["b"]), padding=k // 2
        )
        operands = ConvOperands(filters, leaves["scale"], leaves["shift"], own_norm)
        y = ss_conv(
            leaves["x"],
            operands,
            epilogue=Epilogue("none" if absolute else "after_residual"),
            residual=leaves["residual"],
            backend=backend,
        )
        gradients = torch.autograd.grad(y, list(leaves.values()), given(cotangent))
        return {"y": y.detach()} | dict(zip(leaves, gradients, strict=True))

    found = run(lambda t: t.to(device, copy=True), "triton", False)
    expected = run(lambda t: t.double(), "torch", False)
    bound = run(lambda t: t.double(), "torch", True)
    # An output within its error of 0 may take the other branch, and with it its gradient.
    near = expected["y"].abs() <= 8 * unit(dtype) * bound["y"]
    assert_within(found, expected, bound, unit(dtype), kinks=bool(near.any()))


def check_base_learner(dtype: torch.dtype, device: torch.device, *, order: str) -> None:
    """Logits and gradients of features and head after ten steps; float32 and exact whatever the features' dtype."""
    random = Random(1)
    sizes = {"support": (3, 10, 19), "query": (3, 7, 19), "weight": (5, 19), "bias": (5,)}
    given = {name: random.normal(*size) / 4 for name, size in sizes.items()}
    rounded = {n: t.to(dtype if n in ("support", "query") else torch.float32) for n, t in given.items()}
    labels = torch.arange(5).repeat(2).expand(3, -1).contiguous()
    cotangent = random.normal(3, 7, 5)

    def run(to: Callable[[Tensor], Tensor], backend: str) -> dict[str, Tensor]:
        leaves = {name: to(t).requires_grad_() for name, t in rounded.items()}
        support, query, weight, bias = leaves.values()
        options: dict[str, Any] = {"inner_lr": 0.1, "n_steps": 10, "order": order, "backend": backend}
        y = base_learner(support, labels.to(query.device), query, weight, bias, **options)
        asked = [t for name, t in leaves.items() if order == "second" or name != "support"]
        gradients = torch.autograd.grad(y, asked, cotangent.to(y))
        named = [name for name in leaves if order == "second" or name != "support"]
        return {"y": y.detach()} | dict(zip(named, gradients, strict=True))

    found = run(lambda t: t.to(device, copy=True), "triton")
    expected = run(lambda t: t.double(), "torch")
    # Ten steps of a contraction: the errors of products of 19 and 10 terms, added up.
    scale = {name: value.abs().max().expand(value.shape) for name, value in expected.items()}
    eps = max(torch.finfo(dtype).eps if dtype != torch.float32 else 0.0, torch.finfo(torch.float32).eps)
    assert_within(found, expected, scale, 10 * eps)


def assert_within(
    found: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    bound: Mapping[str, Tensor],
    relative: float,
    kinks: bool = False,
) -> None:
    """Largest error within 8 units of the bound; RMS within 2 of the bound's, unless a kink may have been crossed."""
    for name, value in expected.items():
        error = (found[name].cpu().double() - value).abs()
        assert error.isfinite().all(), f"{name}: {int((~error.isfinite()).sum())} values are not finite"
        limit = 8 * relative * bound[name].abs().clamp_min(1e-30)
        if kinks and name != "y":
            continue
        worst = float((error / limit).max())
        assert worst <= 1, f"{name}: the largest error is {worst:.2f} of its bound"
        rms = float(
            error.square().mean().sqrt() / (relative * bound[name]).square().mean().sqrt().clamp_min(1e-30)
        )
        assert rms <= 2, f"{name}: the RMS error is {rms:.2f} units"
