from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from mtl_fast.training.figures import (
    RIGHT,
    WRONG,
    Curve,
    convergence_figure,
    episode_picture,
    rate_sensitivity_figure,
)

CURVES = {
    "1-shot": {
        "SS[Θ;θ]": Curve([0, 100, 200], [0.5, 0.6, 0.65], [0.01, 0.01, 0.01]),
        "another": Curve([200, 0, 100], [0.7, 0.5, 0.6]),
    },
    "5-shot": {"SS[Θ;θ] + HT": Curve([0], [0.5], [0.01])},
}


def pixels(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def count(picture: NDArray[np.uint8], colour: str) -> int:
    rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return int((picture == rgb).all(axis=-1).sum())


def episode(
    path: Path, n_way: int, n_shot: int, n_query: int, predictions: Any = None, **options: Any
) -> NDArray[np.uint8]:
    g = torch.Generator().manual_seed(0)
    # No channel reaches the frames' pure colours.
    support = torch.randint(100, 150, (n_way, n_shot, 16, 16, 3), generator=g, dtype=torch.uint8)
    query = torch.randint(100, 150, (n_way * n_query, 16, 16, 3), generator=g, dtype=torch.uint8)
    labels = torch.arange(n_way).repeat_interleave(n_query)
    names = options.pop("class_names", [f"Thai U+0E{i:02X}" for i in range(n_way)])
    episode_picture(
        path, support, query, labels, labels if predictions is None else predictions, names, **options
    )
    return pixels(path)


@pytest.mark.parametrize(
    ("n_way", "n_shot", "n_query"), [(1, 1, 1), (5, 1, 15), (5, 5, 15), (2, 10, 1), (20, 1, 3)]
)
def test_an_episode_fills_the_page(n_way: int, n_shot: int, n_query: int, tmp_path: Path) -> None:
    picture = episode(tmp_path / "new" / "e.png", n_way, n_shot, n_query, title="SS[Θ;θ] + HT")
    assert picture.shape[1] == 1600
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["e.png"]
    # The margins stay white: nothing is cut off.
    assert (picture[:, -8:] == 255).all()
    assert (picture[-4:] == 255).all()


def test_wrong_predictions_are_framed_in_their_colour(tmp_path: Path) -> None:
    right = episode(tmp_path / "a.png", 3, 1, 4)
    predictions = torch.arange(3).repeat_interleave(4)
    predictions[5] = 2
    one = episode(tmp_path / "b.png", 3, 1, 4, predictions)
    all_wrong = episode(tmp_path / "c.png", 3, 1, 4, (torch.arange(3).repeat_interleave(4) + 1) % 3)
    legend = count(right, WRONG)
    # A frame is about 4 · 110 pixels of several pixels' width.
    assert count(one, WRONG) - legend > 1000
    assert count(all_wrong, WRONG) - legend > 10 * (count(one, WRONG) - legend)
    assert count(right, RIGHT) > count(one, RIGHT) > count(all_wrong, RIGHT) > 0


def test_names_that_the_font_lacks_do_no_harm(tmp_path: Path) -> None:
    names = ["漢字", "$x_1 unmatched", "a very long name of a class that does not fit its column at all"]
    episode(tmp_path / "e.png", 3, 2, 2, torch.tensor([1, 2, 0, 1, 2, 0]), class_names=names, title="$" * 3)


def test_an_episode_that_does_not_fit_together_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\[3, 1, 16, 16, 3\], \[6, 16, 16, 3\], \[6\], \[5\] and 3"):
        episode(tmp_path / "e.png", 3, 1, 2, torch.zeros(5, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"and 2$"):
        episode(tmp_path / "e.png", 3, 1, 2, class_names=["a", "b"])
    assert not (tmp_path / "e.png").exists()


@pytest.mark.parametrize("draw", [convergence_figure, rate_sensitivity_figure])
def test_curves_are_drawn_and_equal_numbers_give_equal_files(draw: Any, tmp_path: Path) -> None:
    shift = {
        k: {n: Curve([x + 1e-3 for x in c.x], c.accuracy, c.interval) for n, c in m.items()}
        for k, m in CURVES.items()
    }
    for name in ("a.png", "b.png"):
        draw(tmp_path / name, shift)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    picture = pixels(tmp_path / "a.png")
    assert picture.shape[1] == 1600
    assert count(picture, "#0072B2") > 300
    assert count(picture, "#CC79A7") > 300


def test_a_changed_number_changes_the_picture(tmp_path: Path) -> None:
    convergence_figure(tmp_path / "a.png", {"": {"SS[Θ;θ]": Curve([0, 1], [0.5, 0.6])}})
    convergence_figure(tmp_path / "b.png", {"": {"SS[Θ;θ]": Curve([0, 1], [0.5, 0.7])}})
    assert not np.array_equal(pixels(tmp_path / "a.png"), pixels(tmp_path / "b.png"))


def test_curves_that_cannot_be_drawn_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2 x, 1 accuracies, no intervals"):
        Curve([1, 2], [0.5])
    with pytest.raises(ValueError, match="1 x, 1 accuracies, 2 intervals"):
        Curve([1], [0.5], [0.1, 0.2])
    with pytest.raises(ValueError, match="at least one"):
        Curve([], [])
    with pytest.raises(ValueError, match=r"a\.png: no curves to draw"):
        convergence_figure(tmp_path / "a.png", {})
    with pytest.raises(ValueError, match="must be positive"):
        rate_sensitivity_figure(tmp_path / "a.png", {"1-shot": {"FT": Curve([0.0, 0.1], [0.5, 0.5])}})


STATE = """
import sys
import mtl_fast.training.report as report
assert "matplotlib" not in sys.modules, "imported before it is needed"
import matplotlib
matplotlib.rcParams["font.size"] = 31
# Reading the backend would choose one, and import pyplot for it.
settings = lambda: {name: matplotlib.rcParams[name] for name in matplotlib.rcParams if name != 'backend'}
before = settings()
report.convergence_figure(sys.argv[1], {"": {"a": report.Curve([0, 1], [0.5, 0.6])}})
assert settings() == before
assert "matplotlib.pyplot" not in sys.modules
print("clean")
"""


def test_drawing_leaves_the_programs_own_plots_alone(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", "-c", STATE, str(tmp_path / "a.png")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=Path(__file__).parents[2])
    assert (done.returncode, done.stdout) == (0, "clean\n"), done.stderr
    # The user's own settings do not reach our pictures.
    convergence_figure(tmp_path / "b.png", {"": {"a": Curve([0, 1], [0.5, 0.6])}})
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
