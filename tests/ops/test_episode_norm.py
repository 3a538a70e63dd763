"""`episode_norm` against batch normalisation of each group alone; masks; what batch statistics cancel."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mtl_fast.kernels.contracts import ChannelNorm, Epilogue, Normalised
from mtl_fast.kernels.reference.episode_norm import statistics
from mtl_fast.ops import episode_norm, ss_conv
from tests.conv_cases import Random, assert_near, plain_epilogue, plain_norm

EPS = torch.finfo(torch.float64).eps
NAN = float("nan")
EPILOGUES = {
    "none": Epilogue(),
    "before": Epilogue("before_residual", 0.1, pool=True),
    "after": Epilogue("after_residual", 0.0, pool=True),
}
by_epilogue = pytest.mark.parametrize("epilogue", EPILOGUES.values(), ids=EPILOGUES.keys())
# groups, images a group, channels, height, width
SIZES = {
    "ones": (1, 1, 1, 1, 2),
    "odd": (3, 5, 7, 5, 3),
    "groups": (7, 2, 3, 4, 4),
    "large": (2, 40, 32, 16, 16),
}
by_size = pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())


def make(
    size: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, ChannelNorm]:
    groups, per_group, channels, height, width = size
    random = Random(seed, dtype)
    z = random.images(groups * per_group, channels, height, width)
    # Groups of unlike mean and spread: one's statistics would show in another.
    z = z * random.positive(groups, 1, 1, 1).repeat_interleave(per_group, 0)
    return z + random.normal(groups, 1, 1, 1).repeat_interleave(per_group, 0), random.norm(channels)


def backward(out: Normalised, inputs: list[Tensor], cotangent: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(out.output, inputs, cotangent))


@by_size
@by_epilogue
@pytest.mark.parametrize("memory", [torch.channels_last, torch.contiguous_format], ids=["last", "first"])
def test_one_group_is_batch_normalisation_to_the_bit(
    size: tuple[int, ...], epilogue: Epilogue, memory: torch.memory_format
) -> None:
    z, norm = make(size, dtype=torch.float32)
    z, epilogue = z.contiguous(memory_format=memory), replace(epilogue, pool=min(z.shape[2:]) > 1)
    residual = Random(1, torch.float32).normal(*z.shape)
    out = episode_norm(z, norm, n_groups=1, epilogue=epilogue, residual=residual, backend="torch")
    assert torch.equal(out.output, plain_epilogue(plain_norm(z, norm, batch=True), epilogue, residual))
    values = z.double().transpose(0, 1).flatten(1)
    # PyTorch's own sums: rounding of √(values) steps.
    tolerance = torch.finfo(torch.float32).eps * 4 * values.shape[1] ** 0.5
    mean, var = values.mean(dim=1)[None], values.var(dim=1, correction=0)[None]
    assert_near(out.mean, mean, tolerance * float(values.abs().max() / mean.abs().max()), "mean")
    assert_near(out.var, var, tolerance, "var")
    assert out.n_values.tolist() == [values.shape[1]]


@by_size
@by_epilogue
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "mask_of_all"])
def test_each_group_is_as_if_alone(size: tuple[int, ...], epilogue: Epilogue, masked: bool) -> None:
    groups, per_group = size[:2]
    z, norm = make(size)
    epilogue = replace(epilogue, pool=min(z.shape[2:]) > 1)
    residual = Random(2).normal(*z.shape)
    inputs = [t.requires_grad_() for t in (z, residual, norm.weight, norm.bias)]
    mask = torch.ones(len(z), dtype=torch.bool) if masked else None
    out = episode_norm(z, norm, n_groups=groups, mask=mask, epilogue=epilogue, residual=residual)
    alone = [
        episode_norm(part, norm, n_groups=1, epilogue=epilogue, residual=r)
        for part, r in zip(z.split(per_group), residual.split(per_group), strict=True)
    ]
    # (z − mean)/σ of a handful of values: a few roundings and one over √(values) of the sums.
    n_values = z[0, 0].numel() * per_group
    tolerance = 32 * EPS * n_values**0.5
    parts = [torch.cat([getattr(a, name) for a in alone]) for name in Normalised._fields]
    for name, expected in zip(Normalised._fields, parts, strict=True):
        assert_near(getattr(out, name), expected, tolerance, name)
    assert not out.mean.requires_grad
    assert not out.var.requires_grad
    cotangent = Random(3).normal(*out.output.shape)
    expected_gradients = torch.autograd.grad(parts[0], inputs, cotangent)
    names = ("z", "residual", "weight", "bias")
    for name, ours, expected in zip(names, backward(out, inputs, cotangent), expected_gradients, strict=True):
        # Two values a channel have no gradient but through eps: compare with the cotangent's size.
        assert (ours - expected).abs().max() <= tolerance * (expected.abs().max() + cotangent.abs().max()), (
            name
        )


@pytest.mark.parametrize("n_groups", [1, 3])
def test_groups_are_neighbours_and_do_not_see_each_other(n_groups: int) -> None:
    z, norm = make((3, 4, 5, 3, 3))
    before = episode_norm(z, norm, n_groups=n_groups).output
    changed = z.clone()
    changed[:4] += Random(4).normal(4, 5, 3, 3)
    after = episode_norm(changed, norm, n_groups=n_groups).output
    assert torch.equal(after[4:], before[4:]) == (n_groups == 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n_groups", [1, 2])
def test_half_types_are_computed_in_float32(dtype: torch.dtype, n_groups: int) -> None:
    z, norm = make((2, 3, 5, 4, 4), dtype=dtype)
    out = episode_norm(z, norm, n_groups=n_groups)
    wide = replace(norm, weight=norm.weight.float(), bias=norm.bias.float())
    expected = episode_norm(z.float(), wide, n_groups=n_groups, backend="torch")
    assert torch.equal(out.output, expected.output.to(dtype))
    assert torch.equal(out.var, expected.var)
    assert out.var.dtype == torch.float32


@pytest.mark.parametrize("n_groups", [1, 4])
def test_a_single_value_a_channel_gives_beta(n_groups: int) -> None:
    random = Random(5)
    z, norm = random.normal(n_groups, 3, 1, 1), random.norm(3)
    out = episode_norm(z, norm, n_groups=n_groups)
    assert torch.equal(out.output, norm.bias.view(1, 3, 1, 1).expand_as(z))
    assert torch.equal(out.mean, z.flatten(1))
    assert torch.equal(out.var, torch.zeros(n_groups, 3).double())


@by_epilogue
@pytest.mark.parametrize("affine", ["both", "bias", "none"])
def test_gradients_against_finite_differences(epilogue: Epilogue, affine: str) -> None:
    random = Random(6)
    z, residual, norm = random.images(4, 2, 2, 2), random.normal(4, 2, 2, 2), random.norm(2, affine)
    present = [t for t in (norm.weight, norm.bias) if t is not None]

    def run(masked: bool) -> Any:
        mask = torch.tensor([True, False, True, True]) if masked else None

        def f(z: Tensor, residual: Tensor, *given: Tensor) -> Tensor:
            rest = iter(given)
            made = replace(
                norm, **{k: next(rest) for k in ("weight", "bias") if getattr(norm, k) is not None}
            )
            return episode_norm(z, made, n_groups=2, mask=mask, epilogue=epilogue, residual=residual).output

        return f

    values = [t.requires_grad_() for t in (z, residual, *present)]
    for masked in (False, True):
        assert torch.autograd.gradcheck(run(masked), values)


@pytest.mark.parametrize("affine", ["both", "bias", "none"])
def test_second_derivatives_against_finite_differences(affine: str) -> None:
    random = Random(11)
    z, norm = random.images(4, 2, 2, 1), random.norm(2, affine, eps=0.1)
    present = [t for t in (norm.weight, norm.bias) if t is not None]

    def f(z: Tensor, *given: Tensor) -> Tensor:
        made = replace(norm, bias=given[-1] if given else None, weight=given[0] if given[1:] else None)
        return episode_norm(z, made, n_groups=2).output

    assert torch.autograd.gradgradcheck(f, [t.requires_grad_() for t in (z, *present)])


def test_second_derivatives_of_both_ways_agree() -> None:
    z, norm = make((2, 3, 2, 2, 3))
    values = [t.requires_grad_() for t in (z, norm.weight, norm.bias)]
    random = Random(7)
    cotangents = [random.normal(*z.shape)] + [random.normal(*t.shape) for t in values]
    found = []
    for mask in (None, torch.ones(len(z), dtype=torch.bool)):
        y = episode_norm(z, norm, n_groups=2, mask=mask).output
        first = torch.autograd.grad(y, values, cotangents[0], create_graph=True)
        found.append(torch.autograd.grad(first[:2], values[:2], cotangents[1:3]))
    for fused, plain in zip(*found, strict=True):
        assert_near(fused, plain, 1e3 * EPS)


@by_epilogue
@pytest.mark.parametrize("garbage", [NAN, float("inf"), -1e30])
def test_a_masked_image_counts_for_nothing(epilogue: Epilogue, garbage: float) -> None:
    """Unequal groups of real images, with garbage in between, are those images alone."""
    random = Random(8)
    mask = torch.tensor([True, True, False, True, True, False, False, False, True])
    z, residual, norm = random.images(9, 3, 4, 5), random.normal(9, 3, 4, 5), random.norm(3)
    z[~mask], residual[~mask] = garbage, garbage
    inputs = [t.requires_grad_() for t in (z, residual, norm.weight, norm.bias)]
    out = episode_norm(z, norm, n_groups=3, mask=mask, epilogue=epilogue, residual=residual)
    kept = [(z[s][mask[s]], residual[s][mask[s]]) for s in (slice(0, 3), slice(3, 6), slice(6, 9))]
    alone = [episode_norm(a, norm, n_groups=1, epilogue=epilogue, residual=r) for a, r in kept]
    expected = Normalised(*(torch.cat([getattr(a, name) for a in alone]) for name in Normalised._fields))
    assert out.n_values.tolist() == [40, 40, 20]
    for name in ("mean", "var", "n_values"):
        assert_near(getattr(out, name), getattr(expected, name), 64 * EPS, name)
    assert_near(out.output[mask], expected.output, 64 * EPS)
    assert torch.equal(out.output[~mask], torch.zeros_like(out.output[~mask]))
    # A gradient for masked outputs too: it stops there.
    cotangent = random.normal(*out.output.shape)
    gradients = backward(out, inputs, cotangent)
    expected_gradients = torch.autograd.grad(expected.output, inputs, cotangent[mask])
    for name, ours, wanted in zip(
        ("z", "residual", "weight", "bias"), gradients, expected_gradients, strict=True
    ):
        assert_near(ours, wanted, 256 * EPS, name)
    assert torch.equal(gradients[0][~mask], torch.zeros_like(z[~mask]))


@pytest.mark.parametrize("granularity", ["kernel", "filter"])
def test_batch_statistics_cancel_shift_and_filter_scale(granularity: str) -> None:
    """Why `episode` norm warns: a shift before it cancels, a filter's scale leaves its sign."""
    random = Random(9)
    x, conv = random.images(6, 3, 5, 5), random.conv(3, 4, granularity=granularity)
    norm, small = replace(conv.norm, bias=None), 1e-12

    def run(scale: Tensor, shift: Tensor, eps: float) -> Tensor:
        z = ss_conv(x, replace(conv, scale=scale, shift=shift, norm=None))
        return episode_norm(z, replace(norm, eps=eps), n_groups=2).output

    expected = run(conv.scale, conv.shift, 1e-5)
    assert_near(run(conv.scale, conv.shift + random.normal(4), 1e-5), expected, 1e-13, "shift")
    shift = conv.shift.clone().requires_grad_()
    cotangent = random.normal(*expected.shape)
    (gradient,) = torch.autograd.grad(run(conv.scale, shift, 1e-5), shift, cotangent)
    assert gradient.abs().max() <= 1e-12 * cotangent.abs().sum(dim=(0, 2, 3)).max()
    # A factor per filter; relative error of 1/σ is eps/(2σ²), σ² is about 1 here and at least 0.01 rescaled.
    factor = random.positive(4, 1, 1, 1)
    expected = run(conv.scale, conv.shift, small)
    assert_near(run(conv.scale * factor, conv.shift, small), expected, small * 100, "positive")
    factor[1::2] *= -1
    assert_near(
        run(conv.scale * factor, conv.shift, small), expected * factor.sign().view(-1, 1, 1), small * 100
    )
    # With eps there is a trace of it, and a scale a kernel stays.
    assert not torch.allclose(
        run(conv.scale * factor.abs(), conv.shift, 1e-1), run(conv.scale, conv.shift, 1e-1)
    )
    if granularity == "kernel":
        other = random.positive(4, 3, 1, 1)
        assert not torch.allclose(run(conv.scale * other, conv.shift, small), expected)


