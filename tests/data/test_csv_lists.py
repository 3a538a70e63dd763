"""CSV lists: both headers, both placements of images, and lists that are wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mtl_fast.data import load_split
from tests.data.cases import error_of, picture, write
from tests.data.copies import csv_lists


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("header", ["filename,label", "class_name,image_name"])
def test_rows_are_images_in_their_order(tmp_path: Path, header: str, nested: bool) -> None:
    store = load_split(csv_lists(tmp_path, header, nested=nested), "train")
    assert store.class_names == ("n01", "n02")
    assert store.labels.tolist() == [1, 0, 1]
    assert np.array_equal(store.images.numpy(), np.stack([picture(seed=i) for i in range(3)]))
    assert store.name == str(tmp_path / "train.csv")
    assert load_split(tmp_path / "train.csv", "test").class_names == ("n01",)


def test_byte_order_mark_and_line_ends_of_windows(tmp_path: Path) -> None:
    csv_lists(tmp_path)
    write(tmp_path / "train.csv", b"\xef\xbb\xbffilename,label,more\r\na1.png,x,1\r\n")
    assert load_split(tmp_path, "train").class_names == ("x",)


def test_blanks_around_cells_are_none_of_theirs(tmp_path: Path) -> None:
    csv_lists(tmp_path)
    write(tmp_path / "train.csv", b'filename, label \r\na1.png,x\r\n a2.png ,\tx \r\na3.png, "y, z"\r\n')
    store = load_split(tmp_path, "train")
    assert store.class_names == ("x", "y, z")
    assert store.labels.tolist() == [0, 0, 1]


def test_one_name_in_two_class_folders_is_two_files(tmp_path: Path) -> None:
    for label in "xy":
        write(tmp_path / "images" / label / "1.png", picture())
    write(tmp_path / "train.csv", "filename,label\n1.png,x\n1.png,y\n")
    assert load_split(tmp_path, "train").class_counts.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "train.csv: the first line is 'nothing', expected filename,label or class_name,image_name"),
        (b"file,class\na1.png,x\n", "train.csv: the first line is 'file,class', expected filename,label"),
        (b"filename,label\n", "train.csv: lists no image"),
        (b"filename,label\na1.png,x\na2.png\n", "train.csv, line 3: no label"),
        (b"filename,label\n,x\n", "train.csv, line 2: no filename"),
        (b"filename,label\n../x.png,x\n", "train.csv, line 2: '../x.png' of 'x' lies outside of images/"),
        (b"filename,label\n/etc/x.png,x\n", "line 2: '/etc/x.png' of 'x' lies outside"),
        (b"filename,label\nx.png,../..\n", "line 2: 'x.png' of '../..' lies outside"),
        (
            b"filename,label\na1.png,x\na2.png,x\na1.png, x\n",
            "train.csv, lines 2 and 4: 'a1.png' is listed twice; remove one of the lines",
        ),
        (
            b"filename,label\na1.png,x\na1.png,y\n",
            "train.csv, lines 2 and 3: 'a1.png' is of 'x' and of 'y'; remove one of the lines",
        ),
        (b"filename,label\n  ,x\n", "train.csv, line 2: no filename"),
        (b"filename,label\n\xff\xfe,x\n", "train.csv: is no CSV list"),
        (b"filename,label\na1.png,x\ngone.png,x\n", "gone.png (unreadable) cannot be decoded: No such file"),
    ],
)
def test_a_list_that_is_wrong_is_named(tmp_path: Path, content: bytes, says: str) -> None:
    csv_lists(tmp_path)
    write(tmp_path / "train.csv", content)
    assert says in error_of(tmp_path, "train")


def test_a_split_without_list_and_a_list_without_images(tmp_path: Path) -> None:
    csv_lists(tmp_path)
    assert "CSV lists without split 'val', only train, test; expected {train" in error_of(tmp_path, "val")
    (tmp_path / "images").rename(tmp_path / "pictures")
    assert "looked for" in error_of(tmp_path, "train")
