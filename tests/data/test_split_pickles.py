"""One pickle a split: miniImageNet by category split, FC100, CIFAR-FS, whole and damaged."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from PIL import Image

from mtl_fast.data import fc100, load_split
from mtl_fast.data.pixels import resize_and_crop
from tests.data.cases import error_of, pictures, write
from tests.data.copies import split_pickle


@pytest.mark.parametrize("old", [False, True], ids=["python-3", "python-2"])
@pytest.mark.parametrize("split", ["train", "val", "test"])
@pytest.mark.parametrize("kind", ["category", "fc100", "fs"])
def test_images_and_labels_come_back(tmp_path: Path, kind: str, split: str, old: bool) -> None:
    value = split_pickle(tmp_path, kind, split, old=old)
    store = load_split(tmp_path, split)
    order = {number: i for i, number in enumerate(sorted(set(value["labels"])))}
    assert store.labels.tolist() == [order[label] for label in value["labels"]]
    assert np.array_equal(store.images.numpy(), value["data"])


@pytest.mark.parametrize("size", [32, 20])
@pytest.mark.parametrize("order", ["rgb", "bgr"])
def test_arrays_are_resized_and_turned_round(
    tmp_path: Path, size: int, order: Literal["rgb", "bgr"], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a cache too: what a pickle holds cannot be written to."""
    images = split_pickle(tmp_path, "fc100", "val")["data"]
    expected = np.stack([np.asarray(resize_and_crop(Image.fromarray(image), size)) for image in images])
    expected = expected if order == "rgb" else expected[..., ::-1]
    for folder in ("cache", "FC100_val.pickle/none"):
        monkeypatch.setenv("MTL_FAST_CACHE_DIR", str(tmp_path / folder))
        store = load_split(tmp_path, "val", size, channel_order=order)
        assert np.array_equal(store.images.numpy(), expected)
        store.images[0] = 0  # every store may be written to


def test_names_of_classes_and_super_classes(tmp_path: Path) -> None:
    for kind in ("category", "fc100", "fs"):
        split_pickle(tmp_path / kind, kind, "test")
    assert load_split(tmp_path / "category", "test").class_names[0] == "class 80"
    assert load_split(tmp_path / "fs", "test").class_names[-1] == "test 99"
    store = load_split(tmp_path / "fc100", "test")
    assert store.class_names[:3] == ("baby", "beaver", "bee")
    assert store.super_class_names is not None
    assert store.super_class_names[:3] == ("people", "aquatic_mammals", "insects")


@pytest.mark.parametrize(
    ("kind", "changes", "says"),
    [
        ("category", {"labels": [*range(64)] * 2 + [64]}, "expected 128 whole numbers as labels"),
        ("category", {"labels": [*range(63), 64] * 2}, "label 64 (2 images) is out of range; expected 0..63"),
        ("category", {"labels": [*range(63), -1] * 2}, "label -1 (2 images) is out of range"),
        ("category", {"labels": [*range(63), 0] * 2}, "class 63 (class 63) of 64 has no image"),
        (
            "category",
            {"labels": [0.5] * 128},
            "whole numbers as labels, one an image, got a list, not whole numbers",
        ),
        ("category", {"labels": [[0], [1, 2]] * 64}, "whole numbers as labels"),
        ("category", {"labels": "abc"}, "got a str, not whole numbers"),
        ("category", {"data": pictures(128, 32)}, "expected images uint8 [N, 84, 84, 3], got uint8 [128, 32"),
        ("fc100", {"data": pictures(120, 32).astype(np.int16)}, "got int16 [120, 32, 32, 3]"),
        ("fc100", {"labels": [*range(60)] * 2}, "label 2 (50 images) is out of range; expected one of 60 in"),
        ("fc100", {"labels": [*sorted(fc100.class_names("train"))[:-1], 1] * 2}, "has no image"),
        ("fs", {"labels": [*range(63), 100] * 2}, "label 100 is out of range; expected 0..99"),
        ("fs", {"labels": [*range(63), 0] * 2}, "63 classes have images, expected 64"),
    ],
)
def test_a_damaged_copy_is_named(tmp_path: Path, kind: str, changes: dict[str, Any], says: str) -> None:
    split_pickle(tmp_path, kind, "train", **changes)
    message = error_of(tmp_path, "train")
    (path,) = tmp_path.iterdir()
    assert message.startswith(f"{path}: ")
    assert says in message


@pytest.mark.parametrize("key", ["data", "labels"])
def test_a_missing_entry_is_named(tmp_path: Path, key: str) -> None:
    value = split_pickle(tmp_path, "fc100", "val")
    write(tmp_path / "FC100_val.pickle", pickle.dumps({k: v for k, v in value.items() if k != key}))
    assert f"no entry '{key}', only " in error_of(tmp_path, "val")


def test_cut_and_hostile_copies_are_named(tmp_path: Path) -> None:
    split_pickle(tmp_path, "fs", "val")
    path = tmp_path / "CIFAR_FS_val.pickle"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 2 // 3])
    assert "cut short or damaged" in error_of(tmp_path, "val")
    path.write_bytes(b"cos\nsystem\n(S'touch hostile'\ntR.")
    assert "asks for os.system" in error_of(tmp_path, "val")
