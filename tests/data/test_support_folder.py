"""Examples and images to label, as they lie in folders; each wrong folder is one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mtl_fast.data.reading import tell
from mtl_fast.data.support_folder import SupportFolder, read_images
from mtl_fast.errors import InputError
from tests.data.cases import encoded, picture, write


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three examples of one class, one of another, and images to label, in a folder of their own and beside."""
    for i, name in enumerate(("s/ant/1.png", "s/ant/2.JPG", "s/ant/3.png", "s/bee/1.png")):
        write(tmp_path / name, encoded(picture(seed=i), "jpeg" if name.endswith("JPG") else "png"))
    for name in ("s/b.png", "s/a.png", "q/2.png", "q/1.png", "q/deep/3.png"):
        write(tmp_path / name, picture())
    write(tmp_path / "q" / "notes.txt", "no image")
    return tmp_path


def names(found: SupportFolder) -> list[str]:
    return [str(file.relative_to(found.root)) for file in found.unsorted]


def test_a_folder_of_images_beside_one_of_examples(root: Path) -> None:
    found = SupportFolder.find(root / "s", root / "q")
    assert {name: [file.name for file in files] for name, files in found.support.items()} == {
        "ant": ["1.png", "2.JPG", "3.png"],
        "bee": ["1.png"],
    }
    assert names(found) == ["1.png", "2.png", "deep/3.png"]


def test_one_folder_with_unsorted_images_in_it(root: Path) -> None:
    for images in (None, root / "s", root / "q" / ".." / "s"):
        assert names(SupportFolder.find(root / "s", images)) == ["a.png", "b.png"]


def test_one_image(root: Path) -> None:
    assert names(SupportFolder.find(root / "s", root / "q" / "2.png")) == ["2.png"]


def test_a_folder_of_images_among_the_examples_is_no_class(root: Path) -> None:
    (root / "q").rename(root / "s" / "new")
    found = SupportFolder.find(root / "s", root / "s" / "new")
    assert list(found.support) == ["ant", "bee"]
    assert names(found) == ["1.png", "2.png", "deep/3.png"]


def test_examples_are_none_to_label_where_the_images_lie_around_them(root: Path) -> None:
    found = SupportFolder.find(root / "s", root)
    assert names(found) == ["q/1.png", "q/2.png", "q/deep/3.png", "s/a.png", "s/b.png"]


@pytest.mark.parametrize("output", ["s", "s/runs", "s/runs/predict", "q", "q/deep", "s/ant/out"])
def test_what_an_earlier_run_wrote_is_no_image_and_no_class(root: Path, output: str) -> None:
    before = {images: names(SupportFolder.find(root / "s", images)) for images in (None, root / "q")}
    written = root / output / "predictions.png"

    def same() -> bool:
        found = [SupportFolder.find(root / "s", images, written=written) for images in before]
        assert all(list(each.support) == ["ant", "bee"] for each in found)
        return [names(each) for each in found] == list(before.values())

    assert same(), "before the first run"
    written.parent.mkdir(parents=True, exist_ok=True)
    assert same(), "after one that failed"
    write(written, picture())
    assert same()


