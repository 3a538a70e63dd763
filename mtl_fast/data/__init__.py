"""Data sets in memory: the image store, its readers, and the embedded set."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

from mtl_fast.data.store import ImageStore
from mtl_fast.errors import InputError

__all__ = ["ImageStore", "load_split"]

_GLYPHS = "glyphs"


def load_split(
    source: str | Path,
    split: str,
    image_size: int | None = None,
    *,
    channel_order: Literal["auto", "rgb", "bgr"] = "auto",
    crop_to_box: bool = False,
    n_workers: int | None = None,
    seed: int = 0,
) -> ImageStore:
    """One split of a data set, in memory.

    Images on disk are decoded once: their pixels are kept in the user's cache folder and memory-mapped from there.

    Args:
        source: ``glyphs``, ``glyphs:soft`` or ``glyphs:mid`` (the embedded set and its difficulty), or the
            path of a data set, a folder or one of its files; what lies there tells the format. A folder called
            glyphs is ``./glyphs``, or a `Path`.
        split: ``train``, ``val`` or ``test``.
        image_size: side of the store's square images, in pixels: the shorter side is resized to it (bilinear,
            antialiased), then the centre is cropped. None takes images as they are, all of one size.
        channel_order: of files that do not tell whether red or blue comes first; ``auto`` is the format's habit,
            and says on the error stream which that is.
        crop_to_box: keep of each image the box around its object, where the data set has boxes.
        n_workers: decoding threads; None is one for each processor.
        seed: of glyphs.

    Raises:
        InputError: the source is missing, damaged or does not fit; one line with the way out.
    """
    if is_glyphs(source):
        difficulty = str(source).partition(":")[2]
        if channel_order != "auto" or crop_to_box:
            raise InputError(f"{source}: takes neither a channel order nor boxes; leave them out")
        return _glyphs(split, difficulty or "mid", image_size, seed)
    from mtl_fast.data.dataset import Options
    from mtl_fast.data.reading import read_split
    from mtl_fast.data.recognise import recognise

    return read_split(recognise(source), split, Options(image_size, channel_order, crop_to_box, n_workers))


def is_glyphs(source: str | Path) -> bool:
    """Whether a source names the embedded set."""
    return isinstance(source, str) and source.partition(":")[0] == _GLYPHS


def _glyphs(split: str, difficulty: str, image_size: int | None, seed: int) -> ImageStore:
    from mtl_fast.data.glyphs import load_glyphs

    store = load_glyphs(split, difficulty, seed)
    if image_size is not None:
        import torch

        from mtl_fast.data.pixels import resize_images

        store = replace(store, images=torch.from_numpy(resize_images(store.images.numpy(), image_size)))
    return store
