"""Reader of CIFAR-100's own files, ``cifar-100-python/{train,test,meta}``, as FC100."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mtl_fast.data import fc100
from mtl_fast.data.array_files import described, entry, label_array, numbered
from mtl_fast.data.dataset import SPLITS, Content, DataSet, Options, some_present
from mtl_fast.data.pickles import as_text, load_pickle
from mtl_fast.errors import InputError

_FOLDER = "cifar-100-python"
_FILES = ("train", "test", "meta")
_SIDE = 32


class Cifar100(DataSet):
    """FC100 built from CIFAR-100: both files are merged, 600 images a class, split by super-class.

    A file holds ``data`` uint8 [N, 3072] (1024 red, 1024 green, 1024 blue), ``fine_labels`` and ``coarse_labels``.
    Images are in the order of the files, ``train`` before ``test``.
    """

    format = "CIFAR-100 (split as FC100)"
    layout = f"{_FOLDER}/{{train,test,meta}}"

    @classmethod
    def find(cls, folder: Path) -> Cifar100 | None:
        for root in (folder, folder / _FOLDER):
            if (root / "meta").is_file() and any((root / name).is_file() for name in ("train", "test")):
                return cls(root, dict.fromkeys(SPLITS, root / "meta"))
        return None

    def name_of(self, split: str) -> str:
        return f"{self.place(split).parent} ({split})"

    def shows(self, path: Path) -> bool:
        return path in some_present(self.root, _FILES)

    def files(self, split: str) -> Sequence[Path]:
        return some_present(self.root, _FILES)

    def read(self, split: str, options: Options) -> Content:
        meta = self.root / "meta"
        stored = load_pickle(meta)
        fine, coarse = (
            _names(stored, key, meta, n) for key, n in (("fine_label_names", 100), ("coarse_label_names", 20))
        )
        parts = [_part(self.root / name) for name in ("train", "test")]
        images, labels, supers = (np.concatenate([part[i] for part in parts]) for i in range(3))
        super_of = _super_of(labels, supers, self.root)
        kept = np.isin(supers, fc100.SUPER_CLASSES[split])
        # Every class has an image by now, so that those kept are all of the split.
        names = {i: fine[i] for i, its in super_of.items() if its in fc100.SUPER_CLASSES[split]}
        return numbered(
            _rgb(images[kept]),
            labels[kept],
            names,
            self.name_of(split),
            {i: coarse[super_of[i]] for i in names},
        )


def _names(stored: Any, key: str, where: Path, n: int) -> list[str]:
    names = entry(stored, key, where)
    if not isinstance(names, list) or len(names) != n:
        raise InputError(f"{where}: expected {n} names in {key!r}; get the file again")
    return [as_text(name) for name in names]


def _part(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.int64]]:
    """data [N, 3072], fine labels [N] in 0..99 and coarse labels [N] in 0..19 of one file."""
    stored = load_pickle(path)
    data = entry(stored, "data", path)
    length = 3 * _SIDE**2
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape[1:] != (length,):
        raise InputError(
            f"{path}: expected data uint8 [N, {length}], got {described(data)}; get the file again"
        )
    columns = []
    for key, n_classes in (("fine_labels", 100), ("coarse_labels", 20)):
        labels = label_array(entry(stored, key, path), len(data), path)
        bad = labels[(labels < 0) | (labels >= n_classes)]
        if len(bad):
            raise InputError(
                f"{path}: {key}: label {bad[0]} ({len(bad)} images) is out of range; expected 0..{n_classes - 1}; "
                "get the file again"
            )
        columns.append(labels)
    return data, columns[0], columns[1]


def _super_of(labels: NDArray[np.int64], supers: NDArray[np.int64], root: Path) -> dict[int, int]:
    """The coarse id of each of the 100 fine ids, which all have images and one coarse id each."""
    pairs = np.unique(np.stack([labels, supers], axis=1), axis=0)
    fine = pairs[:, 0].tolist()
    missing = sorted(set(range(100)) - set(fine))
    if missing:
        raise InputError(f"{root}: class {missing[0]} of 100 has no image; get the files again")
    if len(pairs) != 100:
        twice = next(i for i in fine if fine.count(i) > 1)
        raise InputError(f"{root}: class {twice} has images of several coarse labels; get the files again")
    return dict(pairs.tolist())


def _rgb(data: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """[N, 3072], one plane a colour → [N, 32, 32, 3]."""
    return np.ascontiguousarray(data.reshape(-1, 3, _SIDE, _SIDE).transpose(0, 2, 3, 1))
