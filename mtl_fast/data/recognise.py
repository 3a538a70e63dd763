"""Which format lies in a folder, told from the names in it."""

from __future__ import annotations

import os
from pathlib import Path

from mtl_fast.data.cifar100 import Cifar100
from mtl_fast.data.class_folders import ClassFolders
from mtl_fast.data.csv_lists import CsvLists
from mtl_fast.data.cub import Cub
from mtl_fast.data.dataset import DataSet, names_in
from mtl_fast.data.mini_cache import MiniCache
from mtl_fast.data.pixels import some
from mtl_fast.data.split_pickles import CategorySplit, CifarFs, Fc100Pickles
from mtl_fast.data.tadam import TadamArchives
from mtl_fast.data.tiered import TieredArchives, TieredPng
from mtl_fast.errors import InputError

FORMATS: tuple[type[DataSet], ...] = (
    ClassFolders,
    CsvLists,
    MiniCache,
    CategorySplit,
    Cifar100,
    Fc100Pickles,
    TadamArchives,
    TieredPng,
    TieredArchives,
    CifarFs,
    Cub,
)


def recognise(path: str | Path) -> DataSet:
    """The data set at `path`: a folder, or one of the files, or of the splits' folders, that show its format.

    A ``~`` at its beginning is the user's home.

    Raises:
        InputError: nothing there, no format fits (the message says what was looked for), or several do.
    """
    path = Path(os.path.expanduser(path))
    if not path.exists():
        raise InputError(
            f"{path}: no such folder or file; name where the images are with --data.source (evaluate, embed: --data)"
        )
    found = _found_in(path) if path.is_dir() else []
    if not found:
        found = [data for data in _found_in(path.parent) if data.shows(path)]
    if not found:
        raise InputError(f"{path}: {_held(path)}; {_wanted()}")
    if len(found) > 1:
        folder = path if path.is_dir() else path.parent
        signs = [(data.format, next(iter(data.splits.values()))) for data in found]
        fits = ", ".join(f"{format} ({os.path.relpath(sign, folder)})" for format, sign in signs)
        raise InputError(
            f"{path}: {len(found)} formats fit: {fits}; name what stands in brackets behind the one that is meant, "
            "or move the others away"
        )
    return found[0]


def _found_in(folder: Path) -> list[DataSet]:
    return [data for data in (kind.find(folder) for kind in FORMATS) if data is not None]


def _held(path: Path) -> str:
    if not path.is_dir():
        return "a file that shows no format"
    folders, files = names_in(path)
    names = sorted([*(f"{name}/" for name in folders), *files])
    return f"holds {some(names) if names else 'nothing'}, which is no data set"


def _wanted() -> str:
    return "looked for " + "; ".join(f"{kind.format}: {kind.layout}" for kind in FORMATS)
