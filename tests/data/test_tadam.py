"""FC100 in TADAM's archives, whole and damaged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mtl_fast.data import fc100, load_split
from tests.data.cases import error_of, pictures, write
from tests.data.copies import tadam


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_ids_of_cifar_name_the_classes(tmp_path: Path, split: str) -> None:
    ids = sorted(fc100.class_names(split))
    arrays = tadam(tmp_path, split, ids[::-1] * 2)
    store = load_split(tmp_path, split)
    assert [store.class_names[label] for label in store.labels] == [fc100.FINE[i] for i in ids[::-1] * 2]
    assert np.array_equal(store.images.numpy(), arrays["features"])
    assert store.super_class_names == tuple(fc100.super_class_names(split).values())


def test_other_numbers_leave_the_classes_without_names(tmp_path: Path) -> None:
    tadam(tmp_path, "val", range(20))
    store = load_split(tmp_path, "val")
    assert store.class_names[:2] == ("val 0", "val 1")
    assert store.super_class_names is None


@pytest.mark.parametrize(
    ("targets", "changes", "says"),
    [
        (
            range(20),
            {"features": pictures(20, 84)},
            "expected images uint8 [N, 32, 32, 3], got uint8 [20, 84",
        ),
        (range(20), {"features": pictures(19, 32)}, "expected 19 whole numbers as labels"),
        (range(20), {"targets": np.zeros(20)}, "got float64 [20], not whole numbers"),
        ([*range(19), 100], {}, "label 100 is out of range; expected 0..99"),
        ([*range(19), 0], {}, "19 classes have images, expected 20"),
        (
            range(20),
            {"targets": np.array([{}] * 20, object)},
            "cut short or damaged (Object arrays cannot be",
        ),
    ],
)
def test_a_damaged_copy_is_named(tmp_path: Path, targets: Any, changes: dict[str, Any], says: str) -> None:
    tadam(tmp_path, "val", targets, **changes)
    message = error_of(tmp_path, "val")
    assert message.startswith(f"{tmp_path / 'few-shot-val.npz'}: ")
    assert says in message


def test_missing_entries_and_files_that_are_no_tadam(tmp_path: Path) -> None:
    path = tmp_path / "few-shot-val.npz"
    np.savez(path, features=pictures(2, 32))
    assert error_of(tmp_path, "val") == f"{path}: no entry 'targets', only features; get the file again"
    with open(path, "wb") as file:
        np.save(file, pictures(2, 32))
    assert f"{path}: one array, expected an archive with features, targets" in error_of(tmp_path, "val")
    for content in (b"", b"<html>", b"PK\x03\x04"):
        write(path, content)
        assert f"{path}: cut short or damaged" in error_of(tmp_path, "val")


def test_wherever_an_archive_is_cut_it_is_an_error(tmp_path: Path) -> None:
    tadam(tmp_path, "val", range(20))
    path = tmp_path / "few-shot-val.npz"
    whole = path.read_bytes()
    for cut in range(0, len(whole), len(whole) // 20):
        path.write_bytes(whole[:cut])
        assert "cut short or damaged" in error_of(tmp_path, "val")
    # A byte turned over inside the compressed images is noticed by the archive's checksum.
    path.write_bytes(whole[:3000] + bytes([whole[3000] ^ 255]) + whole[3001:])
    assert "cut short or damaged" in error_of(tmp_path, "val")
