"""Small copies of data sets as people have them on disk: the same names, fields, types and shapes, few images."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mtl_fast.data import fc100
from tests.data import python2
from tests.data.cases import encoded, picture, pictures, write

SPLITS = ("train", "val", "test")


def class_folders(root: Path) -> Path:
    """Two classes of two images a split, of several sizes."""
    for i, split in enumerate(SPLITS):
        for j, name in enumerate("ab"):
            for k in range(2):
                write(
                    root / split / f"{split} {name}" / f"{k}.png",
                    picture(6 + i, 7 + k, seed=4 * i + 2 * j + k),
                )
    return root


CSV_ROWS = [("a1.png", "n02"), ("a2.png", "n01"), ("a3.png", "n02")]


def csv_lists(root: Path, header: str = "filename,label", *, nested: bool = False) -> Path:
    """Three images of two classes in train, one in test."""
    names_first = header == "filename,label"
    for i, (name, label) in enumerate(CSV_ROWS):
        write(root / "images" / (f"{label}/{name}" if nested else name), picture(seed=i))
    lines = [f"{name},{label}" if names_first else f"{label},{name}" for name, label in CSV_ROWS]
    write(root / "train.csv", "\n".join([header, *lines]) + "\n")
    write(root / "test.csv", f"{header}\n{lines[1]}\n")
    return root


BIRDS = ("001.Albatross", "002.Auk", "003.Bunting", "004.Wren", "005.Gull")


def cub(parent: Path) -> Path:
    """Five classes of two images, 8×6 pixels, each with a box of 4×3 at (2, 1); returns CUB_200_2011/."""
    root = parent / "CUB_200_2011"
    names = [f"{name}/{name[4:]}_{i}.jpg" for name in BIRDS for i in range(2)]
    for i, name in enumerate(names):
        write(root / "images" / name, picture(6, 8, seed=i))
    write(root / "images.txt", "".join(f"{i} {name}\n" for i, name in enumerate(names, 1)))
    write(root / "bounding_boxes.txt", "".join(f"{i} 2.0 1.0 4.0 3.0\n" for i in range(1, len(names) + 1)))
    return root


MINI_IMAGES = pictures(7, 84)
MINI_ROWS = {"n02": [4, 0, 5], "n01": [1, 2, 3, 6]}


def mini_cache(root: Path, split: str = "train", **changes: Any) -> Path:
    """Seven images of two classes; returns the file."""
    value = {"image_data": MINI_IMAGES, "class_dict": MINI_ROWS} | changes
    return write(root / f"mini-imagenet-cache-{split}.pkl", pickle.dumps(value))


CATEGORY_NUMBERS = {"train": range(64), "val": range(64, 80), "test": range(80, 100)}
# CIFAR-FS numbers its classes anyhow: here from 99 down.
CIFAR_FS_CLASSES = {"train": 64, "val": 16, "test": 20}


def split_numbers(kind: str, split: str) -> list[int]:
    """The labels that a split has on disk."""
    if kind == "category":
        return list(CATEGORY_NUMBERS[split])
    return (
        sorted(fc100.class_names(split))
        if kind == "fc100"
        else list(range(99, 99 - CIFAR_FS_CLASSES[split], -1))
    )


def split_pickle(root: Path, kind: str, split: str, *, old: bool = False, **changes: Any) -> dict[str, Any]:
    """Two images a class, classes alternating; returns what was written."""
    labels = split_numbers(kind, split) * 2
    value = {"data": pictures(len(labels), 84 if kind == "category" else 32), "labels": labels} | changes
    phase = "train_phase_train" if split == "train" else split
    name = {
        "category": f"miniImageNet_category_split_{phase}.pickle",
        "fc100": f"FC100_{split}.pickle",
        "fs": f"CIFAR_FS_{split}.pickle",
    }[kind]
    write(root / name, python2.dumps(value) if old else pickle.dumps(value))
    return value


def _cifar_part(n: int, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    fine = rng.permutation(np.repeat(np.arange(100), n)).tolist()
    return {
        "data": rng.integers(0, 256, (100 * n, 3072), dtype=np.uint8),
        "fine_labels": fine,
        "coarse_labels": [fc100.COARSE_OF_FINE[i] for i in fine],
    }


# Two images a class in `train`, one in `test`.
CIFAR_PARTS = {"train": _cifar_part(2, 0), "test": _cifar_part(1, 1)}
CIFAR_META = {"fine_label_names": list(fc100.FINE), "coarse_label_names": list(fc100.COARSE)}


def cifar100(parent: Path, *, old: bool = True, **changes: Any) -> Path:
    """The three files, keys as bytes; returns cifar-100-python/."""
    root = parent / "cifar-100-python"
    for name, value in (CIFAR_PARTS | {"meta": CIFAR_META} | changes).items():
        bytes_keys = {key.encode(): item for key, item in value.items()}
        write(root / name, python2.dumps(bytes_keys) if old else pickle.dumps(bytes_keys))
    return root


def tadam(root: Path, split: str, numbers: Any, **changes: Any) -> dict[str, Any]:
    """An archive with an image for each of the numbers; returns what was written."""
    arrays = {"features": pictures(len(numbers), 32), "targets": np.asarray(numbers)} | changes
    root.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(root / f"few-shot-{split}.npz", **arrays)
    return arrays


TIERED_IMAGES = pictures(6, 84)
TIERED_LABELS = {
    "label_specific": np.array([2, 0, 1, 2, 0, 1], np.int32),
    "label_general": np.array([1, 0, 1, 1, 0, 1], np.int32),
    "label_specific_str": ["n03", "n01", "n02"],
    "label_general_str": ["bird", "fish"],
}


def png_buffers(images: np.ndarray = TIERED_IMAGES) -> list[np.ndarray]:
    """PNG files as arrays of bytes, as OpenCV encodes them."""
    return [np.frombuffer(encoded(image), np.uint8) for image in images]


def tiered(root: Path, images: Any, labels: Any, split: str = "train", *, old: bool = True) -> Path:
    """A list is written as PNG buffers, an array as an archive."""
    dumps = python2.dumps if old else pickle.dumps
    root.mkdir(parents=True, exist_ok=True)
    if isinstance(images, np.ndarray):
        np.savez(root / f"{split}_images.npz", images=images)
    else:
        write(root / f"{split}_images_png.pkl", dumps(images))
    write(root / f"{split}_labels.pkl", dumps(labels))
    return root


def _each_split(make: Callable[[Path, str], object]) -> Callable[[Path], Path]:
    def copy(root: Path) -> Path:
        for split in SPLITS:
            make(root, split)
        return root

    return copy


# Every format → what writes a copy of it into a folder and returns what `load_split` is to be given.
COPIES: dict[str, Callable[[Path], Path]] = {
    "class folders": class_folders,
    "CSV lists": csv_lists,
    "miniImageNet cache": _each_split(mini_cache),
    "miniImageNet, category split": _each_split(lambda root, split: split_pickle(root, "category", split)),
    "CIFAR-100 (split as FC100)": cifar100,
    "FC100": _each_split(lambda root, split: split_pickle(root, "fc100", split)),
    "FC100, TADAM's archives": _each_split(
        lambda root, split: tadam(root, split, sorted(fc100.class_names(split)))
    ),
    "tieredImageNet, PNG buffers": _each_split(
        lambda root, split: tiered(root, png_buffers(), TIERED_LABELS, split)
    ),
    "tieredImageNet, arrays": _each_split(
        lambda root, split: tiered(root, TIERED_IMAGES, TIERED_LABELS, split)
    ),
    "CIFAR-FS": _each_split(lambda root, split: split_pickle(root, "fs", split)),
    "CUB-200-2011": cub,
}
