"""The native `ss_block` against the float64 reference and against its convolutions called one by one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mtl_fast.kernels.contracts import ConvOperands, Epilogue
from mtl_fast.ops import ss_block, ss_conv
from mtl_fast.ops.backend import why
from tests.conv_cases import Random, assert_near, rebuilt, tensors, with_gradients
from tests.native_cases import (
    EPS,
    Kinks,
    amplification,
    assert_near_as_torch,
    double,
    n_threads,
    needs_native,
)

pytestmark = needs_native

COMMON = Epilogue("after_residual", 0.1, pool=True)
TENSORFLOW = Epilogue("before_residual", 0.1, pool=True)
by_form = pytest.mark.parametrize("form", ["common", "tensorflow"])
by_granularity = pytest.mark.parametrize("granularity", ["kernel", "filter"])
# An activation this far from its kink, relative to the largest, stays on its side: a layer of 63 terms.
MARGIN = EPS * amplification("images", 3) * (9 * 7 + 8) ** 0.5


def make(form: str, granularity: str, seed: int, n: int = 4) -> tuple[Tensor, list[ConvOperands]]:
    """Images [n, 5, 7, 6] and a block's operands, the shortcut first."""
    random = Random(seed, torch.float32)
    norm = "both" if form == "common" else "bias"
    convs = [random.conv(c, 7, granularity=granularity, norm=norm) for c in (5, 7, 7)]
    if form == "common":
        shortcut = random.conv(5, 7, 1, granularity=granularity)
    else:
        shortcut = random.conv(5, 7, 1, granularity=None, bias=False, norm=None)
    return random.images(n, 5, 7, 6), [shortcut, *convs]


def results(x: Tensor, layers: list[ConvOperands], form: str, trained: str, **options: Any) -> list[Tensor]:
    """The output, the statistics, and the gradients of x and of all or only the scale-and-shift tensors."""
    x = x.clone().requires_grad_()
    made, wanted = [], [x]
    for conv in layers:
        values = {
            name: t.clone().requires_grad_(trained == "all" or name in ("scale", "shift"))
            for name, t in tensors(conv).items()
        }
        made.append(rebuilt(conv, values))
        wanted += [t for t in values.values() if t.requires_grad]
    epilogue = COMMON if form == "common" else TENSORFLOW
    out = ss_block(x, made[1:], made[0], epilogue=epilogue, **options)
    cotangent = Random(99, x.dtype).normal(*out.output.shape)
    gradients = torch.autograd.grad(out.output, wanted, cotangent)
    return [out.output.detach(), *(s for layer in out.statistics for s in layer[:2]), *gradients]


@by_form
@by_granularity
@pytest.mark.parametrize("trained", ["phi", "all"])
@pytest.mark.parametrize("n_groups", [0, 2], ids=["stored", "batch"])
def test_values_statistics_and_gradients(form: str, granularity: str, trained: str, n_groups: int) -> None:
    for seed in range(100):
        x, layers = make(form, granularity, seed)
        wide = [double(conv) for conv in layers]
        with Kinks() as kinks:
            exact = results(x.double(), wide, form, trained, n_groups=n_groups)
        if kinks.nearest > MARGIN:
            break
    else:
        raise AssertionError("no operands whose activations are all decided")
    native, plain = (
        results(x, layers, form, trained, n_groups=n_groups, backend=backend)
        for backend in ("native", "torch")
    )
    names = [f"result {i}" for i in range(len(exact))]
    assert_near_as_torch(native, plain, exact, x[:, 0].numel(), names)


@by_form
@pytest.mark.parametrize("n_groups", [0, 2], ids=["stored", "batch"])
def test_a_masked_image_reaches_nothing(form: str, n_groups: int) -> None:
    x, layers = make(form, "kernel", 0)
    if n_groups == 0:
        with pytest.raises(ValueError, match="mask"):
            results(x, layers, form, "phi", mask=torch.ones(4) > 0, backend="native")
        return
    mask = torch.tensor([True, True, False, True])
    clean = results(x, layers, form, "all", n_groups=2, mask=mask, backend="native")
    x[2] = float("nan")
    for ours, expected in zip(
        results(x, layers, form, "all", n_groups=2, mask=mask, backend="native"), clean, strict=True
    ):
        assert torch.equal(ours, expected)