@pytest.mark.parametrize("n_groups", [1, 2])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("ratio", [1e2, 1e4])
def test_a_large_mean_and_a_small_variance(n_groups: int, masked: bool, ratio: float) -> None:
    """Errors grow with |mean|/σ, as a float32 mean makes them; those of E[z²] − E[z]² with its square."""
    random = Random(10, torch.float32)
    # A variance far above the default eps, which would hide its error.
    z, norm = random.images(8, 3, 7, 7) + ratio, replace(random.norm(3), eps=1e-12)
    inputs = [t.requires_grad_() for t in (z, norm.weight, norm.bias)]
    mask = torch.ones(8, dtype=torch.bool) if masked else None
    out = episode_norm(z, norm, n_groups=n_groups, mask=mask)
    wide = [t.detach().double().requires_grad_() for t in inputs]
    exact = episode_norm(wide[0], replace(norm, weight=wide[1], bias=wide[2]), n_groups=n_groups)
    tolerance = 16 * torch.finfo(torch.float32).eps * ratio
    assert tolerance < 0.02
    assert_near(out.output, exact.output.float(), tolerance, "output")
    assert_near(out.var, exact.var.float(), tolerance, "var")
    cotangent = random.normal(*z.shape)
    for name, ours, wanted in zip(
        ("z", "weight", "bias"),
        backward(out, inputs, cotangent),
        backward(exact, wide, cotangent.double()),
        strict=True,
    ):
        assert_near(ours, wanted.float(), tolerance, name)


