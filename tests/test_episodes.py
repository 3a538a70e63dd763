from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from mtl_fast import episodes
from mtl_fast.episodes import Episodes
from mtl_fast.errors import InputError
from tests.episode_cases import (
    N_QUERY,
    N_SHOT,
    N_WAY,
    assert_equal,
    assert_uniform,
    check,
    joined,
    make_sampler,
    make_store,
)

# ------------------------------------------------------------------------------------------------ sampler


@pytest.mark.parametrize("shape", [(3, 2, 3), (1, 1, 1), (7, 1, 4), (5, 4, 1)], ids=str)
def test_tasks_are_well_formed(shape):
    store = make_store()
    check(make_sampler(store, shape=shape).sample(50), store, 50, shape)


def test_classes_and_images_are_equally_likely():
    store, n_tasks = make_store(), 6000
    episodes = make_sampler(store).sample(n_tasks)
    for column in episodes.classes.T:
        assert_uniform(column.bincount(minlength=7), n_tasks / 7)
    support = episodes.support.flatten().bincount(minlength=store.n_images)
    # A class is in N_WAY / 7 of the tasks, with N_SHOT of its images.
    per_image = n_tasks * N_WAY / 7 * N_SHOT / store.class_counts[store.labels]
    assert_uniform(support, per_image)
    per_image = n_tasks * N_WAY / 7 * N_QUERY / store.class_counts[store.labels]
    assert_uniform(episodes.query.flatten().bincount(minlength=store.n_images), per_image)


def test_tasks_do_not_depend_on_batching():
    whole = make_sampler().sample(10)
    sampler = make_sampler()
    parts = [sampler.sample(4), sampler.sample(0), sampler.sample(1), sampler.sample(5)]
    assert_equal(whole, joined(parts))
    # And as many tasks as make torch draw by another path, if it has one.
    sampler = make_sampler(seed=3)
    assert_equal(make_sampler(seed=3).sample(3000)[2999:], [sampler.sample(1) for _ in range(3000)][-1])


def test_many_tasks_take_bounded_memory(monkeypatch):
    whole, sizes = make_sampler().sample(10), []

    def keys(generator, n_tasks, n_keys, device):
        sizes.append(n_tasks * n_keys)
        return original(generator, n_tasks, n_keys, device)

    original = episodes._keys
    monkeypatch.setattr(episodes, "_keys", keys)
    for bound, n_draws in ((1, 10), (3 * (7 + 3 * 30), 4), (10**6, 1)):
        sizes.clear()
        monkeypatch.setattr(episodes, "_KEYS_AT_ONCE", bound)
        assert_equal(make_sampler().sample(10), whole)
        assert (len(sizes), max(sizes) <= max(bound, 7 + 3 * 30)) == (n_draws, True)


def test_seed_decides():
    assert_equal(make_sampler(seed=1).sample(5), make_sampler(seed=1).sample(5))
    assert not torch.equal(make_sampler(seed=1).sample(5).support, make_sampler(seed=2).sample(5).support)


def test_given_classes_get_random_images():
    store = make_store()
    classes = torch.tensor([[6, 0, 3], [3, 1, 2], [3, 4, 0], [3, 5, 6]])
    episodes = make_sampler(store).sample_classes(classes)
    check(episodes, store, 4)
    assert torch.equal(episodes.classes, classes)
    assert len({tuple(rows) for rows in episodes.rows()[[0, 1, 2, 3], [2, 0, 0, 0]].tolist()}) == 4
    many = make_sampler(store).sample_classes(classes[:1].expand(3000, 3))
    assert_uniform(many.rows()[:, 2, :N_SHOT].flatten().bincount()[store.class_index[3]], 3000 * N_SHOT / 30)


@pytest.mark.parametrize(
    "classes", [torch.zeros(2, 4, dtype=torch.int64), torch.zeros(2, 3), torch.zeros(3).long()]
)
def test_given_classes_of_another_shape(classes):
    with pytest.raises(ValueError, match=r"classes: expected int64 \[T, 3\]"):
        make_sampler().sample_classes(classes)


