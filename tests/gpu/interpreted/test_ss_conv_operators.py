"""`ss_conv` on the Triton kernels, in the interpreter: forward and every gradient against the float64 reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mtl_fast.kernels.contracts import ConvOperands, Epilogue, FrozenFilters
from mtl_fast.ops import ss_conv
from mtl_fast.ops.backend import why
from tests.conv_cases import Random, assert_near, rebuilt, tensors
from tests.gpu.conv_backward_cases import called
from tests.native_cases import assert_native_agrees, leaves

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
by_granularity = pytest.mark.parametrize("granularity", ["kernel", "filter"])
FROZEN = ("x", "scale", "shift")
LEAKY = Epilogue("after_residual", 0.1, pool=True)
# n, n_in, n_out, height, width, k
SIZES = {
    "one": (1, 1, 1, 1, 1, 3),
    "images": (2, 3, 5, 6, 7, 3),
    "prime": (2, 5, 7, 5, 7, 3),
    "1x1": (3, 7, 5, 5, 3, 1),
}


def case(
    size: tuple[int, ...],
    granularity: str | None = "kernel",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Tensor, ConvOperands]:
    """Images of `dtype`, operands in float32, norm included."""
    random = Random(seed, torch.float32)
    n, n_in, n_out, height, width, k = size
    return random.images(n, n_in, height, width).to(dtype), random.conv(
        n_in, n_out, k, granularity=granularity
    )


def residual_of(x: Tensor, conv: ConvOperands) -> Tensor:
    return Random(50, torch.float32).images(*ss_conv(x, conv, backend="torch").shape).to(x.dtype)


@DTYPES
@by_granularity
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
def test_values_and_gradients(dtype: torch.dtype, granularity: str, size: tuple[int, ...]) -> None:
    x, conv = case(size, granularity, dtype)
    epilogue = LEAKY if min(x.shape[2:]) > 1 else replace(LEAKY, pool=False)
    assert_native_agrees(x, conv, epilogue, residual_of(x, conv), backend="triton")


@by_granularity
@pytest.mark.parametrize("activation", ["none", "before_residual", "after_residual"])
@pytest.mark.parametrize("pool", [False, True], ids=["whole", "pooled"])
def test_every_epilogue(granularity: str, activation: Any, pool: bool) -> None:
    x, conv = case((2, 5, 7, 5, 4, 3), granularity, seed=2)
    residual = residual_of(x, conv) if granularity == "filter" or pool else None
    assert_native_agrees(x, conv, Epilogue(activation, 0.1, pool), residual, backend="triton")


@pytest.mark.parametrize("activation", ["before_residual", "after_residual"])
def test_slope_zero(activation: Any) -> None:
    x, conv = case((2, 5, 7, 5, 4, 3), "filter", seed=2)
    assert_native_agrees(x, conv, Epilogue(activation, 0.0, True), residual_of(x, conv), backend="triton")


@pytest.mark.parametrize("padding", [0, 2])
def test_paddings(padding: int) -> None:
    random = Random(1, torch.float32)
    x, conv = random.images(2, 5, 4, 5), random.conv(5, 7, 3, padding=padding)
    assert_native_agrees(x, conv, LEAKY, residual_of(x, conv), backend="triton")


@pytest.mark.parametrize("norm", ["bias", None], ids=str)
@pytest.mark.parametrize("granularity", ["kernel", "filter", None], ids=str)
def test_what_is_absent_counts_as_identity(norm: str | None, granularity: str | None) -> None:
    random = Random(3, torch.float32)
    x = random.images(2, 3, 4, 5)
    conv = random.conv(3, 4, granularity=granularity, norm=norm, bias=norm is None)
    assert_native_agrees(x, conv, Epilogue("after_residual"), backend="triton")


@pytest.mark.parametrize("trained", [("x",), ("scale",), ("shift",)], ids=str)
@by_granularity
def test_any_selection_of_gradients(granularity: str, trained: tuple[str, ...]) -> None:
    x, conv = case((2, 5, 7, 4, 4, 3), granularity, seed=4)
    assert_native_agrees(x, conv, LEAKY, residual_of(x, conv), trained=trained, backend="triton")


MIXED = (1.0, 1e-3, 0.0, -1e-5, -2.0)


@pytest.mark.parametrize(
    ("granularity", "dtype", "activation", "sizes"),
    [
        ("kernel", torch.float32, "after_residual", MIXED),
        ("filter", torch.float32, "none", (0.0,)),
        *(
            ("filter", dtype, activation, MIXED)
            for dtype in (torch.float32, torch.float16)
            for activation in ("none", "before_residual", "after_residual")
        ),
    ],
    ids=str,
)
def test_negative_tiny_and_zero_scales(
    granularity: str, dtype: torch.dtype, activation: Any, sizes: tuple[float, ...]
) -> None:
    x, conv = case((2, 5, 16, 4, 5, 3), granularity, dtype, seed=5)
    factors = torch.tensor(sizes).repeat(16)[:16].view(16, 1, 1, 1)
    conv = replace(conv, scale=conv.scale * factors)
    assert_native_agrees(x, conv, Epilogue(activation, 0.1), residual_of(x, conv), backend="triton")


def test_any_memory_layout_gives_the_same_bits() -> None:
    x, conv = case((2, 5, 7, 4, 6, 3), seed=9)
    expected = gradients(x, conv)
    for other in (x.contiguous(), torch.empty(4, 5, 4, 12)[::2, :, :, ::2].copy_(x)):
        for ours, wanted in zip(gradients(other, conv), expected, strict=True):
            assert torch.equal(ours, wanted)


def gradients(x: Tensor, conv: ConvOperands, backend: str = "triton", **options: Any) -> list[Tensor]:
    named, given = leaves(x, conv, FROZEN)
    y = ss_conv(named["x"], given, epilogue=LEAKY, backend=backend)
    inputs = [named[name] for name in FROZEN]
    return [y.detach(), *torch.autograd.grad(y, inputs, y.detach(), **options)]


@by_granularity
def test_an_empty_batch_gives_empty_images_and_zero_gradients(granularity: str) -> None:
    x, conv = case((2, 3, 4, 4, 5, 3), granularity)
    y, *found = gradients(x[:0], conv)
    assert y.shape == (0, 4, 2, 2)
    for gradient in found:
        assert torch.equal(gradient, torch.zeros_like(gradient))


@by_granularity
def test_second_derivatives_go_through_pytorch(granularity: str) -> None:
    x, conv = case((2, 3, 4, 4, 5, 3), granularity, seed=6)
    found = []
    for backend in ("triton", "torch"):
        named, given = leaves(x, conv, FROZEN)
        y = ss_conv(named["x"], given, epilogue=LEAKY, backend=backend)
        inputs = [named[name] for name in FROZEN]
        first = torch.autograd.grad(y, inputs, y, create_graph=True)
        total = sum((g * Random(7, torch.float32).normal(*g.shape)).sum() for g in first)
        found.append([t.detach() for t in (*first, *torch.autograd.grad(total, inputs))])
    for ours, expected in zip(*found, strict=True):
        # Sums of 27 terms over 20 values, twice.
        assert_near(ours, expected, (27 * 20) ** 0.5 * torch.finfo(torch.float32).eps * 4)


EPILOGUES = [Epilogue(), LEAKY, replace(LEAKY, activation="before_residual")]


@pytest.mark.parametrize(
    ("granularity", "epilogue"), [*zip(("kernel", "filter", "filter"), EPILOGUES, strict=True)], ids=str
)
def test_opcheck(granularity: str, epilogue: Epilogue) -> None:
    x, conv = case((2, 3, 4, 4, 5, 3), granularity)
    named, given = leaves(x, conv, FROZEN)
    residual = residual_of(x, conv).requires_grad_()
    with called("triton_effective_weights", "triton_ss_conv", "triton_ss_conv_backward") as calls:
        y = ss_conv(named["x"], given, epilogue=epilogue, residual=residual, backend="triton")
        y.sum().backward()
    for operator, arguments in calls:
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
    torch.library.opcheck(*calls[1], test_utils="test_autograd_registration")


def refused(x: Tensor, conv: ConvOperands, **options: Any) -> str:
    """Why the Triton backend does not run; asked for by name it raises with the same words."""
    with pytest.raises(RuntimeError) as error:
        ss_conv(x, conv, backend="triton", **options)
    reason = str(error.value).removeprefix("ss_conv: backend='triton' cannot run this call: ")
    assert f"not triton: {reason}" in why("ss_conv", x=x, conv=conv, epilogue=Epilogue(), **options)
    return reason


def test_refusals_in_words() -> None:
    x, conv = case(SIZES["prime"])
    for name, tensor in tensors(conv).items():
        if name not in ("scale", "shift"):
            trained = rebuilt(conv, tensors(conv) | {name: tensor.clone().requires_grad_()})
            assert refused(x, trained).startswith(f"{name} requires a gradient")
            with torch.no_grad():
                assert "triton" in why("ss_conv", x=x, conv=trained)
    strided = replace(conv, filters=FrozenFilters(conv.filters.weight, padding=1, stride=2))
    assert refused(x, strided) == "stride 2; the Triton kernel has stride 1"
    assert "fold=False" in refused(x, conv, fold=False)
    assert "float64" in refused(x.double(), conv)
    assert "bfloat16" in refused(x.bfloat16(), conv)
    assert "residual" in refused(x, conv, residual=residual_of(x, conv).half())
    with torch.autocast("cpu"):
        assert "autocast" in refused(x, conv)
    reasons = []
    torch.func.grad(lambda s: (reasons.append(refused(x, replace(conv, scale=s))), s.sum())[1])(conv.scale)
    assert "torch.func" in reasons[0]
