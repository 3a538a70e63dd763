"""The Triton kernels of `episode_norm`, interpreted: against the float64 definition, and what operators are asked for."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch

from mtl_fast.kernels import triton
from mtl_fast.kernels.contracts import ChannelNorm, Epilogue
from mtl_fast.kernels.triton import episode_norm as kernels
from mtl_fast.kernels.triton import episode_norm_backward
from mtl_fast.kernels.triton.launch import observed
from mtl_fast.ops.backend import why
from tests.conv_cases import Random
from tests.gpu.altered import altered
from tests.norm_cases import assert_agrees, leaves, make, run

EPILOGUES = [
    Epilogue(activation, 0.1, pool)
    for activation, pool in product(("none", "before_residual", "after_residual"), (False, True))
] + [Epilogue("after_residual", 0.0, True)]
by_epilogue = pytest.mark.parametrize(
    "epilogue", EPILOGUES, ids=lambda e: f"{e.activation}-{e.slope}-{'pool' if e.pool else 'whole'}"
)
by_residual = pytest.mark.parametrize("with_residual", [False, True], ids=["alone", "residual"])
# groups, images a group, channels, height, width
SIZES = {
    "one_channel": (1, 3, 1, 2, 2),
    "odd": (3, 5, 5, 7, 5),
    "more_than_a_block": (1, 3, 33, 5, 6),
}


@by_epilogue
@by_residual
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
def test_values_and_gradients_are_those_of_the_float64_definition(
    size: tuple[int, ...], epilogue: Epilogue, with_residual: bool
) -> None:
    z, norm, residual = make(size)
    assert_agrees(z, norm, residual if with_residual else None, epilogue, size[0], backend="triton")


@pytest.mark.parametrize("epilogue", [EPILOGUES[2], EPILOGUES[5]], ids=["before-whole", "after-pool"])
@by_residual
def test_masked_images_count_for_nothing_whatever_they_hold(epilogue: Epilogue, with_residual: bool) -> None:
    z, norm, residual = make((3, 4, 5, 5, 6), seed=1)
    mask = torch.tensor([True, True, False, True] * 2 + [False, False, True, False])
    clean = [t.where(mask.view(-1, 1, 1, 1), 0) for t in (z, residual)]
    assert_agrees(clean[0], norm, clean[1] if with_residual else None, epilogue, 3, mask, "triton")
    results = []
    for a, b in (clean, [t.where(mask.view(-1, 1, 1, 1), math.nan) for t in (z, residual)]):
        named, given = leaves(a, norm, b if with_residual else None)
        options: dict[str, Any] = {"n_groups": 3, "epilogue": epilogue, "mask": mask, "backend": "triton"}
        out = run(named["z"], given, named.get("residual"), **options)
        cotangent = Random(2, torch.float32).normal(*out.output.shape)
        results.append([*out, *torch.autograd.grad(out.output, list(named.values()), cotangent)])
    for ours, poisoned in zip(*results, strict=True):
        assert torch.equal(ours, poisoned)


def test_a_large_group_is_joined_from_its_parts() -> None:
    z, norm, residual = make((2, 3, 3, 27, 29))
    assert kernels.norm_config(3 * 27 * 29, 3).n_parts == 2
    assert_agrees(z, norm, residual, Epilogue("after_residual", 0.1), 2, backend="triton")


def test_nothing_beside_the_images_is_read() -> None:
    size = (2, 3, 5, 3, 5)
    z, norm, _ = make(size)
    expected = run(z, norm, None, n_groups=2, backend="triton")
    buffer = torch.full((z.numel() + 512,), math.nan)
    middle = buffer[256 : 256 + z.numel()].view(6, 3, 5, 5).permute(0, 3, 1, 2)
    middle.copy_(z)
    for a, e in zip(run(middle, norm, None, n_groups=2, backend="triton"), expected, strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize(
    "epilogue", [EPILOGUES[0], EPILOGUES[3], EPILOGUES[5]], ids=["none", "before", "after"]
)
def test_float16_is_computed_in_float32_and_rounded_once(epilogue: Epilogue) -> None:
    z, norm, residual = make((2, 2, 9, 4, 5))
    results = []
    for dtype in (torch.float16, torch.float32):
        named, given = leaves(z.half(), norm, residual.half(), torch.float32)
        for name in ("z", "residual"):
            named[name] = named[name].detach().to(dtype).requires_grad_()
        out = run(named["z"], given, named["residual"], n_groups=2, epilogue=epilogue, backend="triton")
        cotangent = Random(2, torch.float32).normal(*out.output.shape).half().to(dtype)
        found = torch.autograd.grad(out.output, list(named.values()), cotangent)
        results.append([*out, *found])
    for half, wide in zip(*results, strict=True):
        assert torch.equal(half, wide.to(half.dtype))
    assert results[0][0].dtype == torch.float16


@pytest.mark.parametrize("affine", ["bias", "none"])
@pytest.mark.parametrize("eps", [1e-5, 10.0])
def test_without_gamma_or_beta_and_with_any_eps(affine: str, eps: float) -> None:
    z, norm, residual = make(SIZES["odd"], affine=affine)
    epilogue = Epilogue("after_residual", 0.1, pool=True)
    assert_agrees(z, replace(norm, eps=eps), residual, epilogue, 3, backend="triton")


def test_a_single_value_a_channel_gives_beta_and_no_gradient_to_z() -> None:
    z, norm, _ = make((3, 1, 33, 1, 1))
    named, given = leaves(z, norm, None)
    out = run(named["z"], given, None, n_groups=3, backend="triton")
    assert torch.equal(out.output, norm.bias.view(1, -1, 1, 1).expand_as(z))
    assert torch.equal(out.mean, z.flatten(1))
    assert out.var.count_nonzero() == 0
    gradients = torch.autograd.grad(out.output, list(named.values()), torch.ones_like(z))
    assert gradients[0].count_nonzero() == 0
    assert gradients[1].count_nonzero() == 0
    assert torch.equal(gradients[2], torch.full((33,), 3.0))


@pytest.mark.parametrize("value", [0.0, 0.1, -1e30, 3.3e4])
def test_a_constant_channel_has_no_variance_and_gives_beta_to_the_bit(value: float) -> None:
    z, norm, _ = make((2, 7, 5, 9, 11))
    z[:, 1::2] = value
    out = run(z, norm, None, n_groups=2, backend="triton")
    assert torch.equal(out.mean[:, 1::2], z[:2, 1::2, 0, 0])
    assert out.var[:, 1::2].count_nonzero() == 0
    assert torch.equal(out.output[:, 1::2], norm.bias.view(1, -1, 1, 1).expand_as(z)[:, 1::2])
    assert (out.var[:, ::2] > 0).all()


def test_a_large_mean_costs_the_variance_nothing() -> None:
    """The deviations of z are exact in float32 here: E[z²] − E[z]² would have no digit left."""
    z, norm, _ = make((1, 4, 8, 16, 16))
    z = (z * 64).round()
    far = run(z + 2.0**20, norm, None, n_groups=1, backend="triton").var.double()
    exact = z.double().var(dim=(0, 2, 3), correction=0)
    # Means on the way round to 2⁻⁴ of a unit, 64th of the spread.
    assert ((far[0] - exact).abs() <= 2.0**-8 * exact).all()


def test_a_group_does_not_depend_on_the_others_to_the_bit() -> None:
    z, norm, residual = make((3, 4, 17, 5, 5))
    options: dict[str, Any] = {"epilogue": Epilogue("before_residual", 0.1, pool=True), "backend": "triton"}
    together = run(z, norm, residual, n_groups=3, **options)
    alone = run(z[4:8], norm, residual[4:8], n_groups=1, **options)
    assert torch.equal(together.output[4:8], alone.output)
    assert torch.equal(together.var[1:2], alone.var)


def test_a_value_that_is_not_a_number_spoils_its_channel_only() -> None:
    z, norm, _ = make((2, 3, 5, 6, 6))
    options: dict[str, Any] = {"epilogue": Epilogue("after_residual", 0.0, pool=True), "backend": "triton"}
    expected = run(z, norm, None, n_groups=2, **options).output
    z[1, 3, 2, 2] = math.nan
    output = run(z, norm, None, n_groups=2, **options).output
    assert output[:3, 3].isnan().all()
    output[:3, 3] = expected[:3, 3]
    assert torch.equal(output, expected)


def test_derivatives_of_the_gradients_are_the_definition_s() -> None:
    z, norm, residual = make((2, 4, 5, 4, 5), seed=3)
    epilogue = Epilogue("after_residual", 0.1, True)
    results = []
    for dtype, backend in ((torch.float32, "triton"), (torch.float64, "torch")):
        named, given = leaves(z, norm, residual, dtype)
        options: dict[str, Any] = {"n_groups": 2, "epilogue": epilogue, "backend": backend}
        output = run(named["z"], given, named["residual"], **options).output
        random = Random(4, dtype)
        cotangent = random.normal(*output.shape).requires_grad_()
        first = torch.autograd.grad(output, list(named.values()), cotangent, create_graph=True)
        scalar = sum((g * random.normal(*g.shape)).sum() for g in first)
        results.append([*first, *torch.autograd.grad(scalar, [named["z"], named["weight"], cotangent])])
    # Sums of 80 values and products of at most four factors of a few units.
    tolerance = 64 * torch.finfo(torch.float32).eps * 80**0.5
    for ours, wanted in zip(*results, strict=True):
        assert (ours - wanted).abs().max() <= tolerance * (1 + wanted.abs().max())


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_opcheck(masked: bool) -> None:
    z, norm, residual = make((2, 2, 5, 4, 3))
    mask = torch.tensor([True, False, True, True]) if masked else None
    inputs = (z, norm.weight, norm.bias, norm.eps, 2, mask, residual, 2, 0.1, True, True)
    # The interpreter writes through pointers, so it is not traced: schema and fakes are checked.
    checks = ("test_schema", "test_faketensor")
    operators = torch.ops.mtl_fast
    torch.library.opcheck(operators.triton_episode_norm.default, inputs, test_utils=checks)
    output, mean, var, n_values, codes = operators.triton_episode_norm(*inputs)
    backward = (output, z, codes, mean, var, n_values, norm.weight, norm.eps, mask, *inputs[7:10], True, True)
    torch.library.opcheck(operators.triton_episode_norm_backward.default, backward, test_utils=checks)


def test_launches() -> None:
    z, norm, residual = make((2, 3, 5, 6, 6))
    with observed() as launches:
        run(z, norm, residual, n_groups=2, backend="triton")
    assert [launch.name for launch in launches] == ["statistics_kernel", "normalise_kernel"]
    named, given = leaves(z, norm, residual)
    out = run(named["z"], given, named["residual"], n_groups=2, backend="triton").output
    with observed() as launches:
        torch.autograd.grad(out, list(named.values()), torch.ones_like(out))
    assert [launch.name for launch in launches] == ["sums_kernel", "images_backward_kernel"]


def test_what_it_takes_and_why() -> None:
    z = torch.zeros(4, 3, 2, 2)
    norm = ChannelNorm(None, None)
    assert why("episode_norm", z=z, norm=norm).startswith("triton: ")
    for facts, words in (
        ({"z": z.double()}, "float64"),
        ({"z": z.bfloat16()}, "bfloat16"),
        ({"z": z, "residual": z.half()}, "the residual is torch.float16, the images are torch.float32"),
        ({"z": z, "gather": len}, "span several processes"),
    ):
        with pytest.raises(RuntimeError, match=words):
            why("episode_norm", "triton", norm=norm, **facts)


@pytest.mark.parametrize(
    ("module", "n_rows"),
    [(kernels, "n_rows"), (episode_norm_backward, "n_windows")],
    ids=["forward", "backward"],
)
def test_planted_shifted_mask(module: Any, n_rows: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last pixel of each group is left out: the comparison with the float64 definition sees it."""
    z, norm, _ = make((2, 3, 5, 3, 5))
    assert_agrees(z, norm, None, Epilogue(), 2, backend="triton")
    mask = f"        m_m = counting(p_mask, group, o_m, {n_rows}, "
    with altered(module, mask, mask.replace(n_rows, f"{n_rows} - 1")) as faulty:
        monkeypatch.setattr(triton, module.__name__.rpartition(".")[2], faulty)
        with pytest.raises(AssertionError):
            assert_agrees(z, norm, None, Epilogue(), 2, backend="triton")
