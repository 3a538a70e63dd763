"""The native `ss_conv` as a PyTorch operator: opcheck, compilation, second derivatives, refusals, kept filters."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn

from mtl_fast.kernels.contracts import ConvOperands, Epilogue, FrozenFilters
from mtl_fast.nn import ChannelNorm2d, ScaleShiftConv2d
from mtl_fast.ops import ss_conv
from mtl_fast.ops.backend import ENVIRONMENT_VARIABLE, why
from mtl_fast.ops.ss_conv import reads_effective_weights
from tests.conv_cases import Random, assert_near, rebuilt, tensors, with_gradients
from tests.native_cases import EPS, amplification, assert_native_agrees, leaves, needs_native

pytestmark = needs_native

LEAKY = Epilogue("after_residual", 0.1, pool=True)
ALL = ("x", "weight", "bias", "scale", "shift", "gamma", "beta")
FROZEN = ("x", "scale", "shift")
by_granularity = pytest.mark.parametrize("granularity", ["kernel", "filter", None], ids=str)
# Sums of 45 terms, in the Winograd domain, and 300 pixels of them in a gradient.
NEAR = EPS * amplification("images", 3) * (45 * 300) ** 0.5


def case(granularity: str | None = "kernel", **options: Any) -> tuple[Tensor, ConvOperands]:
    random = Random(0, torch.float32)
    return random.images(3, 5, 8, 7), random.conv(5, 7, granularity=granularity, **options)


@pytest.mark.parametrize("shape", [(5, 3, 3, 3), (33, 40, 1, 1)], ids=["3x3", "1x1"])
def test_opcheck_of_packing(shape: tuple[int, ...]) -> None:
    weight = Random(1, torch.float32).normal(*shape).requires_grad_()
    torch.library.opcheck(torch.ops.mtl_fast.pack_filters.default, (weight,))
    packed = torch.ops.mtl_fast.pack_filters(weight.detach())[0]
    torch.library.opcheck(torch.ops.mtl_fast.unpack_filters.default, (packed, shape[0]))
    assert torch.equal(torch.ops.mtl_fast.unpack_filters(packed, shape[0]), weight.detach())


@by_granularity
@pytest.mark.parametrize(
    ("activation", "pool", "trained"),
    [
        (0, False, FROZEN),
        (0, True, FROZEN),
        (1, True, FROZEN),
        (2, True, ALL),
        (2, False, ("shift",)),
        (1, True, ()),
    ],
    ids=["bare", "pool", "before_pool", "taps", "shift_only", "no_gradient"],
)
def test_opcheck(granularity: str | None, activation: int, pool: bool, trained: tuple[str, ...]) -> None:
    x, conv = case(granularity)
    taps, rotated = torch.ops.mtl_fast.pack_filters(conv.filters.weight)
    taps.requires_grad_("weight" in trained)
    named, given = leaves(x, conv, trained)
    residual = Random(2, torch.float32).images(3, 7, 8, 7).requires_grad_(bool(trained))
    ratio = None if "weight" in trained else Random(3, torch.float32).positive(7)
    shift = (
        given.shift if given.shift is not None else conv.filters.bias.clone().requires_grad_(bool(trained))
    )
    scale = None if "weight" in trained else given.scale
    needed = [x.requires_grad for x in (named["x"], taps, shift, residual)] + [
        scale is not None and scale.requires_grad
    ]
    torch.library.opcheck(
        torch.ops.mtl_fast.ss_conv.default,
        (named["x"], taps, rotated, scale, ratio, shift, residual, 1, activation, 0.1, pool, any(needed)),
    )


@pytest.mark.parametrize("needs_x", [False, True])
@pytest.mark.parametrize("wanted", range(4), ids=["nothing", "kernel", "filter", "weight"])
def test_opcheck_of_the_gradient(wanted: int, needs_x: bool) -> None:
    x, conv = case("filter" if wanted == 2 else "kernel")
    taps, rotated = torch.ops.mtl_fast.pack_filters(conv.filters.weight)
    residual = Random(4, torch.float32).images(3, 7, 8, 7)
    scale = None if wanted == 3 else conv.scale  # a weight that trains has its scale multiplied in
    y, codes = torch.ops.mtl_fast.ss_conv(
        x, taps, rotated, scale, None, conv.shift, residual, 1, 1, 0.1, True, True
    )
    arguments = (torch.randn_like(y), x, codes, taps, rotated, scale, None, conv.shift)
    kept = (y, residual) if wanted == 2 else (None, None)
    torch.library.opcheck(
        torch.ops.mtl_fast.ss_conv_backward.default,
        (*arguments, *kept, 1, 1, 0.1, True, needs_x, wanted, needs_x),
    )


@by_granularity
@pytest.mark.parametrize("trained", [FROZEN, ALL], ids=["frozen", "trained"])
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
# Inductor itself still scripts.
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_a_compiled_call_is_the_eager_one(
    granularity: str | None,
    trained: tuple[str, ...],
    compiler: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    torch.compiler.reset()
    # A folder of this session: what an older version's operators returned must not be taken for this one's.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "inductor"))
    x, conv = case(granularity)
    residual = Random(5, torch.float32).images(3, 7, 8, 7)

    def call(x: Tensor, residual: Tensor, *values: Tensor) -> Tensor:
        given = rebuilt(conv, dict(zip(tensors(conv), values, strict=True)))
        return ss_conv(x, given, epilogue=LEAKY, residual=residual, backend="native")

    results = []
    for function in (call, torch.compile(call, fullgraph=True, backend=compiler)):
        named, _ = leaves(x, conv, trained)
        y = function(named["x"], residual, *list(named.values())[1:])
        wanted = [t for t in named.values() if t.requires_grad]
        results.append([y, *torch.autograd.grad(y, wanted, Random(6, torch.float32).normal(*y.shape))])
    for ours, expected in zip(*results, strict=True):
        # What surrounds the operator may be contracted by a compiler.
        assert_near(ours, expected, 0 if compiler == "aot_eager" else NEAR)


@by_granularity
@pytest.mark.parametrize("pool", [False, True], ids=["whole", "pooled"])
@pytest.mark.parametrize("activation", ["none", "before_residual", "after_residual"])
def test_second_derivatives_are_the_references(granularity: str | None, pool: bool, activation: Any) -> None:
    x, conv = case(granularity)
    residual = Random(7, torch.float32).images(3, 7, 8, 7)
    epilogue = Epilogue(activation, 0.1, pool)
    results = []
    for backend in ("native", "torch"):
        given = with_gradients(conv)
        leaves = [x.clone().requires_grad_(), *tensors(given).values(), residual.clone().requires_grad_()]
        y = ss_conv(leaves[0], given, epilogue=epilogue, residual=leaves[-1], backend=backend)
        cotangent = Random(8, torch.float32).normal(*y.shape).requires_grad_()
        first = torch.autograd.grad(y, leaves, cotangent, create_graph=True)
        random = Random(9, torch.float32)
        total = sum((g * random.normal(*g.shape)).sum() for g in first)
        inputs = [*leaves, cotangent]
        second = torch.autograd.grad(total, inputs, allow_unused=True, materialize_grads=True)
        results.append([t.detach() for t in (*first, *second)])
    for ours, expected in zip(*results, strict=True):
        largest = max(float(expected.abs().max()), 1.0)
        assert (ours - expected).abs().max() <= NEAR * largest


@pytest.mark.parametrize("pool", [False, True], ids=["whole", "pooled"])
def test_a_second_derivative_of_the_residual_alone(pool: bool) -> None:
    x, conv = case()
    residual = Random(10, torch.float32).images(3, 7, 8, 7).requires_grad_()
    y = ss_conv(x, conv, epilogue=replace(LEAKY, pool=pool), residual=residual, backend="native")
    (first,) = torch.autograd.grad(y, residual, y.detach(), create_graph=True)
    (expected,) = torch.autograd.grad(y, residual, y.detach())
    assert torch.equal(first, expected)


# PyTorch's own forward mode scripts a decomposition on first use.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_transforms_and_forward_mode_fall_to_torch() -> None:
    x, conv = case()

    def total(scale: Tensor) -> Tensor:
        return ss_conv(x, replace(conv, scale=scale)).square().sum()

    reasons = []

    def reason(scale: Tensor) -> Tensor:
        reasons.append(why("ss_conv", x=x, conv=replace(conv, scale=scale)))
        return total(scale)

    gradient = torch.func.grad(reason)(conv.scale)
    scale = conv.scale.clone().requires_grad_()
    (expected,) = torch.autograd.grad(total(scale), scale)
    assert_near(gradient, expected, NEAR)
    scales = torch.stack([conv.scale, 2 * conv.scale])
    both = torch.func.vmap(reason)(scales)
    assert_near(both, torch.stack([total(s) for s in scales]), NEAR)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(conv.scale, torch.ones_like(conv.scale))
        tangent = forward_ad.unpack_dual(reason(dual)).tangent
    assert tangent is not None
    assert abs(float(tangent) - float(expected.sum())) <= NEAR * float(expected.abs().sum())
    for text in reasons:
        assert text.startswith("torch: not native: ")
        assert "transform" in text or "forward-mode" in text


def refused(x: Tensor, conv: ConvOperands, **options: Any) -> str:
    """Why `auto` leaves the native backend; asked for by name it raises with the same words."""
    epilogue = options.get("epilogue", Epilogue())
    text = why("ss_conv", **{"x": x, "conv": conv, "epilogue": epilogue, **options})
    assert text.startswith("torch: not native: ")
    reason = text.removeprefix("torch: not native: ").removesuffix("; plain PyTorch runs everywhere")
    with pytest.raises(RuntimeError) as error:
        ss_conv(x, conv, backend="native", **options)
    assert str(error.value) == f"ss_conv: backend='native' cannot run this call: {reason}"
    return reason


@pytest.mark.parametrize(
    ("n_taps", "geometry", "words"),
    [
        (3, {"stride": 2}, "stride 2"),
        (3, {"stride": (1, 2)}, "stride (1, 2)"),
        (3, {"dilation": 2}, "dilation 2"),
        (3, {"groups": 2}, "groups 2"),
        (3, {"padding": 3}, "padding 3"),
        (3, {"padding": (1, 0)}, "padding (1, 0)"),
        (1, {"padding": 1}, "padding 1"),
        (5, {}, "taps of 5×5"),
        (2, {}, "taps of 2×2"),
    ],
)
def test_a_geometry_without_kernel_is_refused_in_words(
    n_taps: int, geometry: dict[str, Any], words: str
) -> None:
    random = Random(11, torch.float32)
    x, conv = random.images(2, 6, 9, 9), random.conv(6, 4, n_taps, **geometry)
    assert refused(x, conv).startswith(words)


def test_other_calls_without_kernel_are_refused_in_words() -> None:
    x, conv = case()
    assert "fold=False" in refused(x, conv, fold=False)
    assert "slope -0.1" in refused(x, conv, epilogue=Epilogue("after_residual", -0.1))
    assert "float64" in refused(x.double(), rebuilt(conv, {n: t.double() for n, t in tensors(conv).items()}))
    assert "float64" in refused(x, replace(conv, shift=conv.shift.double()))
    assert "bfloat16" in refused(x.bfloat16(), conv)
    assert "native" in why("ss_conv", x=x, conv=replace(conv, norm=None), fold=False).split(":")[0]
    with torch.autocast("cpu"):
        assert "autocast" in refused(x, conv)


@pytest.mark.parametrize("size", [(2, 2), (1, 1), (2, 5)], ids=str)
@pytest.mark.parametrize("backend", ["native", "torch"])
def test_images_smaller_than_the_taps_are_an_error(size: tuple[int, int], backend: str) -> None:
    random = Random(12, torch.float32)
    conv = random.conv(3, 4, padding=0)
    with pytest.raises(ValueError, match=r"x: images .* are smaller than the taps"):
        ss_conv(random.images(2, 3, *size), conv, backend=backend)


def test_the_environment_turns_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    x, conv = case()
    assert why("ss_conv", x=x, conv=conv).startswith("native: ")
    assert not reads_effective_weights(conv)
    expected = ss_conv(x, conv, backend="torch")
    assert not torch.equal(ss_conv(x, conv), expected)
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "torch")
    assert torch.equal(ss_conv(x, conv), expected)
    assert reads_effective_weights(conv)


def counting(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The identities of the weights that are packed from now on."""
    seen: list[int] = []
    pack = torch.ops.mtl_fast.pack_filters
    monkeypatch.setattr(torch.ops.mtl_fast, "pack_filters", lambda w: (seen.append(w.data_ptr()), pack(w))[1])
    return seen