def test_what_is_neither_an_example_nor_to_label_is_counted(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    SupportFolder.find(root / "s")
    SupportFolder.find(root / "s", root / "q")
    assert capsys.readouterr().err == ""
    for name in ("s/ant/old/4.png", "s/bee/2.tif", "q/deep/4.heic"):
        write(root / name, picture())
    kinds = "*.{jpg,jpeg,png,webp,gif,bmp}"
    stray = f"1 images in no class folder, such as {root / 's/ant/old/4.png'}; "
    tif = f"1× .tif, such as {root / 's/bee/2.tif'}; what is read is <class>/{kinds}\n"
    heic = f"left out: 1× .heic, such as {root / 'q/deep/4.heic'}; what is read is {kinds}\n"
    for images, expected in (
        (None, f"{root / 's'}: left out: {stray}{tif}"),
        (root / "q", f"{root / 's'}: left out: {stray}{tif}{root / 'q'}: {heic}"),
        (root, f"{root / 's'}: left out: {tif}{root}: {heic}"),  # the example that lies deeper is labelled
    ):
        tell.cache_clear()
        SupportFolder.find(root / "s", images)
        assert capsys.readouterr().err == expected


def refused(*arguments: Any) -> str:
    with pytest.raises(InputError) as caught:
        SupportFolder.find(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_wrong_folders_are_one_line(root: Path) -> None:
    s, q, empty = root / "s", root / "q", root / "empty"
    empty.mkdir()
    layout = "<class>/*.{jpg,jpeg,png,webp,gif,bmp}"
    assert (
        refused(root / "no") == f"{root / 'no'}: no such folder; expected a folder of class folders, {layout}"
    )
    assert refused(s / "a.png") == f"{s / 'a.png'}: is a file; expected a folder of class folders, {layout}"
    assert (
        refused(s, root / "no") == f"{root / 'no'}: no such folder; expected a folder of images, or an image"
    )
    assert refused(empty, q) == f"{empty}: holds nothing; expected {layout}"
    assert refused(s / "ant", q) == f"{s / 'ant'}: holds 3 files but no class folders; expected {layout}"
    assert refused(s, empty) == f"{empty}: no .jpg, .jpeg, .png, .webp, .gif, .bmp file to label"
    for image in ("a.png", "b.png"):
        (s / image).unlink()
    assert refused(s) == (
        f"{s}: no image lies beside its class folders; put some there, or name a folder of images to label"
    )
    (s / "cow").mkdir()
    assert refused(s, q) == (
        f"{s / 'cow'}: no .jpg, .jpeg, .png, .webp, .gif, .bmp file in this class; add some or remove it"
    )
    (s / "cow").rename(root / "cow")
    (s / "bee").rename(root / "bee")
    assert refused(s, q) == f"{s}: holds one class only, ant; at least two are needed to tell them apart"
    (s / "ant").rename(s / "new")
    assert refused(s, s / "new").startswith(f"{s}: holds nothing")


@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "RGBA", "P", "1", "CMYK", "I;16"])
def test_images_of_any_size_and_mode(mode: str, tmp_path: Path) -> None:
    """A dark square in the middle of a wide image is all that is left of it."""
    wide = Image.new("L", (90, 30), 255)
    wide.paste(0, (30, 0, 60, 30))
    kind = "jpeg" if mode == "CMYK" else "png"
    path = tmp_path / f"a.{kind}"
    wide.convert("RGB" if mode == "P" else "I" if mode == "I;16" else mode).convert(mode).save(path, kind)
    if mode == "I;16":
        with pytest.raises(InputError, match=r"a\.png has more than 8 bits a channel"):
            read_images([path], 10)
        return
    pixels = read_images([path, path], 10)
    assert pixels.shape == (2, 10, 10, 3)
    assert pixels.dtype == np.uint8
    # Shrinking to a third reaches over the square's edge, into one pixel; JPEG blurs.
    assert pixels[:, :, 1:-1].max() <= (0 if kind == "png" else 8)


def test_unreadable_images_are_named(root: Path) -> None:
    files = [write(root / name, b"no image") for name in ("q/4.png", "q/5.png")]
    with pytest.raises(
        InputError, match=r"4\.png \(8 bytes\) is not an image; 1 more of 3: .*5\.png; replace"
    ):
        read_images([root / "q/1.png", *files], 8)
    cut = write(root / "q/6.png", encoded(picture(60, 60))[:200])
    with pytest.raises(InputError, match=r"6\.png \(200 bytes\) cannot be decoded"):
        read_images([cut], 8)
    with pytest.raises(InputError, match="image_size is 0"):
        read_images([root / "q/1.png"], 0)
