"""Reader of class folders: ``{train,val,test}/<class>/*.{jpg,jpeg,png,webp}``."""

from __future__ import annotations

import os
import struct
import warnings
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from mtl_fast.data.store import ImageStore
from mtl_fast.errors import InputError

SPLITS = ("train", "val", "test")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")

# A file may bear the wrong suffix, but strangers' files reach no decoder beyond these.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
_LAYOUT = "expected {train,val,test}/<class>/*.{jpg,jpeg,png,webp}"
_BAR_FROM = 2000  # images; fewer are read before a bar is of use
# What Pillow's decoders raise on damaged files.
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


def read_class_folders(
    root: str | Path, split: str, image_size: int | None = None, n_workers: int | None = None
) -> ImageStore:
    """Reads one split, in the order of class and file names.

    Hidden files and files of other kinds are passed over; images beside the class folders, or deeper in one,
    belong to no class and are passed over with a warning.

    Args:
        root: the folder that holds the splits.
        split: ``train``, ``val`` or ``test``.
        image_size: side of the store's square images, in pixels: the shorter side is resized to it (bilinear,
            antialiased), then the centre is cropped. None takes the images as they are, all of one size.
        n_workers: decoding threads; None is one for each processor.

    Returns:
        RGB images; transparency is dropped, grey is repeated.

    Raises:
        InputError: a folder that is missing or holds no images, files that cannot be decoded, images of
            several sizes with `image_size` None; one line that names them and the way out.
    """
    if image_size is not None:
        check_image_size(image_size)
    folder = _split_folder(Path(root), split)
    classes = _class_files(folder)
    files = [file for members in classes.values() for file in members]
    images = _read_images(files, image_size, n_workers or _n_processors(), description=str(folder))
    labels = np.repeat(np.arange(len(classes)), [len(members) for members in classes.values()])
    return ImageStore(
        torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64)), tuple(classes), name=str(folder)
    )


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


def to_rgb(image: Image.Image) -> Image.Image:
    """The image in RGB: transparency is dropped, grey is repeated.

    Raises:
        InputError: more than 8 bits a channel; what is wrong, to follow the image's name.
    """
    if image.mode.startswith(("I", "F")):
        raise InputError(f"has more than 8 bits a channel (mode {image.mode})")
    if "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def resize_images(images: torch.Tensor, size: int) -> torch.Tensor:
    """uint8 [N, H, W, 3] -> [N, size, size, 3] by `resize_and_crop`."""
    check_image_size(size)
    return torch.stack(
        [
            torch.from_numpy(np.array(resize_and_crop(Image.fromarray(image), size)))
            for image in images.cpu().numpy()
        ]
    ).to(images.device)


def _split_folder(root: Path, split: str) -> Path:
    if split not in SPLITS:
        raise InputError(f"split {split!r} is unknown; choose {', '.join(SPLITS)}")
    if not root.exists():
        raise InputError(f"{root}: no such folder; {_LAYOUT} in it")
    if not root.is_dir():
        raise InputError(f"{root}: a file, not a folder; {_LAYOUT} in a folder")
    folders, files = _listing(root)
    if split not in folders:
        if not folders:
            held = f"{len(files)} files and no folders" if files else "nothing"
            raise InputError(f"{root}: holds {held}; {_LAYOUT} in it")
        splits = [name for name in SPLITS if name in folders]
        held = f"the splits {', '.join(splits)}" if splits else f"{_some(sorted(folders))}"
        raise InputError(f"{root}: no folder {split!r}, only {held}; {_LAYOUT} in it")
    return root / split


def _class_files(folder: Path) -> dict[str, list[Path]]:
    """Image files by class, both in the order of their names; at least one class, at least one file each."""
    class_folders, loose = _listing(folder)
    if not class_folders:
        held = f"{len(loose)} files but no class folders" if loose else "nothing"
        raise InputError(f"{folder}: holds {held}; {_LAYOUT}")
    stray = [folder / name for name in loose if _is_image(name)]
    classes: dict[str, list[Path]] = {}
    for name in sorted(class_folders):
        subfolders, names = _listing(folder / name)
        deeper = [file for sub in sorted(subfolders) for file in _images_below(folder / name / sub)]
        classes[name] = [folder / name / file for file in sorted(names) if _is_image(file)]
        if not classes[name]:
            where = f" ({len(deeper)} lie deeper, such as {deeper[0]}: move them up)" if deeper else ""
            kinds = ", ".join(SUFFIXES)
            raise InputError(f"{folder / name}: no {kinds} file in this class{where}; add some or remove it")
        stray += deeper
    if stray:
        left_out = f"{len(stray)} images lie in no class folder and are left out, such as {stray[0]}"
        warnings.warn(f"{folder}: {left_out}; {_LAYOUT}", stacklevel=3)
    return classes


