"""Small pictures on disk, and errors that are one line."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mtl_fast.data import load_split
from mtl_fast.errors import InputError


def picture(height: int = 6, width: int = 6, seed: int = 0) -> np.ndarray:
    """uint8 noise [height, width, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def pictures(n: int, size: int, seed: int = 0) -> np.ndarray:
    """uint8 noise [n, size, size, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


def encoded(pixels: np.ndarray, kind: str = "png", **options: Any) -> bytes:
    """The content of an image file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def write(path: Path, content: bytes | str | np.ndarray) -> Path:
    """Writes bytes, text or a picture (as PNG), and the folders above."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, np.ndarray):
        content = encoded(content)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def two_classes(root: Path) -> Path:
    """Class folders: two classes of two images in train, one class in test; no val."""
    names = ["train/b/2.png", "train/b/1.png", "train/a/x.PNG", "train/a/y.png", "test/c/1.png"]
    for i, name in enumerate(names):
        write(root / name, picture(seed=i))
    return root


def error_of(*arguments: Any, **options: Any) -> str:
    """The one line that `load_split` refuses these arguments with."""
    with pytest.raises(InputError) as caught:
        load_split(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message
