"""The ordinary network that an encoder folds into: the same values, of torch.nn alone."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mtl_fast.nn import Conv4, Encoder, ResNet12, ResNet25
from mtl_fast.nn.folded import folded
from tests.conv_cases import assert_near
from tests.nn.plain_networks import plain_network, randomise

MEAN, STD = (125.3, 123.0, 113.9), (63.0, 62.1, 66.7)
MAKERS: dict[str, Callable[[], Encoder]] = {
    "conv4": lambda: Conv4(4, image_size=20),
    "resnet12": lambda: ResNet12((4, 5, 6, 7), shortcut_scale_shift=True),
    "raw_shortcut": lambda: ResNet12((4, 5, 6, 7), slope=0.0, bias=False, shortcut_norm=False),
    "tensorflow": lambda: ResNet12.tensorflow((4, 5, 6, 7)),
    "resnet25": lambda: ResNet25((4, 6, 7), n_blocks=2),
}
by_encoder = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())


def pixels(n: int = 3) -> Tensor:
    return torch.randint(256, (n, 3, 20, 20), generator=torch.Generator().manual_seed(1)).float()


def standardised(x: Tensor) -> Tensor:
    mean, std = (torch.tensor(v).to(x.dtype).view(3, 1, 1) for v in (MEAN, STD))
    return (x - mean) / std


def make_encoder(make: Callable[[], Encoder], granularity: str | None) -> Encoder:
    torch.manual_seed(0)
    encoder = randomise(make()).eval()
    if granularity is not None:
        encoder.enable_scale_shift(granularity)
        randomise(encoder, 2, scale_shift=True)
    return encoder


@by_encoder
@pytest.mark.parametrize("granularity", ["kernel", "filter", None])
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last], ids=["first", "last"])
def test_values_are_ours_to_the_bit_on_the_torch_backend(
    make: Callable[[], Encoder], granularity: str | None, memory: torch.memory_format
) -> None:
    encoder = make_encoder(make, granularity).to(memory_format=memory)
    encoder.backend = "torch"
    x = pixels().contiguous(memory_format=memory)
    with torch.no_grad():
        assert torch.equal(folded(encoder, MEAN, STD)(x), encoder(standardised(x)))


@pytest.mark.parametrize("kind", ["conv4", "resnet12", "tensorflow", "resnet25"])
def test_values_are_those_of_a_plain_network_with_norms(kind: str) -> None:
    encoder = make_encoder(MAKERS[kind], "kernel").double()
    x = pixels().double()
    expected = plain_network(encoder)(standardised(x))
    # Up to thirteen layers of 63 terms.
    tolerance = 13 * 63**0.5 * 4 * torch.finfo(torch.float64).eps
    assert_near(folded(encoder, MEAN, STD)(x), expected, tolerance)


@by_encoder
def test_it_is_made_of_ordinary_layers_and_shares_nothing(make: Callable[[], Encoder]) -> None:
    encoder = make_encoder(make, "kernel")
    before = copy.deepcopy(encoder.state_dict())
    network = folded(encoder, MEAN, STD)
    leaves = {type(m) for m in network.modules() if not list(m.children())}
    ours = {kind.__name__ for kind in leaves if not kind.__module__.startswith("torch.nn.")}
    assert ours <= {"Standardise", "GlobalMean"}
    assert not any(isinstance(m, nn.BatchNorm2d) for m in network.modules())
    assert sum(isinstance(m, nn.Conv2d) for m in network.modules()) == len(encoder.convs())
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())
    with torch.no_grad():
        for p in network.parameters():
            p.add_(1)
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())


def test_another_encoder_is_an_error() -> None:
    class Other(Conv4.__base__):  # type: ignore[misc, name-defined]
        def embed(self, *_: object, **__: object) -> None:
            raise NotImplementedError

    with pytest.raises(TypeError, match="encoder: Other has no folded form"):
        folded(Other(), MEAN, STD)
