"""`convert` against the network it was given, in any geometry; what it shares and refuses; `fold`, the way back."""

from __future__ import annotations

import copy
import io
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtl_fast.nn import ResNet12, ScaleShiftConv2d, convert, fold, scale_shift_parameters
from mtl_fast.ops.backend import ENVIRONMENT_VARIABLE
from tests.conv_cases import assert_near
from tests.native_cases import amplification
from tests.nn.user_network import UserNetwork, user_images, user_network

EPS = torch.finfo(torch.float64).eps
# Six layers of at most 72 terms.
NEAR = 6 * 72**0.5 * EPS
GEOMETRIES: dict[str, dict[str, Any]] = {
    "plain": {"kernel_size": 3},
    "no-bias": {"kernel_size": 3, "padding": 1, "bias": False},
    "one-by-one": {"kernel_size": 1},
    "strided": {"kernel_size": 3, "stride": (2, 1), "padding": (0, 2)},
    "oblong": {"kernel_size": (2, 5), "padding": (1, 0), "dilation": (1, 2)},
    "depthwise": {"kernel_size": 3, "groups": 4, "padding": 1},
    "valid": {"kernel_size": 3, "padding": "valid", "dilation": 2},
    "same": {"kernel_size": 3, "padding": "same", "dilation": (1, 3), "groups": 2},
    "same-even": {"kernel_size": (4, 2), "padding": "same"},
    "reflect": {"kernel_size": 3, "padding": (2, 1), "padding_mode": "reflect", "stride": 2},
    "replicate": {"kernel_size": 3, "padding": 2, "padding_mode": "replicate", "bias": False},
    "circular": {"kernel_size": (3, 4), "padding": "same", "padding_mode": "circular"},
}
by_geometry = pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES.keys())
by_granularity = pytest.mark.parametrize("granularity", ["kernel", "filter"])
# torch says how it pads an even `same`, which is the case here.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


def images(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, 4, 9, 11, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def plain(geometry: dict[str, Any], dtype: torch.dtype = torch.float64) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(4, 8, dtype=dtype, **geometry)


def moved(model: nn.Module) -> nn.Module:
    """Φ as after training: some scales negative, all shifts different."""
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in scale_shift_parameters(model):
            parameter.add_(torch.randn(parameter.shape, generator=g, dtype=torch.float64).to(parameter))
    return model


@by_granularity
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@by_geometry
def test_it_starts_equal_to_the_bit_on_the_torch_backend(
    geometry: dict[str, Any], dtype: torch.dtype, granularity: Any
) -> None:
    conv, x = plain(geometry, dtype), images(dtype)
    made = convert(conv, granularity, backend="torch")
    assert isinstance(made, ScaleShiftConv2d)
    assert torch.equal(made(x), conv(x))
    channels_last = torch.channels_last
    twin = conv.to(memory_format=channels_last)
    made = convert(twin, granularity, backend="torch")
    assert made.weight.stride() == twin.weight.stride()
    assert torch.equal(made(x.to(memory_format=channels_last)), twin(x.to(memory_format=channels_last)))


@by_granularity
@by_geometry
def test_values_and_gradients_are_those_of_a_convolution_with_its_weight_scaled(
    geometry: dict[str, Any], granularity: Any
) -> None:
    conv, x = plain(geometry), images().requires_grad_()
    made = moved(convert(conv, granularity))
    scale, shift = (p.detach().clone().requires_grad_() for p in (made.scale, made.shift))
    bias = shift if conv.bias is None else conv.bias + shift
    expected = torch.func.functional_call(
        plain({**geometry, "bias": True}), {"weight": conv.weight * scale, "bias": bias}, (x,)
    )
    y = made(x)
    assert_near(y, expected, NEAR)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=y.dtype)
    ours = torch.autograd.grad(y, [x, made.scale, made.shift], cotangent)
    theirs = torch.autograd.grad(expected, [x, scale, shift], cotangent)
    for a, b, n_terms in zip(ours, theirs, (72, 1584, 198), strict=True):
        assert_near(a, b, n_terms**0.5 * 8 * EPS)


@by_granularity
@by_geometry
def test_folded_it_is_a_plain_convolution_with_the_same_outputs_to_the_bit(
    geometry: dict[str, Any], granularity: Any
) -> None:
    made = moved(convert(plain(geometry), granularity, backend="torch"))
    folded = fold(made)
    assert type(folded) is nn.Conv2d
    assert str(folded) == str(plain({**geometry, "bias": True}))
    assert torch.equal(folded(images()), made(images()))
    assert not any(p.requires_grad for p in folded.parameters())
    made.scale = made.shift = None
    assert str(fold(made)) == str(plain(geometry))
    assert torch.equal(fold(made)(images()), plain(geometry)(images()))


