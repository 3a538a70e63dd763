"""`ScaleShiftConv2d` against nn.Conv2d, `ChannelNorm2d` against nn.BatchNorm2d, and that no stale weight is used."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mtl_fast.nn import ChannelNorm2d, ScaleShiftConv2d
from mtl_fast.nn.scale_shift import interleave
from mtl_fast.ops import ss_conv
from mtl_fast.ops.backend import ENVIRONMENT_VARIABLE
from tests.conv_cases import assert_near
from tests.native_cases import amplification

EPS = torch.finfo(torch.float64).eps
# A sum of 36 terms in float32, on whichever backend.
NEAR = torch.finfo(torch.float32).eps * 36**0.5 * amplification("images", 3)
GEOMETRIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "padded": {"padding": 1},
    "all": {"padding": 2, "stride": 2, "dilation": 2, "groups": 2, "bias": False},
}
by_granularity = pytest.mark.parametrize("granularity", ["kernel", "filter"])


def make(norm: bool = True, **geometry: Any) -> ScaleShiftConv2d:
    torch.manual_seed(0)
    conv = ScaleShiftConv2d(4, 6, 3, norm=ChannelNorm2d(6) if norm else None, **geometry)
    if norm:
        conv.norm.update(torch.randn(2, 6), torch.rand(2, 6), torch.full((2,), 9.0))
    return conv


def images(n: int = 2) -> Tensor:
    return torch.randn(n, 4, 9, 7, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES.keys())
def test_it_is_conv2d_before_and_after_it_is_frozen_to_the_bit_on_the_torch_backend(
    geometry: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "torch")
    conv, plain = make(norm=False, **geometry), nn.Conv2d(4, 6, 3, **geometry)
    assert {n: p.shape for n, p in conv.named_parameters()} == {
        n: p.shape for n, p in plain.named_parameters()
    }
    plain.load_state_dict(conv.state_dict())
    assert torch.equal(conv(images()), plain(images()))
    for granularity in ("kernel", "filter"):
        conv.enable_scale_shift(granularity)
        assert torch.equal(conv(images()), plain(images()))


@by_granularity
def test_enabling_freezes_and_starts_at_the_identity(granularity: str) -> None:
    conv = make(groups=2)
    assert conv.scale is None
    assert conv.shift is None
    conv.enable_scale_shift(granularity)
    assert torch.equal(conv.scale, torch.ones(6, 2 if granularity == "kernel" else 1, 1, 1))
    assert torch.equal(conv.shift, torch.zeros(6))
    trainable = [name for name, p in conv.named_parameters() if p.requires_grad]
    assert sorted(trainable) == ["scale", "shift"]
    conv(images()).square().sum().backward()
    assert conv.scale.grad.shape == conv.scale.shape
    assert conv.shift.grad.abs().min() > 0
    assert conv.weight.grad is None
    conv.freeze()
    assert not any(p.requires_grad for p in conv.parameters())


def test_a_shift_also_without_a_bias() -> None:
    conv = make(norm=False, bias=False)
    conv.enable_scale_shift()
    before = conv(images())
    with torch.no_grad():
        conv.shift.copy_(torch.arange(6.0))
    assert_near(conv(images()), before + torch.arange(6.0).view(-1, 1, 1), 4 * torch.finfo(torch.float32).eps)


def test_an_unknown_granularity_is_an_error() -> None:
    with pytest.raises(ValueError, match="granularity: 'channel' is neither kernel nor filter"):
        make().enable_scale_shift("channel")


def doubled(conv: ScaleShiftConv2d) -> dict[str, Tensor]:
    return {name: 2 * tensor for name, tensor in conv.state_dict().items()}


def by_load(conv: ScaleShiftConv2d) -> ScaleShiftConv2d:
    conv.load_state_dict(doubled(conv))
    return conv


def by_assigning_load(conv: ScaleShiftConv2d) -> ScaleShiftConv2d:
    conv.load_state_dict(doubled(conv), assign=True)
    return conv


def by_assignment(conv: ScaleShiftConv2d) -> ScaleShiftConv2d:
    conv.weight, conv.bias = nn.Parameter(2 * conv.weight), nn.Parameter(2 * conv.bias)
    return conv


def by_copy(conv: ScaleShiftConv2d) -> ScaleShiftConv2d:
    made = copy.deepcopy(conv)
    with torch.no_grad():
        made.weight.mul_(2)
    return made


def by_saving(conv: ScaleShiftConv2d) -> ScaleShiftConv2d:
    file = io.BytesIO()
    torch.save(conv, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def by_moving(conv: ScaleShiftConv2d) -> ScaleShiftConv2d:
    return conv.to(torch.float64)


def by_swapping_data(conv: ScaleShiftConv2d) -> ScaleShiftConv2d:
    conv.weight.data = 2 * conv.weight.data
    return conv


def by_writing(conv: ScaleShiftConv2d) -> ScaleShiftConv2d:
    with torch.no_grad():
        conv.weight.mul_(2)
    return conv


WAYS = [
    by_load,
    by_assigning_load,
    by_assignment,
    by_copy,
    by_saving,
    by_moving,
    by_swapping_data,
    by_writing,
]


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_filters_are_those_of_the_present_weight(
    way: Any, frozen: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, backend)
    conv = make()
    if frozen:
        conv.freeze()
    before = conv(images())
    first = conv.filters
    assert conv.filters is first
    made = way(conv)
    assert made.filters.weight is made.weight
    assert made.filters.bias is made.bias
    x = images().to(made.weight.dtype)
    norm = made.norm
    z = nn.functional.conv2d(x, made.weight, made.bias)
    expected = nn.functional.batch_norm(
        z, norm.running_mean, norm.running_var, norm.weight, norm.bias, training=False
    )
    assert_near(made(x), expected, NEAR if backend == "auto" else 32 * torch.finfo(torch.float32).eps)
    if way is by_copy:
        assert torch.equal(conv(images()), before)
        assert conv.filters is first


def test_tensors_that_hold_nothing_say_nothing() -> None:
    with FakeTensorMode():
        conv = make()
        conv.freeze()
        assert conv(torch.zeros(2, 4, 8, 8)).shape == conv(torch.zeros(2, 4, 8, 8)).shape


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_a_functional_call_uses_the_tensors_it_is_given(frozen: bool) -> None:
    conv = make(norm=False)
    if frozen:
        conv.freeze()
    conv(images())
    given = {"weight": torch.randn(6, 4, 3, 3, requires_grad=True), "bias": torch.randn(6)}
    y = torch.func.functional_call(conv, given, images())
    assert_near(y, nn.functional.conv2d(images(), given["weight"], given["bias"]), NEAR)
    (gradient,) = torch.autograd.grad(y.sum(), given["weight"])
    assert gradient.abs().min() > 0
    assert_near(conv(images()), nn.functional.conv2d(images(), conv.weight, conv.bias), NEAR)


def test_forward_is_the_operation_on_its_operands() -> None:
    conv = make(padding=1)
    assert torch.equal(conv(images()), ss_conv(images(), conv.operands()))


def test_the_start_is_kaiming_normal_and_repeats() -> None:
    conv = ScaleShiftConv2d(64, 128, 3)
    conv.reset_parameters(torch.Generator().manual_seed(3))
    weight = conv.weight.detach().clone()
    expected = (2 / (128 * 9)) ** 0.5
    n = weight.numel()
    assert abs(float(weight.std()) / expected - 1) <= 5 / (2 * n) ** 0.5
    assert torch.equal(conv.bias, torch.zeros(128))
    conv.reset_parameters(torch.Generator().manual_seed(3))
    assert torch.equal(conv.weight, weight)


@pytest.mark.parametrize("n_groups", [1, 2, 7])
@pytest.mark.parametrize("momentum", [0.1, 0.5])
def test_running_averages_in_closed_form_are_those_of_one_after_the_other(
    n_groups: int, momentum: float
) -> None:
    g = torch.Generator().manual_seed(2)
    norm = ChannelNorm2d(5, momentum=momentum).double()
    plain = nn.BatchNorm2d(5, momentum=momentum).double().train()
    for _ in range(2):
        x = torch.randn(n_groups, 4, 5, 3, 2, dtype=torch.float64, generator=g) * 2 + 1
        for group in x:
            plain(group)
        var, mean = torch.var_mean(x, dim=(1, 3, 4), correction=0)
        norm.update(mean, var, torch.full((n_groups,), 24.0, dtype=torch.float64))
        assert_near(norm.running_mean, plain.running_mean, 32 * EPS)
        assert_near(norm.running_var, plain.running_var, 32 * EPS)


def test_groups_of_different_counts_and_order() -> None:
    norm = ChannelNorm2d(1, momentum=0.25).double()
    mean, var = torch.tensor([[8.0], [0.0]]).double(), torch.tensor([[3.0], [5.0]]).double()
    norm.update(mean, var, torch.tensor([4.0, 6.0]).double())
    # ((0·¾ + 8·¼)·¾ + 0·¼, ((1·¾ + 3·4/3·¼)·¾ + 5·6/5·¼)
    assert_near(norm.running_mean, torch.tensor([1.5]).double(), 4 * EPS)
    assert_near(norm.running_var, torch.tensor([1.75 * 0.75 + 1.5]).double(), 4 * EPS)


def test_a_single_value_does_not_divide_by_zero() -> None:
    norm = ChannelNorm2d(2)
    norm.update(torch.ones(1, 2), torch.zeros(1, 2), torch.ones(1))
    assert_near(norm.running_var, torch.full((2,), 0.9), 4 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize(
    ("affine", "names"), [("both", ["bias", "weight"]), ("bias", ["bias"]), ("none", [])]
)
def test_affine(affine: str, names: list[str]) -> None:
    norm = ChannelNorm2d(3, affine=affine)
    assert sorted(name for name, _ in norm.named_parameters()) == names
    assert sorted(norm.state_dict()) == sorted([*names, "running_mean", "running_var"])


def test_an_unknown_affine_is_an_error() -> None:
    with pytest.raises(ValueError, match="affine: 'yes' is not one of both, bias, none"):
        ChannelNorm2d(3, affine="yes")


def test_statistics_of_two_splits_interleave_in_task_order() -> None:
    def split(start: float) -> list[tuple[Tensor, Tensor, Tensor]]:
        values = start + torch.arange(3.0)
        return [(values[:, None], 10 * values[:, None], 100 * values)]

    ((mean, var, n_values),) = interleave(split(0.0), split(0.5))
    assert mean.flatten().tolist() == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5]
    assert torch.equal(var, 10 * mean)
    assert torch.equal(n_values, 100 * mean.flatten())
    with pytest.raises(ValueError, match="zip"):
        interleave(split(0.0), [])


def test_weights_of_each_task_last_for_one_call() -> None:
    conv = ScaleShiftConv2d(2, 3, 3)
    own = conv.weight.expand(4, *conv.weight.shape)
    with torch.no_grad():
        kept = conv.filters
        conv_parameters, conv._parameters = conv._parameters, {**conv._parameters, "weight": own}
        assert conv.filters.weight is own
        assert conv.filters.by_task
        conv._parameters = conv_parameters
    assert conv._filters is None
    assert conv.filters.weight is kept.weight
