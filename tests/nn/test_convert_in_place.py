"""What surrounds a converted convolution in somebody's network: views, writes in place, hooks, other geometry, a compiler."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from mtl_fast.nn import convert, fold
from tests.conv_cases import assert_near

# Winograd's rounding of sums of 36 terms.
NEAR = 1e-5
by_backend = pytest.mark.parametrize("backend", ["torch", "auto"])
by_granularity = pytest.mark.parametrize("granularity", ["kernel", "filter"])


class Viewed(nn.Module):
    """Ends as Conv-4 is often written."""

    def __init__(self, n_in: int, kernel_size: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(n_in, 8, kernel_size, padding=kernel_size // 2)
        self.pool = nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.conv(x))
        return x.view(x.size(0), -1)


def images(n_in: int = 3) -> Tensor:
    return torch.randn(2, n_in, 8, 6, generator=torch.Generator().manual_seed(1))


def convolution() -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(3, 8, 3, padding=1)


@by_backend
@by_granularity
@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize("n_in", [1, 3])
def test_the_result_lies_in_memory_as_that_of_conv2d(
    n_in: int, kernel_size: int, granularity: str, backend: str
) -> None:
    network = Viewed(n_in, kernel_size)
    made = convert(network, granularity, backend=backend)
    assert_near(made(images(n_in)), network(images(n_in)), NEAR)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = images(3).contiguous(memory_format=memory_format)
        conv = convolution().to(memory_format=memory_format)
        for given in (x, images(3)):
            assert convert(conv, granularity, backend=backend)(given).stride() == conv(given).stride()


@by_backend
@by_granularity
@pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"]
)
def test_what_follows_may_write_over_its_output(
    memory_format: torch.memory_format, granularity: str, backend: str
) -> None:
    given = images().contiguous(memory_format=memory_format)
    network = nn.Sequential(convolution(), nn.ReLU(inplace=True))
    careful = nn.Sequential(network[0], nn.ReLU())
    found = []
    for model in (network, careful):
        made = convert(model, granularity, backend=backend)
        y = made(given)
        y.square().sum().backward()
        found.append([y.detach(), made[0].scale.grad, made[0].shift.grad])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@by_backend
def test_other_geometry_is_taken_at_once_and_folded_alike(backend: str) -> None:
    conv = convolution()
    made = convert(conv, backend=backend)
    made(images())
    for name, value in (("padding", (0, 1)), ("stride", (2, 2)), ("dilation", (1, 2))):
        setattr(conv, name, value)
        setattr(made, name, value)
        assert_near(made(images()), conv(images()), NEAR)
        assert_near(fold(made)(images()), conv(images()), NEAR)


def test_hooks_are_not_folded_away() -> None:
    made = convert(nn.Sequential(convolution()))
    made[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="model: 0 has hooks"):
        fold(made)
    assert copy.deepcopy(made)[0]._forward_hooks


@by_backend
@pytest.mark.parametrize("seen", [False, True], ids=["compiled first", "called first"])
def test_compiled_it_sees_a_weight_that_was_written_to(seen: bool, backend: str) -> None:
    conv = convolution()
    made = convert(conv, backend=backend)
    if seen:
        made(images())
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert_near(compiled(images()), conv(images()), NEAR)
        for weight in (conv.weight, made.weight):
            weight.mul_(2)
        assert_near(compiled(images()), conv(images()), NEAR)
