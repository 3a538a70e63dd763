"""ResNet-12 and Conv-4 on the native backend: as far from float64 as Winograd allows, in every kind of norm."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mtl_fast.nn import Conv4, Encoder, ResNet12
from tests.native_cases import EPS, Kinks, amplification, assert_near_as_torch, needs_native
from tests.nn.plain_networks import randomise

pytestmark = needs_native

MAKERS: dict[str, Callable[[], Encoder]] = {
    "resnet12": lambda: ResNet12((3, 4, 5, 7), dropout=0.0, shortcut_scale_shift=True),
    "tensorflow": lambda: ResNet12.tensorflow((3, 4, 5, 7), dropout=0.0),
    "conv4": lambda: Conv4(5, image_size=16),
}
by_encoder = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
# An activation this far from its kink, relative to the largest, stays on its side: a layer of 63 terms.
MARGIN = EPS * amplification("images", 3) * (9 * 7 + 8) ** 0.5
N_PIXELS = 4 * 16 * 16


def images(seed: int = 1) -> Tensor:
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def results(encoder: Encoder, x: Tensor, n_groups: int) -> list[Tensor]:
    """Features, statistics, and the gradients of everything that takes one."""
    out = encoder.embed(x, n_groups=n_groups)
    cotangent = torch.randn(out.features.shape, generator=torch.Generator().manual_seed(9)).to(x.dtype)
    wanted = [p for p in encoder.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(out.features, wanted, cotangent)
    return [out.features.detach(), *(s for layer in out.statistics for s in layer[:2]), *gradients]


@by_encoder
@pytest.mark.parametrize("n_groups", [0, 1, 2], ids=["frozen", "batch", "episode"])
@pytest.mark.parametrize("granularity", ["kernel", "filter", None], ids=["kernel", "filter", "pretraining"])
def test_features_statistics_and_gradients(
    make: Callable[[], Encoder], n_groups: int, granularity: str | None
) -> None:
    for seed in range(200):
        torch.manual_seed(seed)
        encoder = randomise(make(), seed)
        if granularity is not None:
            encoder.enable_scale_shift(granularity)
            randomise(encoder, seed, scale_shift=True)
        wide = copy.deepcopy(encoder).double()
        with Kinks() as kinks:
            exact = results(wide, images().double(), n_groups)
        if kinks.nearest > MARGIN:
            break
    else:
        raise AssertionError("no network whose activations are all decided")
    native, plain = copy.deepcopy(encoder), copy.deepcopy(encoder)
    native.backend, plain.backend = "native", "torch"
    ours, theirs = (results(network, images(), n_groups) for network in (native, plain))
    names = [f"result {i}" for i in range(len(exact))]
    assert_near_as_torch(ours, theirs, exact, N_PIXELS, names)


@by_encoder
def test_training_moves_the_same_averages(make: Callable[[], Encoder]) -> None:
    torch.manual_seed(0)
    encoder = randomise(make()).train()
    networks = {"native": copy.deepcopy(encoder), "torch": copy.deepcopy(encoder)}
    exact = encoder.double()
    exact(images().double())
    for backend, network in networks.items():
        network.backend = backend
        network(images())
    buffers = [dict(network.named_buffers()) for network in (networks["native"], networks["torch"], exact)]
    names = list(buffers[0])
    native, plain, wide = ([b[name] for name in names] for b in buffers)
    assert_near_as_torch(native, plain, wide, N_PIXELS, names)


@by_encoder
def test_it_reads_no_effective_weights_and_ignores_given_ones(make: Callable[[], Encoder]) -> None:
    torch.manual_seed(0)
    encoder = randomise(make()).eval()
    encoder.enable_scale_shift()
    randomise(encoder, 1, scale_shift=True)
    encoder.backend = "torch"
    given = encoder.refresh()
    assert all(weights is not None for weights in given)
    encoder.backend = "native"
    assert encoder.refresh() == (None,) * len(encoder.convs())
    with torch.no_grad():
        features = encoder.embed(images()).features
        assert torch.equal(encoder.embed(images(), weights=encoder.refresh()).features, features)
        assert torch.equal(encoder.embed(images(), weights=given).features, features)
