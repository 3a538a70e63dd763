"""`ss_conv` against conv2d, batch_norm, leaky_relu and max_pool2d; gradients against finite differences."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mtl_fast.kernels.contracts import ChannelNorm, ConvOperands, EffectiveWeights, Epilogue, FrozenFilters
from mtl_fast.ops import effective_weights, ss_conv
from tests.conv_cases import (
    Random,
    assert_near,
    plain_conv,
    plain_epilogue,
    plain_norm,
    rebuilt,
    rounding_bound,
    tensors,
    with_gradients,
)

ACTIVATIONS = ("none", "before_residual", "after_residual")
GRANULARITIES = ("kernel", "filter")
# n, n_in, n_out, height, width, k
SIZES = {"ones": (1, 1, 1, 1, 1, 1), "odd": (3, 5, 7, 9, 11, 3), "large": (8, 32, 48, 32, 32, 3)}
GEOMETRIES: dict[str, dict[str, Any]] = {
    "stride": {"stride": 2},
    "uneven_stride": {"stride": (1, 3), "padding": (2, 0)},
    "dilation": {"dilation": 2, "padding": 2},
    "groups": {"groups": 2},
    "depthwise": {"groups": 6},
    "all": {"stride": 2, "dilation": (1, 2), "groups": 3, "padding": 3},
}

by_granularity = pytest.mark.parametrize("granularity", GRANULARITIES)
by_activation = pytest.mark.parametrize("activation", ACTIVATIONS)
by_size = pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
by_geometry = pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES.keys())


@by_size
@by_activation
@by_granularity
@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("slope", [0.1, 0.0])
def test_unfolded_gives_the_bits_of_torch_and_folded_its_value(
    granularity: str, activation: Any, with_residual: bool, slope: float, size: tuple[int, ...]
) -> None:
    n, n_in, n_out, height, width, k = size
    random = Random(dtype=torch.float32)
    x, conv = random.images(n, n_in, height, width), random.conv(n_in, n_out, k, granularity=granularity)
    residual = random.images(n, n_out, height, width) if with_residual else None
    epilogue = Epilogue(activation, slope, pool=min(height, width) > 1)
    expected = plain_epilogue(plain_norm(plain_conv(x, conv), conv.norm), epilogue, residual)
    options: dict[str, Any] = {"epilogue": epilogue, "residual": residual}
    assert torch.equal(ss_conv(x, conv, fold=False, **options), expected)
    # Activation, sum and pooling pass an error on, none makes it larger.
    bound = rounding_bound(x, conv) + torch.finfo(x.dtype).eps * (0 if residual is None else residual.abs())
    bound = F.max_pool2d(bound, 2) if epilogue.pool else bound
    assert ((ss_conv(x, conv, fold=True, **options) - expected).abs() <= bound).all()


@by_geometry
@by_granularity
def test_geometry_is_that_of_conv2d(granularity: str, geometry: dict[str, Any]) -> None:
    random = Random(1)
    x, conv = random.images(2, 6, 11, 13), random.conv(6, 12, granularity=granularity, **geometry)
    expected = plain_norm(plain_conv(x, conv), conv.norm)
    residual = random.normal(*expected.shape)
    assert torch.equal(ss_conv(x, conv, residual=residual, fold=False), expected + residual)
    assert ((ss_conv(x, conv) - expected).abs() <= rounding_bound(x, conv)).all()
    assert not torch.equal(ss_conv(x, replace(conv, scale=None)), ss_conv(x, conv))


@pytest.mark.parametrize("stride", [2, (1, 3)])
@pytest.mark.parametrize(("n_in", "n_out"), [(4, 6), (6, 7), (8, 16)])
def test_gradients_of_one_by_one_kernels_with_a_stride(
    stride: int | tuple[int, int], n_in: int, n_out: int
) -> None:
    # Channels-last, where the weight gradient of torch 2.13 itself crashes on AVX2.
    random = Random(6)
    x = random.normal(4, n_in, 9, 16).float().contiguous(memory_format=torch.channels_last)
    weight = random.normal(n_out, n_in, 1, 1).float().contiguous(memory_format=torch.channels_last)
    tensors_ = [t.requires_grad_() for t in (x, weight, random.normal(n_out).float())]
    y = ss_conv(x, ConvOperands(FrozenFilters(weight, tensors_[2], stride=stride)), backend="torch")
    exact = [t.detach().double().contiguous().requires_grad_() for t in tensors_]
    expected = F.conv2d(*exact, stride=stride)
    cotangent = random.normal(*y.shape)
    got = [y, *torch.autograd.grad(y, tensors_, cotangent.float())]
    want = [expected, *torch.autograd.grad(expected, exact, cotangent)]
    for value, right in zip(got, want, strict=True):
        torch.testing.assert_close(value.double(), right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("has", ["neither", "scale", "shift"])
def test_what_is_absent_counts_as_identity(bias: bool, has: str) -> None:
    random = Random(2)
    x, conv = random.images(2, 3, 5, 5), random.conv(3, 4, bias=bias, norm=None)
    conv = replace(
        conv, scale=conv.scale if has == "scale" else None, shift=conv.shift if has == "shift" else None
    )
    filled = replace(
        conv,
        scale=torch.ones(4, 3, 1, 1).double() if conv.scale is None else conv.scale,
        shift=torch.zeros(4).double() if conv.shift is None else conv.shift,
    )
    assert torch.equal(ss_conv(x, conv), ss_conv(x, filled))
    assert torch.equal(ss_conv(x, conv), plain_conv(x, conv))


@pytest.mark.parametrize("affine", ["bias", "none"])
def test_norm_without_affine(affine: str) -> None:
    random = Random(3)
    x, conv = random.images(2, 3, 5, 7), random.conv(3, 4, norm=affine, eps=1e-3)
    expected = plain_norm(plain_conv(x, conv), conv.norm)
    assert torch.equal(ss_conv(x, conv, fold=False), expected)
    assert ((ss_conv(x, conv) - expected).abs() <= rounding_bound(x, conv)).all()


def test_pooling_drops_odd_last_rows_and_columns() -> None:
    random = Random(4)
    x, conv = random.images(1, 2, 5, 7), random.conv(2, 3)
    pooled = ss_conv(x, conv, epilogue=Epilogue(pool=True))
    assert pooled.shape == (1, 3, 2, 3)
    whole = ss_conv(x, conv)
    for row in range(2):
        for column in range(3):
            window = whole[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            assert torch.equal(pooled[:, :, row, column], window.amax(dim=(2, 3)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("fold", [True, False], ids=["folded", "unfolded"])
def test_half_types(dtype: torch.dtype, fold: bool) -> None:
    random = Random(5, dtype)
    x, conv = random.images(2, 3, 5, 5), random.conv(3, 4)
    y = ss_conv(x, conv, fold=fold)
    assert y.dtype == dtype
    norm = ChannelNorm(*(t.double() for t in (conv.norm.mean, conv.norm.var)), eps=conv.norm.eps)
    wide = rebuilt(replace(conv, norm=norm), {name: t.double() for name, t in tensors(conv).items()})
    bound = rounding_bound(x.double(), wide) / torch.finfo(torch.float64).eps * torch.finfo(dtype).eps
    assert ((y - ss_conv(x.double(), wide)).abs() <= bound).all()


def case(granularity: str, seed: int = 6, **options: Any) -> tuple[list[str], list[Tensor], Any]:
    """Names and values of all inputs [x, residual, weight, ...] and a function of them."""
    random = Random(seed)
    x = random.images(2, 2, 3, 4)
    conv = random.conv(2, 3, granularity=granularity, **options.pop("geometry", {}))
    fold, epilogue = options.pop("fold", True), Epilogue(**options)
    residual = random.normal(*ss_conv(x, conv).shape)
    named = {"x": x, "residual": residual} | tensors(conv)

    def run(*values: Tensor) -> Tensor:
        given = dict(zip(named, values, strict=True))
        made = rebuilt(conv, given)
        return ss_conv(given["x"], made, epilogue=epilogue, residual=given["residual"], fold=fold)

    return list(named), [t.requires_grad_() for t in named.values()], run


@by_granularity
@by_activation
@pytest.mark.parametrize("fold", [True, False], ids=["folded", "unfolded"])
def test_gradients_against_finite_differences(granularity: str, activation: str, fold: bool) -> None:
    names, values, run = case(granularity, fold=fold, activation=activation, pool=activation != "none")
    assert names == ["x", "residual", "weight", "bias", "scale", "shift", "gamma", "beta"]
    assert torch.autograd.gradcheck(run, values)


@by_geometry
@by_granularity
def test_gradients_of_every_geometry_against_finite_differences(
    granularity: str, geometry: dict[str, Any]
) -> None:
    random = Random(7)
    x, conv = (
        random.images(1, 6, 7, 7).requires_grad_(),
        with_gradients(random.conv(6, 6, granularity=granularity, **geometry)),
    )
    # Along random directions only: the inputs are many.
    names = list(tensors(conv))
    assert torch.autograd.gradcheck(
        lambda x, *values: ss_conv(x, rebuilt(conv, dict(zip(names, values, strict=True)))),
        [x, *tensors(conv).values()],
        fast_mode=True,
    )


@by_granularity
@pytest.mark.parametrize("fold", [True, False], ids=["folded", "unfolded"])
def test_second_derivatives_against_finite_differences(granularity: str, fold: bool) -> None:
    _, values, run = case(granularity, seed=8, fold=fold, activation="after_residual", pool=True)
    assert torch.autograd.gradgradcheck(run, values)


@pytest.mark.parametrize(
    ("size", "groups"),
    [((1, 1, 1, 1, 1, 1), 1), ((3, 5, 7, 6, 5, 3), 1), ((2, 6, 4, 7, 5, 3), 2), ((4, 16, 24, 20, 20, 3), 1)],
    ids=["ones", "odd", "groups", "large"],
)
def test_gradients_are_the_explicit_formulas(size: tuple[int, ...], groups: int) -> None:
    n, n_in, n_out, height, width, k = size
    random = Random(9)
    x = random.images(n, n_in, height, width).requires_grad_()
    conv = random.conv(n_in, n_out, k, norm=None, groups=groups)
    cotangent = random.normal(n, n_out, height, width)
    geometry = {"stride": 1, "padding": k // 2, "groups": groups}
    weight = conv.filters.weight
    relative = torch.finfo(torch.float64).eps * (n * height * width * n_in * k * k) ** 0.5 * 4
    for granularity in GRANULARITIES:
        scale = conv.scale if granularity == "kernel" else conv.scale[:, :1].clone()
        scale.requires_grad_()
        shift = conv.shift.clone().requires_grad_()
        y = ss_conv(x, replace(conv, scale=scale, shift=shift))
        dx, dscale, dshift = torch.autograd.grad(y, (x, scale, shift), cotangent)
        effective = (weight * scale).detach()
        # dL/dx = conv_transpose(G, W̃); dL/dΦ_S2 = Σ G
        assert_near(dx, F.conv_transpose2d(cotangent, effective, **geometry), relative, "x")
        assert_near(dshift, cotangent.sum(dim=(0, 2, 3)), relative, "shift")
        if granularity == "kernel":
            # dL/dΦ_S1[o, i] = Σ_uv W·dL/dW̃
            dweight = torch.nn.grad.conv2d_weight(x.detach(), weight.shape, cotangent, **geometry)
            expected = (weight * dweight).sum(dim=(2, 3), keepdim=True)
        else:
            # dL/dΦ_S1[o] = Σ G·conv(x, W)
            expected = (cotangent * F.conv2d(x, weight, **geometry)).sum(dim=(0, 2, 3)).view(-1, 1, 1, 1)
        assert_near(dscale, expected.detach(), relative, granularity)


@by_granularity
def test_effective_weights_serve_only_where_no_gradient_is_asked_for(granularity: str) -> None:
    random = Random(10)
    x, conv = random.images(2, 3, 5, 5), with_gradients(random.conv(3, 4, granularity=granularity))
    (effective,) = effective_weights([conv])
    given = replace(conv, effective=effective)
    with torch.no_grad():
        assert torch.equal(ss_conv(x, given), ss_conv(x, conv))
        doubled = EffectiveWeights(effective.weight * 2, effective.shift * 2, folded=True)
        ours = ss_conv(x, replace(conv, effective=doubled))
        assert_near(ours, 2 * ss_conv(x, conv), 1e-14)
        # Of the other kind, they are of no use and left alone.
        unfolded = replace(doubled, folded=False)
        assert torch.equal(ss_conv(x, replace(conv, effective=unfolded)), ss_conv(x, conv))
        bare = replace(conv, norm=None)
        assert torch.equal(ss_conv(x, replace(bare, effective=doubled)), ss_conv(x, bare))
    y, expected = ss_conv(x, replace(conv, effective=doubled)), ss_conv(x, conv)
    assert torch.equal(y, expected)
    cotangent = random.normal(*y.shape)
    for a, b in zip(
        torch.autograd.grad(y, list(tensors(conv).values()), cotangent),
        torch.autograd.grad(expected, list(tensors(conv).values()), cotangent),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_frozen_tensors_and_their_images_get_no_graph() -> None:
    random = Random(11)
    x, conv = random.images(2, 3, 5, 5), random.conv(3, 4)
    assert not ss_conv(x, conv).requires_grad
    conv.shift.requires_grad_()
    with torch.no_grad():
        assert not ss_conv(x, conv).requires_grad
    y = ss_conv(x, conv)
    y.backward(random.normal(*y.shape))
    assert conv.filters.weight.grad is None
    assert conv.scale.grad is None


def filters(*shape: int, **options: Any) -> FrozenFilters:
    return FrozenFilters(torch.ones(shape), **options)


GOOD = ConvOperands(filters(4, 3, 3, 3, padding=1), norm=ChannelNorm(torch.zeros(4), torch.ones(4)))
X = torch.zeros(2, 3, 5, 5)


@pytest.mark.parametrize(
    ("x", "conv", "options", "words"),
    [
        (X[0], GOOD, {}, ["x:", "(3, 5, 5)"]),
        (X.long(), GOOD, {}, ["x:", "int64"]),
        (X[:, :2], GOOD, {}, ["x:", "(2, 2, 5, 5)", "(4, 3, 3, 3)"]),
        (X, replace(GOOD, filters=filters(4, 3, 3)), {}, ["conv.filters.weight", "(4, 3, 3)"]),
        (
            X,
            replace(GOOD, filters=filters(4, 3, 3, 3, bias=torch.ones(3))),
            {},
            ["filters.bias", "(3,)", "(4,)"],
        ),
        (X, replace(GOOD, scale=torch.ones(3, 4, 1, 1)), {}, ["conv.scale", "(3, 4, 1, 1)", "(4, 3, 3, 3)"]),
        (X, replace(GOOD, scale=torch.ones(4)), {}, ["conv.scale", "(4,)", "(4, 3, 1, 1)", "(4, 1, 1, 1)"]),
        (X, replace(GOOD, shift=torch.ones(4, 1)), {}, ["conv.shift", "(4, 1)", "(4, 3, 3, 3)"]),
        (X, replace(GOOD, norm=ChannelNorm(torch.ones(3), torch.ones(4))), {}, ["norm.mean", "(3,)", "(4,)"]),
        (X, replace(GOOD, norm=ChannelNorm(None, None)), {}, ["conv.norm", "stored"]),
        (
            X,
            replace(GOOD, effective=EffectiveWeights(torch.ones(4, 3, 1, 1), torch.ones(4), True)),
            {},
            ["effective.weight", "(4, 3, 1, 1)", "(4, 3, 3, 3)"],
        ),
        (X, GOOD, {"residual": torch.ones(2, 4, 5, 1)}, ["residual", "(2, 4, 5, 1)", "(2, 4, 5, 5)"]),
        (X, GOOD, {"residual": torch.ones(4, 1, 1)}, ["residual", "(4, 1, 1)", "(2, 4, 5, 5)"]),
        (X[:, :, :1], GOOD, {"epilogue": Epilogue(pool=True)}, ["pool", "(2, 4, 1, 5)"]),
        (X, GOOD, {"epilogue": Epilogue("after")}, ["epilogue.activation", "'after'", "after_residual"]),
        (X, GOOD, {"backend": "fastest"}, ["backend='fastest'", "torch"]),
    ],
)
def test_errors_name_argument_and_shapes(
    x: Tensor, conv: ConvOperands, options: Any, words: list[str]
) -> None:
    ss_conv(X, GOOD)
    with pytest.raises(ValueError, match=r".") as error:
        ss_conv(x, conv, **options)
    for word in words:
        assert word in str(error.value)
