"""Decoded splits on disk, so that images are decoded once: one safetensors file each, memory-mapped when read.

Runs beside each other need no lock: a file is written under a name of its own and renamed when it is whole, so
that a reader finds the old one, the new one or none. What is mapped already stays as it is.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import PIL
import safetensors
from numpy.typing import NDArray

from mtl_fast.data.dataset import Content
from mtl_fast.files import replace_file, user_cache

ENVIRONMENT_VARIABLE = "MTL_FAST_CACHE_DIR"
_VERSION = 1  # of the file's layout
_ABANDONED = 3600  # seconds after which a file half written belongs to a run that was killed


def cache_folder() -> Path:
    """``MTL_FAST_CACHE_DIR``, or ``mtl_fast/data`` in the user's cache folder."""
    chosen = os.environ.get(ENVIRONMENT_VARIABLE)
    return Path(chosen) if chosen else user_cache("data")


def cache_file(root: Path, split: str, asked: Mapping[str, object]) -> Path:
    """Where a split's cache lies; one for each thing asked for, so that a stale one is replaced and not kept.

    Args:
        root: the data set's folder.
        split: which split.
        asked: everything else that the content depends on, such as the image size.
    """
    root = root.resolve()
    identity = json.dumps([str(root), split, sorted(asked.items())])
    readable = re.sub(r"[^\w.-]+", "_", root.name) or "data"
    # File systems count bytes, of which a letter may have four.
    readable = readable.encode()[:60].decode(errors="ignore")
    digest = hashlib.sha256(identity.encode()).hexdigest()[:16]
    return cache_folder() / f"{readable}-{split}-{digest}.safetensors"


def fingerprint(root: Path, files: Sequence[Path], reader: str) -> str:
    """What changes with the sources: name, size and time of each file, the reader's and Pillow's version.

    A file that is missing has a fingerprint too: it is the reader that says so.
    """
    digest = hashlib.sha256(f"{_VERSION} {reader} {PIL.__version__}\n".encode())
    for file in files:
        try:
            status = file.stat()
            state = f"{status.st_size} {status.st_mtime_ns}"
        except OSError:
            state = "missing"
        # Below the root: the same folder has one fingerprint, however its path is written.
        below = file.relative_to(root)
        digest.update(f"{below}\0{state}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def load(path: Path, fingerprint: str) -> Content | None:
    """The content of a cache, its images memory-mapped; None if it is missing, stale or damaged."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            meta = file.metadata() or {}
            if meta.get("fingerprint") != fingerprint:
                return None
            # A private map: what changes these tensors changes neither the file nor another run.
            images, labels = (file.get_tensor(name).numpy() for name in ("images", "labels"))
        if meta.get("crc32") != _checksum(images, labels, meta["names"]):
            return None
        names, supers = json.loads(meta["names"])
    except (OSError, safetensors.SafetensorError, KeyError, ValueError, TypeError, RuntimeError):
        # RuntimeError: the library opens the file twice, and torch's map finds a shorter one put there between.
        return None
    return Content(images, labels, tuple(names), None if supers is None else tuple(supers))


def save(path: Path, fingerprint: str, content: Content) -> str | None:
    """Writes a cache; returns the reason if that cannot be done (read-only or full folder), and leaves nothing."""
    names = json.dumps([content.class_names, content.super_class_names])
    meta = {
        "fingerprint": fingerprint,
        "names": names,
        "crc32": _checksum(content.images, content.labels, names),
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path)
        _write(path, content, meta)
    except OSError as error:
        return error.strerror or str(error)
    return None


def _write(path: Path, content: Content, meta: Mapping[str, str]) -> None:
    """A safetensors file, written from the arrays themselves: the library would copy them, or rename by itself."""
    labels, images = np.ascontiguousarray(content.labels), np.ascontiguousarray(content.images)
    header = {
        "__metadata__": meta,
        "labels": {"dtype": "I64", "shape": labels.shape, "data_offsets": (0, labels.nbytes)},
        "images": {
            "dtype": "U8",
            "shape": images.shape,
            "data_offsets": (labels.nbytes, labels.nbytes + images.nbytes),
        },
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
    replace_file(path, [len(text).to_bytes(8, "little") + text, labels.data, images.data], shared=True)


def _checksum(images: NDArray[np.uint8], labels: NDArray[np.int64], names: str) -> str:
    images, labels = np.ascontiguousarray(images), np.ascontiguousarray(labels)
    return str(zlib.crc32(names.encode(), zlib.crc32(labels.data, zlib.crc32(images.data))))


def _remove_abandoned(path: Path) -> None:
    """Removes what killed runs left of this cache."""
    for left in path.parent.glob(f".{path.name}.*.partial"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > _ABANDONED:
                left.unlink()
