"""What holds for any input: Hypothesis draws shapes and values, and makes what fails small."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mtl_fast import (
    EpisodeSampler,
    HardTaskPool,
    ImageStore,
    InputError,
    RandomStreams,
    base_learner,
    fit_heads,
    ss_conv,
)
from mtl_fast.ops import ConvOperands, FrozenFilters
from mtl_fast.ops.images import images
from mtl_fast.training.statistics import mean_interval, paired_difference

# The same examples every time; a failure prints what it failed on.
FAST = settings(max_examples=60, deadline=None, derandomize=True)
SIZES = st.integers(1, 9)
SEEDS = st.integers(0, 2**32)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@FAST
@given(
    n=st.integers(1, 3),
    channels=st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3)),
    size=st.tuples(SIZES, SIZES),
    taps=st.integers(1, 3),
    stride=st.integers(1, 3),
    padding=st.integers(0, 3),
    dilation=st.integers(1, 2),
    by_filter=st.booleans(),
    seed=SEEDS,
)
def test_scaling_is_a_convolution_with_scaled_weights_at_any_geometry(
    n: int,
    channels: tuple[int, int, int],
    size: tuple[int, int],
    taps: int,
    stride: int,
    padding: int,
    dilation: int,
    by_filter: bool,
    seed: int,
) -> None:
    n_in, n_out, groups = channels[0] * channels[2], channels[1] * channels[2], channels[2]
    x, weight = normal(seed, n, n_in, *size), normal(seed + 1, n_out, channels[0], taps, taps)
    scale = normal(seed + 2, n_out, 1 if by_filter else channels[0], 1, 1)
    shift = normal(seed + 3, n_out)
    geometry = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    conv = ConvOperands(FrozenFilters(weight, None, **geometry), scale, shift)  # type: ignore[arg-type]  # ints all
    reach = dilation * (taps - 1) + 1
    if min(size) + 2 * padding < reach:
        with pytest.raises(ValueError, match="smaller than the taps"):
            ss_conv(x, conv)
        return
    expected = F.conv2d(x, weight * scale, shift, **geometry)  # type: ignore[arg-type]  # ints all
    torch.testing.assert_close(ss_conv(x, conv), expected, rtol=1e-12, atol=1e-12)


@FAST
@given(
    tasks=st.integers(1, 3),
    rows=st.integers(1, 9),
    n_way=st.integers(1, 6),
    width=SIZES,
    n_steps=st.integers(0, 6),
    rate=st.floats(0, 1),
    order=st.sampled_from(["first", "second"]),
    seed=SEEDS,
)
def test_the_dual_form_is_the_primal_one_for_any_task(
    tasks: int, rows: int, n_way: int, width: int, n_steps: int, rate: float, order: str, seed: int
) -> None:
    support, query = normal(seed, tasks, rows, width), normal(seed + 1, tasks, 4, width)
    weight, bias = normal(seed + 2, n_way, width).requires_grad_(), normal(seed + 3, n_way).requires_grad_()
    labels = torch.randint(n_way, (tasks, rows), generator=torch.Generator().manual_seed(seed))
    found = []
    for form in ("dual", "primal"):
        logits = base_learner(
            support,
            labels,
            query,
            weight,
            bias,
            inner_lr=rate,
            n_steps=n_steps,
            order=order,
            form=form,  # type: ignore[arg-type]  # words of the right kind
        )
        found.append((logits, *torch.autograd.grad(logits.square().sum(), (weight, bias))))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
    heads = fit_heads(support, labels, weight, bias, inner_lr=rate, n_steps=n_steps)
    by_head = query @ heads[0].mT + heads[1][:, None]
    torch.testing.assert_close(by_head, found[0][0], rtol=1e-8, atol=1e-8)


@st.composite
def stores(draw: st.DrawFn) -> ImageStore:
    counts = draw(st.lists(st.integers(1, 8), min_size=1, max_size=9))
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(draw(SEEDS)))
    pixels = torch.zeros(len(labels), 2, 2, 3, dtype=torch.uint8)
    return ImageStore.from_arrays(pixels, labels[order])


@FAST
@given(
    store=stores(), n_way=st.integers(1, 6), n_shot=st.integers(1, 4), n_query=st.integers(1, 4), seed=SEEDS
)
def test_an_episode_has_distinct_classes_and_images_or_a_reason(
    store: ImageStore, n_way: int, n_shot: int, n_query: int, seed: int
) -> None:
    counts = torch.bincount(store.labels)
    try:
        sampler = EpisodeSampler(store, n_way, n_shot, n_query, RandomStreams(seed).stream("tasks"))
    except InputError:
        assert len(counts) < n_way or int(counts.min()) < n_shot + n_query
        return
    pool = HardTaskPool(sampler, "resample", RandomStreams(seed).stream("hard tasks"))
    episodes = sampler.sample(3)
    pool.add(episodes, torch.rand(3, n_way))
    for drawn in (episodes, pool.sample(2)):
        rows = drawn.rows()  # [T, n_way, n_shot + n_query]
        assert rows.shape[1:] == (n_way, n_shot + n_query)
        for t in range(drawn.n_tasks):
            assert len(drawn.classes[t].unique()) == n_way
            assert len(rows[t].unique()) == rows[t].numel()
            assert torch.equal(store.labels[rows[t]], drawn.classes[t][:, None].expand_as(rows[t]))


@FAST
@given(
    size=st.tuples(SIZES, SIZES),
    padding=st.integers(0, 3),
    window=st.tuples(SIZES, SIZES),
    flip=st.booleans(),
    seed=SEEDS,
)
def test_a_window_of_an_image_is_the_slice_of_the_padded_one(
    size: tuple[int, int], padding: int, window: tuple[int, int], flip: bool, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    store = torch.randint(256, (2, *size, 3), generator=g, dtype=torch.uint8)
    room = [length + 2 * padding - part for length, part in zip(size, window, strict=True)]
    arguments = {"mean": torch.tensor([1.0, 2.0, 3.0]), "std": torch.tensor([4.0, 5.0, 6.0])}
    if min(room) < 0:
        return
    top, left = (int(torch.randint(r + 1, (1,), generator=g)) for r in room)
    out = images(
        store,
        torch.tensor([1]),
        crop=torch.tensor([[top, left]]),
        size=window,
        padding=padding,
        flip=torch.tensor([flip]),
        **arguments,
    )
    padded = F.pad(store[1].permute(2, 0, 1).float(), [padding] * 4)
    part = padded[:, top : top + window[0], left : left + window[1]]
    part = part.flip(2) if flip else part
    expected = (part - arguments["mean"].view(3, 1, 1)) / arguments["std"].view(3, 1, 1)
    torch.testing.assert_close(out[0], expected)


ACCURACIES = st.lists(st.floats(0, 1), min_size=2, max_size=40)


@FAST
@given(values=ACCURACIES)
def test_an_interval_is_centred_and_shrinks_with_more_of_the_same(values: list[float]) -> None:
    found, more = mean_interval(values), mean_interval(values * 4)
    assert math.isclose(found.mean, sum(values) / len(values), rel_tol=1e-9, abs_tol=1e-12)
    assert found.half >= 0
    assert more.half <= found.half + 1e-12
    same = paired_difference(values, values)
    assert (same.mean, same.half) == (0.0, 0.0)
