"""Which classes were hardest over time: how often each joined the hard-task pool, kept round by round."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .figures import GREY, INK, PALE, RIGHT, WIDTH, blank_figure, write_picture
from .font import drawable
from .run import write_text

LINES, PICTURE = "hard_classes.jsonl", "hard_classes.png"
N_SHOWN = 24  # classes of a picture
N_COLUMNS = 30  # of a picture, at most
N_LETTERS = 20  # of a class's name in it


class HardClasses:
    """Counts what joins the pool, on the device; nothing is read back before `hardest` or `save`.

    Args:
        names: of the classes, by label.
        device: of the pool.
        tasks_per_round: random and hard ones.
    """

    def __init__(self, names: Sequence[str], device: torch.device, tasks_per_round: int) -> None:
        self.names = names
        self.tasks_per_round = tasks_per_round
        self._rounds: list[Tensor] = []  # int32 [n_classes] each
        self._round = torch.zeros(len(names), dtype=torch.int32, device=device)
        self._since = torch.zeros_like(self._round)  # since `hardest` was last asked

    def add(self, labels: Tensor) -> None:
        """These classes joined, int64 [K]; one may be there several times."""
        ones = torch.ones_like(labels, dtype=torch.int32)
        self._round.index_add_(0, labels, ones)
        self._since.index_add_(0, labels, ones)

    def end_round(self) -> None:
        """The pool was emptied."""
        self._rounds.append(self._round)
        self._round = torch.zeros_like(self._round)

    def hardest(self, n: int = 3) -> str:
        """The classes that joined most often since this was last asked, such as ``Lao U+0E81 ×4, …``."""
        counts = self._since.tolist()
        self._since.zero_()
        order = sorted((i for i, count in enumerate(counts) if count), key=lambda i: (-counts[i], i))
        return ", ".join(f"{self.names[i]} ×{counts[i]}" for i in order[:n])

    def counts(self) -> NDArray[np.int32]:
        """[rounds, n_classes]; the last round may have been cut short."""
        rounds = [*self._rounds, self._round] if bool(self._round.any()) else self._rounds
        if not rounds:
            return np.zeros((0, len(self.names)), np.int32)
        return torch.stack(rounds).cpu().numpy()

    def save(self, folder: Path, n_tasks: int) -> None:
        """Writes ``hard_classes.jsonl``: for each round the tasks seen by its end and what joined, most often first.

        Args:
            folder: of the run.
            n_tasks: seen until now, perhaps in the middle of a round.
        """
        lines = []
        for i, counts in enumerate(self.counts()):
            order = sorted(np.flatnonzero(counts).tolist(), key=lambda c: (-int(counts[c]), c))
            joined = {self.names[c]: int(counts[c]) for c in order}
            row = {"round": i + 1, "tasks": min((i + 1) * self.tasks_per_round, n_tasks), "joined": joined}
            lines.append(json.dumps(row, ensure_ascii=False) + "\n")
        write_text(folder / LINES, "".join(lines))

    def state_dict(self) -> dict[str, Tensor]:
        """What `load_state_dict` goes on from."""
        rounds = torch.stack(self._rounds) if self._rounds else self._round[None][:0]
        return {"rounds": rounds, "round": self._round, "since": self._since}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Goes back to `state`; an empty one, of a run that began before this was counted, changes nothing."""
        if state:
            device = self._round.device
            self._rounds = list(state["rounds"].to(device))
            self._round, self._since = (state[name].to(device, copy=True) for name in ("round", "since"))


