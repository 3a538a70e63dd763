"""The refresh of many layers in one launch, in the interpreter, against the float64 reference; and as an operation."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch.library import opcheck

from mtl_fast.kernels.contracts import ConvOperands, Epilogue
from mtl_fast.kernels.reference.effective_weights import effective_weights as reference
from mtl_fast.kernels.triton import effective_weights as kernels
from mtl_fast.kernels.triton.launch import observed
from mtl_fast.ops import effective_weights, ss_conv
from tests.conv_cases import Random
from tests.gpu.conv_backward_cases import assert_within
from tests.native_cases import double

pytestmark = pytest.mark.proof

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
EPS = torch.finfo(torch.float32).eps


def all_kinds() -> list[ConvOperands]:
    """Every granularity with every norm and bias, and sizes beyond a tile; eps and sizes differ."""
    random = Random(1, torch.float32)
    kinds = product(("kernel", "filter", None), ("both", "bias", "none", None), (True, False))
    convs = [
        random.conv(
            3 + i % 7, 1 + i % 5, granularity=of_scale, norm=norm, bias=bias, eps=10.0 ** -(1 + i % 5)
        )
        for i, (of_scale, norm, bias) in enumerate(kinds)
    ]
    return [*convs, random.conv(1, 1), random.conv(70, 33), random.conv(31, 65, 1), random.conv(8, 5, 5)]


def assert_refreshed(convs: list[ConvOperands], dtype: torch.dtype, fold: bool) -> None:
    rounding = torch.finfo(dtype).eps
    for conv, (forward, rotated, shift) in zip(convs, kernels.refresh(convs, dtype, fold), strict=True):
        expected = reference(double(conv), fold=fold)
        n_out, n_in, side, _ = conv.filters.weight.shape
        assert forward.shape == (n_out, side, side, kernels.padded(n_in))
        assert rotated.shape == (n_in, side, side, n_out)
        assert forward.dtype == rotated.dtype == dtype
        assert shift.dtype == torch.float32
        weight = forward.permute(0, 3, 1, 2)
        # Two products and a reciprocal root, and the store.
        bound = (6 * EPS + rounding) * expected.weight.abs() + torch.finfo(dtype).tiny
        assert_within(weight[:, :n_in], expected.weight, bound, "weight")
        assert torch.equal(weight[:, n_in:], torch.zeros_like(weight[:, n_in:]))
        assert torch.equal(rotated, weight[:, :n_in].flip(2, 3).permute(1, 2, 3, 0))
        norm = conv.norm if fold else None
        terms = [t.abs() for t in (conv.filters.bias, conv.shift, norm and norm.mean) if t is not None]
        size = sum(terms, torch.zeros(n_out)).double()
        if norm is not None:
            ratio = torch.rsqrt(norm.var + norm.eps) * (1 if norm.weight is None else norm.weight.abs())
            size = size * ratio + (0 if norm.bias is None else norm.bias.abs())
        assert_within(shift, expected.shift, 8 * EPS * size, "shift")


@DTYPES
@pytest.mark.parametrize("fold", [True, False], ids=["folded", "unfolded"])
def test_every_kind_of_layer_at_once(fold: bool, dtype: torch.dtype) -> None:
    convs = all_kinds()
    assert_refreshed(convs, dtype, fold)
    with observed() as launches:
        kernels.refresh(convs, dtype, fold)
    assert len(launches) == 1


def test_layers_of_four_channels_each() -> None:
    """Then a row of either layout begins at more than one element: accesses of several."""
    random = Random(2, torch.float32)
    convs = [random.conv(4, 8), random.conv(8, 36, 1, norm=None)]
    assert kernels.plan(*zip(*(kernels.shape_of(c, fold=True) for c in convs), strict=True), torch.device("cpu"))[
        -1
    ] == 4  # fmt: skip
    assert_refreshed(convs, torch.float32, fold=True)


def test_the_packed_weights_live_as_long_as_all_their_filters() -> None:
    random = Random(3, torch.float32)
    convs = [random.conv(3, 5), random.conv(5, 4)]
    row = kernels.frozen_weights(convs)
    assert kernels.frozen_weights(convs) is row
    # Another order, or another company, is another row.
    assert kernels.frozen_weights(convs[::-1]) is not row
    assert kernels.frozen_weights(convs[:1]) is not row
    assert kernels.frozen_weights(convs) is row
    renewed = [convs[0], replace(convs[1], filters=replace(convs[1].filters, derived={}))]
    assert kernels.frozen_weights(renewed) is not row
    # A weight that trains is packed anew each time.
    convs[0].filters.weight.requires_grad_()
    assert kernels.frozen_weights(convs) is not kernels.frozen_weights(convs)


def test_values_are_those_of_the_moment() -> None:
    """What a meta-step moves is read anew, in place or replaced."""
    random = Random(4, torch.float32)
    conv = random.conv(3, 5)
    assert_refreshed([conv], torch.float32, fold=True)
    assert conv.scale is not None
    conv.scale.mul_(2)
    conv.norm.var.add_(1)
    assert_refreshed([conv], torch.float32, fold=True)


@DTYPES
@pytest.mark.parametrize("fold", [True, False], ids=["folded", "unfolded"])
def test_the_operation(fold: bool, dtype: torch.dtype) -> None:
    convs = all_kinds()[:6]
    results = effective_weights(convs, fold=fold, dtype=dtype, backend="triton")
    packed = kernels.refresh(convs, dtype, fold)
    for conv, result, (forward, rotated, shift) in zip(convs, results, packed, strict=True):
        assert result.weight.shape == conv.filters.weight.shape
        assert torch.equal(result.weight, forward.permute(0, 3, 1, 2)[:, : result.weight.shape[1]])
        assert result.packed is not None
        assert torch.equal(result.packed.forward, forward)
        assert torch.equal(result.packed.rotated, rotated)
        assert torch.equal(result.shift, shift)
        assert result.folded == (fold and conv.norm is not None)
    assert effective_weights([], backend="triton") == ()


def test_a_convolution_takes_what_came_with_it() -> None:
    random = Random(5, torch.float32)
    x, conv = random.images(2, 5, 4, 3), random.conv(5, 6)
    (effective,) = effective_weights([conv], backend="triton")
    options = {"epilogue": Epilogue("after_residual"), "backend": "triton"}
    with observed() as launches:
        ss_conv(x, replace(conv, effective=effective), **options)
    assert [launch.name for launch in launches] == ["ss_conv_kernel"]
    assert torch.equal(ss_conv(x, replace(conv, effective=effective), **options), ss_conv(x, conv, **options))
    # Of another dtype they do not fit, and it makes its own.
    half = x.half()
    with observed() as launches:
        ss_conv(half, replace(conv, effective=effective), **options)
    assert [launch.name for launch in launches] == ["effective_weights_kernel", "ss_conv_kernel"]


@pytest.mark.parametrize(
    ("geometry", "dtype", "reason"),
    [
        ({"groups": 5}, None, "groups 5; the Triton kernel has one group"),
        ({}, torch.float64, "dtype torch.float64; Triton kernels are float32, float16 and bfloat16"),
    ],
    ids=["groups", "dtype"],
)
def test_refusals(geometry: dict[str, int], dtype: torch.dtype | None, reason: str) -> None:
    conv = Random(6, torch.float32).conv(5, 5, **geometry)
    with pytest.raises(RuntimeError, match=reason):
        effective_weights([conv], dtype=dtype, backend="triton")


def test_opcheck() -> None:
    convs = [Random(7, torch.float32).conv(3, 5), Random(8, torch.float32).conv(5, 4, 1)]
    shapes, eps = zip(*(kernels.shape_of(conv, fold=True) for conv in convs), strict=True)
    numbers = [number for shape in shapes for number in shape]
    buffers = kernels.frozen_weights(convs), kernels.values_of(convs, fold=True)
    # What lies between the layers is undefined: only shapes can be compared.
    checks = ("test_schema", "test_faketensor")
    operator = torch.ops.mtl_fast.triton_effective_weights.default
    opcheck(operator, (*buffers, numbers, list(eps), torch.float16), test_utils=checks)


def test_shipped_launches_say_their_work() -> None:
    launches = dict(kernels.shipped())
    work = launches["64-128-256-512 kernel bf16"].work
    # The 3×3 weights, the 1×1 ones, and a fourth channel in both layers that read images.
    n_weights = 9 * 868_544 + 64 * 3 + 128 * 64 + 256 * 128 + 512 * 256
    assert work.flop == 2 * (n_weights + 64 * 9 + 64)
    assert work.written == 2 * (2 * n_weights + 64 * 9 + 64) + 4 * 4 * (64 + 128 + 256 + 512)
    assert work.read > 4 * (n_weights + 868_544)
    assert not work.matrix
