"""What tests of the native convolutions share: Winograd's matrices, derived tolerances, and one comparison."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mtl_fast.kernels.contracts import ConvOperands, Epilogue
from mtl_fast.kernels.reference.ss_conv import apply_epilogue
from mtl_fast.kernels.reference.ss_conv import ss_conv as reference
from mtl_fast.ops import ss_conv
from mtl_fast.ops._library import native_runs
from tests.conv_cases import mapped, rebuilt, tensors

TILES = (2, 4, 6)
EPS = torch.finfo(torch.float32).eps
# Below it the gradient of a filter's scale is a product; above, a quotient of what the forward pass kept.
TINY_SCALE = 1 / 64
_RUNS, _REASON = native_runs(torch.zeros(1))
needs_native = pytest.mark.skipif(not _RUNS, reason=_REASON)


@cache
def matrices(tile: int) -> dict[str, list[list[Fraction]]]:
    """Bᵀ, G and Aᵀ of F(tile×tile, 3×3) as the kernels have them, exactly: `bt`, `g`, `at`."""
    header = Path(__file__).parents[1] / "kernels" / "native" / "winograd.h"
    body = re.search(rf"struct Matrices<{tile}, 3> \{{(.*?)\n\}};", header.read_text("utf-8"), re.DOTALL)
    assert body, f"no matrices of F({tile}, 3) in {header.name}"
    found = re.findall(r"float (\w+)\[\d\]\[\d\] =\s*\{(.*?)\};", body[1], re.DOTALL)
    return {
        name: [[_number(value) for value in row.split(",")] for row in re.findall(r"\{([^{}]+)\}", rows)]
        for name, rows in found
    }


def _number(text: str) -> Fraction:
    """`-2 / 9.f` and the like."""
    first, *divisor = (Fraction(part.strip().rstrip("f")) for part in text.split("/"))
    return first / divisor[0] if divisor else first


def amplification(of: str, k: int, tiles: Sequence[int] = TILES) -> float:
    """By how much the kernels may enlarge rounding errors beyond those of direct sums, with any of `tiles`.

    In one dimension an output is Σ_p A_p·(G_p·w)·(B_p·x). Each product rounds relative to its own size: for
    independent terms of size 1 that is ‖G_p‖·‖B_p‖, where a direct sum of R terms has √R. The ratio of both at
    the worst place, squared for two dimensions. In the taps' gradient A and G change places.

    Args:
        of: ``images`` (a convolution or its input gradient) or ``taps`` (a weight gradient).
        k: taps a side; 1×1 convolutions are plain products.
    """
    return 1.0 if k == 1 else max(_amplification(of, tile) for tile in tiles)


def _amplification(of: str, tile: int) -> float:
    at, g, bt = (
        torch.tensor([[float(v) for v in row] for row in matrices(tile)[n]]) for n in ("at", "g", "bt")
    )
    # [places, points], [points, terms]
    places, terms = (at, g) if of == "images" else (g.T, at.T)
    products = terms.square().sum(1) * bt.square().sum(1)
    return float((places.square() @ products).max()) / terms.shape[1]


def double(conv: ConvOperands) -> ConvOperands:
    """The same values in float64."""
    return mapped(conv, Tensor.double)


def squared(conv: ConvOperands) -> ConvOperands:
    """Every factor and term squared: its convolution of x² sums the squares of all terms of that of x."""
    norm = conv.norm
    if norm is not None:
        # The folded shift subtracts the mean and divides by √(var + eps).
        norm = replace(norm, mean=-norm.mean.square(), var=(norm.var + norm.eps).square() - norm.eps)
    return rebuilt(replace(conv, norm=norm), {name: t.detach().square() for name, t in tensors(conv).items()})


def leaves(x: Tensor, conv: ConvOperands, trained: Sequence[str]) -> tuple[dict[str, Tensor], ConvOperands]:
    """x and the tensors of `conv` by name, those of `trained` requiring a gradient; and `conv` made of them."""
    named = {"x": x} | tensors(conv)
    named = {name: t.detach().clone().requires_grad_(name in trained) for name, t in named.items()}
    return named, rebuilt(conv, named)


def decided(z: Tensor, epilogue: Epilogue, residual: Tensor | None, margin: Tensor) -> Tensor:
    """Where no rounding of z up to `margin` [1, O, 1, 1] changes a sign at the activation or a window's maximum."""
    y = apply_epilogue(z, replace(epilogue, pool=False), residual)
    sign = z + residual if residual is not None and epilogue.activation == "after_residual" else z
    clear = (sign.abs() > margin) | (epilogue.activation == "none")
    if not epilogue.pool:
        return clear
    best, second = windows(y).topk(2, dim=-1).values.unbind(-1)
    # Equal values are zeros of a ReLU: whichever is taken, its gradient is 0.
    return windows(clear).all(-1) & ((best - second > margin) | (best == second))


