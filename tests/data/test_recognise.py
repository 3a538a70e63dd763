"""Formats are told from names alone; what fits none or several is said in words."""

from __future__ import annotations

from pathlib import Path

import pytest

from mtl_fast.data.recognise import FORMATS, recognise
from mtl_fast.errors import InputError

# A file or folder (ending in /) of each format, and what else its splits need.
SIGNS = {
    "class folders": ["train/"],
    "CSV lists": ["val.csv", "images/"],
    "miniImageNet cache": ["mini-imagenet-cache-validation.pkl"],
    "miniImageNet, category split": ["miniImageNet_category_split_train_phase_train.pickle"],
    "CIFAR-100 (split as FC100)": ["cifar-100-python/meta", "cifar-100-python/train"],
    "FC100": ["FC100_test.pickle"],
    "FC100, TADAM's archives": ["few-shot-val.npz"],
    "tieredImageNet, PNG buffers": ["train_images_png.pkl"],
    "tieredImageNet, arrays": ["train_images.npz"],
    "CIFAR-FS": ["CIFAR_FS_val.pickle"],
    "CUB-200-2011": ["CUB_200_2011/images.txt", "CUB_200_2011/images/"],
}


def make(root: Path, names: list[str]) -> Path:
    for name in names:
        path = root / name
        if name.endswith("/"):
            path.mkdir(parents=True, exist_ok=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    return root


def message_of(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        recognise(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_format_has_its_sign() -> None:
    assert [kind.format for kind in FORMATS] == list(SIGNS)


@pytest.mark.parametrize("format", SIGNS)
def test_a_format_is_recognised_from_the_folder_and_from_a_file(tmp_path: Path, format: str) -> None:
    data = recognise(make(tmp_path, SIGNS[format]))
    assert data.format == format
    for sign in SIGNS[format]:
        place = tmp_path / sign
        if place.is_file():
            assert recognise(place).format == format


def test_nothing_that_fits_says_what_was_looked_for(tmp_path: Path) -> None:
    make(tmp_path, [f"file{i}.txt" for i in range(7)])
    message = message_of(tmp_path)
    assert message.startswith(
        f"{tmp_path}: holds file0.txt, file1.txt, file2.txt, file3.txt, file4.txt and 2 more, which is no data set"
    )
    for kind in FORMATS:
        assert f"{kind.format}: {kind.layout}" in message
    (tmp_path / "empty").mkdir()
    assert f"{tmp_path / 'empty'}: holds nothing" in message_of(tmp_path / "empty")
    assert message_of(tmp_path / "none") == (
        f"{tmp_path / 'none'}: no such folder or file; name where the images are with --data.source (evaluate, embed: "
        "--data)"
    )
    assert "file0.txt: a file that shows no format" in message_of(tmp_path / "file0.txt")


def test_two_formats_in_one_folder_are_told_apart_by_a_file(tmp_path: Path) -> None:
    make(tmp_path, ["FC100_val.pickle", "CIFAR_FS_val.pickle", "train/"])
    message = message_of(tmp_path)
    assert "3 formats fit: class folders (train), FC100 (FC100_val.pickle), CIFAR-FS (CIFAR_FS_val" in message
    assert recognise(tmp_path / "FC100_val.pickle").format == "FC100"
    assert recognise(tmp_path / "CIFAR_FS_val.pickle").format == "CIFAR-FS"
    assert recognise(tmp_path / "train").format == "class folders"
    make(tmp_path, SIGNS["CUB-200-2011"])
    assert "CUB-200-2011 (CUB_200_2011/images.txt); name what stands in brackets" in message_of(tmp_path)


def test_a_data_set_may_be_named_by_any_of_its_lists_and_labels(tmp_path: Path) -> None:
    birds = make(tmp_path, [*SIGNS["CUB-200-2011"], "CUB_200_2011/bounding_boxes.txt", "CUB_200_2011/README"])
    assert recognise(birds / "CUB_200_2011/bounding_boxes.txt").format == "CUB-200-2011"
    assert "README: a file that shows no format" in message_of(birds / "CUB_200_2011/README")
    tiered = make(tmp_path / "tiered", ["train_images.npz", "train_labels.pkl", "more_labels.pkl"])
    assert recognise(tiered / "train_labels.pkl").format == "tieredImageNet, arrays"
    assert "shows no format" in message_of(tiered / "more_labels.pkl")


def test_a_tilde_is_the_user_s_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    make(tmp_path / "birds", ["train/"])
    assert recognise("~/birds").root == tmp_path / "birds"
    assert "~nobody-is-called-so/x: no such folder" in message_of(Path("~nobody-is-called-so/x"))


def test_splits_are_those_that_are_there(tmp_path: Path) -> None:
    make(tmp_path, ["few-shot-test.npz", "few-shot-train.npz", "few-shot-more.npz"])
    assert list(recognise(tmp_path).splits) == ["train", "test"]
