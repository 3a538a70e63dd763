"""CUB-200-2011: the splits in use, boxes, and files that are damaged."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from mtl_fast.data import load_split
from tests.data.cases import encoded, error_of, picture, write
from tests.data.copies import BIRDS, cub


def test_classes_are_split_by_their_number_modulo_4(tmp_path: Path) -> None:
    root = cub(tmp_path)
    for place in (tmp_path, root, root / "images.txt"):
        assert load_split(place, "train").class_names == ("001.Albatross", "003.Bunting", "005.Gull")
    val, test = load_split(root, "val"), load_split(root, "test")
    assert (val.class_names, test.class_names) == (("002.Auk",), ("004.Wren",))
    assert np.array_equal(val.images.numpy(), np.stack([picture(6, 8, seed=i) for i in (2, 3)]))
    assert val.labels.tolist() == [0, 0]
    assert val.name == f"{root} (val)"


def test_two_hundred_classes_are_split_100_50_50(tmp_path: Path) -> None:
    names = [f"{i:03}.B/b.jpg" for i in range(1, 201)]
    for name in names:
        write(tmp_path / "images" / name, picture(2, 2))
    write(tmp_path / "images.txt", "".join(f"{i} {name}\n" for i, name in enumerate(names, 1)))
    assert [load_split(tmp_path, split).n_classes for split in ("train", "val", "test")] == [100, 50, 50]


@pytest.mark.parametrize("val", ["valid", "val"])
def test_a_list_of_classes_goes_before_the_numbers(tmp_path: Path, val: str) -> None:
    root = cub(tmp_path)
    lists = {"train": BIRDS[:3], val: BIRDS[3:4], "test": BIRDS[4:]}
    write(root / "cu_birds_splits.json", json.dumps(lists))
    found = [load_split(root, split).class_names for split in ("train", "val", "test")]
    assert found == [BIRDS[:3], BIRDS[3:4], BIRDS[4:]]


def test_boxes_are_cropped_to_on_request(tmp_path: Path) -> None:
    root = cub(tmp_path)
    whole, cropped = (load_split(root, "val", crop_to_box=crop).images for crop in (False, True))
    assert whole.shape == (2, 6, 8, 3)
    assert np.array_equal(cropped.numpy(), whole[:, 1:4, 2:6].numpy())


def test_pixels_stay_as_stored_for_boxes_are_of_those(tmp_path: Path) -> None:
    root = cub(tmp_path)
    plain = load_split(root, "val", crop_to_box=True).images
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    for i in (2, 3):
        name = f"images/{BIRDS[1]}/{BIRDS[1][4:]}_{i - 2}.jpg"
        write(root / name, encoded(picture(6, 8, seed=i), "png", exif=exif))
    assert load_split(root, "val").image_size == (6, 8)
    assert torch.equal(load_split(root, "val", crop_to_box=True).images, plain)


def test_a_box_is_cut_to_the_image(tmp_path: Path) -> None:
    root = cub(tmp_path)
    write(root / "bounding_boxes.txt", "".join(f"{i} -1.5 4.0 5.2 9.0\n" for i in range(1, 11)))
    assert np.array_equal(
        load_split(root, "val", crop_to_box=True).images.numpy(),
        load_split(root, "val").images[:, 4:, :4].numpy(),
    )


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("images.txt", "", "images.txt: lists no image"),
        (
            "images.txt",
            "1 Albatross.jpg\n",
            "images.txt, line 1: '1 Albatross.jpg', expected '<id> <NNN.Name>",
        ),
        ("images.txt", "1 001.A/../../x.jpg\n", "images.txt, line 1"),
        ("images.txt", "1 ../x.jpg\n", "images.txt, line 1"),
        ("images.txt", b"\xff\xfe", "images.txt: cannot be read"),
        (
            "images.txt",
            "1 001.A/a.jpg\n2 002.B/b.jpg\n3 001.A/a.jpg\n",
            "images.txt, lines 1 and 3: '001.A/a.jpg' is listed twice; remove one of the lines",
        ),
        ("images.txt", "1 001.A/a.jpg\n1 002.B/b.jpg\n", "images.txt, lines 1 and 2: '1' is listed twice"),
        ("images.txt", "1 001.A/a.jpg\n2 003.C/c.jpg\n", "images.txt: class 002 has no image"),
        ("images.txt", "1 001.A/a.jpg\n2 002.B/c.jpg\n", "(unreadable) cannot be decoded: No such file"),
        ("bounding_boxes.txt", "1 2 3\n", "bounding_boxes.txt, line 1: '1 2 3', expected '<id> <x>"),
        ("bounding_boxes.txt", "1 a b c d\n", "bounding_boxes.txt, line 1"),
        ("bounding_boxes.txt", "1 nan 0 inf 5\n", "bounding_boxes.txt, line 1"),
        (
            "bounding_boxes.txt",
            "".join(f"{i} 90 90 4 4\n" for i in range(1, 11)),
            "is 8x6 pixels, its box (90, 90, 94, 94) lies outside",
        ),
        (
            "bounding_boxes.txt",
            "2 1 1 4 4\n",
            "001.Albatross/Albatross_0.jpg: has no box to crop to, like 5 of 6 images",
        ),
        ("cu_birds_splits.json", "[]", "cu_birds_splits.json: is no list of classes"),
        ("cu_birds_splits.json", '{"valid": []}', "cu_birds_splits.json: is no list of classes"),
        (
            "cu_birds_splits.json",
            '{"train": ["001.Dodo"]}',
            "images.txt: class 001.Dodo of train has no image",
        ),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, file: str, content: str | bytes, says: str) -> None:
    root = cub(tmp_path)
    write(root / file, content)
    assert says in error_of(root, "train", 4, crop_to_box=True)


def test_boxes_asked_for_must_be_there(tmp_path: Path) -> None:
    root = cub(tmp_path)
    (root / "bounding_boxes.txt").unlink()
    assert load_split(root, "train").n_images == 6
    assert "has no box to crop to, like 6 of 6 images; complete the boxes, or leave" in error_of(
        root, "train", crop_to_box=True
    )


def test_a_split_without_images_is_named(tmp_path: Path) -> None:
    root = cub(tmp_path)
    write(root / "cu_birds_splits.json", json.dumps({"train": BIRDS, "valid": [], "test": BIRDS[:1]}))
    assert error_of(root, "val") == f"{root}: no image is in split 'val'; get it again, or name another split"
