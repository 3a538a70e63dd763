"""ResNet-25 against the same network written in torch.nn, and against the counts of MTL's PyTorch code."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

from mtl_fast.nn import ResNet25
from mtl_fast.ops import why
from tests.conv_cases import assert_near
from tests.native_cases import EPS, Kinks, amplification, assert_near_as_torch, needs_native
from tests.nn.plain_networks import plain_network, plain_norms, randomise

WIDTHS = (6, 7, 9)
# Nine layers of up to 81 terms; batch statistics of a few values divide by a σ far below the largest of them.
DEEP = 1000 * 9 * math.sqrt(81) * torch.finfo(torch.float64).eps
by_granularity = pytest.mark.parametrize("granularity", ["kernel", "filter"])
by_shift = pytest.mark.parametrize("shift", ["every", "biased"])


def make(n_blocks: int = 2, dtype: torch.dtype = torch.float32) -> ResNet25:
    torch.manual_seed(0)
    encoder = ResNet25(WIDTHS, n_blocks=n_blocks)
    randomise(encoder.to(dtype))
    return encoder.eval()


def images(
    n: int = 3, height: int = 17, width: int = 21, dtype: torch.dtype = torch.float32, seed: int = 1
) -> Tensor:
    return torch.randn(n, 3, height, width, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@by_granularity
@by_shift
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last], ids=["first", "last"])
def test_it_is_the_plain_network_to_the_bit_unfolded(
    granularity: str, shift: str, memory: torch.memory_format
) -> None:
    encoder = make().to(memory_format=memory)
    x, plain = images().contiguous(memory_format=memory), plain_network(encoder)
    encoder.fold = False
    assert torch.equal(encoder(x), plain(x))
    encoder.enable_scale_shift(granularity, shift=shift)
    # A bias of zeros, which the identity of Φ adds, may take another kernel of PyTorch's.
    assert_near(encoder(x), plain(x), 1e-5)
    randomise(encoder, 2, scale_shift=True)
    moved = plain_network(encoder)(x)
    assert torch.equal(encoder(x), moved)
    assert not torch.allclose(moved, plain(x), rtol=0.1)


@by_granularity
def test_folded_it_is_the_plain_network_to_rounding(granularity: str) -> None:
    encoder = make(dtype=torch.float64)
    encoder.enable_scale_shift(granularity)
    randomise(encoder, 2, scale_shift=True)
    x = images(dtype=torch.float64)
    tolerance = 9 * math.sqrt(81) * 4 * torch.finfo(torch.float64).eps
    assert_near(encoder(x), plain_network(encoder)(x), tolerance)
    with torch.no_grad():
        assert torch.equal(encoder.embed(x, weights=encoder.refresh()).features, encoder(x))


@pytest.mark.parametrize("size", [(1, 1), (32, 32), (80, 80), (84, 84), (97, 33)], ids=str)
def test_images_of_any_size(size: tuple[int, int]) -> None:
    encoder = make()
    x = images(2, *size)
    assert encoder(x).shape == (2, 9)
    assert_near(encoder(x), plain_network(encoder)(x), 1e-5)


def test_its_counts_are_those_of_the_public_code() -> None:
    """25 convolutions without the shortcuts; the stem has the only bias, so the only shift."""
    with torch.device("meta"):
        encoder = ResNet25().eval()
        encoder.backend = "torch"
        assert encoder(torch.empty(2, 3, 80, 80)).shape == (2, 640)
    convs = encoder.convs()
    shortcuts = [conv for conv in convs if conv.weight.shape[-1] == 1]
    assert (len(convs), len(shortcuts)) == (28, 3)
    assert [tuple(conv.weight.shape[:2]) for conv in shortcuts] == [(160, 80), (320, 160), (640, 320)]
    assert convs[0].weight.shape == (80, 3, 3, 3)
    assert [conv.bias is not None for conv in convs] == [True] + 27 * [False]
    assert sum(conv.stride == 2 for conv in convs) == 6
    encoder.enable_scale_shift(shift="biased")
    assert all(conv.scale is not None for conv in convs)
    assert [conv.shift is not None for conv in convs] == [True] + 27 * [False]
    assert sum(p.numel() for p in encoder.scale_shift_parameters()) == 80 + sum(
        conv.weight.shape[0] * conv.weight.shape[1] for conv in convs
    )
    encoder.enable_scale_shift()
    assert all(conv.shift is not None for conv in convs)


def test_the_last_block_is_the_last_stage() -> None:
    encoder = make()
    encoder.enable_scale_shift(last_block_only=True)
    scaled = [conv for conv in encoder.convs() if conv.scale is not None]
    assert scaled == encoder.convs(encoder.stages[-1])
    assert len(scaled) == 5


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
    encoder.dropout, encoder.dropout_generator = 0.5, torch.Generator().manual_seed(4)
    first = encoder(images(4))
    encoder.dropout_generator.manual_seed(4)
    assert torch.equal(encoder(images(4)), first)
    assert not torch.equal(encoder(images(4)), first)


def test_groups_and_masks_are_as_if_alone() -> None:
    encoder = make(dtype=torch.float64)
    encoder.enable_scale_shift()
    x, mask = images(6, 16, 16, torch.float64), torch.tensor([True, False, True, True, True, False])
    x[~mask] = float("nan")
    out = encoder.embed(x, n_groups=2, mask=mask)
    alone = [encoder.embed(x[rows], n_groups=1) for rows in ([0, 2], [3, 4])]
    expected = torch.cat([a.features for a in alone])
    assert_near(out.features[mask], expected, DEEP)
    assert len(out.statistics) == len(encoder.norms()) == 16
    for layer, (norm, statistics) in enumerate(zip(encoder.norms(), out.statistics, strict=True)):
        assert statistics[0].shape == (2, len(norm.running_mean))
        assert_near(statistics[1], torch.cat([a.statistics[layer][1] for a in alone]), DEEP)
    cotangent = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    phi = list(encoder.scale_shift_parameters())
    ours = torch.autograd.grad(out.features[mask], phi, cotangent)
    wanted = torch.autograd.grad(expected, phi, cotangent)
    largest = max(float(g.abs().max()) for g in wanted)
    for a, b in zip(ours, wanted, strict=True):
        assert (a - b).abs().max() <= 10 * DEEP * largest


@needs_native
def test_a_strided_block_says_why_it_is_not_native() -> None:
    strided, plain = (
        why("ss_block", convs=[conv.operands() for conv in block.convs]) for block in make().stages[0]
    )
    assert strided.startswith("torch: not native: stride 2; the native kernel has stride 1")
    assert plain.startswith("native")


@needs_native
@pytest.mark.parametrize("n_groups", [0, 2], ids=["frozen", "episode"])
def test_the_blocks_without_stride_run_natively_to_rounding(n_groups: int) -> None:
    margin = EPS * amplification("images", 3) * (9 * 9 + 8) ** 0.5

    def results(network: ResNet25, x: Tensor) -> list[Tensor]:
        out = network.embed(x, n_groups=n_groups)
        cotangent = torch.randn(out.features.shape, generator=torch.Generator().manual_seed(9)).to(x.dtype)
        phi = [p for p in network.parameters() if p.requires_grad]
        return [out.features.detach(), *torch.autograd.grad(out.features, phi, cotangent)]

    for seed in range(200):
        torch.manual_seed(seed)
        encoder = randomise(ResNet25(WIDTHS, n_blocks=2).eval(), seed)
        encoder.enable_scale_shift()
        randomise(encoder, seed, scale_shift=True)
        x = images(4, 16, 16, seed=seed)
        with Kinks() as kinks:
            exact = results(copy.deepcopy(encoder).double(), x.double())
        if kinks.nearest > margin:
            break
    else:
        raise AssertionError("no network whose activations are all decided")
    plain = copy.deepcopy(encoder)
    plain.backend = "torch"
    ours, theirs = results(encoder, x), results(plain, x)
    assert any(not torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert_near_as_torch(ours, theirs, exact, 4 * 16 * 16, [f"result {i}" for i in range(len(exact))])
