"""What is in a data set: format, classes, images, sizes, channel statistics, and what two splits share."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mtl_fast.data import is_glyphs, load_split
from mtl_fast.data.dataset import SPLITS, DataSet, ImageFiles, Options
from mtl_fast.data.pixels import no_word_of_exif, size_of
from mtl_fast.data.reading import read_split
from mtl_fast.data.recognise import recognise
from mtl_fast.data.store import ImageStore
from mtl_fast.text_table import grid

# Images of several sizes are brought to this one for statistics and picture, unless a size is asked for.
COMMON_SIZE = 84
_CHUNK = 256  # images looked at together


@dataclass(frozen=True)
class SplitInfo:
    """One split.

    Attributes:
        store: its images, as a run would see them.
        sizes: (width, height) of the images on disk → how many.
        mean: of each channel, of 255.
        std: of each channel, of 255.
    """

    store: ImageStore
    sizes: Mapping[tuple[int, int], int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass(frozen=True)
class Overlap:
    """What two splits share; lists are sorted.

    Attributes:
        splits: their names.
        classes: class names in both.
        super_classes: super-class names in both.
        n_images: images of the second that are in the first, pixel by pixel.
    """

    splits: tuple[str, str]
    classes: list[str]
    super_classes: list[str]
    n_images: int

    @property
    def is_empty(self) -> bool:
        return not (self.classes or self.super_classes or self.n_images)


@dataclass(frozen=True)
class DataInfo:
    """A data set.

    Attributes:
        source: as given.
        format: what it was recognised as.
        layout: what was found there, in words.
        order: how its channels were read, in words.
        splits: those that are there.
        overlaps: every two splits.
        common_size: what images of several sizes were brought to, or None.
    """

    source: str
    format: str
    layout: str
    order: str
    splits: Mapping[str, SplitInfo]
    overlaps: tuple[Overlap, ...]
    common_size: int | None

    def __str__(self) -> str:
        head = ["split", "classes", "images", "a class", "pixels", "mean (R, G, B)", "std (R, G, B)"]
        rows = [[name, *_cells(split)] for name, split in self.splits.items()]
        lines = [f"{self.source}: {self.format}", f"  {self.layout}", f"  {self.order}", ""]
        lines += [grid(head, rows, "plain"), ""]
        if self.common_size is not None:
            lines.append(
                f"Images are of several sizes: set image_size. Statistics are those at {self.common_size}×{self.common_size}."
            )
        if absent := [split for split in SPLITS if split not in self.splits]:
            lines.append(f"There is no {' and no '.join(absent)} split.")
        shared = [overlap for overlap in self.overlaps if not overlap.is_empty]
        lines += [_sentence(overlap) for overlap in shared]
        if self.overlaps and not shared:
            lines.append("No class, super-class or image is in two splits.")
        if "train" in self.splits:
            train = self.splits["train"]
            options = (f"--data.{name} {_three(getattr(train, name), ' ')}" for name in ("mean", "std"))
            lines.append(f"To normalise by the training images: {' '.join(options)}")
        return "\n".join(lines)


def inspect_data(source: str | Path, options: Options) -> DataInfo:
    """Reads every split of a data set and says what is in it.

    Raises:
        InputError: as `load_split`.
    """
    if is_glyphs(source):
        stores = {
            split: load_split(
                source,
                split,
                options.image_size,
                channel_order=options.channel_order,
                crop_to_box=options.crop_to_box,
            )
            for split in SPLITS
        }
        format, layout, order = "Glyphs", "the embedded benchmark of written characters", "rendered as RGB"
        sizes = {split: _own_size(store) for split, store in stores.items()}
        common = None
    else:
        data = recognise(source)
        format, layout, order = data.format, data.layout, _order(data, options)
        on_disk = {split: _sizes(data, split) for split in data.splits}
        # A network takes one size, whether splits differ within or from each other.
        several = options.crop_to_box or len(set().union(*on_disk.values())) > 1
        common = COMMON_SIZE if options.image_size is None and several else None
        if common is not None:
            options = replace(options, image_size=common)
        stores = {split: read_split(data, split, options) for split in data.splits}
        sizes = {split: on_disk[split] or _own_size(store) for split, store in stores.items()}
    splits = {
        split: SplitInfo(store, sizes[split], *channel_statistics(store.images.numpy()))
        for split, store in stores.items()
    }
    return DataInfo(str(source), format, layout, order, splits, _overlaps(stores), common)


def channel_statistics(
    images: NDArray[np.uint8],
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and standard deviation of each channel over all pixels of uint8 [N, H, W, 3], from exact counts."""
    counts = np.zeros((3, 256), np.int64)
    for start in range(0, len(images), _CHUNK):
        for channel in range(3):
            counts[channel] += np.bincount(
                images[start : start + _CHUNK, ..., channel].reshape(-1), minlength=256
            )
    values = np.arange(256)
    mean = counts @ values / counts.sum(axis=1)
    variance = (counts * (values - mean[:, None]) ** 2).sum(axis=1) / counts.sum(axis=1)
    (r, g, b), (s, t, u) = mean.tolist(), np.sqrt(variance).tolist()
    return (r, g, b), (s, t, u)


