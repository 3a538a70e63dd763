"""Readers of tieredImageNet: PNG buffers in a pickle, or one array in an archive, beside ``{split}_labels.pkl``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mtl_fast.data.array_files import (
    described,
    entry,
    image_array,
    label_array,
    load_archive,
    numbered,
    unnamed,
)
from mtl_fast.data.dataset import SPLITS, Content, DataSet, Options, first_present
from mtl_fast.data.pickles import as_text, load_pickle
from mtl_fast.data.pixels import Encoded, decode_images
from mtl_fast.errors import InputError


class _Labels(NamedTuple):
    numbers: NDArray[np.int64]  # [N], as on disk
    names: dict[int, str]  # number → class
    super_classes: dict[int, str] | None  # number → super-class


class _Tiered(DataSet):
    """Images and labels in two files of a split; the images' file shows the split."""

    ending: ClassVar[str]

    @classmethod
    def find(cls, folder: Path) -> _Tiered | None:
        splits = first_present(folder, {split: (f"{split}{cls.ending}",) for split in SPLITS})
        return cls(folder, splits) if splits else None

    def shows(self, path: Path) -> bool:
        return super().shows(path) or path in [self.root / f"{split}_labels.pkl" for split in self.splits]

    def files(self, split: str) -> Sequence[Path]:
        return (self.place(split), self._labels_file(split))

    def _labels_file(self, split: str) -> Path:
        self.place(split)
        path = self.root / f"{split}_labels.pkl"
        if not path.is_file():
            raise InputError(f"{path}: no such file; expected {self.layout}")
        return path


class TieredPng(_Tiered):
    """``{split}_images_png.pkl``: a list of N uint8 buffers, each a PNG file; they are decoded once."""

    format = "tieredImageNet, PNG buffers"
    layout = "{train,val,test}_images_png.pkl + {train,val,test}_labels.pkl"
    version = 2  # 2: transparency on white
    ending = "_images_png.pkl"

    def read(self, split: str, options: Options) -> Content:
        path = self.place(split)
        buffers = load_pickle(path)
        if not isinstance(buffers, (list, np.ndarray)) or len(buffers) == 0:
            raise InputError(f"{path}: holds {described(buffers)}, expected a list of PNG buffers")
        labels = _labels(self._labels_file(split), split, len(buffers))
        encoded = [Encoded(f"{path}: image {i}", _bytes(buffer, path, i)) for i, buffer in enumerate(buffers)]
        images = decode_images(encoded, options.image_size, options.n_workers, str(path))
        return numbered(images, labels.numbers, labels.names, self._labels_file(split), labels.super_classes)


class TieredArchives(_Tiered):
    """``{split}_images.npz``: ``images`` uint8 [N, 84, 84, 3], as MetaOptNet ships it, blue first."""

    format = "tieredImageNet, arrays"
    layout = "{train,val,test}_images.npz + {train,val,test}_labels.pkl"
    ending = "_images.npz"
    channel_order = "bgr"

    def read(self, split: str, options: Options) -> Content:
        path = self.place(split)
        (stored,) = load_archive(path, "images")
        images = image_array(stored, path, 84)
        labels = _labels(self._labels_file(split), split, len(images))
        return numbered(images, labels.numbers, labels.names, self._labels_file(split), labels.super_classes)


def _bytes(buffer: Any, path: Path, i: int) -> bytes | memoryview:
    if isinstance(buffer, bytes):
        return buffer
    if isinstance(buffer, np.ndarray) and buffer.dtype == np.uint8:
        return np.ascontiguousarray(buffer).reshape(-1).data  # some are [n], some are [n, 1]
    raise InputError(f"{path}: image {i} is {described(buffer)}, expected a uint8 buffer; get the file again")


def _labels(path: Path, split: str, n_images: int) -> _Labels:
    """Ren's labels with their names, or MetaOptNet's plain list; numbers run from the lowest to the highest."""
    stored = load_pickle(path)
    if isinstance(stored, dict) and "label_specific" not in stored:
        numbers = label_array(entry(stored, "labels", path), n_images, path)
        if numbers.min() < 0:
            raise InputError(
                f"{path}: label {numbers.min()} is out of range; expected 0 or more; get the file again"
            )
        used = np.unique(numbers)
        gaps = np.flatnonzero(used != used[0] + np.arange(len(used)))
        if len(gaps):
            raise InputError(f"{path}: class {used[0] + gaps[0]} has no image; get the file again")
        return _Labels(numbers, unnamed(split, used.tolist()), None)
    specific = label_array(entry(stored, "label_specific", path), n_images, path)
    general = label_array(entry(stored, "label_general", path), n_images, path)
    names, super_names = (_texts(stored, key, path) for key in ("label_specific_str", "label_general_str"))
    outside = general[(general < 0) | (general >= len(super_names))]
    if len(outside):
        raise InputError(
            f"{path}: label_general: label {outside[0]} is out of range; expected 0..{len(super_names) - 1}; "
            "get the file again"
        )
    super_of = dict(zip(specific.tolist(), general.tolist(), strict=True))
    return _Labels(
        specific,
        dict(enumerate(names)),
        # A class without an image has no super-class either; that it has none is said by whoever numbers them.
        {i: super_names[super_of[i]] if i in super_of else "" for i in range(len(names))},
    )


def _texts(stored: Any, key: str, path: Path) -> list[str]:
    texts = entry(stored, key, path)
    if not isinstance(texts, (list, tuple, np.ndarray)) or len(texts) == 0:
        raise InputError(f"{path}: {key!r} is no list of names; get the file again")
    return [as_text(text) for text in texts]
