"""Class folders: what belongs to a class, in which order, and what is said of the rest."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mtl_fast.data import load_split
from tests.data.cases import encoded, error_of, picture, two_classes, write


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return two_classes(tmp_path)


@pytest.mark.parametrize("n_workers", [1, 3, None])
def test_order_is_that_of_the_names(root, n_workers):
    store = load_split(root, "train", n_workers=n_workers)
    assert store.class_names == ("a", "b")
    assert store.labels.tolist() == [0, 0, 1, 1]
    expected = np.stack([picture(seed=seed) for seed in (2, 3, 1, 0)])
    assert torch.equal(store.images, torch.from_numpy(expected))
    assert store.name == str(root / "train")


def test_load_split_reads_class_folders(root):
    assert torch.equal(load_split(str(root), "test").images[0], torch.from_numpy(picture(seed=4)))
    assert load_split(root, "train", 4, n_workers=1).image_size == (4, 4)


def test_all_suffixes_in_any_case(tmp_path):
    kinds = {"a.jpg": "jpeg", "b.JPEG": "jpeg", "c.Png": "png", "d.webp": "webp", "e.BMP": "bmp"}
    for name, kind in kinds.items():
        write(tmp_path / "train/x" / name, encoded(np.full((5, 5, 3), 77, np.uint8), kind))
    store = load_split(tmp_path, "train")
    assert store.n_images == 5
    assert (store.images.int() - 77).abs().max() <= 3  # lossy, but a plain colour survives


def test_of_a_gif_the_first_picture_is_read(tmp_path):
    first, second = (Image.fromarray(np.full((5, 5), value, np.uint8)) for value in (40, 200))
    (tmp_path / "train/x").mkdir(parents=True)
    first.save(tmp_path / "train/x/1.gif", save_all=True, append_images=[second])
    assert load_split(tmp_path, "train").images.unique().tolist() == [40]


def test_hidden_and_other_files_are_passed_over(root, capsys):
    for name in (
        "train/.DS_Store",
        "train/a/.hidden.png",
        "train/a/Thumbs.db",
        "train/b/notes.txt",
        "train/list.csv",
    ):
        write(root / name, b"no image")
    write(root / "train/.ipynb_checkpoints/1.png", picture())
    write(root / "train/__MACOSX/a/1.png", picture())
    write(root / "train/a/.ipynb_checkpoints/1.png", picture())
    assert load_split(root, "train").class_counts.tolist() == [2, 2]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["train/stray.png", "train/a/deeper/still/1.png"])
def test_images_outside_a_class_are_left_out_with_a_word(root, name, capsys):
    write(root / name, picture())
    for _ in range(2):
        assert load_split(root, "train").class_counts.tolist() == [2, 2]
    assert capsys.readouterr().err == (
        f"{root / 'train'}: left out: 1 images in no class folder, such as {root / name}; what is read is "
        "<class>/*.{jpg,jpeg,png,webp,gif,bmp}\n"
    )


def test_images_that_are_not_read_and_broken_links_are_counted(root, capsys):
    for name in ("train/a/1.tif", "train/b/1.TIF", "train/b/old/2.heic", "train/list.csv", "train/b/.3.tif"):
        write(root / name, b"")
    (root / "train/gone").symlink_to(root / "nowhere")
    (root / "train/b/circle").symlink_to(root / "train/b/circle")
    assert load_split(root, "train").class_counts.tolist() == [2, 2]
    assert capsys.readouterr().err == (
        f"{root / 'train'}: left out: 1× .heic, 2× .tif, 2× broken link, such as {root / 'train/gone'}; what is read "
        "is <class>/*.{jpg,jpeg,png,webp,gif,bmp}\n"
    )


def test_links_to_folders_are_classes_and_circles_do_no_harm(root):
    (root / "train/d").symlink_to(root / "test/c")
    (root / "train/a/notes").mkdir()
    (root / "train/a/notes/up").symlink_to(root / "train/a")
    assert load_split(root, "train").class_names == ("a", "b", "d")


# --------------------------------------------------------------------------------------------- bad folders


def test_missing_split_says_which_exist(root):
    assert f"{root}: class folders without split 'val', only train, test; expected {{train" in error_of(
        root, "val"
    )
    assert "split 'validation' is unknown; choose train, val, test" in error_of(root, "validation")


def test_split_without_classes(root):
    (root / "val").mkdir()
    assert f"{root / 'val'}: holds nothing" in error_of(root, "val")
    write(root / "val/1.png", picture())
    assert "holds 1 files but no class folders" in error_of(root, "val")


def test_class_without_images(root):
    write(root / "train/bare/readme.txt", b"soon")
    message = error_of(root, "train")
    assert message.startswith(
        f"{root / 'train/bare'}: no .jpg, .jpeg, .png, .webp, .gif, .bmp file in this class; add some"
    )
    write(root / "train/bare/1.tiff", b"")
    assert ".bmp file in this class (1× .tiff: convert them); add some" in error_of(root, "train")
    write(root / "train/bare/images/1.png", picture())
    assert f"1 lie deeper, such as {root / 'train/bare/images/1.png'}: move them up" in error_of(
        root, "train"
    )
