"""What is said of a data set: numbers against plain computation, what splits share, sizes on disk."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from mtl_fast.data import load_split
from mtl_fast.data.dataset import Options
from mtl_fast.data.info import channel_statistics, inspect_data
from mtl_fast.errors import InputError
from tests.data.cases import picture, pictures, write
from tests.data.copies import CIFAR_PARTS, cifar100, class_folders, cub, tiered

LABELS = {"labels": [0, 1] * 3}


@pytest.mark.parametrize("n", [1, 3, 300])
def test_statistics_are_those_of_all_pixels(n: int) -> None:
    images = pictures(n, 5, seed=n)
    images[..., 2] //= 3
    mean, std = channel_statistics(images)
    pixels = images.reshape(-1, 3).astype(np.float64)
    # Sums of at most 2^53 are exact in float64: a few roundings are all that is left.
    np.testing.assert_allclose(mean, pixels.mean(0), rtol=4 * np.finfo(float).eps * 8)
    np.testing.assert_allclose(
        std, pixels.std(0), rtol=4 * np.finfo(float).eps * np.sqrt(pixels.shape[0] + 64)
    )


def test_statistics_of_one_colour() -> None:
    assert channel_statistics(np.full((2, 3, 3, 3), [0, 7, 255], np.uint8)) == ((0, 7, 255), (0, 0, 0))


def test_a_data_set_in_words(tmp_path: Path) -> None:
    root = cifar100(tmp_path)
    info = inspect_data(root, Options())
    assert (info.format, info.common_size) == ("CIFAR-100 (split as FC100)", None)
    assert [split.store.n_classes for split in info.splits.values()] == [60, 20, 20]
    n_images = len(CIFAR_PARTS["train"]["data"]) + len(CIFAR_PARTS["test"]["data"])
    assert sum(split.store.n_images for split in info.splits.values()) == n_images
    lines = str(info).splitlines()
    assert lines[0] == f"{root}: CIFAR-100 (split as FC100)"
    assert lines[1:3] == ["  cifar-100-python/{train,test,meta}", "  the files tell their channel order"]
    assert re.split(r"  +", lines[4]) == [
        "split",
        "classes",
        "images",
        "a class",
        "pixels",
        "mean (R, G, B)",
        "std (R, G, B)",
    ]
    assert [re.split(r"  +", line)[:5] for line in lines[6:9]] == [
        ["train", "60", "180", "3", "32×32"],
        ["val", "20", "60", "3", "32×32"],
        ["test", "20", "60", "3", "32×32"],
    ]
    assert lines[10] == "No class, super-class or image is in two splits."
    mean = " ".join(f"{x:.1f}" for x in info.splits["train"].mean)
    assert lines[11].startswith(f"To normalise by the training images: --data.mean {mean} --data.std ")


def test_what_splits_share_is_said(tmp_path: Path) -> None:
    same, other = picture(seed=1), picture(seed=2)
    for split, name, image in (
        ("train", "cat", same),
        ("train", "dog", other),
        ("val", "cat", other),
        ("val", "cow", same),
        ("test", "hen", picture(seed=3)),
    ):
        write(tmp_path / split / name / "1.png", image)
    info = inspect_data(tmp_path, Options())
    assert [overlap.is_empty for overlap in info.overlaps] == [False, True, True]
    first = info.overlaps[0]
    assert (first.splits, first.classes, first.n_images) == (("train", "val"), ["cat"], 2)
    assert "train and val share 1 class (cat), 2 images!" in str(info).splitlines()
    assert "No class, super-class" not in str(info)


def test_super_classes_that_splits_share_are_said(tmp_path: Path) -> None:
    names = {"label_specific_str": ["a", "b"], "label_general_str": ["x", "y"]}
    numbers = {"label_specific": np.array([0, 1] * 3), "label_general": np.array([0, 1] * 3)}
    tiered(tmp_path, pictures(6, 84, seed=1), names | numbers, "train")
    names["label_specific_str"] = ["c", "d"]
    tiered(tmp_path, pictures(6, 84, seed=2), names | numbers, "test")
    text = str(inspect_data(tmp_path, Options(channel_order="rgb")))
    assert "train and test share 2 super-classes (such as x)!" in text
    assert "There is no val split." in text
    assert "  read as RGB, as asked for; the files do not tell" in text


def test_the_channel_order_of_a_format_is_said(tmp_path: Path) -> None:
    tiered(tmp_path, pictures(6, 84), LABELS)
    assert "  read as BGR, the habit of this format; the files do not tell" in str(
        inspect_data(tmp_path, Options())
    )


def test_images_of_several_sizes_are_measured_on_disk(tmp_path: Path) -> None:
    class_folders(tmp_path)
    info = inspect_data(tmp_path, Options())
    assert info.common_size == 84
    assert info.splits["test"].sizes == {(7, 8): 2, (8, 8): 2}
    assert info.splits["test"].store.image_size == (84, 84)
    text = str(info)
    assert "7×8 … 8×8, 2 sizes" in text
    assert "Images are of several sizes: set image_size. Statistics are those at 84×84." in text
    small = inspect_data(tmp_path, Options(image_size=5))
    assert (small.common_size, small.splits["train"].store.image_size) == (None, (5, 5))
    assert small.splits["test"].sizes == info.splits["test"].sizes


def test_splits_of_a_size_each_are_images_of_several_sizes(tmp_path: Path) -> None:
    for split, side in (("train", 32), ("val", 40)):
        write(tmp_path / split / "x" / "1.png", picture(side, side))
    text = str(inspect_data(tmp_path, Options()))
    assert "Images are of several sizes: set image_size." in text
    assert [line.split()[4] for line in text.splitlines() if "×" in line][:2] == ["32×32", "40×40"]


def test_crops_to_boxes_are_brought_to_one_size(tmp_path: Path) -> None:
    info = inspect_data(cub(tmp_path), Options(crop_to_box=True))
    assert info.splits["val"].store.image_size == (84, 84)
    assert info.splits["val"].sizes == {(8, 6): 2}


def test_the_embedded_set(tmp_path: Path) -> None:
    info = inspect_data("glyphs:soft", Options(image_size=8))
    assert info.format == "Glyphs"
    assert [split.store.image_size for split in info.splits.values()] == [(8, 8)] * 3
    assert all(overlap.is_empty for overlap in info.overlaps)
    assert info.splits["val"].store.class_names == load_split("glyphs", "val").class_names
    with pytest.raises(InputError, match="glyphs: takes neither"):
        inspect_data("glyphs", Options(channel_order="rgb"))