def _listing(folder: Path) -> tuple[list[str], list[str]]:
    """Names of the folders and of the other entries in `folder`, hidden ones left out."""
    try:
        with os.scandir(folder) as entries:
            seen = {entry.name: entry.is_dir() for entry in entries}
    except OSError as error:
        raise InputError(f"{folder}: cannot be read: {error.strerror}; check its permissions") from None
    visible = [name for name in seen if not (name.startswith(".") or name == "__MACOSX")]
    return [name for name in visible if seen[name]], [name for name in visible if not seen[name]]


def _images_below(folder: Path) -> Iterator[Path]:
    """Images in `folder` and the folders in it; links to folders are not followed, for they may go round."""
    folders, files = _listing(folder)
    yield from (folder / name for name in sorted(files) if _is_image(name))
    for name in sorted(folders):
        if not (folder / name).is_symlink():
            yield from _images_below(folder / name)


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def _read_images(files: list[Path], image_size: int | None, n_workers: int, description: str) -> np.ndarray:
    """uint8 [N, H, W, 3] of `files`, decoded by threads and stored in order."""
    images: np.ndarray | None = None
    first: Path | None = None
    damaged: dict[Path, str] = {}
    executor = ThreadPoolExecutor(n_workers, thread_name_prefix="decode")
    try:
        decoded = executor.map(partial(_decode, image_size=image_size), files)
        quiet = None if len(files) >= _BAR_FROM else True  # None: a bar on a terminal only
        bar = tqdm(decoded, description, len(files), disable=quiet, unit=" images", leave=False)
        for i, (file, pixels) in enumerate(zip(files, bar, strict=True)):
            if isinstance(pixels, str):
                damaged[file] = pixels
                continue
            if images is None or first is None:
                images, first = np.empty((len(files), *pixels.shape), np.uint8), file
            if pixels.shape != images.shape[1:]:
                side = min(*images.shape[1:3], *pixels.shape[:2])
                raise InputError(
                    f"{first} is {_size(images[0])} pixels, {file} is {_size(pixels)}: images need one size; "
                    f"set image_size, such as {side}, and they are resized"
                )
            images[i] = pixels
    finally:
        executor.shutdown(cancel_futures=True)
    if damaged or images is None:
        (bad, reason), *others = damaged.items()
        rest = (
            f"; {len(others)} more of {len(files)}: {_some([str(file) for file, _ in others])}"
            if others
            else ""
        )
        raise InputError(f"{bad} {reason}{rest}; replace or remove {'them' if others else 'it'}")
    return images


def _decode(file: Path, image_size: int | None) -> np.ndarray | str:
    """uint8 [H, W, 3], or what is wrong with the file, to follow its name."""
    try:
        with Image.open(file, formats=_FORMATS) as image:
            image.load()  # Image.open reads the header only: this is where a truncated file shows
            image = to_rgb(image)
            return np.asarray(image if image_size is None else resize_and_crop(image, image_size))
    except InputError as error:
        return str(error)
    except UnidentifiedImageError:
        return f"({_n_bytes(file)}) is not an image"
    except _DAMAGE as error:
        text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        return f"({_n_bytes(file)}) cannot be decoded: {' '.join(text.split())}"


def _n_bytes(file: Path) -> str:
    try:
        return f"{file.stat().st_size} bytes"
    except OSError:  # a link to nowhere, for one
        return "unreadable"


def _size(pixels: np.ndarray) -> str:
    return f"{pixels.shape[1]}x{pixels.shape[0]}"


def _some(names: list[str]) -> str:
    """The first five names, and how many more there are."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def _n_processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
