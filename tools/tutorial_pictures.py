"""Runs the snippets of docs/tutorial.md and draws its pictures from what they computed: docs/tutorial/*.png."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from mtl_fast.training.figures import (
    PALE,
    RIGHT,
    WIDTH,
    Curve,
    blank_figure,
    episode_picture,
    steps_figure,
    write_picture,
)

DOCS = Path(__file__).resolve().parents[1] / "docs"


def computed(page: Path) -> dict[str, Any]:
    """The names that a page's snippets define, run one after the other."""
    names: dict[str, Any] = {}
    for snippet in re.findall(r"^```python\n(.*?)^```", page.read_text("utf-8"), re.DOTALL | re.MULTILINE):
        exec(compile(snippet, page.name, "exec"), names)
    return names


def draw(names: dict[str, Any], folder: Path) -> None:
    """The episode, the accuracy of each step of the inner loop, and the gradient of each layer's scale."""
    store, episodes = names["store"], names["episodes"]
    episode_picture(
        folder / "episode.png",
        store.images[episodes.support[0].view(5, 1)],
        store.images[episodes.query[0]],
        episodes.query_labels[0],
        names["by_hand"].argmax(1),
        [store.class_names[int(c)] for c in episodes.classes[0]],
        title="the episode",
    )
    by_step = names["by_step"]
    interval = 1.96 * by_step.std(0) / len(by_step) ** 0.5
    curve = Curve(range(by_step.shape[1]), by_step.mean(0).tolist(), interval.tolist())
    steps_figure(folder / "steps.png", {"1-shot": {"200 tasks": curve}})
    gradients(folder / "gradients.png", names["gradients"])


def gradients(path: Path, norms: list[float]) -> None:
    """A bar a scaled convolution, first to last."""
    with blank_figure(WIDTH, 520, "constrained") as figure:
        axes = figure.add_subplot()
        axes.bar(range(len(norms)), norms, color=RIGHT)
        names = [f"{block}.{conv}" for block in range(1, 5) for conv in range(1, 4)]
        axes.set_xticks(range(len(norms)), names)
        axes.set_xlabel("block.convolution")
        axes.set_ylabel("norm of the scale's gradient")
        axes.grid(axis="y", color=PALE)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        write_picture(figure, path)


if __name__ == "__main__":
    torch.set_num_threads(1)
    draw(computed(DOCS / "tutorial.md"), DOCS / "tutorial")
