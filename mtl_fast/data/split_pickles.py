"""Reader of one pickle a split with ``data`` and ``labels``: miniImageNet by category split, FC100, CIFAR-FS."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from mtl_fast.data import fc100
from mtl_fast.data.array_files import entry, image_array, label_array, numbered, unnamed
from mtl_fast.data.dataset import SPLITS, Content, DataSet, Options, first_present
from mtl_fast.data.pickles import load_pickle
from mtl_fast.errors import InputError


class SplitPickles(DataSet):
    """A dict ``data`` uint8 [N, size, size, 3] and ``labels``, N numbers, in a pickle a split.

    Attributes:
        names: split → file names it may have.
        size: side of the images.
    """

    channel_order = "rgb"
    names: ClassVar[Mapping[str, Sequence[str]]]
    size: ClassVar[int]

    @classmethod
    def find(cls, folder: Path) -> SplitPickles | None:
        splits = first_present(folder, cls.names)
        return cls(folder, splits) if splits else None

    def read(self, split: str, options: Options) -> Content:
        path = self.place(split)
        stored = load_pickle(path)
        images = image_array(entry(stored, "data", path), path, self.size)
        labels = label_array(entry(stored, "labels", path), len(images), path)
        classes, supers = self.classes(split, labels.tolist(), path)
        return numbered(images, labels, classes, path, supers)

    @abstractmethod
    def classes(
        self, split: str, labels: Sequence[int], path: Path
    ) -> tuple[Mapping[int, str], Mapping[int, str] | None]:
        """Label → class name of all classes of the split, and label → super-class where known."""


class CategorySplit(SplitPickles):
    """miniImageNet by category split: labels start at 0, 64 and 80."""

    format = "miniImageNet, category split"
    layout = "miniImageNet_category_split_{train_phase_train,val,test}.pickle"
    size = 84
    names: ClassVar = {
        "train": ("miniImageNet_category_split_train_phase_train.pickle",),
        "val": ("miniImageNet_category_split_val.pickle",),
        "test": ("miniImageNet_category_split_test.pickle",),
    }
    _numbers: ClassVar = {"train": range(64), "val": range(64, 80), "test": range(80, 100)}

    def classes(
        self, split: str, labels: Sequence[int], path: Path
    ) -> tuple[Mapping[int, str], Mapping[int, str] | None]:
        return {number: f"class {number}" for number in self._numbers[split]}, None


class Fc100Pickles(SplitPickles):
    """FC100: labels are CIFAR-100's fine ids, which name class and super-class."""

    format = "FC100"
    layout = "FC100_{train,val,test}.pickle"
    size = 32
    names: ClassVar = {split: (f"FC100_{split}.pickle",) for split in SPLITS}

    def classes(
        self, split: str, labels: Sequence[int], path: Path
    ) -> tuple[Mapping[int, str], Mapping[int, str] | None]:
        return fc100.class_names(split), fc100.super_class_names(split)


class CifarFs(SplitPickles):
    """CIFAR-FS: 64, 16 and 20 classes, numbered anyhow within CIFAR-100's hundred."""

    format = "CIFAR-FS"
    layout = "CIFAR_FS_{train,val,test}.pickle"
    size = 32
    names: ClassVar = {split: (f"CIFAR_FS_{split}.pickle",) for split in SPLITS}
    _n_classes: ClassVar = {"train": 64, "val": 16, "test": 20}

    def classes(
        self, split: str, labels: Sequence[int], path: Path
    ) -> tuple[Mapping[int, str], Mapping[int, str] | None]:
        return unnamed(split, some_of_hundred(labels, self._n_classes[split], path)), None


def some_of_hundred(labels: Sequence[int], n_classes: int, path: Path) -> list[int]:
    """The numbers in use, if they are `n_classes` of 0..99.

    Raises:
        InputError: there are others, or another number of them.
    """
    used = np.unique(labels).tolist()
    outside = [number for number in used if not 0 <= number < 100]
    if outside:
        raise InputError(f"{path}: label {outside[0]} is out of range; expected 0..99; get the file again")
    if len(used) != n_classes:
        raise InputError(f"{path}: {len(used)} classes have images, expected {n_classes}; get the file again")
    return used
