from __future__ import annotations

import pytest
import torch

from mtl_fast.episodes import Episodes, EpisodeSampler, HardTaskPool
from mtl_fast.errors import InputError
from mtl_fast.random_streams import RandomStreams
from tests.episode_cases import (
    N_QUERY,
    N_SHOT,
    N_WAY,
    assert_equal,
    assert_uniform,
    check,
    fail,
    joined,
    make_pool,
    make_sampler,
    make_store,
)
from tests.read_back import NothingReadBack


@pytest.mark.parametrize("mode", ["resample", "reuse"])
def test_nothing_reads_a_value_back(mode):
    """Tensors of the meta device have no values: reading one, or branching on one, would raise."""
    sampler = make_sampler(device="meta")
    pool = make_pool(mode, sampler=sampler)
    episodes = sampler.sample(4)
    pool.add(episodes, torch.rand(4, N_WAY))
    hard = pool.sample(2)
    pool.add(hard.to("meta"), torch.rand(2, N_WAY, device="meta"))
    assert pool.sample(5).support.shape == (5, N_WAY * N_SHOT)
    assert hard.query.device.type == pool.state_dict()["rows"].device.type == "meta"
    sampler.sample_classes(torch.zeros(2, N_WAY, dtype=torch.int64, device="meta"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("mode", ["resample", "reuse"])
def test_a_gpu_gives_the_same_tasks_without_waiting(mode):
    def run(device):
        sampler = make_sampler(device=device)
        pool = make_pool(mode, sampler=sampler)
        accuracy = torch.tensor([[0.2, 0.2, 0.9], [0.5, 0.1, 0.1]], device=device).repeat(3, 1)
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            episodes = sampler.sample(6)
            pool.add(episodes, accuracy)
            return episodes, pool.sample(40)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    for here, there in zip(run("cpu"), run("cuda"), strict=True):
        assert there.support.device.type == "cuda"
        assert_equal(here, there.to("cpu"))


def test_the_worst_class_of_each_task_joins():
    """By hand: classes, accuracies, and the pool they make."""
    store = make_store()
    sampler = make_sampler(store)
    pool = make_pool(sampler=sampler)
    assert pool.classes.tolist() == []
    episodes = sampler.sample_classes(torch.tensor([[5, 0, 3], [1, 2, 6], [0, 1, 2], [4, 3, 5]]))
    accuracy = torch.tensor(
        [
            [0.80, 0.20, 0.60],  # 0
            [1.00, 1.00, 0.93],  # 6: by rank, however good
            [0.00, 0.33, 0.33],  # 0 again
            [0.60, 0.60, 0.53],  # 5
        ]
    )
    pool.add(episodes[:3], accuracy[:3])
    pool.add(episodes[3:], accuracy[3:])
    assert pool.classes.tolist() == [0, 5, 6]
    state = pool.state_dict()
    assert state["classes"].tolist() == [0, 6, 0, 5]
    rows = episodes.rows()
    assert torch.equal(state["rows"], torch.stack([rows[0, 1], rows[1, 2], rows[2, 0], rows[3, 2]]))
    # Exactly n_way classes: every hard task has them all.
    assert torch.equal(pool.sample(20).classes.sort(1).values, torch.tensor([0, 5, 6]).expand(20, 3))
    pool.clear()
    assert pool.classes.tolist() == []
    assert len(pool.sample(60).classes.unique()) == 7


@pytest.mark.parametrize("mode", ["resample", "reuse"])
@pytest.mark.parametrize("failed", [[], [3], [3, 3], [3, 6], [0, 5, 6], [1, 1, 2, 3, 4, 5, 6, 0, 4]], ids=str)
def test_hard_tasks_are_well_formed(mode, failed):
    store = make_store()
    sampler = make_sampler(store)
    pool = make_pool(mode, sampler=sampler)
    if failed:
        fail(pool, sampler, failed)
    check(pool.sample(200), store, 200)
    check(pool.sample(0), store, 0)


@pytest.mark.parametrize("mode", ["resample", "reuse"])
def test_classes_of_the_pool_are_equally_likely_however_often_they_failed(mode):
    sampler = make_sampler()
    pool = make_pool(mode, sampler=sampler)
    fail(pool, sampler, [6, 2, 2, 2, 2, 2, 4, 1, 4, 0])
    n_tasks = 4000
    for column in pool.sample(n_tasks).classes.T:
        counts = column.bincount(minlength=7)
        assert counts[[3, 5]].sum() == 0
        assert_uniform(counts[[0, 1, 2, 4, 6]], n_tasks / 5)


@pytest.mark.parametrize("mode", ["resample", "reuse"])
def test_a_small_pool_is_filled_with_random_classes(mode):
    sampler = make_sampler()
    pool = make_pool(mode, sampler=sampler)
    fail(pool, sampler, [5, 2, 5])
    n_tasks = 4000
    classes = pool.sample(n_tasks).classes
    for member in (2, 5):
        assert bool((classes == member).any(1).all())
        # Its column is any, or the rows of the head would not see hard and other classes alike.
        assert_uniform((classes == member).sum(0), n_tasks / N_WAY)
    assert_uniform(classes.flatten().bincount(minlength=7)[[0, 1, 3, 4, 6]], n_tasks / 5)


@pytest.mark.parametrize(("mode", "reused"), [("resample", False), ("reuse", True)])
def test_which_images_hard_tasks_take(mode, reused):
    """Class 3 (30 images) failed: `reuse` takes the very images, `resample` any; other classes get any."""
    store = make_store((30, 30, 30, 30))
    sampler = make_sampler(store)
    pool = make_pool(mode, sampler=sampler)
    episodes = fail(pool, sampler, [3])
    n_tasks = 3000
    hard = pool.sample(n_tasks)
    rows = hard.rows()
    for label in range(4):
        own = rows[hard.classes == label]
        expected = episodes.rows()[0, 0] if reused and label == 3 else store.class_index[label]
        for part in (own[:, :N_SHOT], own[:, N_SHOT:]):  # split anew: each image is as often in either
            counts = part.flatten().bincount(minlength=store.n_images)
            assert set(counts.nonzero()[:, 0].tolist()) == set(expected.tolist())
            assert_uniform(counts[expected], part.numel() / len(expected))


def test_reuse_takes_the_images_of_one_failure_at_random():
    store = make_store((30, 40, 50, 60))
    sampler = make_sampler(store)
    pool = make_pool("reuse", sampler=sampler)
    failed = [3, 1, 3, 2, 3, 1, 3]
    episodes = fail(pool, sampler, failed)
    own = [frozenset(rows) for rows in episodes.rows()[:, 0].tolist()]
    assert len(set(own)) == len(own)
    taken = torch.zeros(len(failed))
    hard = pool.sample(2000)
    for classes, rows in zip(hard.classes.tolist(), hard.rows().tolist(), strict=True):
        for label, images in zip(classes, rows, strict=True):
            failure = own.index(frozenset(images))
            assert failed[failure] == label
            taken[failure] += 1
    assert taken.sum() == 2000 * N_WAY
    for label in (1, 3):
        among = taken[torch.tensor(failed) == label]
        assert_uniform(among, 2000 / len(among))


def test_reuse_chooses_failures_independently_for_each_class():
    sampler = make_sampler(make_store((30, 30, 30, 30)))
    pool = make_pool("reuse", sampler=sampler)
    own = [frozenset(rows) for rows in fail(pool, sampler, [1, 1, 2, 2, 3]).rows()[:, 0].tolist()]
    pairs = torch.zeros(2, 2)
    hard = pool.sample(2000)
    for classes, rows in zip(hard.classes.tolist(), hard.rows().tolist(), strict=True):
        of = dict(zip(classes, (own.index(frozenset(images)) for images in rows), strict=True))
        pairs[of[1], of[2] - 2] += 1
    assert_uniform(pairs, 500)


def test_ties_are_broken_at_random():
    sampler = make_sampler(make_store((9,) * 3))
    pool = make_pool(sampler=sampler)
    n_tasks = 3000
    pool.add(
        sampler.sample_classes(torch.tensor([[2, 0, 1]]).expand(n_tasks, 3)), torch.full((n_tasks, 3), 0.6)
    )
    assert_uniform(pool.state_dict()["classes"].bincount(minlength=3), n_tasks / 3)
    pool.clear()
    accuracy = torch.tensor([[0.2, 0.8, 0.2]]).expand(n_tasks, 3)
    pool.add(sampler.sample_classes(torch.tensor([[2, 0, 1]]).expand(n_tasks, 3)), accuracy)
    counts = pool.state_dict()["classes"].bincount(minlength=3)
    assert counts[0] == 0
    assert_uniform(counts[1:], n_tasks / 2)


@pytest.mark.parametrize("mode", ["resample", "reuse"])
def test_runs_with_and_without_hard_tasks_see_the_same_random_tasks(mode):
    def run(hard_tasks: bool) -> list[Episodes]:
        streams, store, drawn = RandomStreams(5), make_store(), []
        sampler = EpisodeSampler(store, N_WAY, N_SHOT, N_QUERY, streams.stream("tasks"))
        pool = HardTaskPool(sampler, mode, streams.stream("hard_tasks"))
        for _ in range(3):
            for _ in range(2):
                drawn.append(sampler.sample(2))
                if hard_tasks:
                    pool.add(drawn[-1], torch.full((2, N_WAY), 0.5))
            if hard_tasks:
                pool.sample(3)
                pool.clear()
        return drawn

    for plain, hard in zip(run(False), run(True), strict=True):
        assert_equal(plain, hard)


@pytest.mark.parametrize("mode", ["resample", "reuse"])
def test_hard_tasks_do_not_depend_on_batching(mode):
    def run(adds, samples):
        sampler = make_sampler(seed=2)
        pool = make_pool(mode, 2, sampler)
        episodes, start = sampler.sample(6), 0
        for n in adds:
            pool.add(episodes[start : start + n], torch.full((n, N_WAY), 0.5))
            start += n
        return joined([pool.sample(n) for n in samples])

    assert_equal(run([6], [10]), run([1, 0, 3, 2], [4, 0, 6]))


@pytest.mark.parametrize("mode", ["resample", "reuse"])
def test_the_state_goes_on_exactly(mode):
    streams, store = RandomStreams(5), make_store()
    sampler = EpisodeSampler(store, N_WAY, N_SHOT, N_QUERY, streams.stream("tasks"))
    pool = HardTaskPool(sampler, mode, streams.stream("hard_tasks"))
    pool.add(sampler.sample(4), torch.full((4, N_WAY), 0.5))
    state, streams_state = pool.state_dict(), streams.state_dict()

    def go_on(sampler: EpisodeSampler, pool: HardTaskPool) -> list[Episodes]:
        pool.add(sampler.sample(2), torch.full((2, N_WAY), 0.5))
        return [pool.sample(5), sampler.sample(2)]

    expected = go_on(sampler, pool)
    streams = RandomStreams(77)
    sampler = EpisodeSampler(store, N_WAY, N_SHOT, N_QUERY, streams.stream("tasks"))
    pool = HardTaskPool(sampler, mode, streams.stream("hard_tasks"))
    pool.add(sampler.sample(9), torch.full((9, N_WAY), 0.5))
    pool.load_state_dict(state)
    streams.load_state_dict(streams_state)
    for found, wanted in zip(go_on(sampler, pool), expected, strict=True):
        assert_equal(found, wanted)
    pool.load_state_dict(make_pool(mode).state_dict())
    assert pool.classes.tolist() == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"rows": torch.zeros(2, 4, dtype=torch.int64)},
            r"classes \[2\], rows \[2, 4\], expected \[K\] and \[K, 5\]",
        ),
        ({"classes": torch.tensor([1, 7])}, r"classes of the state are not int64 in 0\.\.6"),
        ({"classes": torch.tensor([1.0, 2.0])}, "classes of the state are not int64"),
        ({"rows": torch.full((2, 5), 73)}, r"rows of the state are not int64 in 0\.\.72"),
        ({"rows": torch.full((2, 5), -1)}, "rows of the state are not"),
        ({"more": torch.zeros(1)}, r"entries \['classes', 'more', 'rows'\]"),
    ],
)
def test_a_state_of_another_run(change, message):
    pool = make_pool("reuse")
    good = {"classes": torch.tensor([1, 2]), "rows": torch.full((2, 5), 72)}
    pool.load_state_dict(good)
    with pytest.raises(ValueError, match=message):
        pool.load_state_dict(good | change)
    assert pool.classes.tolist() == [1, 2]