def test_the_stored_statistics_are_neither_read_nor_moved() -> None:
    z, norm = make((2, 3, 4, 3, 3))
    mean, var = norm.mean.clone(), norm.var.clone()
    out = episode_norm(z, norm, n_groups=2)
    without = episode_norm(z, replace(norm, mean=None, var=None), n_groups=2)
    assert torch.equal(out.output, without.output)
    assert torch.equal(norm.mean, mean)
    assert torch.equal(norm.var, var)


def test_a_group_over_two_processes_has_the_statistics_of_all_its_images() -> None:
    """One process's part, the other's vector given; tests/engine/test_ranks.py has real ones and the gradients."""
    z, norm = make((1, 5, 4, 3, 3))
    mean, var, count = statistics(z[3:], 1, None)
    other = torch.cat([mean[0], var[0], count])
    whole = episode_norm(z, norm, n_groups=1, backend="torch")
    part = episode_norm(z[:3], norm, n_groups=1, gather=lambda own: torch.stack([own, other]))
    tolerance = 16 * 45**0.5 * EPS
    for ours, wanted in zip(part, (whole.output[:3], *whole[1:]), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=tolerance, atol=tolerance)
    with pytest.raises(RuntimeError, match="its statistics span several processes"):
        episode_norm(z[:3], norm, n_groups=1, gather=torch.stack, backend="native")


