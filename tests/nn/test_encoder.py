"""What every encoder does: freeze, start Φ, refresh, move running averages, copy."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mtl_fast.nn import Conv4, Encoder, ResNet12, ResNet25
from mtl_fast.nn.encoder import Encoder as Base
from tests.conv_cases import assert_near
from tests.nn.plain_networks import plain_network, plain_norms, randomise

MAKERS: dict[str, Callable[[], Encoder]] = {
    "conv4": lambda: Conv4(4, image_size=16),
    "resnet12": lambda: ResNet12((4, 5, 6, 7), dropout=0.0),
    "tensorflow": lambda: ResNet12.tensorflow((4, 5, 6, 7), dropout=0.0),
    "resnet25": lambda: ResNet25((4, 6, 7), n_blocks=2),
}
by_encoder = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())


def images(n: int = 4) -> Tensor:
    return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@by_encoder
def test_freezing_leaves_no_gradient_and_enabling_only_phi(make: Callable[[], Encoder]) -> None:
    encoder = make().eval()
    assert all(p.requires_grad for p in encoder.parameters())
    encoder.freeze()
    assert not encoder(images()).requires_grad
    encoder.enable_scale_shift()
    phi = list(encoder.scale_shift_parameters())
    open_ = [p for p in encoder.parameters() if p.requires_grad]
    assert {id(p) for p in phi} == {id(p) for p in open_}
    encoder(images()).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in phi)
    assert all(p.grad is None for p in encoder.parameters() if not p.requires_grad)


@by_encoder
def test_enabling_again_starts_from_nothing(make: Callable[[], Encoder]) -> None:
    encoder = randomise(make()).eval()
    before = encoder(images())
    encoder.enable_scale_shift("kernel")
    randomise(encoder, 1, scale_shift=True)
    fresh = randomise(make()).eval()
    fresh.enable_scale_shift("filter", last_block_only=True)
    encoder.enable_scale_shift("filter", last_block_only=True)
    randomise(encoder)
    assert_near(encoder(images()), before, 1e-5)
    shapes = [tuple(p.shape) for p in encoder.scale_shift_parameters()]
    assert shapes == [tuple(p.shape) for p in fresh.scale_shift_parameters()]
    assert encoder.state_dict().keys() == fresh.state_dict().keys()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"shift": "none"}, "shift: 'none' is neither every nor biased"),
        ({"granularity": "channel"}, "granularity: 'channel' is neither kernel nor filter"),
    ],
)
@by_encoder
def test_an_unknown_form_of_phi_is_an_error_that_changes_nothing(
    make: Callable[[], Encoder], options: Any, says: str
) -> None:
    encoder = make().eval()
    encoder.enable_scale_shift()
    randomise(encoder, 1, scale_shift=True)
    before, learns = list(encoder.parameters()), [p.requires_grad for p in encoder.parameters()]
    with pytest.raises(ValueError, match=says):
        encoder.enable_scale_shift(**options)
    assert all(p is q for p, q in zip(encoder.parameters(), before, strict=True))
    assert [p.requires_grad for p in encoder.parameters()] == learns


@by_encoder
@pytest.mark.parametrize("fold", [True, False], ids=["folded", "unfolded"])
def test_refresh_follows_phi_and_holds_no_graph(make: Callable[[], Encoder], fold: bool) -> None:
    encoder = randomise(make()).eval()
    encoder.enable_scale_shift()
    randomise(encoder, 2, scale_shift=True)
    encoder.backend = "torch"  # native kernels scale their filters themselves
    weights = encoder.refresh(fold=fold)
    for conv, effective in zip(encoder.convs(), weights, strict=True):
        assert effective.folded == (fold and conv.norm is not None)
        assert effective.weight.shape == conv.weight.shape
        assert not effective.weight.requires_grad
    encoder.fold = False
    assert not any(effective.folded for effective in encoder.refresh())
    with torch.no_grad():
        encoder.convs()[1].scale.mul_(2)
    assert_near(
        encoder.refresh(fold=False)[1].weight,
        2 * encoder.convs()[1].weight * encoder.convs()[1].scale / 2,
        1e-6,
    )


@by_encoder
def test_a_copy_is_independent(make: Callable[[], Encoder]) -> None:
    encoder = randomise(make()).eval()
    encoder.enable_scale_shift()
    before = encoder(images())
    other = copy.deepcopy(encoder)
    randomise(other, 5, scale_shift=True)
    assert torch.equal(encoder(images()), before)
    assert not torch.allclose(other(images()), before)
    encoder.load_state_dict(other.state_dict())
    assert torch.equal(encoder(images()), other(images()))


@by_encoder
def test_only_training_mode_moves_running_averages(make: Callable[[], Encoder]) -> None:
    encoder = randomise(make()).eval()
    before = copy.deepcopy(encoder.state_dict())

    def moved() -> list[str]:
        return [name for name, value in encoder.state_dict().items() if not torch.equal(value, before[name])]

    encoder(images())
    statistics = encoder.embed(images(), n_groups=2).statistics
    assert moved() == []
    encoder.update_running(statistics)
    assert len(moved()) == 2 * len(encoder.norms())
    encoder.load_state_dict(before)
    encoder.train()(images())
    assert len(moved()) == 2 * len(encoder.norms())
    with pytest.raises(ValueError, match="zip"):
        encoder.update_running(statistics[:-1])


@by_encoder
def test_stored_statistics_treat_images_apart_batch_statistics_together(make: Callable[[], Encoder]) -> None:
    encoder = randomise(make()).double().eval()
    x = images().double()
    alone = torch.cat([encoder.embed(image[None]).features for image in x])
    assert_near(encoder.embed(x).features, alone, 1e-12)
    assert encoder.embed(x).statistics == []
    assert not torch.allclose(encoder.embed(x, n_groups=1).features, encoder.embed(x, n_groups=2).features)


def test_an_encoder_must_say_how_it_embeds() -> None:
    with pytest.raises(TypeError, match="embed"):
        Base()


@by_encoder
@pytest.mark.parametrize("fold", [True, False], ids=["folded", "unfolded"])
@pytest.mark.parametrize("mode", ["frozen", "episode"])
def test_gradients_of_the_norms_affine_are_those_of_the_plain_network(
    make: Callable[[], Encoder], fold: bool, mode: str
) -> None:
    """γ and β open beside Φ, in float64: also where γ/σ is folded into the filters."""
    encoder = randomise(make()).double().eval()
    encoder.enable_scale_shift()
    randomise(encoder, 2, scale_shift=True)
    plain = plain_network(encoder).train(mode == "episode")
    encoder.fold = fold
    for norm in encoder.norms():
        norm.requires_grad_(True)
    x = images().double()
    weights = encoder.refresh(fold=mode == "frozen")
    features = encoder.embed(x, n_groups=0 if mode == "frozen" else 1, weights=weights).features
    cotangent = torch.randn(features.shape, generator=torch.Generator().manual_seed(3)).double()
    features.backward(cotangent)
    plain(x).backward(cotangent)
    pairs = [
        (ours, getattr(theirs, name).grad)
        for norm, theirs in zip(encoder.norms(), plain_norms(plain), strict=True)
        for name in ("weight", "bias")
        if (ours := getattr(norm, name)) is not None
    ]
    largest = max(float(gradient.abs().max()) for _, gradient in pairs)
    # Up to thirteen layers of 63 terms; batch statistics of a few values divide by a small σ.
    tolerance = 1000 * 13 * 63**0.5 * torch.finfo(torch.float64).eps
    for parameter, gradient in pairs:
        assert parameter.grad is not None
        assert (parameter.grad - gradient).abs().max() <= tolerance * largest
    assert all(p.grad is not None for p in encoder.scale_shift_parameters())
