"""What an operation on the `triton` backend must give, wherever its tensors are: interpreted on the CPU, or on a GPU.

Operands are rounded to the dtype first; the expected values are the reference's in float64. A value is a sum of K
products: its error is bounded by the sum of their absolute values, times the dtype's epsilon for what was stored
in it (operands made on the way, the value itself) and TF32's where float32 products go through it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtl_fast.ops import (
    ConvOperands,
    Epilogue,
    FrozenFilters,
    base_learner,
    effective_weights,
    episode_norm,
    images,
    routes,
    ss_conv,
    why,
)
from tests.conv_cases import Random, convolutions_take, mapped
from tests.gpu.block_cases import decided, results
from tests.native_cases import assert_near_as_torch, double
from tests.norm_cases import leaves
from tests.norm_cases import make as normalised_images
from tests.ops.test_images import MEAN, STD, arguments
from tests.ops.test_images import make as stored_images


class Precision(NamedTuple):
    """Of images and activations, and whether products of float32 take TF32."""

    dtype: torch.dtype
    tf32: bool = False

    @property
    def rounds_as(self) -> torch.dtype:
        """The type whose precision a product's operands have: TF32 has the ten bits of float16."""
        return torch.float16 if self.tf32 else self.dtype

    @property
    def unit(self) -> float:
        """Relative error of one operand or result of a product."""
        return torch.finfo(self.rounds_as).eps / (2 if self.tf32 else 1)


PRECISIONS = {
    "fp32": Precision(torch.float32),
    "tf32": Precision(torch.float32, tf32=True),
    "fp16": Precision(torch.float16),
    "bf16": Precision(torch.bfloat16),
}
# (N, I, O, height, width, k): small, odd and prime, and some with whole blocks.
CONVOLUTIONS = {
    "one": (1, 1, 1, 1, 1, 1),
    "images": (2, 3, 8, 5, 7, 3),
    "prime": (2, 5, 7, 7, 5, 3),
    "blocks": (1, 64, 64, 6, 4, 3),
}


def backend_of(operation: str, precision: Precision, device: torch.device, **facts: Any) -> str:
    """`triton`, but for exact convolutions on a GPU, of which `auto` says why PyTorch's run."""
    if device.type != "cuda" or precision.dtype != torch.float32 or precision.tf32:
        return "triton"
    assert why(operation, **facts).startswith("torch: not triton: float32 without TF32")
    return "auto"


def check_ss_conv(
    device: torch.device, precision: Precision, shape: tuple[int, ...], granularity: str, seed: int = 0
) -> None:
    """Value and gradients of x, Φ_S1, Φ_S2 with activation and a residual."""
    n, n_in, n_out, height, width, k = shape
    dtype, unit, random = precision.dtype, precision.unit, Random(seed)
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

    def run(to: Callable[[Tensor], Tensor], backend: str | None, absolute: bool) -> dict[str, Tensor]:
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
        facts: dict[str, Any] = {"x": leaves["x"], "conv": operands}
        y = ss_conv(
            **facts,
            epilogue=Epilogue("none" if absolute else "after_residual"),
            residual=leaves["residual"],
            backend=backend or backend_of("ss_conv", precision, device, **facts),
        )
        gradients = torch.autograd.grad(y, list(leaves.values()), given(cotangent))
        return {"y": y.detach()} | dict(zip(leaves, gradients, strict=True))

    found = run(lambda t: t.to(device, copy=True), None, False)
    expected = run(lambda t: t.double(), "torch", False)
    bound = run(lambda t: t.double(), "torch", True)
    # An output within its error of 0 may take the other branch, and with it its gradient.
    near = expected["y"].abs() <= 8 * unit * bound["y"]
    assert_within(found, expected, bound, unit, kinks=bool(near.any()))


