"""A picture of a data set: some classes of each split, some images of each class."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mtl_fast.data.store import ImageStore
from mtl_fast.errors import InputError
from mtl_fast.files import replace_file

N_CLASSES, N_IMAGES = 6, 12  # rows a split, pictures a row
_WIDTH, _EDGE, _CELL, _GAP = 1600, 32, 96, 8  # pixels; 96 is three times 32
_TITLE = 56  # height of a split's title
_NAMES = _WIDTH - 2 * _EDGE - N_IMAGES * (_CELL + _GAP)  # width of the class names
_INK, _GREY = "#1b1f24", "#6b7280"


def write_contact_sheet(path: Path, stores: Mapping[str, ImageStore]) -> None:
    """Writes the PNG in one step; classes and images are taken at equal distances, so a picture shows the whole range.

    Args:
        path: the file.
        stores: split → its images.

    Raises:
        InputError: it cannot be written.
    """
    rows = [min(store.n_classes, N_CLASSES) for store in stores.values()]
    height = _EDGE + sum(_TITLE + n * (_CELL + _GAP) + _EDGE for n in rows)
    sheet = Image.new("RGB", (_WIDTH, height), "white")
    top = _EDGE
    for split, store in stores.items():
        top = _draw_split(sheet, top, split, store) + _EDGE
    content = io.BytesIO()
    sheet.save(content, "PNG")
    try:
        replace_file(path, [content.getvalue()], shared=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); give another --output") from None


def _draw_split(sheet: Image.Image, top: int, split: str, store: ImageStore) -> int:
    """Draws a split from height `top` on; returns where it ends."""
    draw = ImageDraw.Draw(sheet)
    title, name_font, small = _font(24, bold=True), _font(17), _font(13)
    draw.text((_EDGE, top), split, _INK, title)
    about = f"{store.n_classes:,} classes, {store.n_images:,} images"
    draw.text((_EDGE + _NAMES, top + 7), about, _GREY, name_font)
    top += _TITLE
    for label in _spread(store.n_classes, N_CLASSES):
        supers = store.super_class_names
        _draw_text(draw, top + (30 if supers else 38), store.class_names[label], name_font, _INK)
        if supers:
            _draw_text(draw, top + 54, supers[label], small, _GREY)
        count = int(store.class_counts[label])
        for place, i in enumerate(_spread(count, N_IMAGES)):
            pixels = store.images[int(store.class_index[label, i])].cpu().numpy()
            sheet.paste(_fitted(Image.fromarray(pixels)), (_EDGE + _NAMES + place * (_CELL + _GAP), top))
        top += _CELL + _GAP
    return top


def _spread(n: int, most: int) -> list[int]:
    """At most `most` of 0..n-1, at equal distances, the first and the last among them."""
    return np.linspace(0, n - 1, min(n, most)).round().astype(int).tolist()


def _fitted(image: Image.Image) -> Image.Image:
    """The image within a cell; small ones keep their pixels sharp."""
    scale = _CELL / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.NEAREST if scale > 2 else Image.Resampling.LANCZOS)


def _draw_text(
    draw: ImageDraw.ImageDraw, y: int, text: str, font: ImageFont.FreeTypeFont, colour: str
) -> None:
    """A name on one line, cut with an ellipsis where it is too long."""
    # What no font draws, such as half a surrogate pair in the name of a folder, becomes a question mark.
    text = " ".join(text.encode("utf-8", "replace").decode().split())
    kept = text
    while len(kept) > 1 and font.getlength(kept if kept == text else f"{kept}…") > _NAMES - _EDGE:
        kept = kept[:-1].rstrip()
    draw.text((_EDGE, y), kept if kept == text else f"{kept}…", colour, font)


def _font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu, which comes with matplotlib and knows most alphabets."""
    import matplotlib

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name
    # The basic layout is there on every machine, and refuses no text.
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)