def test_what_a_pool_refuses():
    sampler = make_sampler()
    with pytest.raises(InputError, match="'again' is unknown; choose resample or reuse"):
        make_pool("again")
    with pytest.raises(ValueError, match="a generator of their own"):
        HardTaskPool(sampler, "reuse", sampler._generator)
    pool = make_pool(sampler=sampler)
    with pytest.raises(
        ValueError, match=r"class_accuracy: expected \[T, n_way\], got \[3, 2\] for classes \[2, 3\]"
    ):
        pool.add(sampler.sample(2), torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"is \(3, 1, 4\), the sampler's \(3, 2, 3\)"):
        pool.add(make_sampler(shape=(3, 1, 4)).sample(2), torch.zeros(2, 3))
    assert pool.classes.tolist() == []


@pytest.mark.parametrize("mode", ["resample", "reuse"])
def test_sampling_and_the_pool_read_nothing_back(mode: str) -> None:
    """Random tasks, failures that join, hard tasks of few and of many classes, an emptied pool."""
    sampler = make_sampler()
    pool = make_pool(mode, sampler=sampler)
    accuracy = torch.rand(4, N_WAY, generator=torch.Generator().manual_seed(0))
    with NothingReadBack():
        pool.sample(2)
        for _ in range(3):
            pool.add(sampler.sample(4), accuracy)
            pool.sample(3)
        pool.clear()
