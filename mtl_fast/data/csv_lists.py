"""Reader of CSV lists: ``{train,val,test}.csv`` beside ``images/``, as Ravi and Larochelle's and LibFewShot's."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from mtl_fast.data.dataset import SPLITS, ImageFiles, Listing
from mtl_fast.data.pixels import Encoded
from mtl_fast.errors import InputError

# The two headers in use: columns of file name and class.
_HEADERS = (("filename", "label"), ("image_name", "class_name"))


class CsvLists(ImageFiles):
    """A row an image, in the order of the rows; columns ``filename,label`` or ``class_name,image_name``."""

    format = "CSV lists"
    layout = "{train,val,test}.csv (columns filename,label or class_name,image_name) + images/"

    @classmethod
    def find(cls, folder: Path) -> CsvLists | None:
        splits = {split: folder / f"{split}.csv" for split in SPLITS if (folder / f"{split}.csv").is_file()}
        return cls(folder, splits) if splits and (folder / "images").is_dir() else None

    def lists(self, split: str) -> Sequence[Path]:
        return (self.place(split),)

    def list_images(self, split: str) -> Listing:
        path = self.place(split)
        rows = _rows(path)
        folder = self.root / "images"
        _, name, label = rows[0]
        # Some keep a folder a class in images/; the first row tells.
        nested = not (folder / name).exists() and (folder / label / name).exists()
        files = [folder / label / name if nested else folder / name for _, name, label in rows]
        seen: dict[Path, tuple[int, str]] = {}
        for file, (line, name, label) in zip(files, rows, strict=True):
            first, other = seen.setdefault(file, (line, label))
            if first != line:
                twice = "is listed twice" if other == label else f"is of {other!r} and of {label!r}"
                raise InputError(
                    f"{path}, lines {first} and {line}: {name!r} {twice}; remove one of the lines"
                )
        return Listing([Encoded(str(file), file) for file in files], [label for _, _, label in rows])


def _rows(path: Path) -> list[tuple[int, str, str]]:
    """(line, file name, class) of each row; at least one row."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            columns = reader.fieldnames = [column.strip() for column in reader.fieldnames or ()]
            wanted = next((pair for pair in _HEADERS if set(pair) <= set(columns)), None)
            if wanted is None:
                held = ",".join(columns) if columns else "nothing"
                raise InputError(
                    f"{path}: the first line is {held!r}, expected filename,label or class_name,image_name"
                )
            # A row may have too few cells.
            name, label = wanted
            rows = [
                (reader.line_num, (row[name] or "").strip(), (row[label] or "").strip()) for row in reader
            ]
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: is no CSV list ({error}); get it again") from None
    if not rows:
        raise InputError(f"{path}: lists no image; get it again")
    for line, name, label in rows:
        if not name or not label:
            raise InputError(
                f"{path}, line {line}: no {wanted[1] if name else wanted[0]}; get the file again"
            )
        if (
            PurePosixPath(name).is_absolute()
            or {"..", "."} & {*PurePosixPath(name).parts, label}
            or "/" in label
        ):
            raise InputError(
                f"{path}, line {line}: {name!r} of {label!r} lies outside of images/; do not trust its source"
            )
    return rows