def test_frozen_filters_are_packed_once_and_trainable_ones_never_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, conv = case()
    packs = counting(monkeypatch)
    given = replace(conv, scale=conv.scale.clone().requires_grad_())
    for _ in range(3):
        ss_conv(x, given, backend="native").sum().backward()
    assert len(packs) == 1
    assert conv.filters.derived
    trainable = replace(conv, filters=FrozenFilters(conv.filters.weight.clone().requires_grad_(), padding=1))
    for _ in range(2):
        ss_conv(x, trainable, backend="native")
        with torch.no_grad():
            ss_conv(x, trainable, backend="native")
    assert len(packs) == 5
    assert not trainable.filters.derived


def test_filters_packed_in_inference_mode_serve_gradients_later() -> None:
    x, conv = case()
    with torch.inference_mode():
        expected = ss_conv(x, conv, backend="native")
    assert conv.filters.derived
    y = ss_conv(x, replace(conv, scale=conv.scale.clone().requires_grad_()), backend="native")
    assert torch.equal(y, expected)
    y.sum().backward()


def test_a_module_drops_what_was_derived_from_a_former_weight() -> None:
    """After training, loading, moving, replacing and resetting the outputs are those of the present weight."""
    torch.manual_seed(0)
    x = case()[0]
    module = ScaleShiftConv2d(5, 7, 3, padding=1, norm=ChannelNorm2d(7))
    module.enable_scale_shift()

    def check(what: str) -> None:
        assert_native_agrees(x, module.operands(), trained=FROZEN)
        assert torch.equal(module(x), ss_conv(x, replace(module.operands(), filters=fresh(module)))), what
        assert module.filters.derived, what

    def fresh(module: ScaleShiftConv2d) -> FrozenFilters:
        return replace(module.filters, derived={})

    check("at first")
    other = {name: t + 0.5 if "var" in name else t - 0.5 for name, t in module.state_dict().items()}
    module.load_state_dict(other)
    check("loaded")
    module.double().float()
    check("moved")
    module.weight.requires_grad_(True)
    optimizer = torch.optim.SGD([module.weight], 0.1)
    module(x).square().mean().backward()
    optimizer.step()
    module.freeze()
    check("trained")
    module.weight = nn.Parameter(-module.weight, requires_grad=False)
    check("replaced")
    module.reset_parameters()
    check("reset")
    twin = copy.deepcopy(module)
    with torch.no_grad():
        expected = module(x)
    twin.load_state_dict({name: t * 2 for name, t in twin.state_dict().items()})
    assert torch.equal(module(x), expected)


