"""Data sets in memory: the image store, its readers, and the embedded set."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from mtl_fast.data.store import ImageStore

__all__ = ["ImageStore", "load_split"]

_GLYPHS = "glyphs"


def load_split(source: str | Path, split: str, image_size: int | None = None, **options: Any) -> ImageStore:
    """One split of a data set, in memory.

    Args:
        source: ``glyphs``, ``glyphs:soft`` or ``glyphs:mid`` (the embedded set and its difficulty), or the
            path of class folders. A folder called glyphs is ``./glyphs``, or a `Path`.
        split: ``train``, ``val`` or ``test``.
        image_size: side of the images in pixels; None takes them as they are.
        options: ``seed`` for glyphs, ``n_workers`` for class folders.

    Raises:
        InputError: the source is missing, damaged or does not fit; one line with the way out.
    """
    name, _, difficulty = source.partition(":") if isinstance(source, str) else ("", "", "")
    if name == _GLYPHS:
        return _glyphs(split, image_size, **({"difficulty": difficulty} if difficulty else {}), **options)
    from mtl_fast.data.class_folders import read_class_folders

    return read_class_folders(source, split, image_size, **options)


def _glyphs(split: str, image_size: int | None, **options: Any) -> ImageStore:
    from mtl_fast.data.glyphs import load_glyphs

    store = load_glyphs(split, **options)
    if image_size is not None and store.image_size != (image_size, image_size):
        from mtl_fast.data.class_folders import resize_images

        store = replace(store, images=resize_images(store.images, image_size))
    return store