@no_word_of_exif()
def _sizes(data: DataSet, split: str) -> Counter[tuple[int, int]]:
    """Sizes of images that are files of their own, from their headers; of others the store tells, and this is empty."""
    if not isinstance(data, ImageFiles):
        return Counter()
    with ThreadPoolExecutor() as executor:
        found = executor.map(size_of, data.listing(split).images, chunksize=_CHUNK)
        # What has no size is no image: reading says so.
        return Counter(size for size in found if size is not None)


def _own_size(store: ImageStore) -> Counter[tuple[int, int]]:
    height, width = store.image_size
    return Counter({(width, height): store.n_images})


def _order(data: DataSet, options: Options) -> str:
    if data.channel_order is None:
        return "the files tell their channel order"
    if options.channel_order == "auto":
        return f"read as {data.channel_order.upper()}, the habit of this format; the files do not tell"
    return f"read as {options.channel_order.upper()}, as asked for; the files do not tell"


def _overlaps(stores: Mapping[str, ImageStore]) -> tuple[Overlap, ...]:
    digests = {split: _digests(store.images.numpy()) for split, store in stores.items()}
    found = []
    for a, b in combinations(stores, 2):
        known = set(digests[a])
        supers = [set(stores[split].super_class_names or ()) for split in (a, b)]
        found.append(
            Overlap(
                splits=(a, b),
                classes=sorted(set(stores[a].class_names) & set(stores[b].class_names)),
                super_classes=sorted(supers[0] & supers[1]),
                n_images=sum(digest in known for digest in digests[b]),
            )
        )
    return tuple(found)


def _digests(images: NDArray[np.uint8]) -> list[bytes]:
    return [hashlib.blake2b(np.ascontiguousarray(image).data, digest_size=16).digest() for image in images]


def _cells(split: SplitInfo) -> list[str]:
    counts = split.store.class_counts
    low, high = int(counts.min()), int(counts.max())
    return [
        f"{split.store.n_classes:,}",
        f"{split.store.n_images:,}",
        f"{low:,}" if low == high else f"{low:,} … {high:,}",
        _pixels(split.sizes),
        _three(split.mean, "  "),
        _three(split.std, "  "),
    ]


def _pixels(sizes: Mapping[tuple[int, int], int]) -> str:
    """The one size, or from the narrowest and lowest to the widest and highest."""
    if len(sizes) == 1:
        ((width, height),) = sizes
        return f"{width}×{height}"
    widths, heights = zip(*sizes, strict=True)
    return f"{min(widths)}×{min(heights)} … {max(widths)}×{max(heights)}, {len(sizes):,} sizes"


def _three(values: tuple[float, float, float], between: str) -> str:
    return between.join(f"{value:.1f}" for value in values)


def _sentence(overlap: Overlap) -> str:
    first, second = overlap.splits
    parts = []
    for names, one, many in (
        (overlap.classes, "class", "classes"),
        (overlap.super_classes, "super-class", "super-classes"),
    ):
        if names:
            such = names[0] if len(names) == 1 else f"such as {names[0]}"
            parts.append(f"{len(names)} {one if len(names) == 1 else many} ({such})")
    if overlap.n_images:
        parts.append(f"{overlap.n_images:,} image{'s' if overlap.n_images > 1 else ''}")
    return f"{first} and {second} share {', '.join(parts)}!"
