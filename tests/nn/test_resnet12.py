"""ResNet-12 in both forms against the same network written in torch.nn."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mtl_fast.nn import ResNet12
from tests.conv_cases import assert_near
from tests.nn.plain_networks import plain_network, plain_norms, randomise

WIDTHS = (5, 7, 8, 11)
# Twelve layers of up to 99 terms; batch statistics of a few values divide by a σ far below the largest of them.
DEEP = 1000 * 12 * math.sqrt(99) * torch.finfo(torch.float64).eps
by_form = pytest.mark.parametrize("form", ["common", "tensorflow"])
by_granularity = pytest.mark.parametrize("granularity", ["kernel", "filter"])


def make(
    form: str, widths: tuple[int, ...] = WIDTHS, dtype: torch.dtype = torch.float32, **options: bool
) -> ResNet12:
    torch.manual_seed(0)
    build = ResNet12 if form == "common" else ResNet12.tensorflow
    encoder = build(widths, dropout=0.0, **options)
    randomise(encoder.to(dtype))
    return encoder.eval()


def images(
    n: int = 3, height: int = 17, width: int = 21, dtype: torch.dtype = torch.float32, seed: int = 1
) -> Tensor:
    return torch.randn(n, 3, height, width, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@by_form
@by_granularity
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last], ids=["first", "last"])
@pytest.mark.parametrize("shortcut", [False, True], ids=["without", "with_shortcut"])
def test_at_identity_it_is_the_pretrained_network_to_the_bit_unfolded(
    form: str, granularity: str, memory: torch.memory_format, shortcut: bool
) -> None:
    encoder = make(form, shortcut_scale_shift=shortcut).to(memory_format=memory)
    x, plain = images().contiguous(memory_format=memory), plain_network(encoder)
    encoder.fold = False
    assert torch.equal(encoder(x), plain(x))
    encoder.enable_scale_shift(granularity)
    assert torch.equal(encoder(x), plain(x))
    assert encoder(x).shape == (3, encoder.feature_dim) == (3, 11)


@by_form
@by_granularity
def test_at_identity_it_is_the_pretrained_network_to_rounding_folded(form: str, granularity: str) -> None:
    encoder = make(form, (16, 16, 24, 32))
    exact = plain_network(encoder.double())(images(8, 32, 32).double())
    encoder.float().enable_scale_shift(granularity)
    encoder.backend = "torch"
    x = images(8, 32, 32)
    theirs, ours = plain_network(encoder)(x) - exact, encoder(x) - exact
    # Folding rounds each weight once more than PyTorch does.
    assert ours.abs().max() <= 2 * theirs.abs().max()
    assert ours.norm() <= 2 * theirs.norm()
    encoder.double()
    layers, terms = 12, 9 * 32
    assert_near(encoder(x.double()), exact, layers * math.sqrt(terms) * 4 * torch.finfo(torch.float64).eps)


@by_form
@by_granularity
@pytest.mark.parametrize("shortcut", [False, True], ids=["without", "with_shortcut"])
def test_a_moved_phi_is_multiplied_and_added(form: str, granularity: str, shortcut: bool) -> None:
    encoder = make(form, shortcut_scale_shift=shortcut and form == "common")
    before = encoder(images())
    encoder.enable_scale_shift(granularity)
    randomise(encoder, 2, scale_shift=True)
    encoder.fold = False
    assert torch.equal(encoder(images()), plain_network(encoder)(images()))
    assert not torch.allclose(encoder(images()), before, rtol=0.1)


@by_form
def test_this_steps_weights_give_the_same_bits(form: str) -> None:
    encoder = make(form, shortcut_scale_shift=True)
    encoder.enable_scale_shift()
    randomise(encoder, 3, scale_shift=True)
    weights = encoder.refresh()
    assert len(weights) == 16
    with torch.no_grad():
        expected = encoder(images())
        assert torch.equal(encoder.embed(images(), weights=weights).features, expected)
        batch = encoder.embed(images(4), n_groups=2).features
        given = encoder.embed(images(4), n_groups=2, weights=encoder.refresh(fold=False)).features
        assert torch.equal(given, batch)


@by_form
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last], ids=["first", "last"])
def test_training_mode_is_that_of_batchnorm2d(form: str, memory: torch.memory_format) -> None:
    encoder = make(form).train().to(memory_format=memory)
    # Its bits are torch's own only there.
    encoder.backend = "torch"
    plain = plain_network(encoder)
    for step in range(3):
        x = images(4, seed=step).contiguous(memory_format=memory)
        ours, theirs = encoder(x), plain(x)
        assert torch.equal(ours, theirs)
        for norm, batch_norm in zip(encoder.norms(), plain_norms(plain), strict=True):
            # Ours is scaled to the biased variance and back.
            assert_near(norm.running_mean, batch_norm.running_mean, 4 * torch.finfo(torch.float32).eps)
            assert_near(norm.running_var, batch_norm.running_var, 8 * torch.finfo(torch.float32).eps)
    cotangent = torch.randn(ours.shape, generator=torch.Generator().manual_seed(9))
    ours.backward(cotangent)
    theirs.backward(cotangent)
    expected = [
        p.grad for name, p in plain.named_parameters() if form == "common" or "norm.weight" not in name
    ]
    parameters = [p for conv in encoder.convs() for p in conv.parameters()]
    assert len(parameters) == len(expected)
    for parameter, gradient in zip(parameters, expected, strict=True):
        assert torch.equal(parameter.grad, gradient)
    encoder.eval()
    encoder.fold = False
    assert_near(encoder(x), plain.eval()(x), 1e-5)


@by_form
def test_groups_of_a_batch_are_embedded_as_if_alone(form: str) -> None:
    encoder = make(form, dtype=torch.float64)
    x = images(6, 18, 16, torch.float64)
    together = encoder.embed(x, n_groups=3)
    alone = [encoder.embed(part, n_groups=1) for part in x.split(2)]
    assert_near(together.features, torch.cat([a.features for a in alone]), DEEP)
    assert len(together.statistics) == len(encoder.norms())
    for layer, (norm, ours) in enumerate(zip(encoder.norms(), together.statistics, strict=True)):
        parts = zip(*(a.statistics[layer] for a in alone), strict=True)
        for statistic, part in zip(ours, parts, strict=True):
            assert_near(statistic, torch.cat(part), DEEP)
        assert ours[0].shape == (3, len(norm.running_mean))


@by_form
def test_masked_images_count_for_nothing(form: str) -> None:
    encoder = make(form, dtype=torch.float64)
    encoder.enable_scale_shift()
    x, mask = images(6, 16, 16, torch.float64), torch.tensor([True, False, True, True, True, False])
    x[~mask] = float("nan")
    features = encoder.embed(x, n_groups=2, mask=mask).features
    expected = torch.cat([encoder.embed(x[rows], n_groups=1).features for rows in ([0, 2], [3, 4])])
    assert_near(features[mask], expected, DEEP)
    cotangent = torch.randn(4, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    phi = list(encoder.scale_shift_parameters())
    ours = torch.autograd.grad(features[mask], phi, cotangent)
    wanted = torch.autograd.grad(expected, phi, cotangent)
    largest = max(float(g.abs().max()) for g in wanted)
    for a, b in zip(ours, wanted, strict=True):
        assert (a - b).abs().max() <= 10 * DEEP * largest


def test_counts_of_scale_shift_parameters_are_the_papers() -> None:
    """868,544 scales and 2,880 shifts of 7,992,000: weights and biases of all convolutions, norms not counted."""
    for form in (ResNet12, ResNet12.tensorflow):
        with torch.device("meta"):
            encoder = form()
        convolutions = [p for c in encoder.convs() for p in (c.weight, c.bias) if p is not None]
        in_shortcuts = [b.shortcut.bias for b in encoder.blocks() if b.shortcut.bias is not None]
        n_biases = sum(p.numel() for p in in_shortcuts)
        assert n_biases == (64 + 128 + 256 + 512 if form is ResNet12 else 0)
        n_parameters = sum(p.numel() for p in convolutions) - n_biases
        assert n_parameters == 7_992_000
        encoder.enable_scale_shift("kernel")
        scales = sum(c.scale.numel() for c in encoder.convs() if c.scale is not None)
        shifts = sum(c.shift.numel() for c in encoder.convs() if c.shift is not None)
        assert (scales, shifts) == (868_544, 2_880)
        assert round(100 * (scales + shifts) / n_parameters, 1) == 10.9
        assert sum(p.numel() for p in encoder.scale_shift_parameters()) == scales + shifts
        encoder.enable_scale_shift("filter")
        assert sum(p.numel() for p in encoder.scale_shift_parameters()) == 2 * 2_880


@pytest.mark.parametrize("size", [32, 80, 84, 97])
def test_either_row_of_widths_takes_images_of_any_size(size: int) -> None:
    with torch.device("meta"):
        for widths in ((64, 128, 256, 512), (64, 160, 320, 640)):
            encoder = ResNet12(widths).eval()
            encoder.backend = "torch"
            assert encoder(torch.empty(2, 3, size, size)).shape == (2, widths[-1])


def test_scale_and_shift_reach_what_is_asked_for() -> None:
    encoder = make("common")
    block = encoder.blocks()[-1]
    encoder.enable_scale_shift(last_block_only=True)
    assert [c for c in encoder.convs() if c.scale is not None] == list(block.convs)
    shortcuts = make("common", shortcut_scale_shift=True)
    shortcuts.enable_scale_shift(last_block_only=True)
    block = shortcuts.blocks()[-1]
    assert [c for c in shortcuts.convs() if c.scale is not None] == [block.shortcut, *block.convs]
    shortcuts.enable_scale_shift()
    assert all(c.scale is not None for c in shortcuts.convs())


def test_the_constructor_makes_every_variant() -> None:
    encoder = ResNet12(WIDTHS, slope=0.0, bias=False, shortcut_norm=False, affine="none", eps=0.01).eval()
    assert all(c.bias is None for c in encoder.convs())
    assert len(encoder.norms()) == 12
    assert not any(list(n.parameters()) for n in encoder.norms())
    assert {n.eps for n in encoder.norms()} == {0.01}
    assert encoder(images()).shape == (3, 11)
    assert [c.bias is None for c in make("tensorflow").convs()] == 4 * [True, False, False, False]
    assert len(make("common").norms()) == 16


def test_dropout_repeats_with_its_generator_and_only_in_training() -> None:
    encoder = make("common", (64, 64, 64, 64)).train()
    x = images(8, 32, 32)
    without = encoder(x)
    encoder.dropout, encoder.dropout_generator = 0.1, torch.Generator().manual_seed(4)
    first, second = encoder(x), encoder(x)
    assert not torch.equal(first, second)
    assert not torch.equal(first, without)
    encoder.dropout_generator.manual_seed(4)
    torch.manual_seed(99)
    assert torch.equal(encoder(x), first)
    encoder.eval()
    assert torch.equal(encoder(x), encoder(x))


def test_dropout_comes_after_each_block_and_keeps_the_mean() -> None:
    encoder = make("common").train()
    encoder.dropout, encoder.dropout_generator = 0.25, torch.Generator().manual_seed(5)
    sizes = []
    drop = encoder._dropout
    encoder._dropout = lambda x: (sizes.append(tuple(x.shape[1:])), drop(x))[1]
    encoder(images(2, 32, 32))
    assert sizes == [(5, 16, 16), (7, 8, 8), (8, 4, 4), (11, 2, 2)]
    n = 100_000
    dropped = drop(torch.ones(n))
    kept = dropped > 0
    assert torch.equal(dropped[kept], torch.full_like(dropped[kept], 1 / 0.75))
    # Five standard deviations of a share of 0.75.
    assert abs(float(kept.float().mean()) - 0.75) <= 5 * math.sqrt(0.25 * 0.75 / n)


def test_an_unknown_activation_is_an_error() -> None:
    encoder = ResNet12(WIDTHS, activation="after")
    with pytest.raises(ValueError, match=r"epilogue\.activation: 'after'"):
        encoder(images())
