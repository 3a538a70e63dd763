"""From a recognised data set to a split in memory, by way of the cache."""

from __future__ import annotations

import functools
import sys

import numpy as np
import torch
from numpy.typing import NDArray

from mtl_fast.data import cache
from mtl_fast.data.dataset import SPLITS, Content, DataSet, Options
from mtl_fast.data.pixels import check_image_size, resize_images
from mtl_fast.data.store import ImageStore
from mtl_fast.errors import InputError


def read_split(data: DataSet, split: str, options: Options) -> ImageStore:
    """The split from its cache if that is of the same sources, else read, and kept for the next time.

    Raises:
        InputError: options that do not fit the data, or what `DataSet.read` says.
    """
    if split not in SPLITS:
        raise InputError(f"split {split!r} is unknown; choose {', '.join(SPLITS)}")
    if options.image_size is not None:
        check_image_size(options.image_size)
    if options.crop_to_box and not data.has_boxes:
        raise InputError(f"{data.root}: {data.format} has no boxes to crop to; leave data.crop_to_box out")
    if options.channel_order != "auto" and data.channel_order is None:
        raise InputError(
            f"{data.root}: files of {data.format} tell their channel order; leave data.channel_order at auto"
        )
    content = _cached(data, split, options)
    if data.channel_order is not None and options.channel_order == "auto":
        other = "rgb" if data.channel_order == "bgr" else "bgr"
        tell(
            f"{data.root}: {data.format} is read as {data.channel_order.upper()}; "
            f"if colours look wrong, set channel_order to {other}"
        )
    return ImageStore(
        torch.from_numpy(np.require(content.images, requirements=("C", "W"))),
        torch.from_numpy(content.labels),
        content.class_names,
        content.super_class_names,
        name=data.name_of(split),
    )


@functools.cache
def tell(message: str) -> None:
    """Says it on the error stream, once a process."""
    print(message, file=sys.stderr)


def _cached(data: DataSet, split: str, options: Options) -> Content:
    asked = {
        "format": data.format,
        "image_size": options.image_size,
        "channel_order": options.channel_order,
        "crop_to_box": options.crop_to_box,
    }
    path = cache.cache_file(data.root, split, asked)
    # Taken before reading: what changes while it is read makes the cache stale.
    fingerprint = cache.fingerprint(data.root, data.files(split), f"{data.format} {data.version}")
    found = cache.load(path, fingerprint)
    if found is not None:
        return found
    content = _fitted(data.read(split, options), data, options)
    reason = cache.save(path, fingerprint, content)
    if reason is not None:
        tell(
            f"images are decoded anew by each run: {path.parent} cannot hold them ({reason}); "
            f"{cache.ENVIRONMENT_VARIABLE} names another folder"
        )
        return content
    # Mapped from the file, they need no memory of their own.
    return cache.load(path, fingerprint) or content


def _fitted(content: Content, data: DataSet, options: Options) -> Content:
    """Red first, and of the size asked for."""
    images = content.images
    order = data.channel_order if options.channel_order == "auto" else options.channel_order
    if order == "bgr":
        images = _red_first(images)
    if options.image_size is not None:
        images = resize_images(images, options.image_size)
    return content._replace(images=images)


def _red_first(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """[N, H, W, 3], blue first → red first, in place where that can be: a large set is not there twice."""
    images = np.require(images, requirements="W")
    for start in range(0, len(images), 1024):
        part = images[start : start + 1024]
        part[:] = part[..., ::-1].copy()
    return images