@by_granularity
@pytest.mark.parametrize("epilogue", [LEAKY, Epilogue("before_residual", 0.1)], ids=["pooled", "whole"])
def test_what_was_saved_may_come_back_in_another_order_of_memory(
    granularity: str | None, epilogue: Epilogue
) -> None:
    """As from `torch.autograd.graph.save_on_cpu`."""
    x, conv = case(granularity)

    def gradients() -> list[Tensor]:
        named, given = leaves(x, conv, FROZEN)
        y = ss_conv(named["x"], given, epilogue=epilogue)
        wanted = [t for t in named.values() if t.requires_grad]
        return list(torch.autograd.grad(y, wanted, torch.arange(y.numel()).view(y.shape).sin()))

    expected = gradients()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: t.clone(memory_format=torch.contiguous_format), lambda t: t
    ):
        found = gradients()
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_an_output_that_gets_no_gradient_gives_none() -> None:
    x, conv = case()
    named, given = leaves(x, conv, FROZEN)

    class Ends(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, y: Tensor) -> Tensor:
            return y.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> None:
            return None

    y = Ends.apply(ss_conv(named["x"], given, epilogue=LEAKY))
    (y.sum() + named["x"].sum()).backward()
    assert torch.equal(named["x"].grad, torch.ones_like(x))
    assert given.scale.grad is None