@pytest.mark.parametrize("task", [[0, -1, 2], [0, 7, 2], [4, 2, 4]], ids=str)
def test_given_classes_are_distinct_ones_of_the_store(task):
    wrong = re.escape(f"classes: task 1 has {task}; expected distinct ones of 0..6")
    with pytest.raises(ValueError, match=wrong):
        make_sampler().sample_classes(torch.tensor([[0, 1, 2], task]))
    assert make_sampler().sample_classes(torch.empty(0, 3, dtype=torch.int64)).n_tasks == 0


def test_a_class_with_just_enough_images_gives_all():
    store = make_store((5, 5, 5))
    episodes = make_sampler(store).sample(4)
    assert torch.equal(episodes.rows().flatten(1).sort(1).values, torch.arange(15).expand(4, 15))
    assert len({tuple(rows) for rows in episodes.support.tolist()}) == 4


def test_too_few_classes():
    message = "birds: 2 classes, fewer than n_way = 3; lower n_way or add classes"
    with pytest.raises(InputError, match=message):
        make_sampler(make_store((9, 9)))


def test_too_few_images():
    message = (
        r"birds: class 'class1' has 4 images, fewer than n_shot \+ n_query = 2 \+ 3 = 5; lower them or add"
    )
    with pytest.raises(InputError, match=message):
        make_sampler(make_store((9, 4, 9)))
    with pytest.raises(InputError, match=r"class 'class1' has 4 images \(and 2 more classes\), fewer"):
        make_sampler(make_store((9, 4, 9, 3, 1)))


@pytest.mark.parametrize("which", [0, 1, 2])
def test_sizes_must_be_positive(which):
    shape = [3, 2, 3]
    shape[which] = 0
    with pytest.raises(
        InputError, match=f"{('n_way', 'n_shot', 'n_query')[which]} is 0; it must be at least 1"
    ):
        make_sampler(shape=shape)


def test_negative_number_of_tasks():
    with pytest.raises(ValueError, match="n_tasks is -1"):
        make_sampler().sample(-1)


# ----------------------------------------------------------------------------------------------- episodes


def test_chunks_hold_all_tasks_in_order():
    episodes = make_sampler().sample(7)
    chunks = list(episodes.chunks(3))
    assert [chunk.n_tasks for chunk in chunks] == [3, 3, 1]
    assert_equal(episodes, joined(chunks))
    assert_equal(episodes[2:5], Episodes(*(tensor[2:5] for tensor in vars(episodes).values())))
    assert list(episodes[:0].chunks(3)) == []
    with pytest.raises(ValueError, match="n is 0"):
        episodes.chunks(0)


def test_from_rows_and_rows_are_inverse():
    classes, rows = torch.tensor([[4, 2]]), torch.arange(6).reshape(1, 2, 3)
    episodes = Episodes.from_rows(classes, rows, n_shot=1)
    assert episodes.support.tolist() == [[0, 3]]
    assert episodes.query.tolist() == [[1, 2, 4, 5]]
    assert episodes.support_labels.tolist() == [[0, 1]]
    assert episodes.query_labels.tolist() == [[0, 0, 1, 1]]
    assert torch.equal(episodes.rows(), rows)


def test_rows_of_a_support_set_in_any_order():
    episodes = make_sampler().sample(6)
    order = torch.rand(episodes.support.shape, generator=torch.Generator().manual_seed(0)).argsort(dim=1)
    support, labels = (x.gather(1, order) for x in (episodes.support, episodes.support_labels))
    assert not torch.equal(labels, episodes.support_labels)
    found, expected = (
        e.rows() for e in (replace(episodes, support=support, support_labels=labels), episodes)
    )
    assert torch.equal(found[:, :, N_SHOT:], expected[:, :, N_SHOT:])
    assert torch.equal(found[:, :, :N_SHOT].sort(dim=2).values, expected[:, :, :N_SHOT].sort(dim=2).values)


def test_shapes_that_do_not_fit():
    tensors = vars(make_sampler().sample(2))
    with pytest.raises(ValueError, match=r"support: .*\[2, 5\] for classes \[2, 3\]"):
        Episodes(**(tensors | {"support": tensors["support"][:, 1:]}))
    with pytest.raises(ValueError, match=r"query: .*\[1, 9\] for classes \[2, 3\]"):
        Episodes(**(tensors | {"query": tensors["query"][1:]}))
    with pytest.raises(ValueError, match=r"query_labels: \[2, 6\] differs from query \[2, 9\]"):
        Episodes(**(tensors | {"query_labels": tensors["support_labels"]}))
