"""What every format has in common: a data set as it lies on disk, and what is read of one split."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mtl_fast.data.pixels import Encoded, decode_images
from mtl_fast.errors import InputError

SPLITS = ("train", "val", "test")
ChannelOrder = Literal["rgb", "bgr"]


class Content(NamedTuple):
    """One split, read."""

    images: NDArray[np.uint8]  # [N, H, W, 3], channels as stored
    labels: NDArray[np.int64]  # [N], 0..C-1
    class_names: tuple[str, ...]  # C
    super_class_names: tuple[str, ...] | None = None  # C, or None where unknown


@dataclass(frozen=True)
class Options:
    """How to read; each has its default in `mtl_fast.data.load_split`, which documents them."""

    image_size: int | None = None
    channel_order: Literal["auto", "rgb", "bgr"] = "auto"
    crop_to_box: bool = False
    n_workers: int | None = None


class DataSet(ABC):
    """A data set on disk, recognised by names alone; nothing is decoded before `read`.

    Args:
        root: the folder.
        splits: each split that is there → the file or folder that showed it.

    Attributes:
        format: what the format is called.
        layout: what has to lie in the folder, in words.
        version: raised when the reader's results change, so that caches of the old ones are made anew.
        channel_order: how the format stores channels as a rule, where its files do not tell; None where they do.
        has_boxes: whether the images can be cropped to the boxes of their objects.
    """

    format: ClassVar[str]
    layout: ClassVar[str]
    version: ClassVar[int] = 1
    channel_order: ClassVar[ChannelOrder | None] = None
    has_boxes: ClassVar[bool] = False

    def __init__(self, root: Path, splits: Mapping[str, Path]) -> None:
        self.root = root
        self.splits = {split: splits[split] for split in SPLITS if split in splits}

    @classmethod
    @abstractmethod
    def find(cls, folder: Path) -> DataSet | None:
        """The data set of this format in `folder`, or None."""

    def files(self, split: str) -> Sequence[Path]:
        """The files that the split's content comes from: by default one; raises InputError as `read` does."""
        return (self.place(split),)

    @abstractmethod
    def read(self, split: str, options: Options) -> Content:
        """Reads one split.

        Raises:
            InputError: what is there is damaged or does not fit; one line names it and the way out.
        """

    def shows(self, path: Path) -> bool:
        """Whether this is a file or folder that the data set may be named by: by default those of `splits`."""
        return path in self.splits.values()

    def place(self, split: str) -> Path:
        """What showed the split.

        Raises:
            InputError: the split is not there.
        """
        if split not in self.splits:
            there = ", ".join(self.splits)
            raise InputError(
                f"{self.root}: {self.format} without split {split!r}, only {there}; expected {self.layout}"
            )
        return self.splits[split]

    def name_of(self, split: str) -> str:
        """What error messages call the split."""
        return str(self.place(split))


@dataclass(frozen=True)
class Listing:
    """The images of a split before they are decoded.

    Attributes:
        images: N images, not decoded.
        classes: the class name of each, N.
    """

    images: Sequence[Encoded]
    classes: Sequence[str]


class ImageFiles(DataSet):
    """A format whose images are files of their own; classes are numbered in the order of their names."""

    version = 2  # 2: transparency on white, upright by EXIF

    def __init__(self, root: Path, splits: Mapping[str, Path]) -> None:
        super().__init__(root, splits)
        self._listings: dict[str, Listing] = {}

    @abstractmethod
    def list_images(self, split: str) -> Listing:
        """The images of a split, with boxes where there are any; raises InputError as `read` does."""

    def listing(self, split: str) -> Listing:
        """What `list_images` says, asked once."""
        if split not in self._listings:
            listing = self.list_images(split)
            if not listing.images:
                raise InputError(
                    f"{self.root}: no image is in split {split!r}; get it again, or name another split"
                )
            self._listings[split] = listing
        return self._listings[split]

    def lists(self, split: str) -> Sequence[Path]:
        """The files that the listing itself comes from."""
        return ()

    def files(self, split: str) -> Sequence[Path]:
        images = self.listing(split).images
        return [*self.lists(split), *(image.data for image in images if isinstance(image.data, Path))]

    def read(self, split: str, options: Options) -> Content:
        listing = self.listing(split)
        images = listing.images
        if not options.crop_to_box:
            images = [replace(image, box=None) for image in images]
        elif boxless := [image.name for image in images if image.box is None]:
            raise InputError(
                f"{boxless[0]}: has no box to crop to, like {len(boxless)} of {len(images)} images; "
                "complete the boxes, or leave data.crop_to_box out"
            )
        pixels = decode_images(images, options.image_size, options.n_workers, self.name_of(split))
        names = sorted(set(listing.classes))
        number = {name: i for i, name in enumerate(names)}
        return Content(pixels, np.array([number[name] for name in listing.classes], np.int64), tuple(names))


def first_present(folder: Path, names: Mapping[str, Sequence[str]]) -> dict[str, Path]:
    """For each split, the first of its possible names that lies in `folder`."""
    found = {}
    for split, candidates in names.items():
        for name in candidates:
            if (folder / name).exists():
                found[split] = folder / name
                break
    return found


def names_in(folder: Path) -> tuple[list[str], list[str]]:
    """Names of the folders and of the other entries in `folder`, hidden ones left out.

    Raises:
        InputError: it cannot be read.
    """
    try:
        with os.scandir(folder) as entries:
            seen = {entry.name: _is_folder(entry) for entry in entries}
    except OSError as error:
        raise InputError(f"{folder}: cannot be read: {error.strerror}; check its permissions") from None
    visible = [name for name in seen if not (name.startswith(".") or name == "__MACOSX")]
    return [name for name in visible if seen[name]], [name for name in visible if not seen[name]]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads back to itself
        return False


def some_present(folder: Path, names: Sequence[str]) -> list[Path]:
    """Those of the files that lie in `folder`."""
    return [folder / name for name in names if (folder / name).is_file()]