def check_ss_block(device: torch.device, precision: Precision, form: str, granularity: str) -> None:
    """Value and gradients of a pooled block, as near to float64 as PyTorch's own on the same device."""
    x, layers, exact = decided(form, granularity, precision.dtype, precision.rounds_as)
    x, layers = x.to(device), [mapped(conv, lambda t: t.to(device)) for conv in layers]
    plain = results(x, layers, form, "torch")
    facts: dict[str, Any] = {"x": x, "convs": layers[1:], "shortcut": layers[0]}
    ours = results(x, layers, form, backend_of("ss_block", precision, device, **facts))
    names = [f"result {i}" for i in range(len(exact))]
    length = 9 * 7 * x[:, 0].numel()
    assert_near_as_torch(ours, plain, exact, length, names, dtype=precision.rounds_as, amplified=False)


def check_effective_weights(device: torch.device, precision: Precision, fold: bool) -> None:
    """Layers of every kind refreshed at once: weights rounded to the dtype, shifts of float32."""
    random, dtype = Random(1, torch.float32), precision.dtype
    layers = [
        random.conv(3, 64, granularity="kernel"),
        random.conv(37, 71, granularity="filter", bias=False),
        random.conv(17, 33, 1, granularity=None),
        random.conv(16, 1, granularity="kernel", norm=None),
    ]
    moved = [mapped(conv, lambda t: t.to(device)) for conv in layers]
    found = effective_weights(moved, fold=fold, dtype=dtype, backend="triton")
    expected = effective_weights([double(conv) for conv in layers], fold=fold, backend="torch")
    # Six factors each rounded in float32, terms of up to a few units, and one rounding to the dtype.
    exact, stored = (torch.finfo(t).eps for t in (torch.float32, dtype))
    for ours, wanted in zip(found, expected, strict=True):
        assert (ours.weight.dtype, ours.folded) == (dtype, wanted.folded)
        error = (ours.weight.cpu().double() - wanted.weight).abs()
        tiny = torch.finfo(dtype).smallest_normal
        assert (error <= (6 * exact + stored) * (wanted.weight.abs() + tiny)).all(), "weight"
        assert ours.packed is not None
        turned = ours.packed.rotated.permute(3, 0, 1, 2).flip(2, 3)
        assert torch.equal(turned, ours.weight), "both layouts hold the same"
        error = (ours.shift.cpu().double() - wanted.shift).abs()
        assert (error <= 32 * exact * (1 + wanted.shift.abs().max())).all(), "shift"


def check_episode_norm(device: torch.device, precision: Precision, form: str, masked: bool) -> None:
    """Output, statistics and gradients of two groups, float32 inside whatever the images' dtype."""
    z, norm, residual = normalised_images((2, 3, 17, 7, 5))
    z, residual = (t.to(precision.dtype) for t in (z, residual))
    mask = torch.tensor([True, False, True, True, True, False]) if masked else None
    keep = torch.ones(6, dtype=torch.bool) if mask is None else mask
    epilogue = Epilogue("after_residual", 0.1, pool=True) if form == "common" else Epilogue("before_residual")

    def run(to: Callable[[Tensor], Tensor], backend: str) -> list[Tensor]:
        named, given = leaves(z, norm, residual, torch.float64)
        named = {name: to(t.detach()).requires_grad_() for name, t in named.items()}
        given = type(norm)(None, None, named["weight"], named["bias"], norm.eps)
        out = episode_norm(
            named["z"],
            given,
            n_groups=2,
            mask=None if mask is None else mask.to(named["z"].device),
            epilogue=epilogue,
            residual=named["residual"],
            backend=backend,
        )
        cotangent = Random(7).normal(*out.output.shape).bfloat16() * keep.view(-1, 1, 1, 1)
        gradients = torch.autograd.grad(out.output, list(named.values()), cotangent.to(out.output))
        return [t.detach().cpu().double() for t in (*out, *gradients)]

    def moved(t: Tensor) -> Tensor:
        return t.to(device, precision.dtype if t.dim() == 4 else torch.float32)

    names = ("output", "mean", "var", "n_values", "z", "weight", "bias", "residual")
    for name, ours, wanted in zip(names, run(moved, "triton"), run(Tensor.double, "torch"), strict=True):
        stored = torch.finfo(precision.dtype).eps if name in ("output", "z", "residual") else 0.0
        # Values of a few units about means of a few; sums over the pixels of a group, then over both groups.
        relative = 32 * torch.finfo(torch.float32).eps * (2 * 3 * 35) ** 0.5 + stored
        assert ours.isfinite().all(), name
        assert (ours - wanted).abs().max() <= relative * wanted.abs().max(), name


