"""From files and buffers to pixels: decoding in parallel, cropping, resizing."""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError
from tqdm import tqdm

from mtl_fast.errors import InputError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")

# A file may bear the wrong suffix, but strangers' files reach no decoder beyond these.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
_BAR_FROM = 2000  # images; fewer are read before a bar is of use
_BATCH = 4096  # images given to the threads at a time: each one waiting costs memory
# What brings an image upright of which EXIF says that it was stored otherwise.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ON_THEIR_SIDE = (5, 6, 7, 8)  # width and height change places
# What Pillow's decoders raise on damaged files.
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


@dataclass(frozen=True)
class Encoded:
    """An image to decode.

    Attributes:
        name: what error messages call it.
        data: the file, or its content, which is not copied before it is decoded.
        box: (left, top, right, bottom) in pixels, the part to keep; it is cut to the image. None keeps all.
        as_stored: pixels stay as they lie in the file, as boxes may ask; else the image is turned upright where its
            EXIF orientation says that it was stored otherwise.
    """

    name: str
    data: Path | bytes | memoryview
    box: tuple[int, int, int, int] | None = None
    as_stored: bool = False


@contextmanager
def no_word_of_exif() -> Iterator[None]:
    """Pillow warns of damaged EXIF, which is no damage to an image."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(Possibly c|C)orrupt EXIF data")
        yield


@no_word_of_exif()
def decode_images(
    sources: Sequence[Encoded], image_size: int | None, n_workers: int | None, description: str
) -> NDArray[np.uint8]:
    """RGB images, decoded by threads (Pillow's decoders run beside each other), in the order of `sources`.

    Args:
        sources: N images, at least one.
        image_size: side of the square images, as `resize_and_crop` makes them; None takes them as they are.
        n_workers: threads; None is one for each processor.
        description: what the progress bar says; there is one on a terminal, for many images.

    Returns:
        uint8 [N, H, W, 3], upright by EXIF, of a GIF the first picture; transparency lies on white, grey is repeated.

    Raises:
        InputError: images that cannot be decoded, or of several sizes with `image_size` None.
    """
    images: NDArray[np.uint8] | None = None
    first = ""
    damaged: dict[str, str] = {}
    quiet = None if len(sources) >= _BAR_FROM else True  # None: a bar on a terminal only
    decoded = _decoded(sources, image_size, n_workers or _n_processors())
    bar = tqdm(decoded, description, len(sources), disable=quiet, unit=" images", leave=False)
    for i, (source, pixels) in enumerate(zip(sources, bar, strict=True)):
        if isinstance(pixels, str):
            damaged[source.name] = pixels
            continue
        if images is None:
            images, first = np.empty((len(sources), *pixels.shape), np.uint8), source.name
        if pixels.shape != images.shape[1:]:
            side = min(*images.shape[1:3], *pixels.shape[:2])
            raise InputError(
                f"{first} is {_size(images[0])} pixels, {source.name} is {_size(pixels)}: images need one size; "
                f"set image_size, such as {side}, and they are resized"
            )
        images[i] = pixels
    if damaged or images is None:
        (bad, reason), *others = damaged.items()
        rest = (
            f"; {len(others)} more of {len(sources)}: {some([name for name, _ in others])}" if others else ""
        )
        raise InputError(f"{bad} {reason}{rest}; replace or remove {'them' if others else 'it'}")
    return images


def _decoded(
    sources: Sequence[Encoded], image_size: int | None, n_workers: int
) -> Iterator[NDArray[np.uint8] | str]:
    executor = ThreadPoolExecutor(n_workers, thread_name_prefix="decode")
    try:
        for start in range(0, len(sources), _BATCH):
            yield from executor.map(partial(_decode, image_size=image_size), sources[start : start + _BATCH])
    finally:
        executor.shutdown(cancel_futures=True)


def to_rgb(image: Image.Image) -> Image.Image:
    """The image in RGB: transparency lies on white, grey is repeated.

    Raises:
        InputError: more than 8 bits a channel; what is wrong, to follow the image's name.
    """
    if image.mode.startswith(("I", "F")):
        raise InputError(f"has more than 8 bits a channel (mode {image.mode})")
    if image.has_transparency_data:
        # What no one sees is often stored black, as a drawing's lines are.
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    """EXIF's number, 1 for images that are upright or do not tell."""
    try:
        # A PNG file's own method decodes the whole image first.
        return int(Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1))
    except Exception:  # damage there is no damage to the image, and what Pillow raises on it is anything
        return 1


def _decode(source: Encoded, image_size: int | None) -> NDArray[np.uint8] | str:
    """uint8 [H, W, 3], or what is wrong with the image, to follow its name."""
    try:
        with _open(source) as image:
            image.load()  # Image.open reads the header only: this is where a truncated file shows
            turn = None if source.as_stored else _UPRIGHT.get(_orientation(image))
            image = to_rgb(image)
            if turn is not None:
                image = image.transpose(turn)
            if source.box is not None:
                left, top, right, bottom = source.box
                box = (max(left, 0), max(top, 0), min(right, image.width), min(bottom, image.height))
                if box[0] >= box[2] or box[1] >= box[3]:
                    return f"is {image.width}x{image.height} pixels, its box {source.box} lies outside"
                image = image.crop(box)
            return np.asarray(image if image_size is None else resize_and_crop(image, image_size))
    except InputError as error:
        return str(error)
    except UnidentifiedImageError:
        return f"({_n_bytes(source)}) is not an image"
    except _DAMAGE as error:
        text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        return f"({_n_bytes(source)}) cannot be decoded: {' '.join(text.split())}"


def size_of(source: Encoded) -> tuple[int, int] | None:
    """(width, height) from the image's header, as it is decoded but for its box; None where it cannot be read."""
    try:
        with _open(source) as image:
            on_side = not source.as_stored and _orientation(image) in _ON_THEIR_SIDE
            return (image.height, image.width) if on_side else image.size
    except _DAMAGE:
        return None


def _open(source: Encoded) -> Image.Image:
    data = source.data
    return Image.open(data if isinstance(data, Path) else io.BytesIO(data), formats=_FORMATS)


def check_image_size(image_size: int) -> None:
    if image_size < 1:
        raise InputError(f"image_size is {image_size}; it must be at least 1 pixel")


def resize_and_crop(image: Image.Image, size: int) -> Image.Image:
    """The centre square of `image` after its shorter side is resized to `size`, if it is not yet."""
    width, height = image.size
    scale = size / min(width, height)
    width, height = max(size, round(width * scale)), max(size, round(height * scale))
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def resize_images(images: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """uint8 [N, H, W, 3] -> [N, size, size, 3] by `resize_and_crop`; itself if it has that size already."""
    check_image_size(size)
    if images.shape[1:3] == (size, size):
        return images
    resized = np.empty((len(images), size, size, 3), np.uint8)
    for i, image in enumerate(images):
        resized[i] = np.asarray(resize_and_crop(Image.fromarray(image), size))
    return resized


def some(names: Sequence[str]) -> str:
    """The first five names, and how many more there are."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def _n_bytes(source: Encoded) -> str:
    if not isinstance(source.data, Path):
        return f"{len(source.data)} bytes"
    try:
        return f"{source.data.stat().st_size} bytes"
    except OSError:  # a link to nowhere, for one
        return "unreadable"


def _size(pixels: NDArray[np.uint8]) -> str:
    return f"{pixels.shape[1]}x{pixels.shape[0]}"


def _n_processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