Z, NORM = torch.zeros(6, 4, 2, 2), ChannelNorm(None, None)


@pytest.mark.parametrize(
    ("z", "norm", "options", "words"),
    [
        (Z[0], NORM, {}, ["z:", "(4, 2, 2)"]),
        (Z, NORM, {"n_groups": 4}, ["n_groups", "6", "4"]),
        (Z, NORM, {"n_groups": 0}, ["n_groups", "6", "0"]),
        (Z[:0], NORM, {}, ["n_groups", "0", "2"]),
        (Z, NORM, {"mask": torch.ones(2, 3, dtype=torch.bool)}, ["mask", "(2, 3)", "(6,)"]),
        (Z, replace(NORM, weight=torch.ones(6)), {}, ["norm.weight", "(6,)", "(6, 4, 2, 2)"]),
        (Z, replace(NORM, bias=torch.ones(1)), {}, ["norm.bias", "(1,)", "(6, 4, 2, 2)"]),
        (Z, NORM, {"residual": Z[:, :1]}, ["residual", "(6, 1, 2, 2)", "(6, 4, 2, 2)"]),
        (Z, NORM, {"epilogue": Epilogue("relu")}, ["epilogue.activation", "'relu'"]),
        (Z[..., :1], NORM, {"epilogue": Epilogue(pool=True)}, ["pool", "(6, 4, 2, 1)"]),
        (Z, NORM, {"gather": torch.stack}, ["gather", "2 groups"]),
        (Z, NORM, {"gather": torch.stack, "n_groups": 1, "mask": torch.ones(6) > 0}, ["gather", "mask True"]),
    ],
)
def test_errors_name_argument_and_shapes(
    z: Tensor, norm: ChannelNorm, options: Any, words: list[str]
) -> None:
    episode_norm(Z, NORM, n_groups=2)
    with pytest.raises(ValueError, match=r".") as error:
        episode_norm(z, norm, **{"n_groups": 2, **options})
    for word in words:
        assert word in str(error.value)


def test_a_mask_is_bool() -> None:
    with pytest.raises(TypeError, match=r"mask: expected bool, got torch\.float32"):
        episode_norm(Z, NORM, n_groups=2, mask=torch.ones(6))
    assert episode_norm(Z, NORM, n_groups=2, mask=torch.ones(6) > 0).output.shape == Z.shape
