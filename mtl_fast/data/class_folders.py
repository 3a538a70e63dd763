"""Reader of class folders: ``{train,val,test}/<class>/*.{jpg,jpeg,png,webp}``."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

from mtl_fast.data.dataset import SPLITS, ImageFiles, Listing, names_in
from mtl_fast.data.pixels import SUFFIXES, Encoded
from mtl_fast.errors import InputError


class ClassFolders(ImageFiles):
    """A folder a class, its name the class's; images in the order of class and file names.

    Hidden files and files of other kinds are passed over; images beside the class folders, or deeper in one,
    belong to no class and are passed over with a warning.
    """

    format = "class folders"
    layout = "{train,val,test}/<class>/*.{jpg,jpeg,png,webp}"

    @classmethod
    def find(cls, folder: Path) -> ClassFolders | None:
        splits = {split: folder / split for split in SPLITS if (folder / split).is_dir()}
        return cls(folder, splits) if splits else None

    def list_images(self, split: str) -> Listing:
        classes = _class_files(self.place(split))
        files = [(name, file) for name, members in classes.items() for file in members]
        return Listing([Encoded(str(file), file) for _, file in files], [name for name, _ in files])


def _class_files(folder: Path) -> dict[str, list[Path]]:
    """Image files by class, both in the order of their names; at least one class, at least one file each."""
    found = sorted_images(folder, ClassFolders.layout)
    stray = [*found.loose, *found.deeper]
    if stray:
        left_out = f"{len(stray)} images lie in no class folder and are left out, such as {stray[0]}"
        warnings.warn(f"{folder}: {left_out}; expected {ClassFolders.layout}", stacklevel=3)
    return found.classes


class SortedImages(NamedTuple):
    """Image files in a folder of class folders, in the order of their names."""

    classes: dict[str, list[Path]]  # by class; at least one class, at least one file each
    loose: list[Path]  # beside the class folders
    deeper: list[Path]  # in folders below them


def sorted_images(folder: Path, layout: str, *, leave_out: Collection[Path] = ()) -> SortedImages:
    """The image files in `folder`, hidden files and files of other kinds passed over.

    Args:
        folder: holds a folder a class.
        layout: what is expected there, in words.
        leave_out: folders in it that are no class, resolved.

    Raises:
        InputError: no class folder, or one without images, or one that cannot be read.
    """
    class_folders, files = names_in(folder)
    names = [name for name in sorted(class_folders) if (folder / name).resolve() not in leave_out]
    if not names:
        held = f"{len(files)} files but no class folders" if files else "nothing"
        raise InputError(f"{folder}: holds {held}; expected {layout}")
    found = SortedImages({}, [folder / name for name in sorted(files) if _is_image(name)], [])
    for name in names:
        subfolders, inside = names_in(folder / name)
        deeper = [file for sub in sorted(subfolders) for file in images_below(folder / name / sub)]
        found.classes[name] = [folder / name / file for file in sorted(inside) if _is_image(file)]
        if not found.classes[name]:
            where = f" ({len(deeper)} lie deeper, such as {deeper[0]}: move them up)" if deeper else ""
            kinds = ", ".join(SUFFIXES)
            raise InputError(f"{folder / name}: no {kinds} file in this class{where}; add some or remove it")
        found.deeper.extend(deeper)
    return found


def images_below(folder: Path) -> Iterator[Path]:
    """Images in `folder` and the folders in it; links to folders are not followed, for they may go round."""
    folders, files = names_in(folder)
    yield from (folder / name for name in sorted(files) if _is_image(name))
    for name in sorted(folders):
        if not (folder / name).is_symlink():
            yield from images_below(folder / name)


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)
