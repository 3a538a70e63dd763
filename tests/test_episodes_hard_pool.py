"""Which classes the pool takes of a task, and of which hard tasks are made."""

from __future__ import annotations

import pytest
import torch

from mtl_fast.errors import InputError
from tests.episode_cases import assert_uniform, check, fail, make_pool, make_sampler, make_store
from tests.read_back import NothingReadBack


@pytest.mark.parametrize("mode", ["resample", "reuse"])
def test_several_classes_of_a_task_join_the_lowest_first(mode):
    sampler = make_sampler()
    pool = make_pool(mode, sampler=sampler, per_task=2)
    episodes = sampler.sample_classes(torch.tensor([[5, 0, 3], [1, 2, 6], [4, 3, 5]]))
    accuracy = torch.tensor([[0.8, 0.2, 0.6], [0.5, 0.9, 0.4], [0.0, 1.0, 0.1]])
    failed = pool.add(episodes, accuracy)
    assert failed.tolist() == [0, 3, 6, 1, 4, 5]
    assert pool.classes.tolist() == [0, 1, 3, 4, 5, 6]
    rows = episodes.rows()
    own = [rows[0, 1], rows[0, 2], rows[1, 2], rows[1, 0], rows[2, 0], rows[2, 2]]
    assert torch.equal(pool.state_dict()["rows"], torch.stack(own))
    check(pool.sample(50), sampler.store, 50)


def test_ties_among_several_are_broken_at_random():
    sampler = make_sampler(make_store((9,) * 3))
    pool = make_pool(sampler=sampler, per_task=2)
    n_tasks = 3000
    episodes = sampler.sample_classes(torch.tensor([[2, 0, 1]]).expand(n_tasks, 3))
    failed = pool.add(episodes, torch.tensor([[0.5, 0.2, 0.5]]).expand(n_tasks, 3)).view(n_tasks, 2)
    assert set(failed[:, 0].tolist()) == {0}
    assert_uniform(failed[:, 1].bincount(minlength=3)[[1, 2]], n_tasks / 2)


@pytest.mark.parametrize("mode", ["resample", "reuse"])
def test_a_pool_of_bounded_size_keeps_what_failed_most_often_and_of_equals_the_latest(mode):
    sampler = make_sampler()
    pool = make_pool(mode, sampler=sampler, size=3)
    fail(pool, sampler, [6, 2, 2, 1, 0, 6, 4])
    assert pool.classes.tolist() == [2, 4, 6]  # twice, the last, twice
    hard = pool.sample(40)
    check(hard, sampler.store, 40)
    assert torch.equal(hard.classes.sort(1).values, torch.tensor([2, 4, 6]).expand(40, 3))
    fail(pool, sampler, [1])
    assert pool.classes.tolist() == [1, 2, 6]
    for size, members in ((1, [6]), (5, [0, 1, 2, 4, 6]), (7, [0, 1, 2, 4, 6]), (99, [0, 1, 2, 4, 6])):
        wider = make_pool(mode, sampler=sampler, size=size)
        wider.load_state_dict(pool.state_dict())
        fail(wider, sampler, [6])
        assert wider.classes.tolist() == members


def test_a_class_beyond_the_size_is_as_any_other():
    """With `reuse` its images are new ones, though the pool knows those that failed."""
    sampler = make_sampler(make_store((30, 30, 30)))
    pool = make_pool("reuse", sampler=sampler, size=1)
    failures = fail(pool, sampler, [0, 1, 1]).rows()
    hard = pool.sample(400)
    first, second = (hard.rows()[hard.classes == label] for label in (0, 1))
    assert len(first.unique()) > failures[0, 0].numel()
    failed = {tuple(sorted(rows)) for rows in failures[1:, 0].tolist()}
    assert {tuple(sorted(rows)) for rows in second.tolist()} == failed


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"per_task": 0}, r"hard classes per task: 0 is outside 1\.\.3"),
        ({"per_task": 4}, r"hard classes per task: 4 is outside 1\.\.3 \(n_way\)"),
        ({"size": 0}, "hard pool size: 0 is too small; it must be at least 1"),
    ],
)
def test_sizes_that_no_pool_has_are_named(options, says):
    with pytest.raises(InputError, match=says):
        make_pool(**options)


def test_a_bounded_pool_reads_nothing_back():
    sampler = make_sampler()
    pool = make_pool(sampler=sampler, per_task=2, size=3)
    accuracy = torch.rand(4, 3, generator=torch.Generator().manual_seed(0))
    with NothingReadBack():
        pool.sample(2)
        pool.add(sampler.sample(4), accuracy)
        pool.sample(3)