def test_a_network_starts_equal_to_the_bit_and_stays_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "torch")
    network = user_network()
    before, state = copy.deepcopy(network.state_dict()), torch.get_rng_state()
    converted = convert(network)
    assert torch.equal(torch.get_rng_state(), state)
    assert network.training
    assert all(p.requires_grad for p in network.parameters())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not any(m.training for m in converted.modules())
    assert torch.equal(converted(user_images()), network.eval()(user_images()))


def test_it_starts_equal_to_rounding_on_the_native_backend() -> None:
    network = user_network(torch.float32).eval()
    x = user_images(dtype=torch.float32)
    near = 6 * 72**0.5 * amplification("images", 3) * torch.finfo(torch.float32).eps
    assert_near(convert(network)(x), network(x), near)


def test_only_scale_and_shift_learn() -> None:
    converted = convert(user_network())
    learns = {name for name, p in converted.named_parameters() if p.requires_grad}
    convs = ("stem", "grouped", "twice.0", "tied", "last")
    assert learns == {f"{name}.{part}" for name in convs for part in ("scale", "shift")}
    assert [id(p) for p in scale_shift_parameters(converted)] == [
        id(p) for p in converted.parameters() if p.requires_grad
    ]
    converted(user_images()).square().sum().backward()
    for name, parameter in converted.named_parameters():
        assert (parameter.grad is not None) == (name in learns), name
    assert type(converted.up) is nn.ConvTranspose2d


def test_what_the_network_shares_its_copy_shares() -> None:
    network = user_network()
    converted = convert(network)
    assert converted.alias is converted.twice[0]
    assert converted.listed == [converted.tied]
    assert isinstance(converted.tied, ScaleShiftConv2d)
    assert converted.tied.weight is converted.alias.weight
    assert converted.tied.scale is not converted.alias.scale
    assert converted.alias.weight is not network.alias.weight
    folded = fold(moved(converted))
    assert folded.alias is folded.twice[0]
    assert folded.listed == [folded.tied]


def test_what_was_saved_before_loads_and_what_is_saved_now_comes_back() -> None:
    network = user_network()
    converted = convert(network)
    extra = set(converted.state_dict()) - set(network.state_dict())
    names = {name.removesuffix(".weight") for name, p in network.state_dict().items() if p.ndim == 4} - {"up"}
    assert extra == {f"{name}.{part}" for name in names for part in ("scale", "shift")}
    other = convert(UserNetwork().double())
    missing, unexpected = other.load_state_dict(network.state_dict(), strict=False)
    assert set(missing) == extra
    assert not unexpected
    x = user_images()
    assert torch.equal(other(x), converted(x))
    moved(converted)
    assert not torch.equal(other(x), converted(x))
    other.load_state_dict(converted.state_dict())
    assert torch.equal(other(x), converted(x))


