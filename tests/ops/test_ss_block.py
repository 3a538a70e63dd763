"""`ss_block` against a residual block written out in torch.nn, in both forms and both kinds of statistics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mtl_fast.kernels.contracts import BlockOutput, ChannelNorm, ConvOperands, Epilogue, FrozenFilters
from mtl_fast.ops import effective_weights, ss_block
from tests.conv_cases import Random, assert_near, plain_conv, plain_norm, rebuilt, tensors, with_gradients

EPS = torch.finfo(torch.float64).eps
COMMON = Epilogue("after_residual", 0.1, pool=True)
TENSORFLOW = Epilogue("before_residual", 0.1, pool=True)
FORMS = pytest.mark.parametrize("form", ["common", "tensorflow"])
by_granularity = pytest.mark.parametrize("granularity", ["kernel", "filter"])
# n, n_in, n_out, height, width
SIZES = {"ones": (2, 1, 1, 2, 2), "odd": (6, 3, 5, 7, 5), "large": (8, 16, 24, 12, 12)}


def make(
    form: str, granularity: str, size: tuple[int, ...] = SIZES["odd"], dtype: torch.dtype = torch.float64
) -> tuple[Tensor, list[ConvOperands], ConvOperands]:
    random = Random(1, dtype)
    n, n_in, n_out, height, width = size
    norm = "both" if form == "common" else "bias"
    convs = [random.conv(c, n_out, granularity=granularity, norm=norm) for c in (n_in, n_out, n_out)]
    if form == "common":
        shortcut = random.conv(n_in, n_out, 1, granularity=granularity)
    else:
        shortcut = random.conv(n_in, n_out, 1, granularity=None, bias=False, norm=None)
    return random.images(n, n_in, height, width), convs, shortcut


def written_out(
    x: Tensor, convs: Sequence[ConvOperands], shortcut: ConvOperands, form: str, *, batch: bool
) -> Tensor:
    """The two blocks, line by line."""

    def layer(x: Tensor, conv: ConvOperands) -> Tensor:
        return plain_norm(plain_conv(x, conv), conv.norm, batch=batch)

    first, second, third = convs
    residual = layer(x, shortcut)
    out = F.leaky_relu(layer(x, first), 0.1)
    out = F.leaky_relu(layer(out, second), 0.1)
    out = layer(out, third)
    out = F.leaky_relu(out + residual, 0.1) if form == "common" else F.leaky_relu(out, 0.1) + residual
    return F.max_pool2d(out, 2)


def run(
    x: Tensor, convs: Sequence[ConvOperands], shortcut: ConvOperands | None, form: str, **options: Any
) -> BlockOutput:
    return ss_block(x, convs, shortcut, epilogue=COMMON if form == "common" else TENSORFLOW, **options)


def leaves(x: Tensor, convs: Sequence[ConvOperands], shortcut: ConvOperands) -> list[Tensor]:
    return [x] + [t for conv in (*convs, shortcut) for t in tensors(conv).values()]


@FORMS
@by_granularity
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize("n_groups", [0, 1], ids=["stored", "batch"])
def test_a_block_is_the_block_written_out_to_the_bit(
    form: str, granularity: str, size: tuple[int, ...], n_groups: int
) -> None:
    x, convs, shortcut = make(form, granularity, size, torch.float32)
    out = run(x, convs, shortcut, form, n_groups=n_groups, fold=False, backend="torch")
    assert torch.equal(out.output, written_out(x, convs, shortcut, form, batch=n_groups == 1))
    assert len(out.statistics) == (0 if n_groups == 0 else 4 if form == "common" else 3)


@FORMS
@by_granularity
def test_folded_gives_values_and_gradients_to_rounding(form: str, granularity: str) -> None:
    x, convs, shortcut = make(form, granularity)
    x.requires_grad_()
    convs, shortcut = [with_gradients(conv) for conv in convs], with_gradients(shortcut)
    folded = run(x, convs, shortcut, form).output
    expected = written_out(x, convs, shortcut, form, batch=False)
    # Three layers of 45 terms, each with a condition of about 10.
    tolerance = 3 * 10 * 45**0.5 * EPS
    assert_near(folded, expected, tolerance)
    cotangent = Random(2).normal(*folded.shape)
    inputs = leaves(x, convs, shortcut)
    for ours, wanted in zip(
        torch.autograd.grad(folded, inputs, cotangent),
        torch.autograd.grad(expected, inputs, cotangent),
        strict=True,
    ):
        assert_near(ours, wanted, 10 * tolerance)


@FORMS
@by_granularity
@pytest.mark.parametrize("n_groups", [0, 2], ids=["stored", "batch"])
def test_gradients_against_finite_differences(form: str, granularity: str, n_groups: int) -> None:
    x, convs, shortcut = make(form, granularity, (4, 2, 2, 4, 3))
    x.requires_grad_()
    convs, shortcut = [with_gradients(conv) for conv in convs], with_gradients(shortcut)

    def f(x: Tensor, *values: Tensor) -> Tensor:
        rest = iter(values)
        made = [rebuilt(c, {name: next(rest) for name in tensors(c)}) for c in (*convs, shortcut)]
        return run(x, made[:3], made[3], form, n_groups=n_groups).output

    # Random directions: the inputs are many.
    assert torch.autograd.gradcheck(f, leaves(x, convs, shortcut), fast_mode=True)


@FORMS
def test_groups_are_as_if_alone(form: str) -> None:
    x, convs, shortcut = make(form, "kernel")
    x.requires_grad_()
    convs = [with_gradients(conv) for conv in convs]
    together = run(x, convs, shortcut, form, n_groups=3)
    alone = [run(part, convs, shortcut, form, n_groups=1) for part in x.split(2)]
    expected = torch.cat([a.output for a in alone])
    # Batch statistics of 70 values divide by a σ that is about a tenth of the largest value.
    tolerance = 3 * 100 * 70**0.5 * EPS
    assert_near(together.output, expected, tolerance)
    for layer, statistics in enumerate(together.statistics):
        for ours, parts in zip(
            statistics, zip(*(a.statistics[layer] for a in alone), strict=True), strict=True
        ):
            assert_near(ours, torch.cat(parts), tolerance, f"layer {layer}")
    cotangent = Random(3).normal(*expected.shape)
    inputs = [x] + [t for conv in convs for t in (conv.scale, conv.filters.weight)]
    for ours, wanted in zip(
        torch.autograd.grad(together.output, inputs, cotangent),
        torch.autograd.grad(expected, inputs, cotangent),
        strict=True,
    ):
        assert_near(ours, wanted, 10 * tolerance)


def test_statistics_come_shortcut_first_then_in_order() -> None:
    x, convs, shortcut = make("common", "kernel")
    statistics = run(x, convs, shortcut, "common", n_groups=1).statistics
    z = [plain_conv(x, shortcut), plain_conv(x, convs[0])]
    z.append(plain_conv(F.leaky_relu(plain_norm(z[1], convs[0].norm, batch=True), 0.1), convs[1]))
    z.append(plain_conv(F.leaky_relu(plain_norm(z[2], convs[1].norm, batch=True), 0.1), convs[2]))
    for (mean, var, n_values), expected in zip(statistics, z, strict=True):
        assert_near(mean[0], expected.mean(dim=(0, 2, 3)), 100 * EPS)
        assert_near(var[0], expected.var(dim=(0, 2, 3), correction=0), 1000 * EPS)
        assert n_values.tolist() == [6 * 7 * 5]


@FORMS
@by_granularity
def test_a_masked_image_counts_for_nothing(form: str, granularity: str) -> None:
    x, convs, shortcut = make(form, granularity)
    mask = torch.tensor([True, True, False, True, False, True])
    x[~mask] = float("nan")
    x.requires_grad_()
    convs, shortcut = [with_gradients(conv) for conv in convs], with_gradients(shortcut)
    out = run(x, convs, shortcut, form, n_groups=2, mask=mask)
    kept = [x[:2], x[[3, 5]]]
    expected = torch.cat([run(part, convs, shortcut, form, n_groups=1).output for part in kept])
    tolerance = 3 * 100 * 70**0.5 * EPS
    assert_near(out.output[mask], expected, tolerance)
    assert torch.equal(out.output[~mask], torch.zeros_like(out.output[~mask]))
    cotangent = Random(4).normal(*out.output.shape)
    inputs = leaves(x, convs, shortcut)
    ours = torch.autograd.grad(out.output, inputs, cotangent)
    wanted = torch.autograd.grad(expected, inputs, cotangent[mask])
    for a, b in zip(ours, wanted, strict=True):
        # The bias before a norm cancels: there both are rounding only.
        assert torch.isfinite(a).all()
        assert (a - b).abs().max() <= 10 * tolerance * max(float(b.abs().max()), float(cotangent.abs().sum()))


def test_an_identity_shortcut_and_another_number_of_convolutions() -> None:
    random = Random(5)
    x, convs = random.images(2, 4, 5, 5), [random.conv(4, 6), random.conv(6, 4)]
    out = ss_block(x, convs, None, epilogue=Epilogue("after_residual", 0.0), fold=False).output
    inner = F.relu(plain_norm(plain_conv(x, convs[0]), convs[0].norm))
    assert torch.equal(out, F.relu(plain_norm(plain_conv(inner, convs[1]), convs[1].norm) + x))


@FORMS
@pytest.mark.parametrize("n_groups", [0, 2], ids=["stored", "batch"])
def test_effective_weights_of_either_kind_change_nothing(form: str, n_groups: int) -> None:
    x, convs, shortcut = make(form, "kernel")
    expected = run(x, convs, shortcut, form, n_groups=n_groups).output
    for fold in (True, False):
        effective = effective_weights([*convs, shortcut], fold=fold)
        given = [replace(c, effective=e) for c, e in zip((*convs, shortcut), effective, strict=True)]
        assert torch.equal(run(x, given[:3], given[3], form, n_groups=n_groups).output, expected)


def conv(*shape: int, **options: Any) -> ConvOperands:
    norm = options.pop("norm", ChannelNorm(torch.zeros(shape[0]), torch.ones(shape[0])))
    return ConvOperands(FrozenFilters(torch.ones(shape), padding=shape[2] // 2, **options), norm=norm)


X = torch.zeros(6, 3, 4, 4)
CONVS, SHORTCUT = [conv(5, 3, 3, 3), conv(5, 5, 3, 3)], conv(5, 3, 1, 1)


@pytest.mark.parametrize(
    ("x", "convs", "shortcut", "options", "words"),
    [
        (X[0], CONVS, SHORTCUT, {}, ["x:", "(3, 4, 4)"]),
        (X, [], SHORTCUT, {}, ["convs", "at least one"]),
        (X[:, :2], CONVS, SHORTCUT, {}, ["convs[0]", "(6, 2, 4, 4)", "(5, 3, 3, 3)"]),
        (X, [CONVS[0], conv(5, 4, 3, 3)], SHORTCUT, {}, ["convs[1]", "(6, 5, 4, 4)", "(5, 4, 3, 3)"]),
        (X, CONVS, conv(4, 3, 1, 1), {}, ["shortcut", "(6, 4, 4, 4)", "(6, 5, 4, 4)"]),
        (X, CONVS, conv(5, 2, 1, 1), {}, ["shortcut", "(6, 3, 4, 4)", "(5, 2, 1, 1)"]),
        (X, CONVS, conv(5, 3, 1, 1, stride=2), {}, ["shortcut", "(6, 5, 2, 2)", "(6, 5, 4, 4)"]),
        (X, CONVS, None, {}, ["shortcut", "(6, 3, 4, 4)", "(6, 5, 4, 4)"]),
        (
            X,
            [CONVS[0], replace(CONVS[1], shift=torch.ones(3))],
            SHORTCUT,
            {},
            ["convs[1].shift", "(3,)", "(5,)"],
        ),
        (X, CONVS, replace(SHORTCUT, scale=torch.ones(5)), {}, ["shortcut.scale", "(5,)", "(5, 3, 1, 1)"]),
        (X, CONVS, conv(5, 3, 1, 1, norm=ChannelNorm(None, None)), {}, ["shortcut.norm", "stored"]),
        (X, CONVS, SHORTCUT, {"n_groups": 4}, ["n_groups", "6", "4"]),
        (X, CONVS, SHORTCUT, {"mask": torch.ones(6) > 0}, ["mask", "n_groups"]),
        (X, CONVS, SHORTCUT, {"mask": torch.ones(5) > 0, "n_groups": 2}, ["mask", "(5,)", "(6,)"]),
        (X, CONVS, SHORTCUT, {"epilogue": Epilogue("leaky")}, ["epilogue.activation", "'leaky'"]),
        (X[:, :, :1], CONVS, SHORTCUT, {}, ["pool", "(6, 5, 1, 4)"]),
        (X, CONVS, SHORTCUT, {"gather": torch.stack}, ["gather", "0 groups"]),
    ],
)
def test_errors_name_argument_and_shapes(
    x: Tensor, convs: list[ConvOperands], shortcut: ConvOperands | None, options: Any, words: list[str]
) -> None:
    ss_block(X, CONVS, SHORTCUT, epilogue=COMMON)
    with pytest.raises(ValueError, match=r".") as error:
        ss_block(x, convs, shortcut, **{"epilogue": COMMON, **options})
    for word in words:
        assert word in str(error.value)
