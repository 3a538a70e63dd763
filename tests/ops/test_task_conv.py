"""Layers with weights of each task's own: values, first and second derivatives against torch.nn task by task."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.accuracy import convolution_bound
from mtl_fast.kernels import native
from mtl_fast.ops import ChannelNorm, ConvOperands, Epilogue, FrozenFilters, task_conv, why
from tests.conv_cases import Random, assert_near, plain_conv, plain_epilogue, plain_norm

# A task's layer is a few hundred terms a value, and so are its statistics.
TOLERANCE = 1000 * 300**0.5 * torch.finfo(torch.float64).eps
EPILOGUES = {
    "bare": Epilogue(),
    "relu, pool": Epilogue("after_residual", 0.0, pool=True),
    "leaky": Epilogue("before_residual", 0.2),
    "pool": Epilogue(pool=True),
}
by_epilogue = pytest.mark.parametrize("epilogue", EPILOGUES.values(), ids=EPILOGUES)
# tasks, images a task, input and output channels, pixels, taps
SHAPES = [(1, 2, 1, 1, 4, 3), (3, 3, 3, 5, 7, 3), (2, 4, 33, 35, 6, 3), (2, 5, 6, 4, 5, 1)]
by_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
needs_native = pytest.mark.skipif(not native.load()[0], reason=native.load()[1])


def case(
    shape: tuple[int, ...] = SHAPES[1], *, affine: str = "both", bias: bool = True, seed: int = 0
) -> tuple[Tensor, ConvOperands]:
    n_tasks, n, n_in, n_out, pixels, k = shape
    random = Random(seed)
    weight = random.normal(n_tasks, n_out, n_in, k, k) / (n_in * k * k) ** 0.5
    filters = FrozenFilters(weight, random.normal(n_tasks, n_out) if bias else None, padding=k // 2)
    norm = ChannelNorm(
        random.normal(n_out),
        random.positive(n_out),
        random.normal(n_tasks, n_out) if affine == "both" else None,
        random.normal(n_tasks, n_out) if affine != "none" else None,
    )
    return random.images(n_tasks * n, n_in, pixels, pixels), ConvOperands(filters, norm=norm)


def leaves(x: Tensor, conv: ConvOperands, dtype: torch.dtype) -> tuple[dict[str, Tensor], ConvOperands]:
    """Tensors that take a gradient, by name, and operands made of them."""
    assert conv.norm is not None
    values = {
        "x": x,
        "weight": conv.filters.weight,
        "bias": conv.filters.bias,
        "gamma": conv.norm.weight,
        "beta": conv.norm.bias,
    }
    made = {k: v.detach().to(dtype).requires_grad_() for k, v in values.items() if v is not None}
    mean, var = (None if v is None else v.to(dtype) for v in (conv.norm.mean, conv.norm.var))
    norm = ChannelNorm(mean, var, made.get("gamma"), made.get("beta"), conv.norm.eps)
    filters = replace(conv.filters, weight=made["weight"], bias=made.get("bias"))
    return made, replace(conv, filters=filters, norm=norm)


def ours(x: Tensor, conv: ConvOperands, **options: Any) -> Tensor:
    return task_conv(x, conv, **options).output


def task_by_task(
    x: Tensor, conv: ConvOperands, *, n_groups: int, epilogue: Epilogue, residual: Tensor | None = None
) -> Tensor:
    n_tasks = len(conv.filters.weight)
    outputs = []
    for t, part in enumerate(x.chunk(n_tasks)):
        bias = None if conv.filters.bias is None else conv.filters.bias[t]
        own = ConvOperands(replace(conv.filters, weight=conv.filters.weight[t], bias=bias))
        z = plain_conv(part, own)
        if (norm := conv.norm) is not None:
            gamma, beta = (None if v is None else v[t] for v in (norm.weight, norm.bias))
            gamma = torch.ones_like(beta) if gamma is None and beta is not None else gamma
            z = plain_norm(z, replace(norm, weight=gamma, bias=beta), batch=n_groups > 0)
        outputs.append(plain_epilogue(z, epilogue, None if residual is None else residual.chunk(n_tasks)[t]))
    return torch.cat(outputs)


def derivatives(
    way: Any, x: Tensor, conv: ConvOperands, dtype: torch.dtype = torch.float64, **options: Any
) -> dict[str, Tensor]:
    """Output, gradients for a random cotangent, and gradients of a random product of those."""
    values, operands = leaves(x, conv, dtype)
    y = way(values["x"], operands, **options)
    random = Random(7, torch.float64)
    cotangent = random.normal(*y.shape).to(dtype).requires_grad_()
    first = torch.autograd.grad(y, list(values.values()), cotangent, create_graph=True)
    # The bias's gradient is 0 with batch statistics: what rounding leaves there is no function to differentiate.
    product = sum(
        (gradient * random.normal(*gradient.shape).to(dtype)).sum()
        for name, gradient in zip(values, first, strict=True)
        if name != "bias"
    )
    second = torch.autograd.grad(product, [cotangent, *values.values()], materialize_grads=True)
    found = {"y": y.detach()}
    found |= {f"d{name}": gradient.detach() for name, gradient in zip(values, first, strict=True)}
    return found | {f"dd{name}": value for name, value in zip(["cotangent", *values], second, strict=True)}


def check(actual: dict[str, Tensor], expected: dict[str, Tensor], bound: float, *, batch: bool) -> None:
    for name, value in expected.items():
        if batch and name.endswith("bias"):
            scale = expected["dweight"].abs().max()
            assert actual[name].abs().max() <= bound * scale, name
        elif float(value.abs().max()) == 0:
            assert float(actual[name].abs().max()) == 0, name
        else:
            assert_near(actual[name], value, bound, name)


@by_epilogue
@by_shape
@pytest.mark.parametrize("stored", [False, True], ids=["batch", "stored"])
def test_it_is_each_task_on_its_own(epilogue: Epilogue, shape: tuple[int, ...], stored: bool) -> None:
    x, conv = case(shape)
    options = {"n_groups": 0 if stored else shape[0], "epilogue": epilogue}
    expected = derivatives(task_by_task, x, conv, **options)
    check(derivatives(ours, x, conv, **options), expected, TOLERANCE, batch=not stored)


@pytest.mark.parametrize("affine", ["both", "bias", "none"])
@pytest.mark.parametrize("bias", [False, True])
def test_what_a_layer_may_lack(affine: str, bias: bool) -> None:
    x, conv = case(affine=affine, bias=bias)
    for n_groups in (0, 3):
        options = {"n_groups": n_groups, "epilogue": EPILOGUES["relu, pool"]}
        expected = derivatives(task_by_task, x, conv, **options)
        check(derivatives(ours, x, conv, **options), expected, TOLERANCE, batch=n_groups > 0)


@pytest.mark.parametrize("activation", ["before_residual", "after_residual"])
def test_a_residual_and_no_norm(activation: Any) -> None:
    x, conv = case()
    residual = Random(3).normal(9, 5, 7, 7)
    for n_groups, operands in ((3, conv), (0, conv), (0, conv.without_norm())):
        options = {"n_groups": n_groups, "epilogue": Epilogue(activation, 0.1, True), "residual": residual}
        assert_near(ours(x, operands, **options), task_by_task(x, operands, **options), TOLERANCE)


def test_statistics_are_those_of_each_task() -> None:
    x, conv = case()
    _, ((mean, var, count),) = task_conv(x, conv, n_groups=3)
    z = task_by_task(x, conv.without_norm(), n_groups=0, epilogue=Epilogue()).unflatten(0, (3, -1))
    assert_near(mean, z.mean(dim=(1, 3, 4)), TOLERANCE)
    assert_near(var, z.var(dim=(1, 3, 4), unbiased=False), TOLERANCE)
    assert count.tolist() == [3 * 7 * 7] * 3
    assert task_conv(x, conv, n_groups=0).statistics == ()


@pytest.mark.parametrize("stored", [False, True], ids=["batch", "stored"])
@pytest.mark.parametrize("affine", ["both", "bias", "none"])
def test_under_autocast_statistics_and_norm_stay_float32(stored: bool, affine: str) -> None:
    x, conv = case(affine=affine)
    options = {"n_groups": 0 if stored else 3, "epilogue": EPILOGUES["relu, pool"]}
    expected = leaves(x, conv, torch.float64)
    found = leaves(x, conv, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y, statistics = task_conv(found[0]["x"], found[1], **options)
    wanted, exact = task_conv(expected[0]["x"], expected[1], **options)
    # Factors and 27 products of a value are rounded to bfloat16.
    bound = 27**0.5 * torch.finfo(torch.bfloat16).eps
    assert y.dtype == torch.bfloat16
    assert_near(y.detach().double(), wanted.detach(), bound)
    for own, other in zip(statistics, exact, strict=True):
        assert [v.dtype for v in own] == [torch.float32] * 3
        for value, true in zip(own, other, strict=True):
            assert_near(value.double(), true, bound)
    y.float().square().sum().backward()
    assert all(v.grad is not None and v.grad.dtype == torch.float32 for v in found[0].values())


@needs_native
@by_epilogue
@by_shape
def test_native_is_the_definition(epilogue: Epilogue, shape: tuple[int, ...]) -> None:
    x, conv = case(shape)
    options = {"n_groups": shape[0], "epilogue": epilogue}
    expected = derivatives(ours, x, conv, backend="torch", **options)
    actual = derivatives(ours, x, conv, torch.float32, backend="native", **options)
    # Behind a convolution and batch statistics of few values, a derivative of second order adds a dozen terms.
    bound = 12 * convolution_bound(9 * max(shape[2:4]), 3)
    check(actual, expected, bound, batch=True)
    statistics = (
        task_conv(values["x"], operands, n_groups=shape[0]).statistics[0]
        for values, operands in (leaves(x, conv, dtype) for dtype in (torch.float32, torch.float64))
    )
    for own, other in zip(*statistics, strict=True):
        assert not own.requires_grad
        assert_near(own, other, bound)


@needs_native
@pytest.mark.parametrize("affine", ["both", "bias", "none"])
def test_native_with_every_affine_and_a_gamma_of_zero(affine: str) -> None:
    x, conv = case(affine=affine, bias=False)
    assert conv.norm is not None
    if conv.norm.weight is not None:
        conv.norm.weight[:, 0] = 0
    options = {"n_groups": 3, "epilogue": EPILOGUES["leaky"]}
    expected = derivatives(ours, x, conv, backend="torch", **options)
    actual = derivatives(ours, x, conv, torch.float32, backend="native", **options)
    check(actual, expected, 12 * convolution_bound(45, 3), batch=True)


@needs_native
def test_native_differentiates_what_is_asked_for() -> None:
    """Images without a gradient, as the network's first layer has them, and a frozen weight."""
    x, conv = case()
    for asked in (["weight", "gamma"], ["x"], ["beta"]):
        found = []
        for dtype, backend in ((torch.float64, "torch"), (torch.float32, "native")):
            values, operands = leaves(x, conv, dtype)
            for name, value in values.items():
                value.requires_grad_(name in asked)
            y = ours(values["x"], operands, n_groups=3, epilogue=EPILOGUES["relu, pool"], backend=backend)
            cotangent = Random(5).normal(*y.shape).to(dtype).requires_grad_()
            wanted = [values[name] for name in asked]
            first = torch.autograd.grad(y, wanted, cotangent, create_graph=True)
            second = torch.autograd.grad(
                sum(g.square().sum() for g in first), [cotangent, *wanted], materialize_grads=True
            )
            found.append([*first, *second])
        for own, other in zip(found[1], found[0], strict=True):
            if bool((other != 0).any()):
                assert_near(own.detach(), other.detach(), 12 * convolution_bound(45, 3))


