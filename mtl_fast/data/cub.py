"""Reader of CUB-200-2011 as Caltech ships it: ``images/<NNN.Name>/*.jpg``, ``images.txt``, ``bounding_boxes.txt``."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from mtl_fast.data.dataset import SPLITS, ImageFiles, Listing, some_present
from mtl_fast.data.pixels import Encoded
from mtl_fast.errors import InputError

# Split of the class number modulo 4, where no list says otherwise: 100/50/50 classes.
_MODULO = ("test", "train", "val", "train")
# The list of 140/30/30 classes, by its name in Meta-Dataset; {"train": [class, …], "valid": …, "test": …}.
SPLIT_LIST = "cu_birds_splits.json"
_BOXES = "bounding_boxes.txt"
_LISTS = ("images.txt", _BOXES, SPLIT_LIST)


class Cub(ImageFiles):
    """Birds, split by class number modulo 4 (train 1 and 3, val 2, test 0), or by the list file where it lies there."""

    format = "CUB-200-2011"
    layout = f"CUB_200_2011/ with images/<NNN.Name>/*.jpg and images.txt (for boxes {_BOXES}, for 140/30/30 {SPLIT_LIST})"
    has_boxes = True

    @classmethod
    def find(cls, folder: Path) -> Cub | None:
        for root in (folder, folder / "CUB_200_2011"):
            if (root / "images.txt").is_file() and (root / "images").is_dir():
                return cls(root, dict.fromkeys(SPLITS, root / "images.txt"))
        return None

    def name_of(self, split: str) -> str:
        return f"{self.place(split).parent} ({split})"

    def shows(self, path: Path) -> bool:
        return path in some_present(self.root, _LISTS)

    def lists(self, split: str) -> Sequence[Path]:
        return some_present(self.root, _LISTS)

    def list_images(self, split: str) -> Listing:
        wanted = self._classes(split)
        rows = [row for row in self._rows() if row[1].split("/")[0] in wanted]
        missing = sorted(wanted - {name.split("/")[0] for _, name in rows})
        if missing:
            raise InputError(
                f"{self.root / 'images.txt'}: class {missing[0]} of {split} has no image; get the file again"
            )
        boxes = self._boxes()
        files = [self.root / "images" / name for _, name in rows]
        # Boxes are those of the pixels as stored, whatever EXIF says of the camera.
        images = [
            Encoded(str(file), file, boxes.get(number), as_stored=True)
            for file, (number, _) in zip(files, rows, strict=True)
        ]
        return Listing(images, [name.split("/")[0] for _, name in rows])

    def _rows(self) -> list[tuple[str, str]]:
        """(image number, path below images/) of each image."""
        path = self.root / "images.txt"
        rows = []
        seen: dict[str, int] = {}
        for line, words in _words(path):
            parts = words[1].split("/") if len(words) == 2 else []
            if len(parts) != 2 or {"..", "."} & set(parts) or not parts[0].split(".")[0].isdecimal():
                raise InputError(
                    f"{path}, line {line}: {' '.join(words)!r}, expected '<id> <NNN.Name>/<file>'; get the file again"
                )
            for word in words:  # neither a number, which boxes go by, nor a file comes twice
                first = seen.setdefault(word, line)
                if first != line:
                    raise InputError(
                        f"{path}, lines {first} and {line}: {word!r} is listed twice; remove one of the lines"
                    )
            rows.append((words[0], words[1]))
        if not rows:
            raise InputError(f"{path}: lists no image; get it again")
        return rows

    def _classes(self, split: str) -> set[str]:
        path = self.root / SPLIT_LIST
        if not path.is_file():
            names = {name.split("/")[0] for _, name in self._rows()}
            by_number = {int(name.split(".")[0]): name for name in names}
            gaps = sorted(set(range(1, len(names) + 1)) - set(by_number))
            if gaps:
                raise InputError(
                    f"{self.root / 'images.txt'}: class {gaps[0]:03} has no image; get the file again"
                )
            return {name for number, name in by_number.items() if _MODULO[number % 4] == split}
        try:
            lists = json.loads(path.read_text("utf-8"))
            lists = {key: set(map(str, names)) for key, names in lists.items()}
            return lists["valid" if split == "val" and "val" not in lists else split]
        except (OSError, ValueError, AttributeError, TypeError, KeyError):
            raise InputError(
                f'{path}: is no list of classes, {{"train": […], "valid": […], "test": […]}}; '
                "get it again, or remove it for the split by class number modulo 4"
            ) from None

    def _boxes(self) -> dict[str, tuple[int, int, int, int]]:
        """Image number → (left, top, right, bottom); empty where there are no boxes."""
        path = self.root / _BOXES
        if not path.is_file():
            return {}
        boxes = {}
        for line, words in _words(path):
            try:
                number, left, top, width, height = words[0], *map(float, words[1:])
                box = (math.floor(left), math.floor(top), math.ceil(left + width), math.ceil(top + height))
            except (ValueError, OverflowError):
                raise InputError(
                    f"{path}, line {line}: {' '.join(words)!r}, expected '<id> <x> <y> <width> <height>'; "
                    "get the file again"
                ) from None
            boxes[number] = box
        return boxes


def _words(path: Path) -> list[tuple[int, list[str]]]:
    """Line number and words of each line that has any."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); get it again") from None
    return [(i, line.split()) for i, line in enumerate(lines, 1) if line.strip()]
