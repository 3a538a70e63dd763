from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mtl_fast.errors import InputError
from mtl_fast.training.figures import WIDTH
from mtl_fast.training.prediction_picture import MAX_CLASSES, MAX_IMAGES, MAX_SHOT, prediction_picture


def draw(path: Path, n_classes: int, n_shot: int, n_images: int, **names: str) -> np.ndarray:
    """A picture whose examples are pure green and whose images are pure red."""
    green, red = (np.full((8, 8, 3), colour, np.uint8) for colour in ((0, 255, 0), (255, 0, 0)))
    support = [np.stack([green] * (n_shot + c)) for c in range(n_classes)]
    predicted = np.arange(n_images) % n_classes
    probabilities = np.full((n_images, n_classes), 1 / n_classes, np.float32)
    class_names = [names.get(f"c{c}", f"class {c}") for c in range(n_classes)]
    prediction_picture(path, support, class_names, np.stack([red] * n_images), predicted, probabilities)
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def cells(picture: np.ndarray, channel: int) -> int:
    """How many cells of a pure colour there are: an example has 72² pixels, an image 128²."""
    others = [c for c in range(3) if c != channel]
    pure = (picture[..., channel] > 250) & (picture[..., others].max(axis=-1) < 5)
    return round(pure.sum() / (72**2 if channel == 1 else 128**2))


@pytest.mark.parametrize(("n_classes", "n_shot", "n_images"), [(2, 1, 1), (5, 2, 23), (7, 5, 8)])
def test_every_example_and_image_is_there(n_classes: int, n_shot: int, n_images: int, tmp_path: Path) -> None:
    picture = draw(tmp_path / "a.png", n_classes, n_shot, n_images)
    assert picture.shape[1] == WIDTH
    assert cells(picture, 1) == sum(min(n_shot + c, MAX_SHOT) for c in range(n_classes))
    assert cells(picture, 0) == n_images


def test_of_many_the_first_ones(tmp_path: Path) -> None:
    picture = draw(tmp_path / "a.png", MAX_CLASSES + 3, 1, MAX_IMAGES + 5)
    assert cells(picture, 0) == MAX_IMAGES
    assert cells(picture, 1) == 1 + 2 + 3 * (MAX_CLASSES - 2)


def test_names_of_any_kind_are_drawn(tmp_path: Path) -> None:
    draw(tmp_path / "a.png", 3, 1, 3, c0="", c1="ก่\udcff$x^2$\n", c2="a very long name " * 4)


def test_names_that_the_font_lacks_are_told_apart(tmp_path: Path) -> None:
    picture = draw(tmp_path / "a.png", 2, 1, 1, c0="鳥", c1="猫")
    left = slice(0, 36 + 150)  # the margin and the column of names
    rows = [picture[130 + 86 * c : 130 + 86 * c + 72, left] for c in range(2)]
    assert rows[0].min() < 200, "a name stands there"
    assert (rows[0] != rows[1]).any()


def test_a_picture_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.png").mkdir()
    with pytest.raises(InputError, match=r"a\.png: cannot be written \(.+\); free some space"):
        draw(tmp_path / "a.png", 2, 1, 1)