@needs_native
def test_why_a_layer_runs_where_it_does() -> None:
    x, conv = case()
    values, operands = leaves(x, conv, torch.float32)
    facts = {"x": values["x"], "conv": operands, "n_groups": 3}
    assert why("task_conv", **facts).startswith("native: ")
    assert "batch statistics only" in why("task_conv", **(facts | {"n_groups": 0}))
    assert "no residual" in why("task_conv", **facts, residual=values["x"])
    assert "float64" in why("task_conv", **(facts | {"x": x}))
    with pytest.raises(RuntimeError, match=r"cannot run this call: .* float64"):
        task_conv(x, conv, n_groups=3, backend="native")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"filters": FrozenFilters(torch.zeros(5, 3, 3, 3))},
            "expected [T, O, I/groups, k, k], got (5, 3, 3, 3)",
        ),
        ({"scale": torch.ones(5, 3, 1, 1)}, "takes no scale and shift"),
        (
            {"norm": ChannelNorm(None, None, torch.ones(5))},
            "conv.norm.weight: shape (5,) does not fit weight (3, 5,",
        ),
        ({"norm": ChannelNorm(torch.zeros(4), None)}, "conv.norm.mean: shape (4,)"),
    ],
)
def test_operands_that_do_not_fit_are_named(change: dict[str, Any], says: str) -> None:
    x, conv = case()
    with pytest.raises(ValueError, match=re.escape(says)):
        task_conv(x, replace(conv, **change), n_groups=3)


def test_images_that_do_not_fit_are_named() -> None:
    x, conv = case()
    for images, n_groups, says in (
        (x, 2, "n_groups: 2 with the weights of 3 tasks; give 0 (stored statistics) or 3"),
        (x[:8], 3, "8 images do not divide into 3 groups"),
        (x[:, :2], 3, "have 2 channels, weight (3, 5, 3, 3, 3) with groups=1 takes 3"),
        (x[0], 3, "x: expected floating images"),
    ):
        with pytest.raises(ValueError, match=re.escape(says)):
            task_conv(images, conv, n_groups=n_groups)
    with pytest.raises(ValueError, match="stored statistics are asked for"):
        task_conv(x, replace(conv, norm=ChannelNorm(None, None)), n_groups=0)