def read_hard_classes(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's ``hard_classes.jsonl``."""
    return [json.loads(line) for line in (folder / LINES).read_text(encoding="utf-8").splitlines()]


def draw_hard_classes(run: Path, path: Path, *, title: str) -> None:
    """The picture of a run's folder; none where no class joined, or where the run was made before this was counted."""
    rows = read_hard_classes(run) if (run / LINES).exists() else []
    if any(row["joined"] for row in rows):
        hard_classes_figure(path, rows, title=title)


def hard_classes_figure(path: str | Path, rows: Sequence[Mapping[str, Any]], *, title: str) -> None:
    """The hardest classes, a row each: when they joined the pool (a heat map) and how often in all (bars).

    Args:
        path: the PNG.
        rows: of `read_hard_classes`.
        title: head line.

    Raises:
        ValueError: no class joined.
    """
    from matplotlib.ticker import MaxNLocator

    totals: dict[str, int] = {}
    for row in rows:
        for name, count in row["joined"].items():
            totals[name] = totals.get(name, 0) + count
    if not totals:
        raise ValueError(f"{Path(path).name}: no class joined the pool, there is nothing to draw")
    names = sorted(totals, key=lambda name: (-totals[name], name))[:N_SHOWN]
    # Neighbouring rounds share a column where there are too many for the page.
    per_column = -(-len(rows) // N_COLUMNS)
    heat = np.zeros((len(names), -(-len(rows) // per_column)))
    for i, row in enumerate(rows):
        for j, name in enumerate(names):
            heat[j, i // per_column] += row["joined"].get(name, 0)
    # Pixels, from the top left corner: a page laid out by hand is drawn in a fraction of the time.
    left, right, top, line = 250, 1190, 110, 34
    height = top + line * len(names) + 150
    with blank_figure(WIDTH, height) as figure:

        def axes(x: int, y: int, width: int, tall: int) -> Any:
            axis = figure.add_axes((x / WIDTH, 1 - (y + tall) / height, width / WIDTH, tall / height))
            axis.spines[:].set_visible(False)
            axis.tick_params(length=0, colors=GREY, labelcolor=INK)
            return axis

        axis = axes(left, top, right - left, line * len(names))
        most = max(1, int(heat.max()))
        colours: dict[str, Any] = {"cmap": "Blues", "vmin": 0, "vmax": most, "aspect": "auto"}
        extent = (0, rows[-1]["tasks"], len(names) - 0.5, -0.5)
        axis.imshow(heat, interpolation="nearest", extent=extent, **colours)
        labels = (drawable(name) for name in names)
        short = [name if len(name) <= N_LETTERS else f"{name[: N_LETTERS - 1]}…" for name in labels]
        axis.set_yticks(range(len(names)), short, parse_math=False)
        axis.set_xlabel("tasks seen")
        axis.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
        average = sum(totals.values()) / len(totals)
        bars = axes(right + 60, top, WIDTH - right - 110, line * len(names))
        bars.set_ylim(len(names) - 0.5, -0.5)
        bars.set_yticks([])
        bars.barh(range(len(names)), [totals[name] for name in names], color=RIGHT, height=0.7)
        bars.axvline(average, color=INK, linewidth=1, linestyle=(0, (4, 3)))
        bars.set_xlabel("times joined in all")
        bars.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        bars.grid(axis="x", color=PALE, linewidth=0.8)
        bars.set_axisbelow(True)
        shown = f"the {len(names)} that joined most often" if len(names) < len(totals) else "all"
        facts = f"{shown} of {len(totals)} classes that joined the pool; dashed: their mean, {average:.1f}"
        figure.text(36 / WIDTH, 1 - 46 / height, title, size=11, weight="bold", va="center", parse_math=False)
        figure.text(36 / WIDTH, 1 - 84 / height, facts, color=GREY, va="center")
        scale = axes(left, height - 62, 300, 18)
        scale.imshow(np.arange(most + 1)[None], interpolation="nearest", **colours)
        scale.set_yticks([])
        scale.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        rounds = "a round" if per_column == 1 else f"{per_column} rounds"
        figure.text(
            (left + 320) / WIDTH, 1 - (height - 53) / height, f"times joined in {rounds}", va="center"
        )
        write_picture(figure, Path(path))
