"""tieredImageNet: PNG buffers and arrays, both kinds of labels, whole and damaged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mtl_fast.data import load_split
from tests.data.cases import encoded, error_of, pictures
from tests.data.copies import TIERED_IMAGES, TIERED_LABELS, png_buffers, tiered

PLAIN = {"labels": [2, 0, 1, 2, 0, 1]}


@pytest.mark.parametrize("split", ["train", "val", "test"])
@pytest.mark.parametrize("old", [True, False], ids=["python-2", "python-3"])
def test_png_buffers_are_decoded_as_rgb(tmp_path: Path, old: bool, split: str) -> None:
    store = load_split(tiered(tmp_path, png_buffers(), TIERED_LABELS, split, old=old), split)
    assert np.array_equal(store.images.numpy(), TIERED_IMAGES)
    assert store.labels.tolist() == [2, 0, 1, 2, 0, 1]
    assert store.class_names == ("n03", "n01", "n02")
    assert store.super_class_names == ("bird", "fish", "fish")


def test_png_buffers_may_be_columns(tmp_path: Path) -> None:
    tiered(tmp_path, [buffer[:, None] for buffer in png_buffers()], TIERED_LABELS)
    assert np.array_equal(load_split(tmp_path, "train").images.numpy(), TIERED_IMAGES)


def test_png_buffers_of_bytes_and_of_another_size(tmp_path: Path) -> None:
    tiered(tmp_path, [encoded(image) for image in pictures(6, 20)], TIERED_LABELS)
    assert load_split(tmp_path, "train", 10).image_size == (10, 10)


@pytest.mark.parametrize("labels", [TIERED_LABELS, PLAIN], ids=["names", "numbers"])
def test_arrays_are_blue_first_unless_told(
    tmp_path: Path, labels: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    tiered(tmp_path, TIERED_IMAGES, labels)
    store = load_split(tmp_path, "train")
    assert np.array_equal(store.images.numpy(), TIERED_IMAGES[..., ::-1])
    said = capsys.readouterr().err
    assert said == (
        f"{tmp_path}: tieredImageNet, arrays is read as BGR; if colours look wrong, set channel_order to rgb\n"
    )
    assert np.array_equal(
        load_split(tmp_path, "train", channel_order="bgr").images.numpy(), TIERED_IMAGES[..., ::-1]
    )
    assert np.array_equal(load_split(tmp_path, "train", channel_order="rgb").images.numpy(), TIERED_IMAGES)
    assert store.labels.tolist() == [2, 0, 1, 2, 0, 1]
    assert store.class_names == (
        ("n03", "n01", "n02") if labels is TIERED_LABELS else ("train 0", "train 1", "train 2")
    )
    assert capsys.readouterr().err == ""


def with_labels(**changes: Any) -> dict[str, Any]:
    return TIERED_LABELS | changes


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        ({"names": []}, "no entry 'labels', only names"),
        ([1, 2], "holds a list, expected a dict with 'label_specific'"),
        ({"labels": [0] * 5}, "expected 6 whole numbers as labels"),
        ({"labels": [0, 1, 2, 2, 1, -1]}, "label -1 is out of range; expected 0 or more"),
        ({"labels": [0, 1, 3, 3, 1, 0]}, "class 2 has no image"),
        ({"labels": [0, 1, 2**50, 3, 1, 0]}, "class 2 has no image"),
        (with_labels(label_specific=np.array([0, 1, 2, 3, 0, 0])), "label 3 (1 images) is out of range"),
        (with_labels(label_specific=np.array([0, 1, 1, 0, 0, 0])), "class 2 (n02) of 3 has no image"),
        (with_labels(label_general=np.array([0, 1, 2, 0, 0, 0])), "label_general: label 2 is out of range"),
        (with_labels(label_specific_str="abc"), "'label_specific_str' is no list of names"),
        ({k: v for k, v in TIERED_LABELS.items() if k != "label_general"}, "no entry 'label_general', only"),
    ],
)
@pytest.mark.parametrize("kind", ["png", "arrays"])
def test_damaged_labels_are_named(tmp_path: Path, kind: str, labels: Any, says: str) -> None:
    tiered(tmp_path, png_buffers() if kind == "png" else TIERED_IMAGES, labels)
    message = error_of(tmp_path, "train")
    assert message.startswith(f"{tmp_path / 'train_labels.pkl'}: ")
    assert says in message


@pytest.mark.parametrize(
    ("images", "says"),
    [
        (
            TIERED_IMAGES[..., :1],
            "train_images.npz: expected images uint8 [N, 84, 84, 3], got uint8 [6, 84, 84, 1]",
        ),
        ([], "train_images_png.pkl: holds a list, expected a list of PNG buffers"),
        ({"a": 1}, "train_images_png.pkl: holds a dict, expected a list"),
        (
            [*png_buffers()[:5], png_buffers()[5][:300]],
            "train_images_png.pkl: image 5 (300 bytes) cannot be decoded",
        ),
        (
            [*png_buffers()[:5], np.zeros(9, np.uint8)],
            "train_images_png.pkl: image 5 (9 bytes) is not an image",
        ),
        (
            [*png_buffers()[:5], np.zeros(9)],
            "train_images_png.pkl: image 5 is float64 [9], expected a uint8 buffer",
        ),
        ([*png_buffers()[:5], 7], "train_images_png.pkl: image 5 is a int, expected a uint8 buffer"),
    ],
)
def test_damaged_images_are_named(tmp_path: Path, images: Any, says: str) -> None:
    assert says in error_of(tiered(tmp_path, images, TIERED_LABELS), "train")


def test_missing_and_cut_files_are_named(tmp_path: Path) -> None:
    tiered(tmp_path, png_buffers(), TIERED_LABELS)
    path = tmp_path / "train_labels.pkl"
    path.unlink()
    assert error_of(tmp_path, "train").startswith(f"{path}: no such file; expected {{train")
    tiered(tmp_path, png_buffers(), TIERED_LABELS)
    images = tmp_path / "train_images_png.pkl"
    images.write_bytes(images.read_bytes()[:9999])
    assert error_of(tmp_path, "train").startswith(f"{images} (9,999 bytes): cut short or damaged")
