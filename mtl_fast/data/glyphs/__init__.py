"""Glyphs, the embedded benchmark: images of written characters, split by script.

DATASHEET.md beside this file says what it is made of and what it is good for.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from mtl_fast.data.glyphs.render import DIFFICULTIES, SIZE, render
from mtl_fast.data.store import ImageStore
from mtl_fast.errors import InputError

__all__ = ["DIFFICULTIES", "SPLITS", "Drawings", "load_drawings", "load_glyphs"]

SPLITS = ("train", "val", "test")
_FOLDER = Path(__file__).resolve().parent


class Drawings(NamedTuple):
    """What the package ships: C classes of F drawings each, a class's drawings all from different faces."""

    masks: NDArray[np.uint8]  # [C, F, 32, 32], opacity 0..15
    faces: NDArray[np.uint16]  # [C, F], rows of faces.csv
    codepoints: NDArray[np.uint32]  # [C], the Unicode character
    scripts: tuple[str, ...]  # C script names
    splits: tuple[str, ...]  # C split names


def load_drawings() -> Drawings:
    """Read the drawings of the whole set."""
    with np.load(_FOLDER / "masks.npz", allow_pickle=False) as stored:
        packed, of_class = stored["masks"], stored["class_scripts"]
        masks = np.stack((packed >> 4, packed & 15), axis=-1).reshape(*packed.shape[:2], SIZE, SIZE)
        names, splits = stored["script_names"], stored["script_splits"]
        return Drawings(
            masks=masks,
            faces=stored["faces"],
            codepoints=stored["codepoints"],
            scripts=tuple(str(names[script]) for script in of_class),
            splits=tuple(SPLITS[splits[script]] for script in of_class),
        )


def load_glyphs(split: str, difficulty: str = "mid", seed: int = 0) -> ImageStore:
    """Render one split of Glyphs: the same bits on every machine.

    Args:
        split: "train", "val" or "test"; no script is in two of them.
        difficulty: "soft" or "mid"; mid has more clutter, less contrast, smaller and more slanted characters.
        seed: 0 .. 2^64 - 1. Results are comparable at seed 0, which belongs to the benchmark's definition.

    Returns:
        An `ImageStore`: images uint8 [N, 32, 32, 3], equally many a class; class names such as "Thai U+0E01";
        super-class names are the scripts.

    Raises:
        InputError: an unknown split or difficulty, or a seed out of range.
    """
    if split not in SPLITS:
        raise InputError(f"Glyphs has no split {split!r}; take one of {', '.join(SPLITS)}")
    if difficulty not in DIFFICULTIES:
        raise InputError(f"Glyphs has no difficulty {difficulty!r}; take one of {', '.join(DIFFICULTIES)}")
    if not 0 <= seed < 2**64:
        raise InputError(f"Glyphs cannot be rendered with seed {seed}; take one in 0..2^64-1")
    drawings = load_drawings()
    per_class = drawings.masks.shape[1]
    classes = np.array([c for c, its in enumerate(drawings.splits) if its == split])
    image_ids = (classes[:, None] * per_class + np.arange(per_class)).astype(np.uint32).reshape(-1)
    masks = drawings.masks[classes].reshape(-1, SIZE, SIZE)
    images = render(masks, image_ids, per_class, difficulty, seed)
    scripts = tuple(drawings.scripts[c] for c in classes)
    return ImageStore(
        images=torch.from_numpy(images),
        labels=torch.arange(len(classes)).repeat_interleave(per_class),
        class_names=tuple(
            f"{s} U+{drawings.codepoints[c]:04X}" for s, c in zip(scripts, classes, strict=True)
        ),
        super_class_names=scripts,
        name=f"the {split} split of Glyphs ({difficulty})",
    )
