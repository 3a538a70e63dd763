"""Reader of class folders: ``{train,val,test}/<class>/*.{jpg,jpeg,png,webp,gif,bmp}``."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from mtl_fast.data.dataset import SPLITS, ImageFiles, Listing, names_in
from mtl_fast.data.pixels import SUFFIXES, Encoded
from mtl_fast.data.reading import tell
from mtl_fast.errors import InputError

KINDS = f"*.{{{','.join(suffix[1:] for suffix in SUFFIXES)}}}"
IN_A_CLASS = f"<class>/{KINDS}"
# Images too, which nobody should miss without a word.
_UNREAD = (
    ".tif",
    ".tiff",
    ".heic",
    ".heif",
    ".avif",
    ".jfif",
    ".jp2",
    ".jxl",
    ".ppm",
    ".pgm",
    ".tga",
    ".svg",
)


class ClassFolders(ImageFiles):
    """A folder a class, its name the class's; images in the order of class and file names.

    Hidden files and files of other kinds are passed over; images beside the class folders or deeper in one, images of
    kinds that are not read, and links to nowhere are passed over and counted on the error stream.
    """

    format = "class folders"
    layout = f"{{train,val,test}}/{IN_A_CLASS}"

    @classmethod
    def find(cls, folder: Path) -> ClassFolders | None:
        splits = {split: folder / split for split in SPLITS if (folder / split).is_dir()}
        return cls(folder, splits) if splits else None

    def list_images(self, split: str) -> Listing:
        folder = self.place(split)
        found = sorted_images(folder, self.layout)
        tell_of_left_out(folder, [*found.loose, *found.deeper], found.unread)
        files = [(name, file) for name, members in found.classes.items() for file in members]
        return Listing([Encoded(str(file), file) for _, file in files], [name for name, _ in files])


class SortedImages(NamedTuple):
    """Image files in a folder of class folders, in the order of their names."""

    classes: dict[str, list[Path]]  # by class; at least one class, at least one file each
    loose: list[Path]  # beside the class folders
    deeper: list[Path]  # in folders below them
    unread: list[Path]  # anywhere: images of kinds that are not read, and links to nowhere


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
    beside = [folder / name for name in sorted(files)]
    found = SortedImages({}, images_of(beside), [], unread_of(beside))
    for name in names:
        subfolders, inside = names_in(folder / name)
        members = [folder / name / file for file in sorted(inside)]
        below = [file for sub in sorted(subfolders) for file in files_below(folder / name / sub)]
        found.classes[name], deeper = images_of(members), images_of(below)
        unread = unread_of([*members, *below])
        if not found.classes[name]:
            where = f" ({len(deeper)} lie deeper, such as {deeper[0]}: move them up)" if deeper else ""
            where = where or (f" ({_counted(unread)}: convert them)" if unread else "")
            kinds = ", ".join(SUFFIXES)
            raise InputError(f"{folder / name}: no {kinds} file in this class{where}; add some or remove it")
        found.deeper.extend(deeper)
        found.unread.extend(unread)
    return found


def tell_of_left_out(
    folder: Path, stray: Sequence[Path], unread: Sequence[Path], expected: str = IN_A_CLASS
) -> None:
    """Says once what lies in `folder` and is not taken: images in no class, and what `unread_of` finds."""
    parts = []
    if stray:
        parts.append(f"{len(stray)} images in no class folder, such as {stray[0]}")
    if unread:
        parts.append(f"{_counted(unread)}, such as {unread[0]}")
    if parts:
        tell(f"{folder}: left out: {'; '.join(parts)}; what is read is {expected}")


def files_below(folder: Path) -> Iterator[Path]:
    """Files in `folder` and the folders in it; links to folders are not followed, for they may go round."""
    folders, files = names_in(folder)
    yield from (folder / name for name in sorted(files))
    for name in sorted(folders):
        if not (folder / name).is_symlink():
            yield from files_below(folder / name)


def images_of(files: Iterable[Path]) -> list[Path]:
    """Those that are images by their names."""
    return [file for file in files if file.name.lower().endswith(SUFFIXES)]


def unread_of(files: Iterable[Path]) -> list[Path]:
    """Those that are images of kinds that are not read, or links to nowhere; a link called an image is one."""
    others = (file for file in files if not file.name.lower().endswith(SUFFIXES))
    return [file for file in others if file.name.lower().endswith(_UNREAD) or _leads_nowhere(file)]


def _leads_nowhere(file: Path) -> bool:
    return file.is_symlink() and not os.path.exists(file)


def _counted(unread: Sequence[Path]) -> str:
    """How many there are of each kind, such as ``3× .tif, 1× broken link``."""
    kinds = Counter("broken link" if _leads_nowhere(file) else file.suffix.lower() for file in unread)
    return ", ".join(f"{count}× {kind}" for kind, count in sorted(kinds.items()))
