"""CIFAR-100's own files: merged, split as FC100, whole and damaged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mtl_fast.data import fc100, load_split
from tests.data.cases import error_of
from tests.data.copies import CIFAR_META, CIFAR_PARTS, cifar100


@pytest.mark.parametrize("old", [True, False], ids=["python-2", "python-3"])
def test_both_files_are_merged_and_split_by_super_class(tmp_path: Path, old: bool) -> None:
    root = cifar100(tmp_path, old=old)
    fine, coarse, data = (
        np.concatenate([CIFAR_PARTS["train"][key], CIFAR_PARTS["test"][key]])
        for key in ("fine_labels", "coarse_labels", "data")
    )
    for split, n_classes in (("train", 60), ("val", 20), ("test", 20)):
        store = load_split(tmp_path if split == "train" else root, split)
        kept = [i for i, its in enumerate(coarse) if its in fc100.SUPER_CLASSES[split]]
        assert (store.n_classes, store.n_images) == (n_classes, 3 * n_classes)
        assert [store.class_names[label] for label in store.labels] == [fc100.FINE[fine[i]] for i in kept]
        # [N, 3072] is 1024 red, 1024 green, 1024 blue, rows of 32.
        for channel in range(3):
            plane = data[kept, 1024 * channel : 1024 * (channel + 1)].reshape(-1, 32, 32)
            assert np.array_equal(store.images[..., channel].numpy(), plane)
        assert store.super_class_names == tuple(fc100.super_class_names(split).values())
        assert store.name == f"{root} ({split})"


def with_part(key: str, value: Any) -> dict[str, Any]:
    return {"train": CIFAR_PARTS["train"] | {key: value}}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            with_part("data", CIFAR_PARTS["train"]["data"][:, :1024]),
            "train: expected data uint8 [N, 3072], got uint8 [200",
        ),
        (with_part("data", [1]), "train: expected data uint8 [N, 3072], got a list"),
        (with_part("fine_labels", [0] * 7), "train: expected 200 whole numbers as labels"),
        (with_part("fine_labels", [100] * 200), "train: fine_labels: label 100 (200 images) is out of range"),
        (
            with_part("coarse_labels", [-1] * 200),
            "train: coarse_labels: label -1 (200 images) is out of range",
        ),
        (with_part("coarse_labels", [0] * 200), "class 0 has images of several coarse labels"),
        ({"meta": {"fine_label_names": list(fc100.FINE)}}, "meta: no entry 'coarse_label_names'"),
        (
            {"meta": CIFAR_META | {"fine_label_names": ["a"]}},
            "meta: expected 100 names in 'fine_label_names'",
        ),
        ({"test": {"data": CIFAR_PARTS["test"]["data"]}}, "test: no entry 'fine_labels', only data"),
    ],
)
def test_a_damaged_copy_is_named(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    root = cifar100(tmp_path, **changes)
    message = error_of(root, "val")
    assert message.startswith(str(root))
    assert says in message


def test_a_class_without_image_is_named(tmp_path: Path) -> None:
    parts = {}
    for name, value in CIFAR_PARTS.items():
        kept = [i for i, label in enumerate(value["fine_labels"]) if label != 23]
        parts[name] = {
            key: item[kept] if isinstance(item, np.ndarray) else [item[i] for i in kept]
            for key, item in value.items()
        }
    root = cifar100(tmp_path, **parts)
    assert error_of(root, "train").startswith(f"{root}: class 23 of 100 has no image")


def test_a_file_that_is_cut_or_missing_is_named(tmp_path: Path) -> None:
    root = cifar100(tmp_path)
    (root / "train").write_bytes((root / "train").read_bytes()[:5000])
    assert error_of(root, "test").startswith(f"{root / 'train'} (5,000 bytes): cut short or damaged")
    (root / "train").unlink()
    assert error_of(root, "test").startswith(f"{root / 'train'}: cannot be read: No such file")