@by_form
def test_a_block_is_its_convolutions_one_by_one_to_the_bit(form: str) -> None:
    x, layers = make(form, "kernel", 1)
    epilogue = COMMON if form == "common" else TENSORFLOW
    inner = replace(epilogue, pool=False)

    def one_by_one(x: Tensor, shortcut: ConvOperands, *convs: ConvOperands) -> Tensor:
        residual = ss_conv(x, shortcut, backend="native")
        for conv in convs[:-1]:
            x = ss_conv(x, conv, epilogue=inner, backend="native")
        return ss_conv(x, convs[-1], epilogue=epilogue, residual=residual, backend="native")

    x.requires_grad_()
    layers = [with_gradients(conv) for conv in layers]
    inputs = [x, *(t for conv in layers for t in tensors(conv).values())]
    block = ss_block(x, layers[1:], layers[0], epilogue=epilogue, backend="native").output
    separate = one_by_one(x, *layers)
    assert torch.equal(block, separate)
    cotangent = Random(2, torch.float32).normal(*block.shape)
    for ours, expected in zip(
        torch.autograd.grad(block, inputs, cotangent),
        torch.autograd.grad(separate, inputs, cotangent),
        strict=True,
    ):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("n_convs", [1, 2])
def test_an_identity_shortcut_and_another_number_of_convolutions(n_convs: int) -> None:
    random = Random(3, torch.float32)
    x, convs = random.images(2, 4, 5, 5), [random.conv(4, 4) for _ in range(n_convs)]
    outputs = [
        ss_block(x, convs, None, epilogue=COMMON, backend=backend).output for backend in ("native", "torch")
    ]
    exact = ss_block(x.double(), [double(conv) for conv in convs], None, epilogue=COMMON).output
    assert_near_as_torch(outputs[:1], outputs[1:], [exact], 9 * 4, ["output"])


@by_form
@pytest.mark.parametrize("n_groups", [0, 2], ids=["stored", "batch"])
def test_threads_do_not_change_a_bit(form: str, n_groups: int) -> None:
    x, layers = make(form, "kernel", 4)
    expected = results(x, layers, form, "all", n_groups=n_groups, backend="native")
    for n in (2, 5):
        with n_threads(n):
            ours = results(x, layers, form, "all", n_groups=n_groups, backend="native")
        for a, b in zip(ours, expected, strict=True):
            assert torch.equal(a, b)


@by_form
@pytest.mark.parametrize("n_groups", [0, 2], ids=["stored", "batch"])
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
# Inductor itself still scripts.
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_a_compiled_block_is_the_eager_one(form: str, n_groups: int, compiler: str) -> None:
    torch.compiler.reset()
    x, (shortcut, *convs) = make(form, "kernel", 5)
    x.requires_grad_()
    scale = convs[0].scale.clone().requires_grad_()
    epilogue = COMMON if form == "common" else TENSORFLOW

    def call(x: Tensor, scale: Tensor) -> Tensor:
        given = [replace(convs[0], scale=scale), *convs[1:]]
        return ss_block(x, given, shortcut, epilogue=epilogue, n_groups=n_groups, backend="native").output

    outputs = []
    for function in (call, torch.compile(call, fullgraph=True, backend=compiler)):
        y = function(x, scale)
        cotangent = Random(6, torch.float32).normal(*y.shape)
        outputs.append([y, *torch.autograd.grad(y, (x, scale), cotangent)])
    for ours, expected in zip(*reversed(outputs), strict=True):
        assert_near(ours, expected, 0 if compiler == "aot_eager" else 3 * MARGIN)


def test_refusals_name_what_the_kernel_has_not() -> None:
    x, (shortcut, *convs) = make("common", "kernel", 7)
    facts = {"x": x, "convs": convs, "shortcut": shortcut, "epilogue": COMMON}
    assert why("ss_block", **facts).startswith("native: ")
    strided = replace(convs[1], filters=replace(convs[1].filters, stride=2))
    for changed, words in (
        ({"convs": [convs[0], strided, convs[2]]}, "stride 2"),
        ({"fold": False}, "fold=False"),
        ({"epilogue": replace(COMMON, slope=-0.1)}, "slope -0.1"),
        ({"x": x.double()}, "float64"),
    ):
        text = why("ss_block", **{**facts, **changed})
        assert text.startswith("torch: not native: ")
        assert words in text
    with pytest.raises(RuntimeError, match="ss_block: backend='native' cannot run this call: fold=False"):
        ss_block(x, convs, shortcut, epilogue=COMMON, fold=False, backend="native")
