"""Reader of FC100 as TADAM ships it: ``few-shot-{train,val,test}.npz``."""

from __future__ import annotations

from pathlib import Path

from mtl_fast.data import fc100
from mtl_fast.data.array_files import image_array, label_array, load_archive, numbered, unnamed
from mtl_fast.data.dataset import SPLITS, Content, DataSet, Options, first_present
from mtl_fast.data.split_pickles import some_of_hundred


class TadamArchives(DataSet):
    """``features`` uint8 [N, 32, 32, 3] and ``targets``, N of CIFAR-100's fine ids, or any numbers in 0..99."""

    format = "FC100, TADAM's archives"
    layout = "few-shot-{train,val,test}.npz"
    channel_order = "rgb"

    @classmethod
    def find(cls, folder: Path) -> TadamArchives | None:
        splits = first_present(folder, {split: (f"few-shot-{split}.npz",) for split in SPLITS})
        return cls(folder, splits) if splits else None

    def read(self, split: str, options: Options) -> Content:
        path = self.place(split)
        features, targets = load_archive(path, "features", "targets")
        images = image_array(features, path, 32)
        labels = label_array(targets, len(images), path)
        names = fc100.class_names(split)
        used = some_of_hundred(labels.tolist(), len(names), path)
        if used == sorted(names):
            return numbered(images, labels, names, path, fc100.super_class_names(split))
        return numbered(images, labels, unnamed(split, used), path)