def windows(y: Tensor) -> Tensor:
    """[N, C, H, W] → [N, C, H//2, W//2, 4], the pixels that a 2×2 pooling sees."""
    height, width = (length // 2 * 2 for length in y.shape[2:])
    parts = y[:, :, :height, :width].unflatten(3, (-1, 2)).unflatten(2, (-1, 2))
    return parts.transpose(3, 4).flatten(4)


def assert_close(actual: Tensor, expected: Tensor, relative: float, natural: Tensor, what: str) -> None:
    """The largest and the RMS error against those of the terms' root sum of squares, `natural`."""
    assert actual.shape == expected.shape, what
    assert actual.isfinite().all(), what
    error = (actual.double() - expected).abs()
    assert error.max() <= relative * natural.max(), (
        f"{what}: {error.max() / natural.max():.2e} > {relative:.2e}"
    )
    rms, natural_rms = error.square().mean().sqrt(), natural.square().mean().sqrt()
    assert rms <= relative * natural_rms, f"{what}, RMS: {rms / natural_rms:.2e} > {relative:.2e}"


def assert_native_agrees(
    x: Tensor,
    conv: ConvOperands,
    epilogue: Epilogue | None = None,
    residual: Tensor | None = None,
    *,
    trained: Sequence[str] = ("x", "scale", "shift"),
    tiles: Sequence[int] = TILES,
    seed: int = 100,
    backend: str = "native",
) -> None:
    """Value and gradients of a backend's `ss_conv` against the float64 reference, each to its derived tolerance.

    A tolerance is eps·√(length of the reduction)·amplification, relative to the root of the sum of the squares
    of all terms, which the reference itself gives when it is fed with squares. eps is that of the images, and only
    the native kernels amplify.
    """
    eps = torch.finfo(x.dtype).eps
    epilogue = epilogue or Epilogue()
    wide_residual = None if residual is None else residual.double()
    named, wide = leaves(x.double(), double(conv), trained)
    z = reference(named["x"], wide, epilogue=Epilogue(), residual=None, fold=True)
    expected = apply_epilogue(z, epilogue, wide_residual)
    k, n_pixels = conv.filters.weight.shape[2], z[:, 0].numel()
    of_images, of_taps = 1.0, 1.0
    if backend == "native":
        of_images, of_taps = (amplification(of, k, tiles) for of in ("images", "taps"))
    # The factors Φ_S1 and γ/σ and the parts of the shift round too, once each.
    terms = k * k * x.shape[1] + 8
    forward = eps * of_images * terms**0.5

    squares, wide_squared = leaves(x.double().square(), squared(double(conv)), trained)
    z_squared = reference(squares["x"], wide_squared, epilogue=Epilogue(), residual=None, fold=True)
    natural = z_squared.detach() if residual is None else z_squared.detach() + wide_residual.square()
    ours, given = leaves(x, conv, trained)
    if residual is not None:
        residual = residual.detach().clone().requires_grad_()
        wide_residual.requires_grad_()
    y = ss_conv(ours["x"], given, epilogue=epilogue, residual=residual, backend=backend)
    # A maximum is one of its window's values and no farther off than they.
    assert_close(y, expected, forward, natural.sqrt(), "y")

    margin = forward * natural.sqrt().amax(dim=(0, 2, 3), keepdim=True)
    clear = decided(z.detach(), epilogue, None if residual is None else wide_residual.detach(), margin)
    assert clear.double().mean() > (0.95 if x.dtype == torch.float32 else 0.8), "too little is decided"
    cotangent = (torch.randn(y.shape, generator=torch.Generator().manual_seed(seed)) * clear).to(y.dtype)
    names = [name for name in trained if name in named]
    inner = torch.autograd.grad(expected, z, cotangent.double(), retain_graph=True)[0] if names else None
    results = torch.autograd.grad(
        y, [*(ours[name] for name in names), *([] if residual is None else [residual])], cotangent
    )
    if residual is not None:
        expected = apply_epilogue(z.detach(), epilogue, wide_residual)
        wanted = torch.autograd.grad(expected, wide_residual, cotangent.double())[0]
        # A copy, at most times the slope.
        tiny = 0.0 if x.dtype == torch.float32 else torch.finfo(x.dtype).smallest_normal
        assert ((results[-1] - wanted).abs() <= eps * (wanted.abs() + tiny)).all(), "residual"
    if not names:
        return
    relative = {
        "x": of_images * (k * k * z.shape[1] + 8) ** 0.5,
        "scale": of_taps * (k * k * n_pixels + 8) ** 0.5,
        "weight": of_taps * (n_pixels + 8) ** 0.5,
        "gamma": of_taps * (terms * n_pixels) ** 0.5,
    }
    if conv.scale is not None and conv.scale.shape[1] < x.shape[1]:
        relative["scale"] = relative["gamma"]
    sums = torch.autograd.grad(z, [named[name] for name in names], inner)
    squared_sums = torch.autograd.grad(
        z_squared, [squares[name] for name in names], inner.square(), allow_unused=True
    )
    trains_weight = "weight" in names or "gamma" in names
    for name, result, wanted, size in zip(names, results, sums, squared_sums, strict=False):
        by_output = name == "scale" and not trains_weight and relative["scale"] == relative["gamma"]
        if by_output and conv.scale.abs().min() >= TINY_SCALE:
            # Σ G·(y − residual − shift)/Φ_S1: what is subtracted rounds with y.
            shift_squared = reference(
                torch.zeros_like(squares["x"]), wide_squared, epilogue=Epilogue(), residual=None, fold=True
            )
            kept = inner.square() * (natural + shift_squared)
            size = kept.sum(dim=(0, 2, 3)).view(conv.scale.shape).detach() / wide.scale.detach().square()
            bound = forward + eps * n_pixels**0.5
        else:
            bound = eps * relative.get(name, (n_pixels + 8) ** 0.5)
        assert_close(result, wanted, bound, size.sqrt(), name)


@contextmanager
def n_threads(n: int) -> Iterator[None]:
    """That many threads, and the former number after it."""
    former = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(former)


class Kinks(TorchFunctionMode):
    """Measures how close a computation comes to the kinks of its activations and pooling.

    `nearest` is the smallest distance from a sign change or from another maximum, relative to the tensor's
    largest value. Equal values in a window are zeros of a ReLU and count for nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.nearest = 1.0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.leaky_relu, F.relu, torch.max_pool2d):
            x = args[0].detach()
            if func is torch.max_pool2d:
                best, second = windows(x).topk(2, dim=-1).values.unbind(-1)
                distances = (best - second)[best > second]
            else:
                distances = x.abs()
            self.nearest = min(self.nearest, float(distances.min() / x.abs().max()))
        return func(*args, **(kwargs or {}))


def assert_near_as_torch(
    native: Sequence[Tensor],
    plain: Sequence[Tensor],
    exact: Sequence[Tensor],
    length: int,
    names: Sequence[str],
    *,
    dtype: torch.dtype = torch.float32,
    amplified: bool = True,
) -> None:
    """Errors of several layers, the largest and the RMS: Winograd's amplification times those of direct sums.

    Those are eps·√length of `dtype`, or what PyTorch's own results in it (`plain`) are off by, where that is more:
    values that cancel are small against their errors. What is not `amplified` may be off twice as far.
    """
    factor = max(amplification("images", 3), amplification("taps", 3)) if amplified else 2.0
    for ours, theirs, expected, name in zip(native, plain, exact, names, strict=True):
        assert ours.isfinite().all(), name
        for size in (_largest, _rms):
            error, usual = (size(t.double() - expected) for t in (ours, theirs))
            direct = max(usual, torch.finfo(dtype).eps * length**0.5 * size(expected))
            assert error <= factor * direct, f"{name}, {size.__name__}: {error / direct:.1f} > {factor:.1f}"


def _largest(t: Tensor) -> float:
    return float(t.detach().abs().max())


def _rms(t: Tensor) -> float:
    return float(t.detach().square().mean().sqrt())
