"""The route `cudnn` inside the Triton operators, in the interpreter: forward and gradients against float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from mtl_fast.kernels.contracts import Epilogue
from mtl_fast.kernels.triton.launch import Launch, observed
from mtl_fast.ops import routes, ss_conv
from mtl_fast.tune import training_step
from tests.conv_cases import Random
from tests.gpu.block_cases import decided, make, results
from tests.gpu.conv_backward_cases import called
from tests.gpu.interpreted.test_ss_conv_operators import DTYPES, SIZES, by_granularity, case, residual_of
from tests.native_cases import assert_native_agrees, assert_near_as_torch

ACTIVATIONS = ("none", "before_residual", "after_residual")
# What cuDNN's part of a block is: all of it, conv1 with the shortcut's route the other way, conv2 and conv3, and the
# shortcut alone.
RULES = {
    "all": lambda shape: True,
    "first": lambda shape: shape.n_in == 3 and shape.taps == 3,
    "later": lambda shape: shape.n_in == 7,
    "shortcut": lambda shape: shape.taps == 1,
}


@pytest.fixture
def cudnn() -> Iterator[None]:
    with routes.forced("cudnn"):
        yield


@pytest.mark.usefixtures("cudnn")
@DTYPES
@by_granularity
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
def test_values_and_gradients(dtype: torch.dtype, granularity: str, size: tuple[int, ...]) -> None:
    x, conv = case(size, granularity, dtype)
    epilogue = Epilogue("after_residual", 0.1, pool=min(x.shape[2:]) > 1)
    assert_native_agrees(x, conv, epilogue, residual_of(x, conv), backend="triton")


@pytest.mark.usefixtures("cudnn")
@by_granularity
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("pool", [False, True], ids=["whole", "pooled"])
@pytest.mark.parametrize("added", [False, True], ids=["alone", "residual"])
def test_every_epilogue(granularity: str, activation: Any, pool: bool, added: bool) -> None:
    x, conv = case((2, 5, 17, 5, 4, 3), granularity, seed=2)
    residual = residual_of(x, conv) if added else None
    assert_native_agrees(x, conv, Epilogue(activation, 0.1, pool), residual, backend="triton")


@pytest.mark.usefixtures("cudnn")
@pytest.mark.parametrize("padding", [0, 2])
def test_paddings(padding: int) -> None:
    random = Random(1, torch.float32)
    x, conv = random.images(2, 5, 4, 5), random.conv(5, 7, 3, padding=padding)
    assert_native_agrees(x, conv, Epilogue("after_residual", 0.1, True), backend="triton")


@DTYPES
@by_granularity
@pytest.mark.parametrize("form", ["common", "tensorflow"])
@pytest.mark.parametrize("rule", RULES)
def test_blocks(
    dtype: torch.dtype, granularity: str, form: str, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, layers, exact = decided(form, granularity, dtype)
    plain = results(x, layers, form, "torch")
    monkeypatch.setattr(routes, "route", lambda shape, device: "cudnn" if RULES[rule](shape) else "triton")
    ours = results(x, layers, form, "triton")
    names = [f"result {i}" for i in range(len(exact))]
    assert_near_as_torch(ours, plain, exact, 9 * 7 * x[:, 0].numel(), names, dtype=dtype, amplified=False)


@pytest.mark.usefixtures("cudnn")
@by_granularity
def test_an_empty_batch_gives_empty_images_and_zero_gradients(granularity: str) -> None:
    x, conv = case((2, 3, 4, 4, 5, 3), granularity)
    scale = conv.scale.clone().requires_grad_()
    y = ss_conv(x[:0], replace(conv, scale=scale), epilogue=Epilogue(pool=True), backend="triton")
    assert y.shape == (0, 4, 2, 2)
    (gradient,) = torch.autograd.grad(y.sum(), scale)
    assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.usefixtures("cudnn")
def test_opcheck() -> None:
    x, layers = make("tensorflow", "kernel", torch.float32, 0)
    with called("triton_ss_block", "triton_ss_block_backward") as calls:
        results(x, layers, "tensorflow", "triton")
    for operator, arguments in calls:
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("route", routes.ROUTES)
def test_tuning_takes_the_route_that_it_measures(route: routes.Route) -> None:
    step = training_step(routes.LayerShape(5, 7, 4, 4, 3, "float32"), 2, torch.device("cpu"))
    names: list[str] = []

    def note(launch: Launch) -> None:
        names.append(launch.name)

    with routes.forced(route), observed(note):
        step()
    products = {"ss_conv_kernel", "scale_gradient_kernel"}
    assert products.isdisjoint(names) == (route == "cudnn"), names
    assert ("epilogue_kernel" in names) == (route == "cudnn"), names


def test_the_way_back_takes_the_route_of_the_way_there() -> None:
    x, conv = case((2, 5, 7, 4, 4, 3), seed=4)
    x.requires_grad_()
    with routes.forced("cudnn"):
        y = ss_conv(x, conv, backend="triton")
    names: list[str] = []

    def note(launch: Launch) -> None:
        names.append(launch.name)

    with observed(note):
        y.sum().backward()
    assert "ss_conv_kernel" not in names
