"""miniImageNet's cache files: keys of both Pythons, and copies that are damaged."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mtl_fast.data import load_split
from tests.data import python2
from tests.data.cases import error_of, write
from tests.data.copies import MINI_IMAGES, mini_cache


def test_rows_go_to_their_classes(tmp_path: Path) -> None:
    path = mini_cache(tmp_path)
    for source in (tmp_path, path):
        store = load_split(source, "train")
        assert store.class_names == ("n01", "n02")
        assert store.labels.tolist() == [1, 0, 0, 0, 1, 1, 0]
        assert np.array_equal(store.images.numpy(), MINI_IMAGES)
        assert store.name == str(path)


@pytest.mark.parametrize("python", [2, 3])
def test_keys_may_be_bytes(tmp_path: Path, python: int) -> None:
    value = {b"image_data": MINI_IMAGES, b"class_dict": {b"n01": np.arange(7)}}
    path = tmp_path / "mini-imagenet-cache-test.pkl"
    write(path, python2.dumps(value) if python == 2 else pickle.dumps(value, 2))
    assert load_split(tmp_path, "test").class_names == ("n01",)


def test_validation_goes_by_two_names(tmp_path: Path) -> None:
    mini_cache(tmp_path, "validation")
    assert load_split(tmp_path, "val").n_images == 7
    assert "miniImageNet cache without split 'train', only val" in error_of(tmp_path, "train")


def test_rows_of_no_class_are_left_out(tmp_path: Path) -> None:
    mini_cache(tmp_path, class_dict={"a": [6], "b": [0, 2]})
    store = load_split(tmp_path, "train")
    assert store.labels.tolist() == [1, 1, 0]
    assert np.array_equal(store.images.numpy(), MINI_IMAGES[[0, 2, 6]])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"image_data": MINI_IMAGES[..., :1]},
            "expected images uint8 [N, 84, 84, 3], got uint8 [7, 84, 84, 1]",
        ),
        ({"image_data": MINI_IMAGES.astype(np.float32)}, "got float32 [7, 84, 84, 3]"),
        ({"image_data": MINI_IMAGES[:0]}, "got uint8 [0, 84, 84, 3]"),
        ({"image_data": "none"}, "got a str"),
        ({"class_dict": {"a": [0, 7]}}, "class a: row 7 is out of range; there are 7 images"),
        ({"class_dict": {"a": [-1]}}, "class a: row -1 is out of range"),
        ({"class_dict": {"a": [0], "b": []}}, "class 1 (b) of 2 has no image"),
        ({"class_dict": {"a": [0], "b": [0]}}, "row 0 belongs to two classes, b is one"),
        ({"class_dict": {"a": ["x"]}}, "the rows of class a are no list of numbers"),
        ({"class_dict": {"a": [[1], [2, 3]]}}, "the rows of class a are no list of numbers"),
        ({"class_dict": {}}, "'class_dict' is no dict of rows by class"),
        ({"class_dict": [1]}, "'class_dict' is no dict of rows by class"),
    ],
)
def test_a_damaged_copy_is_named(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    path = mini_cache(tmp_path, **changes)
    message = error_of(tmp_path, "train")
    assert message.startswith(f"{path}: ")
    assert says in message


def test_missing_entries_and_cut_files_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "mini-imagenet-cache-val.pkl", pickle.dumps({"image_data": MINI_IMAGES}))
    assert f"{path}: no entry 'class_dict', only image_data" in error_of(tmp_path, "val")
    write(path, pickle.dumps([1]))
    assert f"{path}: holds a list, expected a dict with 'image_data'" in error_of(tmp_path, "val")
    whole = mini_cache(tmp_path).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "cut short or damaged" in error_of(tmp_path, "val")
