"""The picture of a data set: which images it shows and where, and names of any length."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mtl_fast.data import ImageStore
from mtl_fast.data.contact_sheet import N_CLASSES, N_IMAGES, write_contact_sheet
from mtl_fast.errors import InputError


def plain(n_classes: int, n_images: int, height: int = 32, width: int = 32) -> ImageStore:
    """Class c, image i is one colour: (c, i, 9)."""
    labels = torch.arange(n_classes).repeat_interleave(n_images)
    colours = torch.stack([labels, torch.arange(n_images).repeat(n_classes), torch.full_like(labels, 9)], 1)
    images = colours[:, None, None, :].expand(-1, height, width, 3).to(torch.uint8).contiguous()
    return ImageStore(images, labels, tuple(f"class {i}" for i in range(n_classes)))


def cells(sheet: Image.Image) -> list[tuple[int, int]]:
    """(class, image) of each picture on the sheet, row by row, from its colour."""
    pixels = np.asarray(sheet)[::8, 300::8].reshape(-1, 3)
    return list(dict.fromkeys((int(c), int(i)) for c, i, mark in pixels if mark == 9))


def test_classes_and_images_are_spread_over_the_whole(tmp_path: Path) -> None:
    path = tmp_path / "sheet.png"
    write_contact_sheet(path, {"train": plain(26, 34)})
    found = cells(Image.open(path))
    assert found == [(c, i) for c in (0, 5, 10, 15, 20, 25) for i in range(0, 34, 3)]
    assert len(found) == N_CLASSES * N_IMAGES


def test_few_classes_and_images_are_all_shown(tmp_path: Path) -> None:
    path = tmp_path / "sheet.png"
    write_contact_sheet(path, {"train": plain(2, 3), "test": plain(1, 1)})
    assert cells(Image.open(path)) == [(c, i) for c in (0, 1) for i in range(3)]
    assert [file.name for file in tmp_path.iterdir()] == ["sheet.png"]


@pytest.mark.parametrize(("height", "width"), [(32, 32), (84, 84), (200, 50), (1, 300), (7, 3)])
def test_images_keep_their_shape_within_a_cell(tmp_path: Path, height: int, width: int) -> None:
    path = tmp_path / "sheet.png"
    write_contact_sheet(path, {"train": plain(1, 1, height, width)})
    rows, columns = np.nonzero((np.asarray(Image.open(path))[..., :] == (0, 0, 9)).all(-1))
    scale = 96 / max(height, width)
    assert np.ptp(rows) + 1 == max(1, round(scale * height))
    assert np.ptp(columns) + 1 == max(1, round(scale * width))


@pytest.mark.parametrize("name", ["", "x" * 500, "漢字", "a\nb", "\udcff", "e\u0301" * 200])
def test_any_name_is_drawn_beside_the_pictures(tmp_path: Path, name: str) -> None:
    path = tmp_path / "sheet.png"
    store = plain(1, 1)
    named = ImageStore(store.images, store.labels, (name,), (name,))
    write_contact_sheet(path, {"train": named})
    pixels = np.asarray(Image.open(path))
    assert (pixels[90:, 300:320] == 255).all()


def test_equal_data_give_equal_files(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        write_contact_sheet(tmp_path / name, {"val": plain(3, 3)})
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    path = tmp_path / "none" / "sheet.png"
    with pytest.raises(InputError, match=r"sheet\.png: cannot be written \(No such file"):
        write_contact_sheet(path, {"val": plain(1, 1)})
