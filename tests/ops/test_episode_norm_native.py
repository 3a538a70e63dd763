"""Native batch statistics: against the float64 definition, and what the framework asks of an operator."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from mtl_fast.kernels.contracts import ChannelNorm, Epilogue
from mtl_fast.ops import episode_norm
from mtl_fast.ops.backend import why
from tests.conv_cases import Random
from tests.native_cases import EPS, assert_close, n_threads, needs_native
from tests.norm_cases import NAMES, assert_agrees, leaves, make, run

pytestmark = needs_native

NAN = float("nan")
EPILOGUES = [
    Epilogue(activation, slope, pool)
    for activation, slope, pool in product(
        ("none", "before_residual", "after_residual"), (0.0, 0.1), (False, True)
    )
    if activation != "none" or slope
]
by_epilogue = pytest.mark.parametrize(
    "epilogue", EPILOGUES, ids=lambda e: f"{e.activation}-{e.slope}-{'pool' if e.pool else 'whole'}"
)
by_residual = pytest.mark.parametrize("with_residual", [False, True], ids=["alone", "residual"])
# groups, images a group, channels, height, width
SIZES = {
    "one_channel": (1, 3, 1, 2, 2),
    "odd": (3, 5, 5, 7, 5),
    "a_vector": (3, 2, 16, 4, 9),
    "and_one_more": (1, 4, 33, 5, 6),
    "large": (2, 3, 64, 32, 32),
}


@by_epilogue
@by_residual
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
def test_values_and_gradients_are_those_of_the_float64_definition(
    size: tuple[int, ...], epilogue: Epilogue, with_residual: bool
) -> None:
    z, norm, residual = make(size)
    assert_agrees(z, norm, residual if with_residual else None, epilogue, size[0])


@by_epilogue
@by_residual
def test_masked_images_count_for_nothing_whatever_they_hold(epilogue: Epilogue, with_residual: bool) -> None:
    z, norm, residual = make((3, 4, 33, 5, 6), seed=1)
    mask = torch.tensor([True, True, False, True] * 2 + [False, False, True, False])
    clean = [t.where(mask.view(-1, 1, 1, 1), 0) for t in (z, residual)]
    assert_agrees(clean[0], norm, clean[1] if with_residual else None, epilogue, 3, mask)
    results = []
    for a, b in (clean, [t.where(mask.view(-1, 1, 1, 1), NAN) for t in (z, residual)]):
        named, given = leaves(a, norm, b if with_residual else None)
        out = run(named["z"], given, named.get("residual"), n_groups=3, epilogue=epilogue, mask=mask)
        cotangent = Random(2, torch.float32).normal(*out.output.shape)
        results.append([*out, *torch.autograd.grad(out.output, list(named.values()), cotangent)])
    for ours, poisoned in zip(*results, strict=True):
        assert torch.equal(ours, poisoned)


@pytest.mark.parametrize("affine", ["bias", "none"])
@pytest.mark.parametrize("eps", [1e-5, 10.0])
def test_without_gamma_or_beta_and_with_any_eps(affine: str, eps: float) -> None:
    z, norm, residual = make(SIZES["odd"], affine=affine)
    assert_agrees(z, replace(norm, eps=eps), residual, Epilogue("after_residual", 0.1, pool=True), 3)


def test_a_single_value_a_channel_gives_beta_and_no_gradient_to_z() -> None:
    z, norm, _ = make((3, 1, 33, 1, 1))
    named, given = leaves(z, norm, None)
    out = run(named["z"], given, None, n_groups=3)
    assert torch.equal(out.output, norm.bias.view(1, -1, 1, 1).expand_as(z))
    assert torch.equal(out.mean, z.flatten(1))
    assert out.var.count_nonzero() == 0
    cotangent = torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
    gradients = torch.autograd.grad(out.output, list(named.values()), cotangent)
    assert gradients[0].count_nonzero() == 0
    assert gradients[1].count_nonzero() == 0
    assert_close(
        gradients[2], cotangent.double().sum(dim=(0, 2, 3)), 2 * EPS, cotangent.abs().sum((0, 2, 3)), "bias"
    )


@pytest.mark.parametrize("value", [0.0, 0.1, -1e30, 3.3e4])
def test_a_constant_channel_has_no_variance_and_gives_beta_to_the_bit(value: float) -> None:
    z, norm, _ = make((2, 7, 5, 9, 11))
    z[:, 1::2] = value
    out = run(z, norm, None, n_groups=2)
    assert torch.equal(out.mean[:, 1::2], z[:2, 1::2, 0, 0])
    assert out.var[:, 1::2].count_nonzero() == 0
    assert torch.equal(out.output[:, 1::2], norm.bias.view(1, -1, 1, 1).expand_as(z)[:, 1::2])
    assert (out.var[:, ::2] > 0).all()


def test_a_large_mean_costs_the_variance_nothing() -> None:
    """The deviations of z are exact in float32 here: E[z²] − E[z]² would have no digit left."""
    z, norm, _ = make((1, 16, 64, 16, 16))
    z = (z * 64).round()
    far = run(z + 2.0**20, norm, None, n_groups=1)
    near = run(z, norm, None, n_groups=1)
    assert ((far.var - near.var).abs() <= 4 * EPS * near.var).all()


@pytest.mark.parametrize("size", [(1, 6, 64, 16, 16), (5, 2, 33, 9, 7)], ids=["one_group", "groups"])
@pytest.mark.parametrize("pool", [False, True], ids=["whole", "pool"])
def test_one_two_and_five_threads_give_the_same_bits(size: tuple[int, ...], pool: bool) -> None:
    z, norm, residual = make(size)
    results = []
    for n in (1, 2, 5):
        with n_threads(n):
            named, given = leaves(z, norm, residual)
            epilogue = Epilogue("after_residual", 0.1, pool)
            out = run(named["z"], given, named["residual"], n_groups=size[0], epilogue=epilogue)
            results.append(
                [*out, *torch.autograd.grad(out.output, list(named.values()), out.output.detach())]
            )
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_group_does_not_depend_on_the_others_to_the_bit() -> None:
    z, norm, residual = make((3, 4, 17, 5, 5))
    epilogue = Epilogue("before_residual", 0.1, pool=True)
    together = run(z, norm, residual, n_groups=3, epilogue=epilogue)
    alone = run(z[4:8], norm, residual[4:8], n_groups=1, epilogue=epilogue)
    assert torch.equal(together.output[4:8], alone.output)
    assert torch.equal(together.var[1:2], alone.var)


def test_a_value_that_is_not_a_number_spoils_its_channel_only() -> None:
    z, norm, _ = make((2, 3, 17, 6, 6))
    expected = run(z, norm, None, n_groups=2, epilogue=Epilogue("after_residual", 0.0, pool=True)).output
    z[1, 3, 2, 2] = NAN
    output = run(z, norm, None, n_groups=2, epilogue=Epilogue("after_residual", 0.0, pool=True)).output
    assert output[:3, 3].isnan().all()
    others = [c for c in range(17) if c != 3]
    assert torch.equal(output[:, others], expected[:, others])
    assert torch.equal(output[3:], expected[3:])


def test_operands_need_not_be_channels_last_or_dense() -> None:
    z, norm, residual = make((2, 3, 18, 5, 6))
    expected = run(z, norm, residual, n_groups=2)
    apart = torch.stack([z, z], dim=-1)[..., 0]
    mask = torch.ones(12, dtype=torch.bool)[::2]
    for other in (z.contiguous(), apart):
        out = run(other, norm, residual.contiguous(), n_groups=2, mask=mask)
        assert torch.equal(out.output, expected.output)
    named, given = leaves(z, norm, residual)
    out = run(named["z"], given, named["residual"], n_groups=2, epilogue=Epilogue("after_residual"))
    # A sum's gradient is one number, expanded.
    spread = torch.autograd.grad(out.output.sum(), list(named.values()), retain_graph=True)
    dense = torch.autograd.grad(out.output, list(named.values()), torch.ones_like(z))
    assert all(torch.equal(a, b) for a, b in zip(spread, dense, strict=True))


@pytest.mark.parametrize("wanted", NAMES)
def test_each_gradient_alone_is_the_same_to_the_bit(wanted: str) -> None:
    z, norm, residual = make((2, 3, 18, 5, 6))
    epilogue = Epilogue("before_residual", 0.1, pool=True)
    named, given = leaves(z, norm, residual)
    output = run(named["z"], given, named["residual"], n_groups=2, epilogue=epilogue).output
    expected = dict(zip(named, torch.autograd.grad(output.sin().sum(), list(named.values())), strict=True))
    for name, t in named.items():
        t.requires_grad_(name == wanted)
    alone = run(named["z"], given, named["residual"], n_groups=2, epilogue=epilogue).output
    assert torch.equal(torch.autograd.grad(alone.sin().sum(), named[wanted])[0], expected[wanted])


@by_epilogue
@by_residual
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_derivatives_of_the_gradients_are_the_definition_s(
    epilogue: Epilogue, with_residual: bool, masked: bool
) -> None:
    z, norm, residual = make((2, 4, 5, 4, 5), seed=3)
    mask = torch.tensor([True, False, True, True] * 2) if masked else None
    results = []
    for dtype, backend in ((torch.float32, "native"), (torch.float64, "torch")):
        named, given = leaves(z, norm, residual if with_residual else None, dtype)
        output = run(
            named["z"],
            given,
            named.get("residual"),
            n_groups=2,
            epilogue=epilogue,
            mask=mask,
            backend=backend,
        ).output
        random = Random(4, dtype)
        cotangent = random.normal(*output.shape).requires_grad_()
        first = torch.autograd.grad(output, list(named.values()), cotangent, create_graph=True)
        scalar = sum((g * random.normal(*g.shape)).sum() for g in first)
        inputs = [named["z"], named["weight"], cotangent]
        results.append([*first, *torch.autograd.grad(scalar, inputs)])
    # Sums of 80 values and products of at most four factors of a few units.
    tolerance = 64 * EPS * 80**0.5
    for ours, wanted in zip(*results, strict=True):
        assert (ours - wanted).abs().max() <= tolerance * (1 + wanted.abs().max())


def test_stored_statistics_are_neither_read_nor_moved() -> None:
    z, norm, _ = make((2, 3, 4, 3, 3))
    before = norm.mean.clone(), norm.var.clone()
    out = run(z, norm, None, n_groups=2)
    assert torch.equal(out.output, run(z, replace(norm, mean=None, var=None), None, n_groups=2).output)
    assert torch.equal(norm.mean, before[0])
    assert torch.equal(norm.var, before[1])
    assert not out.mean.requires_grad


Z, NORM = torch.zeros(4, 3, 2, 2), ChannelNorm(None, None)


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"z": Z.double()}, "float64"),
        ({"z": Z, "norm": replace(NORM, weight=torch.ones(3).half())}, "float16"),
        ({"z": Z, "residual": Z.bfloat16()}, "bfloat16"),
        ({"z": Z, "epilogue": Epilogue("after_residual", -0.1)}, "slope -0.1"),
    ],
)
def test_beyond_its_limits_torch_runs_and_says_why(facts: dict[str, Any], words: str) -> None:
    reason = why("episode_norm", **facts)
    assert "torch:" in reason
    assert words in reason
    with pytest.raises(RuntimeError, match="cannot run this call"):
        why("episode_norm", "native", **facts)
    assert why("episode_norm", z=Z, norm=NORM, epilogue=Epilogue("none", -0.1)).startswith("native:")


def test_function_transforms_go_to_torch() -> None:
    z, norm, _ = make((1, 3, 4, 3, 3))
    gradient = torch.func.grad(lambda z: episode_norm(z, norm, n_groups=1).output.sin().sum())(z)
    assert gradient.shape == z.shape


@pytest.mark.parametrize("epilogue", [Epilogue(), Epilogue("after_residual", 0.1, pool=True)])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_opcheck(epilogue: Epilogue, masked: bool) -> None:
    z, norm, residual = make((2, 2, 5, 4, 3))
    named, given = leaves(z, norm, residual)
    mask = torch.tensor([True, False, True, True]) if masked else None
    coded = epilogue.pool
    inputs = (
        named["z"],
        given.weight,
        given.bias,
        norm.eps,
        2,
        mask,
        named["residual"],
        2 if coded else 0,
        0.1,
        coded,
        coded,
    )
    torch.library.opcheck(torch.ops.mtl_fast.episode_norm.default, inputs)
    with torch.no_grad():
        output, mean, var, n_values, codes = torch.ops.mtl_fast.episode_norm(*inputs)
    backward = (
        output,
        z,
        codes,
        mean,
        var,
        n_values,
        norm.weight,
        norm.eps,
        mask,
        *inputs[7:10],
        True,
        coded,
    )
    torch.library.opcheck(torch.ops.mtl_fast.episode_norm_backward.default, backward)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_a_compiled_call_without_graph_breaks_gives_the_same_bits(compiler: str) -> None:
    z, norm, residual = make((2, 3, 18, 5, 6))
    results = []
    torch.compiler.reset()

    def f(z: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        given = replace(norm, weight=weight, bias=bias)
        return run(z, given, residual, n_groups=2, epilogue=Epilogue("after_residual", 0.1, pool=True)).output

    for call in (f, torch.compile(f, backend=compiler, fullgraph=True)):
        named, _ = leaves(z, norm, residual)
        output = call(*named.values())
        results.append([output, *torch.autograd.grad(output, list(named.values()), output.detach())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_what_was_saved_may_come_back_in_another_order_of_memory() -> None:
    """As from `torch.autograd.graph.save_on_cpu`."""
    z, norm, residual = make(SIZES["odd"], seed=3)

    def gradients() -> list[Tensor]:
        named, own = leaves(z, norm, residual)
        epilogue = Epilogue("after_residual", 0.1, pool=True)
        y = run(named["z"], own, named["residual"], n_groups=3, epilogue=epilogue).output
        return list(torch.autograd.grad(y, list(named.values()), torch.arange(y.numel()).view(y.shape).sin()))

    expected = gradients()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: t.clone(memory_format=torch.contiguous_format), lambda t: t
    ):
        found = gradients()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
