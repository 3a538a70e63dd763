"""Conv-4 against the same network written in torch.nn."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mtl_fast.nn import Conv4
from tests.conv_cases import assert_near
from tests.nn.plain_networks import plain_network, plain_norms, randomise

by_granularity = pytest.mark.parametrize("granularity", ["kernel", "filter"])


def make(width: int = 7, image_size: int = 35, dtype: torch.dtype = torch.float32) -> Conv4:
    torch.manual_seed(0)
    encoder = Conv4(width, image_size=image_size)
    randomise(encoder.to(dtype))
    return encoder.eval()


def images(n: int = 3, size: int = 35, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(n, 3, size, size, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@by_granularity
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last], ids=["first", "last"])
def test_at_identity_it_is_the_pretrained_network_to_the_bit_unfolded(
    granularity: str, memory: torch.memory_format
) -> None:
    encoder = make().to(memory_format=memory)
    x, plain = images().contiguous(memory_format=memory), plain_network(encoder)
    encoder.fold = False
    encoder.enable_scale_shift(granularity)
    assert torch.equal(encoder(x), plain(x))
    randomise(encoder, 2, scale_shift=True)
    moved = plain_network(encoder)(x)
    assert torch.equal(encoder(x), moved)
    assert not torch.equal(moved, plain(x))


@by_granularity
def test_at_identity_it_is_the_pretrained_network_to_rounding_folded(granularity: str) -> None:
    encoder = make(dtype=torch.float64)
    encoder.enable_scale_shift(granularity)
    x = images(dtype=torch.float64)
    tolerance = 4 * math.sqrt(9 * 7) * 4 * torch.finfo(torch.float64).eps
    assert_near(encoder(x), plain_network(encoder)(x), tolerance)
    with torch.no_grad():
        assert torch.equal(encoder.embed(x, weights=encoder.refresh()).features, encoder(x))


@pytest.mark.parametrize(("width", "size", "features"), [(32, 84, 800), (1, 16, 1), (3, 47, 12)])
def test_feature_dimension(width: int, size: int, features: int) -> None:
    encoder = make(width, size)
    assert encoder.feature_dim == features
    assert encoder(images(2, size)).shape == (2, features)


def test_training_mode_is_that_of_batchnorm2d() -> None:
    encoder = make().train()
    # Its bits are torch's own only there.
    encoder.backend = "torch"
    plain = plain_network(encoder)
    for step in range(3):
        ours, theirs = encoder(images(4, seed=step)), plain(images(4, seed=step))
        assert torch.equal(ours, theirs)
    for norm, batch_norm in zip(encoder.norms(), plain_norms(plain), strict=True):
        assert_near(norm.running_mean, batch_norm.running_mean, 4 * torch.finfo(torch.float32).eps)
        assert_near(norm.running_var, batch_norm.running_var, 8 * torch.finfo(torch.float32).eps)
    cotangent = torch.randn(ours.shape, generator=torch.Generator().manual_seed(9))
    ours.backward(cotangent)
    theirs.backward(cotangent)
    for p, q in zip(encoder.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_groups_and_masks_are_as_if_alone() -> None:
    encoder = make(image_size=16, dtype=torch.float64)
    encoder.enable_scale_shift()
    x, mask = images(6, 16, torch.float64), torch.tensor([True, False, True, True, True, False])
    x[~mask] = float("nan")
    out = encoder.embed(x, n_groups=2, mask=mask)
    alone = [encoder.embed(x[rows], n_groups=1) for rows in ([0, 2], [3, 4])]
    expected = torch.cat([a.features for a in alone])
    # The last map has 4 pixels an image: statistics of 8 values, of small σ.
    tolerance = 1000 * 4 * math.sqrt(9 * 7) * torch.finfo(torch.float64).eps
    assert_near(out.features[mask], expected, tolerance)
    assert [s[2].tolist() for s in out.statistics] == [[2.0 * n * n] * 2 for n in (16, 8, 4, 2)]
    for layer, statistics in enumerate(out.statistics):
        assert_near(statistics[0], torch.cat([a.statistics[layer][0] for a in alone]), tolerance)
    cotangent = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    scales = [conv.scale for conv in encoder.convs()]
    ours = torch.autograd.grad(out.features[mask], scales, cotangent)
    for a, b in zip(ours, torch.autograd.grad(expected, scales, cotangent), strict=True):
        assert_near(a, b, 10 * tolerance)


def test_the_last_block_is_the_last_layer() -> None:
    encoder = make()
    encoder.enable_scale_shift(last_block_only=True)
    assert [conv.scale is not None for conv in encoder.convs()] == [False, False, False, True]


def test_too_small_images_are_an_error() -> None:
    with pytest.raises(ValueError, match="at least 16 pixels, got 15"):
        Conv4(image_size=15)


def test_images_of_another_size_are_an_error() -> None:
    encoder = make(2, 35)
    assert encoder(images(1, 47)).shape == (1, 8)  # the last rows and columns have no part in it
    for size in (15, 31, 48):
        with pytest.raises(
            ValueError, match=rf"images: \(1, 3, {size}, {size}\) give another .* than 35×35 pixels"
        ):
            encoder(images(1, size))
