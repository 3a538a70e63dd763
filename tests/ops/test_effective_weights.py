"""`effective_weights` against its two equations, and in use."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mtl_fast.kernels.contracts import ChannelNorm, ConvOperands, FrozenFilters
from mtl_fast.ops import effective_weights, ss_conv
from tests.conv_cases import Random, assert_near, tensors, with_gradients

EPS = torch.finfo(torch.float64).eps


@pytest.mark.parametrize("granularity", ["kernel", "filter", None])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("norm", ["both", "bias", "none", None])
@pytest.mark.parametrize("fold", [True, False], ids=["folded", "unfolded"])
def test_the_equations(granularity: str | None, bias: bool, norm: str | None, fold: bool) -> None:
    conv = Random(1).conv(5, 7, granularity=granularity, bias=bias, norm=norm, eps=1e-3)
    (result,) = effective_weights([conv], fold=fold)
    weight, shift = conv.filters.weight.clone(), torch.zeros(7, dtype=torch.float64)
    if bias:
        shift += conv.filters.bias
    if granularity is not None:
        shift += conv.shift
    for o in range(7):
        for i in range(5):
            if granularity is not None:
                weight[o, i] *= conv.scale[o, i if granularity == "kernel" else 0, 0, 0]
        if fold and norm is not None:
            ratio = (conv.norm.weight[o] if norm == "both" else 1) / (conv.norm.var[o] + 1e-3).sqrt()
            weight[o] *= ratio
            shift[o] = (shift[o] - conv.norm.mean[o]) * ratio
            shift[o] += conv.norm.bias[o] if norm != "none" else 0
    assert result.folded == (fold and norm is not None)
    assert_near(result.weight, weight, 8 * EPS, "weight")
    if bool(shift.any()):
        assert_near(result.shift, shift, 8 * EPS, "shift")
    else:
        assert torch.equal(result.shift, shift)


def test_all_layers_at_once_are_each_alone() -> None:
    random = Random(2, torch.float32)
    convs = [
        random.conv(3, 5),
        random.conv(5, 1, 1, granularity="filter", norm=None),
        random.conv(6, 8, groups=2, bias=False, stride=2),
    ]
    together = effective_weights(convs)
    assert [e.folded for e in together] == [True, False, True]
    for conv, result in zip(convs, together, strict=True):
        (alone,) = effective_weights([conv])
        assert result.weight.dtype == torch.float32
        assert torch.equal(result.weight, alone.weight)
        assert torch.equal(result.shift, alone.shift)
    assert effective_weights([]) == ()


@pytest.mark.parametrize("fold", [True, False], ids=["folded", "unfolded"])
def test_a_convolution_takes_them_to_the_bit(fold: bool) -> None:
    random = Random(3, torch.float32)
    x, conv = random.images(2, 3, 7, 7), random.conv(3, 5, norm="both" if fold else None)
    (effective,) = effective_weights([conv], fold=fold)
    assert torch.equal(ss_conv(x, replace(conv, effective=effective)), ss_conv(x, conv))


@pytest.mark.parametrize("fold", [True, False], ids=["folded", "unfolded"])
@pytest.mark.parametrize("granularity", ["kernel", None])
def test_values_only_no_gradient(fold: bool, granularity: str | None) -> None:
    conv = with_gradients(Random(4).conv(3, 5, granularity=granularity, norm="both" if fold else None))
    (effective,) = effective_weights([conv], fold=fold)
    assert not effective.weight.requires_grad
    assert not effective.shift.requires_grad
    assert all(t.requires_grad for t in tensors(conv).values())


WEIGHT = torch.ones(4, 3, 3, 3)


@pytest.mark.parametrize(
    ("conv", "words"),
    [
        (
            ConvOperands(FrozenFilters(WEIGHT), shift=torch.ones(3)),
            ["convs[1].shift", "(3,)", "(4, 3, 3, 3)"],
        ),
        (
            ConvOperands(FrozenFilters(WEIGHT), scale=torch.ones(3, 1, 1, 1)),
            ["convs[1].scale", "(3, 1, 1, 1)", "(4, 1, 1, 1)"],
        ),
        (ConvOperands(FrozenFilters(WEIGHT), norm=ChannelNorm(None, None)), ["convs[1].norm", "mean or var"]),
        (
            ConvOperands(
                FrozenFilters(WEIGHT), norm=ChannelNorm(torch.ones(4), torch.ones(4), torch.ones(2))
            ),
            ["convs[1].norm.weight", "(2,)", "(4,)"],
        ),
    ],
)
def test_errors_name_the_layer_and_the_shapes(conv: ConvOperands, words: list[str]) -> None:
    with pytest.raises(ValueError, match=r"convs\[1\]") as error:
        effective_weights([ConvOperands(FrozenFilters(WEIGHT)), conv])
    for word in words:
        assert word in str(error.value)


def test_a_norm_without_statistics_does_where_it_is_not_folded() -> None:
    conv = ConvOperands(FrozenFilters(WEIGHT), norm=ChannelNorm(None, None))
    (effective,) = effective_weights([conv], fold=False)
    assert torch.equal(effective.weight, WEIGHT)


def test_plain_pytorch_leaves_rounding_to_the_convolutions() -> None:
    conv = Random(6).conv(3, 5)
    (wanted,), (plain,) = (effective_weights([conv], dtype=d, backend="torch") for d in (torch.float16, None))
    assert wanted.packed is None
    assert torch.equal(wanted.weight, plain.weight)
    assert wanted.weight.dtype == torch.float64
