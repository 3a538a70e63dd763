"""Decoding: every mode, every size, and files that are no images."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

import mtl_fast.data.pixels as pixels
from mtl_fast.data import load_split
from mtl_fast.data.dataset import Options
from mtl_fast.data.info import inspect_data
from mtl_fast.data.pixels import Encoded, resize_and_crop, to_rgb
from mtl_fast.errors import InputError
from tests.data.cases import encoded, error_of, picture, two_classes, write


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return two_classes(tmp_path)


# ---------------------------------------------------------------------------------------------- what is read


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "RGBA", "LA", "CMYK"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    image = Image.fromarray(picture()).convert(mode)
    kind = "jpeg" if mode == "CMYK" else "png"
    path = tmp_path / "train/x" / f"1.{kind}"
    path.parent.mkdir(parents=True)
    image.save(path)
    expected = np.asarray(Image.open(path).convert("RGB"))
    assert np.array_equal(load_split(tmp_path, "train").images[0].numpy(), expected)


def test_palette_with_transparency_is_read_without_a_warning(tmp_path):
    path = tmp_path / "train/x/1.png"
    path.parent.mkdir(parents=True)
    Image.fromarray(picture()).convert("P").save(path, transparency=bytes(range(200)))
    pixels = np.asarray(Image.open(path).convert("RGBA")).astype(int)
    alpha = pixels[..., 3:]
    expected = (alpha * pixels[..., :3] + (255 - alpha) * 255) / 255
    # The product is rounded once, in eight bits.
    assert np.abs(load_split(tmp_path, "train").images[0].numpy() - expected).max() <= 1


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P", "L", "RGB"])
def test_what_is_transparent_is_white(tmp_path, mode):
    """A black line on a background that is stored black too, and seen by nobody; only its line is opaque."""
    line = np.zeros((5, 5), np.uint8)
    line[2] = 255
    image, options = Image.new("LA", (5, 5)), {}
    image.putalpha(Image.fromarray(line))
    if mode in ("P", "L", "RGB"):  # a colour of its own is the transparent one
        image = Image.fromarray(np.where(line, 0, 1).astype(np.uint8) * np.uint8(9)).convert(mode)
        options = {
            "transparency": (9, 9, 9) if mode == "RGB" else 9 if mode == "L" else image.getpixel((0, 0))
        }
    else:
        image = image.convert("RGBA" if mode == "PA" else mode).convert(mode)
    expected = np.repeat(255 - line[..., None], 3, 2)
    if mode == "PA":  # which no file has that is read
        assert np.array_equal(np.asarray(to_rgb(image)), expected)
        return
    path = tmp_path / "train/x/1.png"
    path.parent.mkdir(parents=True)
    image.save(path, **options)
    assert np.array_equal(load_split(tmp_path, "train").images[0].numpy(), expected)


def upright(orientation: int) -> tuple[bytes, np.ndarray]:
    """A JPEG file that bears this orientation, and the 8x16 pixels that a viewer shows of it, grey and smooth."""
    shown = np.add.outer(np.arange(8) * 16, np.arange(16) * 4).astype(np.uint8)
    stored = {
        1: shown,
        2: shown[:, ::-1],
        3: shown[::-1, ::-1],
        4: shown[::-1],
        5: shown.T,
        6: np.rot90(shown),
        7: shown[::-1, ::-1].T,
        8: np.rot90(shown, -1),
    }[orientation]
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    content = encoded(np.ascontiguousarray(stored), "jpeg", quality=100, exif=exif)
    return content, np.repeat(shown[..., None], 3, 2)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_is_turned_upright(tmp_path, orientation):
    content, shown = upright(orientation)
    path = write(tmp_path / "train/x/1.jpg", content)
    found = load_split(tmp_path, "train").images[0].numpy()
    assert found.shape == shown.shape
    assert np.abs(found.astype(int) - shown).max() <= 2  # JPEG's loss
    assert pixels.size_of(Encoded("1", path)) == (16, 8)
    height, width = np.asarray(Image.open(path)).shape[:2]
    assert pixels.size_of(Encoded("1", path, as_stored=True)) == (width, height)


def test_photos_held_either_way_are_of_one_size(tmp_path):
    for orientation in (1, 6):
        write(tmp_path / f"train/x/{orientation}.jpg", upright(orientation)[0])
    assert load_split(tmp_path, "train").image_size == (8, 16)


@pytest.mark.parametrize(
    "damage", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01\x12"]
)
def test_damaged_exif_is_no_damage_to_the_image(tmp_path, damage):
    path = write(tmp_path / "train/x/1.jpg", encoded(picture(), "jpeg", exif=damage))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        found = load_split(tmp_path, "train").images[0].numpy()
        assert inspect_data(tmp_path, Options()).splits["train"].sizes == {(6, 6): 1}
        assert warned == []
        assert np.array_equal(found, np.asarray(Image.open(path)))


# ------------------------------------------------------------------------------------------------- size


@pytest.mark.parametrize(
    ("height", "width", "size"), [(6, 6, 6), (7, 13, 5), (13, 7, 5), (3, 5, 8), (1, 9, 1)]
)
def test_shorter_side_then_centre(height, width, size):
    image = Image.fromarray(picture(height, width))
    scale = size / min(height, width)
    wide, high = max(size, round(width * scale)), max(size, round(height * scale))
    whole = np.asarray(image.resize((wide, high), Image.Resampling.BILINEAR))
    top, left = (high - size) // 2, (wide - size) // 2
    found = np.asarray(resize_and_crop(image, size))
    assert np.array_equal(found, whole[top : top + size, left : left + size])
    assert found.shape == (size, size, 3)


def test_images_of_the_right_size_keep_their_bits(root):
    assert torch.equal(load_split(root, "train", 6).images, load_split(root, "train").images)


def test_the_centre_is_kept():
    pixels = np.zeros((4, 12, 3), np.uint8)
    pixels[:, 4:8] = 255
    assert np.asarray(resize_and_crop(Image.fromarray(pixels), 4)).min() == 255


def test_images_of_one_oblong_size_are_taken_as_they_are(tmp_path):
    for i in range(3):
        write(tmp_path / f"val/x/{i}.png", picture(4, 9, seed=i))
    assert load_split(tmp_path, "val").image_size == (4, 9)


def test_several_sizes_need_an_image_size(root):
    write(root / "train/b/0.png", picture(8, 5))
    first, other = root / "train/a/x.PNG", root / "train/b/0.png"
    message = error_of(root, "train")
    assert message.startswith(f"{first} is 6x6 pixels, {other} is 5x8:")
    assert "set image_size, such as 5" in message
    assert load_split(root, "train", image_size=5).images.shape == (5, 5, 5, 3)


@pytest.mark.parametrize("size", [0, -3])
def test_image_size_must_be_positive(root, size):
    assert error_of(root, "train", size) == f"image_size is {size}; it must be at least 1 pixel"


# --------------------------------------------------------------------------------------------- bad files


@pytest.mark.parametrize("size", [None, 4])
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", r"\(0 bytes\) is not an image"),
        (b"<html>404</html>", r"\(16 bytes\) is not an image"),
        (encoded(picture(), "png")[:60], r"\(60 bytes\) (cannot be decoded: .|is not an image)"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", r"\(47 bytes\) is not an image"),
    ],
    ids=["empty", "html", "cut", "postscript"],
)
def test_a_bad_file_is_named(root, content, reason, size):
    bad = write(root / "train/b/3.jpg", content)
    message = error_of(root, "train", size)
    assert re.match(re.escape(f"{bad} ") + reason, message)
    assert message.endswith("; replace or remove it")


def test_all_bad_files_are_counted(root):
    bad = [write(root / f"train/b/z{i}.png", b"bad") for i in range(8)]
    message = error_of(root, "train")
    assert message.startswith(f"{bad[0]} (3 bytes) is not an image; 7 more of 12: {bad[1]}, ")
    assert message.endswith(f"{bad[5]} and 2 more; replace or remove them")


@pytest.mark.parametrize(
    ("kind", "options"),
    [("jpeg", {}), ("jpeg", {"progressive": True}), ("png", {}), ("webp", {}), ("webp", {"lossless": True})],
    ids=["jpeg", "progressive", "png", "webp", "webp-lossless"],
)
def test_no_cut_file_is_read_as_something_else(root, kind, options):
    """Wherever a file is cut, it is an error, unless every pixel is there already."""
    whole = encoded(picture(40, 40), kind, **options)
    path = write(root / f"val/x/1.{kind}", whole)
    expected = load_split(root, "val").images
    n_errors = 0
    cuts = sorted({*range(0, len(whole), 97), len(whole) // 2, *range(len(whole) - 20, len(whole))})
    for cut in cuts:
        path.write_bytes(whole[:cut])
        found, message = None, ""
        try:
            found = load_split(root, "val", n_workers=1).images
        except InputError as error:
            message = str(error)
        if found is not None:
            assert torch.equal(found, expected), f"cut at {cut} of {len(whole)}"
            continue
        assert message.startswith(f"{path} ({cut} bytes) ")
        n_errors += 1
    assert n_errors >= len(cuts) - 20


def test_truncation_is_noticed_although_the_header_is_whole(root):
    whole = encoded(picture(64, 64), "jpeg", quality=95)
    path = write(root / "val/x/1.jpg", whole[: len(whole) * 2 // 3])
    with Image.open(path) as image:
        assert image.size == (64, 64)
    assert "cannot be decoded: " in error_of(root, "val")


def test_a_dangling_link_is_named(root):
    (root / "train/a/z.png").symlink_to(root / "gone.png")
    assert f"{root / 'train/a/z.png'} (unreadable) cannot be decoded: No such file" in error_of(root, "train")


def test_sixteen_bits_are_refused_not_clipped(root):
    path = root / "train/a/z.png"
    Image.fromarray(np.full((6, 6), 40000, np.uint16)).save(path)
    assert f"{path} has more than 8 bits a channel" in error_of(root, "train")


def test_large_splits_show_a_bar(root, monkeypatch, capsys):
    load_split(root, "train")
    assert capsys.readouterr().err == ""
    seen = []
    real = pixels.tqdm
    monkeypatch.setattr(
        pixels, "tqdm", lambda *args, **options: seen.append(options) or real(*args, **options)
    )
    monkeypatch.setattr(pixels, "_BAR_FROM", 4)
    load_split(root, "train", 4)  # another size: nothing of it is in the cache
    load_split(root, "test")
    assert [options["disable"] for options in seen] == [None, True]
