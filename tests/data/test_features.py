"""The store of features: the same tasks as from images, and what does not fit together."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from mtl_fast.data.features import FeatureStore
from mtl_fast.data.store import ImageStore
from mtl_fast.episodes import EpisodeSampler
from tests.episode_cases import assert_equal

NAMES = ("a", "b", "c")


def make(**changes: Any) -> FeatureStore:
    options: dict[str, Any] = {
        "features": torch.arange(12.0).view(6, 2),
        "labels": torch.tensor([2, 0, 1, 0, 2, 0]),
        "class_names": NAMES,
    }
    return FeatureStore(**(options | changes))


def test_rows_are_found_by_class() -> None:
    store = make()
    assert (store.n_images, store.n_classes, store.device.type) == (6, 3, "cpu")
    assert store.class_counts.tolist() == [3, 1, 2]
    assert store.class_index.tolist() == [[1, 3, 5], [2, -1, -1], [0, 4, -1]]
    assert repr(store) == "FeatureStore(the features: 6 features of 2, 3 classes, cpu)"


def test_tasks_are_those_of_the_images(small_store: ImageStore) -> None:
    features = torch.zeros(small_store.n_images, 4)
    store = FeatureStore(features, small_store.labels, small_store.class_names)
    drawn = [
        EpisodeSampler(source, 3, 1, 2, torch.Generator().manual_seed(0)).sample(5)
        for source in (small_store, store)
    ]
    assert_equal(*drawn)


def test_it_moves_with_everything() -> None:
    moved = make(mirrored=torch.zeros(6, 2)).to("meta")
    for name in ("features", "labels", "mirrored", "class_counts", "class_index"):
        assert getattr(moved, name).device.type == "meta"
    assert make().to("meta").mirrored is None


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"features": torch.zeros(6)}, ValueError, r"features: expected a non-empty \[N, D\], got \[6\]"),
        ({"features": torch.zeros(0, 2)}, ValueError, r"non-empty \[N, D\], got \[0, 2\]"),
        (
            {"features": torch.zeros(6, 2).double()},
            TypeError,
            "features: expected float32, got torch.float64",
        ),
        ({"labels": torch.zeros(5, dtype=torch.int64)}, ValueError, r"labels: expected \[6\] .* got \[5\]"),
        ({"labels": torch.zeros(6)}, TypeError, "labels: expected int64, got torch.float32"),
        ({"labels": torch.zeros(6, dtype=torch.int64)}, ValueError, r"labels: 0\.\.0 do not fill 0\.\.2"),
        ({"labels": torch.tensor([0, 1, 2, 3, 0, 0])}, ValueError, r"labels: 0\.\.3 do not fill 0\.\.2"),
        ({"labels": torch.tensor([0, 1, 2, -1, 0, 0])}, ValueError, r"labels: -1\.\.2 do not fill 0\.\.2"),
        ({"mirrored": torch.zeros(6, 3)}, ValueError, r"mirrored: expected \[6, 2\], got \[6, 3\]"),
        (
            {"features": torch.tensor([[0.0, 0.0]] * 4 + [[0.0, math.nan]] * 2)},
            ValueError,
            "features: row 4 holds numbers that are not finite",
        ),
    ],
)
def test_what_does_not_fit_is_named(changes: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        make(**changes)