def by_copy(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def by_saving(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("way", [by_copy, by_saving], ids=lambda way: way.__name__)
def test_copies_are_their_own(way: Any) -> None:
    converted, x = moved(convert(user_network())), user_images()
    before = converted(x)
    made = way(converted)
    assert torch.equal(made(x), before)
    moved(made)
    assert not torch.equal(made(x), before)
    assert torch.equal(converted(x), before)


def test_another_dtype_and_device() -> None:
    converted = moved(convert(user_network()))
    expected = converted(user_images())
    single = converted.to(torch.float32)
    assert {p.dtype for p in single.parameters()} == {torch.float32}
    near = 6 * 72**0.5 * amplification("images", 3) * torch.finfo(torch.float32).eps
    assert_near(single(user_images(dtype=torch.float32)), expected, near)
    on_meta = single.to("meta")
    assert on_meta(user_images(dtype=torch.float32).to("meta")).shape == (2, 10)


def test_training_mode_is_the_network_s_own() -> None:
    network = user_network()
    converted = convert(network).train()
    outputs = []
    for model in (network, converted):
        torch.manual_seed(4)
        outputs.append(model(user_images()))
    assert torch.equal(*outputs)
    assert torch.equal(converted.norm.running_mean, network.norm.running_mean)
    assert not torch.equal(outputs[0], converted.eval()(user_images()))
    assert fold(converted.train()).last.training


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_it_compiles_as_one_graph(backend: str) -> None:
    converted = moved(convert(user_network(torch.float32), backend=backend))
    compiled = torch.compile(converted, backend="aot_eager", fullgraph=True)
    x = user_images(dtype=torch.float32)
    near = 6 * 72**0.5 * amplification("images", 3) * torch.finfo(torch.float32).eps
    expected, found = converted(x), compiled(x)
    assert_near(found, expected, near)
    parameters = list(scale_shift_parameters(converted))
    for a, b in zip(*(torch.autograd.grad(y.sum(), parameters) for y in (found, expected)), strict=True):
        # A shift before a norm's cancelling ends in few digits: against the largest of all.
        assert_near(a, b, 64 * near)


def test_function_transforms_pass_through_the_torch_backend() -> None:
    converted, x = (
        moved(convert(user_network(torch.float32), backend="torch")),
        user_images(dtype=torch.float32),
    )
    state = dict(converted.named_parameters()) | dict(converted.named_buffers())

    def loss(shift: Tensor) -> Tensor:
        return torch.func.functional_call(converted, {**state, "last.shift": shift}, (x,)).square().sum()

    hessian = torch.func.jacrev(torch.func.grad(loss))(converted.last.shift.detach())
    # The last shift is added to each feature of both images: 2·2 on the diagonal.
    assert_near(hessian, 4 * torch.eye(10), 1e-5)


class Centred(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(input, self.weight - self.weight.mean(), self.bias)


class Drawn(nn.Conv2d):
    """Draws its weight in its own way, and computes as nn.Conv2d does."""

    def reset_parameters(self) -> None:
        nn.init.dirac_(self.weight)
        nn.init.ones_(self.bias)


def with_own_forward() -> nn.Module:
    return Centred(3, 4, 3)


def with_a_forward_put_in() -> nn.Module:
    conv = nn.Conv2d(3, 4, 3)
    conv.forward = lambda x: x  # type: ignore[method-assign]
    return conv


def with_a_parametrisation() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3))


def with_a_hook() -> nn.Module:
    conv = nn.Conv2d(3, 4, 3)
    conv.register_forward_hook(lambda *_: None)
    return conv


def with_pruning() -> nn.Module:
    from torch.nn.utils import prune

    return prune.l1_unstructured(nn.Conv2d(3, 4, 3), "weight", 0.5)


def without_a_weight_yet() -> nn.Module:
    return nn.LazyConv2d(4, 3)


def converted_already() -> nn.Module:
    return convert(nn.Conv2d(3, 4, 3))


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (with_own_forward, "is a Centred whose forward is its own"),
        (with_a_forward_put_in, "is a Conv2d whose forward is its own"),
        (with_a_parametrisation, "has hooks or a parametrised weight"),
        (with_a_hook, "has hooks or a parametrised weight"),
        (with_pruning, "has hooks or a parametrised weight"),
        (without_a_weight_yet, "has not seen an input yet; run the model once"),
        (converted_already, "is a ScaleShiftConv2d already"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_cannot_be_converted_is_named(made: Any, message: str) -> None:
    layer = made()
    with pytest.raises(ValueError, match=f"model: body.1 {message}"):
        convert(nn.ModuleDict({"body": nn.Sequential(nn.ReLU(), layer)}))
    with pytest.raises(ValueError, match=f"model: it {message}"):
        convert(layer)


def test_a_subclass_that_computes_as_conv2d_is_converted() -> None:
    conv = Drawn(3, 4, 3, dtype=torch.float64)
    assert torch.equal(convert(conv)(user_images()), conv(user_images()))


def test_a_network_without_convolutions_and_an_unknown_granularity_are_errors() -> None:
    with pytest.raises(ValueError, match=r"model: Linear has no nn\.Conv2d to convert"):
        convert(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="granularity: 'channel' is neither kernel nor filter"):
        convert(nn.Conv2d(3, 4, 3), "channel")  # type: ignore[arg-type]


def test_encoders_of_this_package_are_refused() -> None:
    encoder = ResNet12((2, 2, 2, 2))
    with pytest.raises(ValueError, match=r"layers\.0\.shortcut is a ScaleShiftConv2d already"):
        convert(encoder)
    with pytest.raises(ValueError, match=r"layers\.0\.shortcut has a norm of its own"):
        fold(encoder)


@pytest.mark.parametrize(
    ("geometry", "message"),
    [
        ({"padding": "full"}, "padding: 'full' is neither same nor valid"),
        ({"padding": "same", "stride": 2}, r"padding: 'same' needs stride 1, got \(2, 2\)"),
        ({"padding_mode": "mirror"}, "padding_mode: 'mirror' is not one of zeros, reflect"),
    ],
    ids=["full", "same-strided", "mirror"],
)
def test_paddings_that_do_not_exist_are_errors(geometry: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScaleShiftConv2d(2, 2, 3, **geometry)


def test_every_padding_in_every_mode_starts_equal_to_the_bit() -> None:
    paddings: tuple[Any, ...] = (0, 1, (1, 2), "same", "valid")
    modes: tuple[Any, ...] = ("zeros", "reflect", "replicate", "circular")
    for padding, mode, side in itertools.product(paddings, modes, (1, 2, 3)):
        conv = nn.Conv2d(4, 2, side, padding=padding, padding_mode=mode, dtype=torch.float64)
        assert torch.equal(convert(conv)(images()), conv(images())), (padding, mode, side)