def check_images(device: torch.device, precision: Precision, augment: bool) -> None:
    """Equal to the bit to the reference."""
    store, index = stored_images(5, 23, 31), torch.tensor([4, 0, 2])
    options = arguments(store, 3, (22, 29), 3, augment, augment)
    moved = {name: t.to(device) if isinstance(t, Tensor) else t for name, t in options.items()}
    settings: dict[str, Any] = {"mean": MEAN, "std": STD, "dtype": precision.dtype}
    found = images(store.to(device), index.to(device), **settings, **moved, backend="triton")
    assert torch.equal(found.cpu(), images(store, index, **settings, **options, backend="torch"))


def check_base_learner(device: torch.device, precision: Precision, order: str) -> None:
    """Logits and gradients of features and head after ten steps; float32 and exact whatever the features' dtype."""
    random, dtype = Random(1), precision.dtype
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


@dataclass(frozen=True)
class Check:
    """An operation's check.

    Attributes:
        run: called with a device, a precision and a case's arguments.
        cases: the arguments by readable name.
        routed: whether it has convolutions, which take our kernel or cuDNN's and one pass that follows them.
    """

    run: Callable[..., None]
    cases: Mapping[str, tuple[Any, ...]]
    routed: bool = False

    @property
    def routes(self) -> tuple[routes.Route | None, ...]:
        """Those that it is made by; None where there is no choice."""
        return routes.ROUTES if self.routed else (None,)


GRANULARITIES = ("kernel", "filter")
CHECKS = {
    "ss_conv": Check(
        check_ss_conv,
        {f"{name} {g}": (shape, g) for name, shape in CONVOLUTIONS.items() for g in GRANULARITIES},
        routed=True,
    ),
    "ss_block": Check(
        check_ss_block,
        {f"{form} {g}": (form, g) for form in ("common", "tensorflow") for g in GRANULARITIES},
        routed=True,
    ),
    "effective_weights": Check(check_effective_weights, {"folded": (True,), "not folded": (False,)}),
    "base_learner": Check(check_base_learner, {"first": ("first",), "second": ("second",)}),
    "episode_norm": Check(
        check_episode_norm, {"common masked": ("common", True), "tensorflow": ("tensorflow", False)}
    ),
    "images": Check(check_images, {"centre": (False,), "cropped and flipped": (True,)}),
}


def every_check(precisions: Mapping[str, Precision]) -> dict[str, tuple[str, str, str, routes.Route | None]]:
    """(operation, case, precision, route) by a name that says them."""
    return {
        " ".join(filter(None, (operation, case, precision, route))): (operation, case, precision, route)
        for operation, check in CHECKS.items()
        for case in check.cases
        for precision in precisions
        for route in check.routes
    }


def run_check(
    operation: str, case: str, precision: str, route: routes.Route | None, device: torch.device
) -> None:
    """One of `every_check` on a device."""
    check, settings = CHECKS[operation], PRECISIONS[precision]
    with (
        convolutions_take("tf32" if settings.tf32 else "ieee"),
        routes.forced(route) if route else nullcontext(),
    ):
        check.run(device, settings, *check.cases[case])


def summary() -> Iterator[str]:
    """A line an operation: the precisions and routes that it is checked in."""
    for operation, check in CHECKS.items():
        by = f", by {' and '.join(map(str, check.routes))}" if check.routed else ""
        yield f"{operation} in {', '.join(PRECISIONS)}{by}"
