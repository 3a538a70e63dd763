"""Reader of miniImageNet's cache files, ``mini-imagenet-cache-{train,val,test}.pkl``."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mtl_fast.data.array_files import check_all_present, entry, image_array, whole_numbers
from mtl_fast.data.dataset import Content, DataSet, Options, first_present
from mtl_fast.data.pickles import load_pickle
from mtl_fast.errors import InputError


class MiniCache(DataSet):
    """A dict ``image_data`` uint8 [N, 84, 84, 3] and ``class_dict``, class name → rows; rows of no class are left out."""

    format = "miniImageNet cache"
    layout = "mini-imagenet-cache-{train,val or validation,test}.pkl"
    channel_order = "rgb"

    @classmethod
    def find(cls, folder: Path) -> MiniCache | None:
        endings = {"train": ("train",), "val": ("val", "validation"), "test": ("test",)}
        names = {split: [f"mini-imagenet-cache-{end}.pkl" for end in ends] for split, ends in endings.items()}
        splits = first_present(folder, names)
        return cls(folder, splits) if splits else None

    def read(self, split: str, options: Options) -> Content:
        path = self.place(split)
        stored = load_pickle(path)
        images = image_array(entry(stored, "image_data", path), path, 84)
        classes = entry(stored, "class_dict", path)
        if not isinstance(classes, dict) or not classes:
            raise InputError(f"{path}: 'class_dict' is no dict of rows by class; get the file again")
        rows_of = {str(name): rows for name, rows in classes.items()}
        names = sorted(rows_of)
        labels = np.full(len(images), -1, np.int64)
        for number, name in enumerate(names):
            rows = whole_numbers(rows_of[name])
            if rows is None:
                raise InputError(
                    f"{path}: the rows of class {name} are no list of numbers; get the file again"
                )
            outside = rows[(rows < 0) | (rows >= len(images))]
            if len(outside):
                raise InputError(
                    f"{path}: class {name}: row {outside[0]} is out of range; there are {len(images)} images; "
                    "get the file again"
                )
            taken = rows[labels[rows] >= 0]
            if len(taken):
                raise InputError(
                    f"{path}: row {taken[0]} belongs to two classes, {name} is one; get the file again"
                )
            labels[rows] = number
        check_all_present(labels, dict(enumerate(names)), path)
        kept = labels >= 0
        # As a rule every row belongs to a class: nothing is copied then.
        return Content(images if kept.all() else images[kept], labels[kept], tuple(names))
