"""The picture of `mtl-fast predict`: examples of each class on the left, what the images were taken for beside them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .figures import GREY, WIDTH, Page, blank_figure, write_picture
from .font import distinct

MAX_CLASSES, MAX_SHOT, MAX_IMAGES = 40, 3, 120
# Pixels: margin, height of the head, cell of an example, cell of an image and the space under it for its caption.
_EDGE, _HEAD, _EXAMPLE, _IMAGE, _CAPTION, _BETWEEN = 36, 130, 72, 128, 74, 14
_NAMES = 150  # width of a class's name
_RIGHT = _EDGE + _NAMES + MAX_SHOT * (_EXAMPLE + 6) + 50  # where the images begin
_COLUMNS = (WIDTH - _EDGE - _RIGHT) // (_IMAGE + _BETWEEN)


def prediction_picture(
    path: str | Path,
    support: Sequence[NDArray[np.uint8]],
    class_names: Sequence[str],
    images: NDArray[np.uint8],
    predicted: NDArray[np.int64],
    probabilities: NDArray[np.float32],
) -> None:
    """Writes the PNG; of many classes, examples and images the first ones, and the head lines say so.

    Args:
        path: the PNG.
        support: of each of C classes its examples, uint8 [n, H, W, 3].
        class_names: [C]; drawn as `font.distinct` makes them, which counts in the order of the table's columns.
        images: uint8 [M, H, W, 3].
        predicted: [M], in 0..C-1.
        probabilities: [M, C].

    Raises:
        InputError: it cannot be written.
    """
    class_names = distinct(class_names)
    n_classes, n_images = min(len(class_names), MAX_CLASSES), min(len(images), MAX_IMAGES)
    rows = -(-n_images // _COLUMNS)
    pitch = _IMAGE + _CAPTION
    height = _HEAD + max(n_classes * (_EXAMPLE + 14), rows * pitch) + _EDGE
    with blank_figure(WIDTH, height) as figure:
        page = Page(figure, height)
        page.text(_EDGE, 46, f"{len(images):,} images, {len(class_names)} classes", size=13, weight="bold")
        page.text(_EDGE, 98, _first("class, examples", n_classes, len(class_names)), size=9, colour=GREY)
        page.text(_RIGHT, 98, _first("taken for", n_images, len(images)), size=9, colour=GREY)
        page.rule(_EDGE, WIDTH - _EDGE, 116)
        for c in range(n_classes):
            top = _HEAD + c * (_EXAMPLE + 14)
            middle = top + _EXAMPLE / 2
            page.lines(_EDGE, middle, class_names[c], 26, size=9, weight="bold", width=_NAMES - 12)
            for i, example in enumerate(support[c][:MAX_SHOT]):
                page.image(_EDGE + _NAMES + i * (_EXAMPLE + 6), top, _EXAMPLE, example)
        for i in range(n_images):
            left, top = _RIGHT + i % _COLUMNS * (_IMAGE + _BETWEEN), _HEAD + i // _COLUMNS * pitch
            label = int(predicted[i])
            page.image(left, top, _IMAGE, images[i])
            name_at = top + _IMAGE + 22
            page.lines(left, name_at, class_names[label], 17, size=7, weight="bold", width=_IMAGE)
            page.text(left, name_at + 28, f"{probabilities[i, label]:.0%}", size=7, colour=GREY)
        write_picture(figure, Path(path))


def _first(what: str, n_shown: int, n: int) -> str:
    return what if n_shown == n else f"{what} (first {n_shown} of {n:,})"
