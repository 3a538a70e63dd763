"""Which format lies in a folder, told from the names in it."""

from __future__ import annotations

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
    """The data set at `path`, a folder or one of the files that show its format.

    Raises:
        InputError: nothing there, no format fits (the message says what was looked for), or several do.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such folder or file; {_wanted()}")
    folder = path if path.is_dir() else path.parent
    found = [data for data in (kind.find(folder) for kind in FORMATS) if data is not None]
    if not path.is_dir():
        found = [data for data in found if path in data.splits.values()]
    if not found:
        raise InputError(f"{path}: {_held(path)}; {_wanted()}")
    if len(found) > 1:
        fits = ", ".join(f"{data.format} ({next(iter(data.splits.values())).name})" for data in found)
        raise InputError(
            f"{path}: {len(found)} formats fit: {fits}; name one of the files instead of the folder, or move the "
            "others away"
        )
    return found[0]


def _held(path: Path) -> str:
    if not path.is_dir():
        return "a file that shows no format"
    folders, files = names_in(path)
    names = sorted([*(f"{name}/" for name in folders), *files])
    return f"holds {some(names) if names else 'nothing'}, which is no data set"


def _wanted() -> str:
    return "looked for " + "; ".join(f"{kind.format}: {kind.layout}" for kind in FORMATS)
