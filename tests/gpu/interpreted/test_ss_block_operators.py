"""`ss_block` on the Triton kernels, in the interpreter: forward and every gradient against the float64 reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mtl_fast.kernels.contracts import ConvOperands
from mtl_fast.kernels.triton.launch import Launch, observed
from mtl_fast.ops import ss_block, ss_conv
from tests.conv_cases import Random, assert_near, rebuilt, tensors
from tests.gpu.block_cases import FORMS, decided, make, results
from tests.gpu.conv_backward_cases import called
from tests.native_cases import assert_near_as_torch, double

by_form = pytest.mark.parametrize("form", FORMS)
by_granularity = pytest.mark.parametrize("granularity", ["kernel", "filter"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])


@DTYPES
@by_form
@by_granularity
def test_values_and_gradients(dtype: torch.dtype, form: str, granularity: str) -> None:
    x, layers, exact = decided(form, granularity, dtype)
    triton = results(x, layers, form, "triton")
    # PyTorch's own error, of images and weights of the same dtype.
    plain = results(x, layers, form, "torch")
    names = [f"result {i}" for i in range(len(exact))]
    assert_near_as_torch(triton, plain, exact, 9 * 7 * x[:, 0].numel(), names, dtype=dtype, amplified=False)


@by_form
@by_granularity
def test_a_block_is_its_convolutions_one_by_one(form: str, granularity: str) -> None:
    """The block's end sums the shortcut's product unrounded, so to rounding."""
    x, layers, _ = decided(form, granularity, torch.float32)

    def one_by_one(x: Tensor, convs: list[ConvOperands], shortcut: ConvOperands) -> Tensor:
        residual = ss_conv(x, shortcut, backend="triton")
        for conv in convs[:-1]:
            x = ss_conv(x, conv, epilogue=replace(FORMS[form], pool=False), backend="triton")
        return ss_conv(x, convs[-1], epilogue=FORMS[form], residual=residual, backend="triton")

    block = results(x, layers, form, "triton")[0]
    separate = one_by_one(x, layers[1:], layers[0])
    assert_near(block, separate, torch.finfo(torch.float32).eps * (9 * 7) ** 0.5)


@by_form
def test_a_block_of_another_form_runs_layer_by_layer(form: str) -> None:
    random = Random(3, torch.float32)
    x, convs = random.images(2, 4, 5, 4), [random.conv(4, 4) for _ in range(2)]
    ours, plain = (
        ss_block(x, convs, None, epilogue=FORMS[form], backend=backend).output
        for backend in ("triton", "torch")
    )
    exact = ss_block(x.double(), [double(conv) for conv in convs], None, epilogue=FORMS[form]).output
    assert_near_as_torch([ours], [plain], [exact], 9 * 4, ["output"], dtype=torch.float32, amplified=False)


@by_form
def test_batch_statistics_follow_the_convolutions(form: str) -> None:
    x, layers = make(form, "kernel", torch.float32, 1)
    exact = results(x.double(), [double(conv) for conv in layers], form, "torch", n_groups=2)
    ours, plain = (results(x, layers, form, backend, n_groups=2) for backend in ("triton", "torch"))
    assert_near_as_torch(
        ours[:1], plain[:1], exact[:1], 9 * 7, ["output"], dtype=torch.float32, amplified=False
    )


@by_form
def test_second_derivatives_go_through_pytorch(form: str) -> None:
    found = []
    x, layers, _ = decided(form, "kernel", torch.float32)
    for backend in ("triton", "torch"):
        scale = layers[1].scale.clone().requires_grad_()
        convs = [replace(layers[1], scale=scale), *layers[2:]]
        y = ss_block(x, convs, layers[0], epilogue=FORMS[form], backend=backend).output
        (first,) = torch.autograd.grad(y, scale, y, create_graph=True)
        found.append([first.detach(), *torch.autograd.grad(first.square().sum(), scale)])
    for ours, expected in zip(*found, strict=True):
        # Three layers of 63 terms, over 60 pixels, twice.
        assert_near(ours, expected, 3 * (63 * 60) ** 0.5 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize(("form", "granularity"), [("common", "kernel"), ("tensorflow", "filter")])
def test_opcheck(form: str, granularity: str) -> None:
    x, layers = make(form, granularity, torch.float32, 0)
    with called("triton_ss_block", "triton_ss_block_backward") as calls:
        results(x, layers, form, "triton")
    for operator, arguments in calls:
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
    torch.library.opcheck(*calls[0], test_utils="test_autograd_registration")


def test_a_block_takes_few_launches() -> None:
    """Forward: refresh and three convolutions, the shortcut in the last; no weight gradient, no sum of its own."""
    x, layers = make("common", "kernel", torch.float32, 0)
    names: list[str] = []

    def note(launch: Launch) -> None:
        names.append(launch.name)

    made = [
        rebuilt(conv, {n: t.requires_grad_(n in ("scale", "shift")) for n, t in tensors(conv).items()})
        for conv in layers
    ]
    x.requires_grad_()
    with observed(note):
        out = ss_block(x, made[1:], made[0], epilogue=FORMS["common"], backend="triton").output
        n_forward = len(names)
        out.sum().backward()
    assert n_forward == 4, names[:n_forward]
    # Three unwound layers and the shortcut's sums; four products, each with all totals of its layer; three gradients of
    # inputs, the shortcut's in the last.
    assert len(names) - n_forward == 4 + 2 * 4 + 3, names[n_forward:]


def test_a_compiled_block_is_the_eager_one() -> None:
    torch.compiler.reset()
    x, (shortcut, *convs) = make("common", "filter", torch.float32, 0)
    x.requires_grad_()
    scale = convs[0].scale.clone().requires_grad_()

    def call(x: Tensor, scale: Tensor) -> Tensor:
        given = [replace(convs[0], scale=scale), *convs[1:]]
        return ss_block(x, given, shortcut, epilogue=FORMS["common"], backend="triton").output

    results = []
    for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        y = function(x, scale)
        results.append([y, *torch.autograd.grad(y.square().sum(), (x, scale))])
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours, expected)
