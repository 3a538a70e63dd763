from __future__ import annotations

import io
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mtl_fast.data.class_folders as class_folders
from mtl_fast.data import ImageStore, load_split
from mtl_fast.data.class_folders import read_class_folders, resize_and_crop
from mtl_fast.errors import InputError


def picture(height: int = 6, width: int = 6, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(pixels: np.ndarray, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def write(path: Path, content: bytes | np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else encoded(content, "png"))
    return path


@pytest.fixture
def root(tmp_path):
    """Two classes of two images in train, one class in test; no val."""
    for i, name in enumerate(
        ["train/b/2.png", "train/b/1.png", "train/a/x.PNG", "train/a/y.png", "test/c/1.png"]
    ):
        write(tmp_path / name, picture(seed=i))
    return tmp_path


def error_of(*args, **options) -> str:
    with pytest.raises(InputError) as caught:
        read_class_folders(*args, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---------------------------------------------------------------------------------------------- what is read


@pytest.mark.parametrize("n_workers", [1, 3, None])
def test_order_is_that_of_the_names(root, n_workers):
    store = read_class_folders(root, "train", n_workers=n_workers)
    assert store.class_names == ("a", "b")
    assert store.labels.tolist() == [0, 0, 1, 1]
    expected = np.stack([picture(seed=seed) for seed in (2, 3, 1, 0)])
    assert torch.equal(store.images, torch.from_numpy(expected))
    assert store.name == str(root / "train")


def test_load_split_reads_class_folders(root):
    assert torch.equal(load_split(str(root), "test").images[0], torch.from_numpy(picture(seed=4)))
    assert load_split(root, "train", 4, n_workers=1).image_size == (4, 4)


def test_all_suffixes_in_any_case(tmp_path):
    kinds = {"a.jpg": "jpeg", "b.JPEG": "jpeg", "c.Png": "png", "d.webp": "webp", "e.JPG": "jpeg"}
    for name, kind in kinds.items():
        write(tmp_path / "train/x" / name, encoded(np.full((5, 5, 3), 77, np.uint8), kind))
    store = read_class_folders(tmp_path, "train")
    assert store.n_images == 5
    assert (store.images.int() - 77).abs().max() <= 3  # lossy, but a plain colour survives


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "RGBA", "LA", "CMYK"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    image = Image.fromarray(picture()).convert(mode)
    kind = "jpeg" if mode == "CMYK" else "png"
    path = tmp_path / "train/x" / f"1.{kind}"
    path.parent.mkdir(parents=True)
    image.save(path)
    expected = np.asarray(Image.open(path).convert("RGB"))
    assert np.array_equal(read_class_folders(tmp_path, "train").images[0].numpy(), expected)


def test_palette_with_transparency_is_read_without_a_warning(tmp_path):
    path = tmp_path / "train/x/1.png"
    path.parent.mkdir(parents=True)
    Image.fromarray(picture()).convert("P").save(path, transparency=bytes(range(200)))
    expected = np.asarray(Image.open(path).convert("RGBA"))[..., :3]
    assert np.array_equal(read_class_folders(tmp_path, "train").images[0].numpy(), expected)


def test_hidden_and_other_files_are_passed_over(root):
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
    assert read_class_folders(root, "train").class_counts.tolist() == [2, 2]


@pytest.mark.parametrize("name", ["train/stray.png", "train/a/deeper/still/1.png"])
def test_images_outside_a_class_are_left_out_with_a_warning(root, name):
    write(root / name, picture())
    with pytest.warns(UserWarning, match=rf"1 images lie in no class folder.*{re.escape(name)}"):
        store = read_class_folders(root, "train")
    assert store.class_counts.tolist() == [2, 2]


def test_links_to_folders_are_classes_and_circles_do_no_harm(root):
    (root / "train/d").symlink_to(root / "test/c")
    (root / "train/a/notes").mkdir()
    (root / "train/a/notes/up").symlink_to(root / "train/a")
    assert read_class_folders(root, "train").class_names == ("a", "b", "d")


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
    assert torch.equal(read_class_folders(root, "train", 6).images, read_class_folders(root, "train").images)


def test_the_centre_is_kept():
    pixels = np.zeros((4, 12, 3), np.uint8)
    pixels[:, 4:8] = 255
    assert np.asarray(resize_and_crop(Image.fromarray(pixels), 4)).min() == 255


def test_images_of_one_oblong_size_are_taken_as_they_are(tmp_path):
    for i in range(3):
        write(tmp_path / f"val/x/{i}.png", picture(4, 9, seed=i))
    assert read_class_folders(tmp_path, "val").image_size == (4, 9)


def test_several_sizes_need_an_image_size(root):
    write(root / "train/b/0.png", picture(8, 5))
    first, other = root / "train/a/x.PNG", root / "train/b/0.png"
    message = error_of(root, "train")
    assert message.startswith(f"{first} is 6x6 pixels, {other} is 5x8:")
    assert "set image_size, such as 5" in message
    assert read_class_folders(root, "train", image_size=5).images.shape == (5, 5, 5, 3)


@pytest.mark.parametrize("size", [0, -3])
def test_image_size_must_be_positive(root, size):
    assert error_of(root, "train", size) == f"image_size is {size}; it must be at least 1 pixel"


# --------------------------------------------------------------------------------------------- bad folders


def test_missing_empty_and_other_roots(tmp_path):
    assert error_of(tmp_path / "none", "train").startswith(
        f"{tmp_path / 'none'}: no such folder; expected {{train"
    )
    assert "holds nothing; expected {train" in error_of(tmp_path, "train")
    file = write(tmp_path / "some.tar", b"x")
    assert "a file, not a folder" in error_of(file, "train")
    assert "holds 1 files and no folders" in error_of(tmp_path, "train")
    (tmp_path / "dogs").mkdir()
    assert "no folder 'train', only dogs; expected {train" in error_of(tmp_path, "train")


def test_missing_split_says_which_exist(root):
    assert f"{root}: no folder 'val', only the splits train, test;" in error_of(root, "val")
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
        f"{root / 'train/bare'}: no .jpg, .jpeg, .png, .webp file in this class; add some"
    )
    write(root / "train/bare/images/1.png", picture())
    assert f"1 lie deeper, such as {root / 'train/bare/images/1.png'}: move them up" in error_of(
        root, "train"
    )


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
    expected = read_class_folders(root, "val").images
    n_errors = 0
    cuts = sorted({*range(0, len(whole), 97), len(whole) // 2, *range(len(whole) - 20, len(whole))})
    for cut in cuts:
        path.write_bytes(whole[:cut])
        found, message = None, ""
        try:
            found = read_class_folders(root, "val", n_workers=1).images
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
    read_class_folders(root, "train")
    assert capsys.readouterr().err == ""
    seen = []
    real = class_folders.tqdm
    monkeypatch.setattr(
        class_folders, "tqdm", lambda *args, **options: seen.append(options) or real(*args, **options)
    )
    monkeypatch.setattr(class_folders, "_BAR_FROM", 4)
    read_class_folders(root, "train")
    read_class_folders(root, "test")
    assert [options["disable"] for options in seen] == [None, True]


# ------------------------------------------------------------------------------------------------- glyphs


def test_load_split_finds_the_embedded_set(monkeypatch):
    calls = []

    def load_glyphs(split: str, difficulty: str = "mid", seed: int = 0) -> ImageStore:
        calls.append((split, difficulty, seed))
        return ImageStore(
            torch.from_numpy(picture(8, 8)[None]), torch.tensor([0]), ("a",), ("x",), name="glyphs"
        )

    fake = types.ModuleType("mtl_fast.data.glyphs")
    fake.load_glyphs = load_glyphs
    monkeypatch.setitem(sys.modules, "mtl_fast.data.glyphs", fake)
    assert load_split("glyphs", "train").image_size == (8, 8)
    load_split("glyphs:soft", "val", image_size=8, seed=3)
    assert calls == [("train", "mid", 0), ("val", "soft", 3)]
    small = load_split("glyphs", "test", image_size=5)
    expected = np.asarray(resize_and_crop(Image.fromarray(picture(8, 8)), 5))
    assert np.array_equal(small.images[0].numpy(), expected)
    assert (small.name, small.super_class_names) == ("glyphs", ("x",))
    assert len(calls) == 3
    # A path is a path, whatever its name.
    for folder in (Path("glyphs"), "./glyphs"):
        with pytest.raises(InputError, match="no such folder"):
            load_split(folder, "train")
    assert len(calls) == 3
