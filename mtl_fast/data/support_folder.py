"""A few labelled images and some to label, as they lie in folders."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mtl_fast.data.class_folders import (
    IN_A_CLASS,
    KINDS,
    files_below,
    images_of,
    sorted_images,
    tell_of_left_out,
    unread_of,
)
from mtl_fast.data.pixels import SUFFIXES, Encoded, check_image_size, decode_images
from mtl_fast.errors import InputError


@dataclass(frozen=True)
class SupportFolder:
    """Files found, none decoded.

    Attributes:
        support: class → its example files; at least two classes, in the order of their names.
        unsorted: the files to label, at least one.
        root: the folder that those lie below.
    """

    support: dict[str, list[Path]]
    unsorted: list[Path]
    root: Path

    @classmethod
    def find(
        cls, support: str | Path, images: str | Path | None = None, *, written: Path | None = None
    ) -> SupportFolder:
        """Looks for examples and for images to label; what is neither is counted on the error stream.

        Args:
            support: a folder of class folders, any number of examples each.
            images: a folder of images, at any depth, or one image; it may lie in `support` and is no class there, or
                around it, where the examples are none to label. None: the images beside the class folders.
            written: a picture that an earlier run may have left there; it is none to label, and a folder that holds
                nothing else is no class.

        Raises:
            InputError: a folder that is missing or cannot be read, fewer than two classes, a class without an image, or
                nothing to label.
        """
        folder, root = Path(support), Path(support if images is None else images)
        _require(folder, f"expected a folder of class folders, {IN_A_CLASS}", is_folder=True)
        _require(root, "expected a folder of images, or an image")
        no_class = {root.resolve(), *_holding_only(written, folder)}
        found = sorted_images(folder, IN_A_CLASS, leave_out=no_class)
        unread: list[Path] = []
        if root.resolve() == folder.resolve():
            root, unsorted = folder, found.loose  # however it was written
            nothing = (
                "no image lies beside its class folders; put some there, or name a folder of images to label"
            )
        else:
            below = list(files_below(root)) if root.is_dir() else []
            unsorted, unread = (images_of(below), unread_of(below)) if root.is_dir() else ([root], [])
            nothing = f"no {', '.join(SUFFIXES)} file to label"
        known = [*itertools.chain(*found.classes.values()), *([] if written is None else [written])]
        others = {file.resolve() for file in known}
        unsorted = [file for file in unsorted if file.resolve() not in others]
        taken = others | {file.resolve() for file in unsorted}
        # Those beside the class folders are no examples that somebody misses.
        stray = [file for file in found.deeper if file.resolve() not in taken]
        tell_of_left_out(folder, stray, found.unread)
        told = {file.absolute() for file in found.unread}  # one folder may lie in the other
        tell_of_left_out(root, [], [file for file in unread if file.absolute() not in told], KINDS)
        if len(found.classes) < 2:
            only = next(iter(found.classes))
            raise InputError(
                f"{folder}: holds one class only, {only}; at least two are needed to tell them apart"
            )
        if not unsorted:
            raise InputError(f"{root}: {nothing}")
        return cls(found.classes, unsorted, root if root.is_dir() else root.parent)


def read_images(files: Sequence[Path], image_size: int) -> NDArray[np.uint8]:
    """Images of any size and mode as a network takes them.

    They are turned upright by EXIF, the shorter side is resized to `image_size` (bilinear, antialiased), then the
    centre is cropped; grey is repeated, transparency lies on white.

    Args:
        files: N image files, at least one.
        image_size: height and width.

    Returns:
        uint8 [N, image_size, image_size, 3], RGB.

    Raises:
        InputError: files that are no images, damaged, or of more than 8 bits a channel; the first is named.
    """
    check_image_size(image_size)
    return decode_images([Encoded(str(file), file) for file in files], image_size, None, "images")


def _holding_only(written: Path | None, folder: Path) -> list[Path]:
    """The folder in `folder` on the way to this file, if it is there and holds no other image; resolved."""
    if written is None or not written.resolve().is_relative_to(folder.resolve()):
        return []
    first, *rest = written.resolve().relative_to(folder.resolve()).parts
    place = folder.resolve() / first
    alone = (
        rest and place.is_dir() and all(file == written.resolve() for file in images_of(files_below(place)))
    )
    return [place] if alone else []


def _require(path: Path, expected: str, *, is_folder: bool = False) -> None:
    if not path.exists():
        raise InputError(f"{path}: no such folder; {expected}")
    if is_folder and not path.is_dir():
        raise InputError(f"{path}: is a file; {expected}")
