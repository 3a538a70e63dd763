"""How time grows with tasks, shots, ways, inner steps and width of the features, and that throughput does not fall.

A meta-training step is that of `step`, first order, on a slim ResNet-12 at 32 pixels, at equal `images_per_chunk`; fit
and predict is what an evaluation does with features, at equal tasks a batch. One thing varies at a time; every point
is checked before it is timed, and the points of a row are timed in turn, round by round.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from mtl_fast.data.features import FeatureStore
from mtl_fast.engine import EmbeddedEpisodes, fit_and_predict
from mtl_fast.episodes import EpisodeSampler
from mtl_fast.nn import LinearHead
from mtl_fast.training.figures import GREY, INK, PALE, RIGHT, blank_figure, write_picture

from .accuracy import EPS, Expected, mismatch
from .harness import Contender, Line, Measurable, Settings, Spread, Target, duration, interleaved, ratios
from .networks import SLIM
from .peers.base_learner import batched_primal
from .peers.meta_step import InnerLoop
from .step import INNER, Problem, Shape

STEP, FIT = "meta-training step", "fit and predict"
TASKS = "tasks"
# What varies; all else is as in the first two columns.
STEP_DEFAULT = {TASKS: 2, "n_shot": 1, "n_way": 5, "inner steps": 20, "features": 128}
FIT_DEFAULT = {TASKS: 16, "n_shot": 1, "n_way": 5, "inner steps": 100, "features": 512}
STEP_POINTS = {
    TASKS: (1, 2, 4, 8, 16, 32, 64),
    "n_shot": (1, 2, 5, 10),
    "n_way": (2, 5, 10, 20),
    "inner steps": (1, 5, 20, 50, 100),
    "features": (64, 128, 256, 512),
}
FIT_POINTS = {
    TASKS: (1, 4, 16, 64, 256, 1024),
    "n_shot": (1, 2, 5, 10, 20),
    "n_way": (2, 5, 10, 20),
    "inner steps": (1, 5, 20, 50, 100, 200),
    "features": (64, 128, 256, 512, 1024),
}
TASKS_PER_BATCH, N_TASKS = 16, 1024
# Timing's own noise of the best of several points; the aim has none.
NOT_FALLING = Target(0.97, 1.0)


@dataclass(frozen=True)
class Point:
    """What is timed at one value of what varies."""

    value: int
    n_tasks: int
    run: Callable[[], Mapping[str, Tensor]]
    expected: Mapping[str, Expected]


@dataclass(frozen=True)
class ScalingRow:
    """Time and throughput at each value of one axis."""

    what: str
    axis: str
    values: tuple[int, ...]
    point: Callable[[str, int], Point]

    @property
    def name(self) -> str:
        return f"scaling, {self.what}, {self.axis}"

    def measure(self, settings: Settings) -> Iterable[Line]:
        points = [self.point(self.axis, value) for value in self.values]
        for p in points:
            wrong = mismatch(p.run(), p.expected)
            if wrong:
                return [Line(self.name, refused=f"{self.axis} {p.value}: {wrong}")]
        times, _ = interleaved([Contender(str(p.value), p.run) for p in points], settings)
        lines = [self._line(p, times[str(p.value)]) for p in points]
        return lines + ([throughput(self.what, lines)] if self.axis == TASKS else [])

    def _line(self, point: Point, seconds: Sequence[float]) -> Line:
        return Line(
            row=f"scaling, {self.what}, {self.axis} {point.value}",
            ours=duration(median(seconds)),
            values=tuple(point.n_tasks / s for s in seconds),
            unit=" tasks/s",
            details={"what": self.what, "axis": self.axis, "value": point.value, "seconds": list(seconds)},
        )


def throughput(what: str, lines: Sequence[Line]) -> Line:
    """Of all pairs of lines, the one where more tasks have the least of fewer tasks' rate, by the rounds' ratios."""
    pairs = itertools.combinations(lines, 2)
    before, after = min(pairs, key=lambda pair: median(ratios(pair[0].values, pair[1].values)))
    few, many = before.details["value"], after.details["value"]
    return Line(
        row=f"scaling, {what}, throughput as tasks grow, worst",
        against="fewer tasks",
        peers=("fewer tasks",),
        ours=f"{many} tasks",
        peer=f"({few})",
        values=ratios(before.values, after.values),
        target=NOT_FALLING,
    )


def rows(quick: bool) -> Sequence[Measurable]:
    step = _step_point_quickly if quick else _step_point
    return [
        ScalingRow(what, axis, values[:2] if quick else values, point)
        for what, axes, point in ((STEP, STEP_POINTS, step), (FIT, FIT_POINTS, _fit_point))
        for axis, values in axes.items()
    ]


def _step_point(axis: str, value: int, *, n_query: int = 15, widths: tuple[int, ...] = (16, 32, 64)) -> Point:
    at = STEP_DEFAULT | {axis: value}
    inner = InnerLoop(lr=INNER.lr, n_steps=at["inner steps"])
    shape = Shape(at["n_way"], at["n_shot"], n_query, (*widths, at["features"]), inner)
    stepped = Problem(shape, n_tasks=at[TASKS])
    encoder = stepped.network()
    per_task = stepped.episodes.support.shape[1] + stepped.episodes.query.shape[1]
    # Two tasks of the usual size; a larger task is a chunk of its own.
    usual = 2 * STEP_DEFAULT["n_way"] * (STEP_DEFAULT["n_shot"] + n_query)
    step = stepped.ours(encoder, images_per_chunk=max(usual, per_task))
    expected = stepped.expected(encoder)
    return Point(value, at[TASKS], step, expected)


def _step_point_quickly(axis: str, value: int) -> Point:
    return _step_point(axis, value, n_query=2, widths=SLIM[:3])


def _fit_point(axis: str, value: int) -> Point:
    at = FIT_DEFAULT | {axis: value}
    width, n_steps = at["features"], at["inner steps"]
    store = _features(width)
    sampler = EpisodeSampler(store, at["n_way"], at["n_shot"], 15, torch.Generator().manual_seed(0))
    everything = EmbeddedEpisodes.of_store(sampler.sample(N_TASKS), store.features)
    head = LinearHead(width, at["n_way"], init="zeros")
    # Each call takes the next tasks, so that what is in the caches does not depend on how many it takes.
    starts = itertools.cycle(range(0, N_TASKS, at[TASKS]))

    def run() -> Mapping[str, Tensor]:
        start = next(starts)
        tasks = everything[start : start + at[TASKS]]
        options = {"inner_lr": INNER.lr, "inner_steps": n_steps, "tasks_per_batch": TASKS_PER_BATCH}
        return {"logits": fit_and_predict(tasks, head, **options)}

    first = everything[: at[TASKS]]
    support, query = (store.features.double()[place] for place in (first.support, first.query))
    exact = batched_primal(
        support,
        first.support_labels,
        query,
        head.weight.detach().double(),
        head.bias.detach().double(),
        inner_lr=INNER.lr,
        n_steps=n_steps,
        order="first",
    )
    # A rounding of a D-long product a step.
    bound = 4 * EPS * (width * n_steps) ** 0.5
    return Point(value, at[TASKS], run, {"logits": Expected(exact, bound)})


def _features(width: int, n_classes: int = 40, per_class: int = 50) -> FeatureStore:
    """Of norm about 3, as a trained encoder gives them."""
    g = torch.Generator().manual_seed(width)
    labels = torch.arange(n_classes).repeat_interleave(per_class)
    centres = torch.randn(n_classes, width, generator=g)
    features = (centres[labels] + 2 * torch.randn(len(labels), width, generator=g)) * (9 / 5 / width) ** 0.5
    return FeatureStore(features, labels, tuple(map(str, range(n_classes))))


def picture(path: Path, lines: Sequence[Line]) -> Path:
    """Writes the panels of all rows in `lines`: time against what varies, both logarithmic."""
    panels: dict[tuple[str, str], list[Line]] = {}
    for line in lines:
        if "axis" in line.details:
            panels.setdefault((line.details["what"], line.details["axis"]), []).append(line)
    whats = list(dict.fromkeys(what for what, _ in panels))
    axes = list(dict.fromkeys(axis for _, axis in panels))
    with blank_figure(1600, 100 + 340 * len(whats), "constrained") as figure:
        grid = figure.subplots(len(whats), len(axes), squeeze=False, sharey="row")
        for (what, axis), points in panels.items():
            _panel(grid[whats.index(what)][axes.index(axis)], axis, points)
        for i, what in enumerate(whats):
            grid[i][0].set_ylabel(f"{what}, ms")
        write_picture(figure, path)
    return path


def _panel(axis: Any, label: str, points: Sequence[Line]) -> None:
    from matplotlib.ticker import LogLocator

    x = [line.details["value"] for line in points]
    spreads = [Spread.of([1e3 * s for s in line.details["seconds"]]) for line in points]
    axis.fill_between(
        x, [s.low for s in spreads], [s.high for s in spreads], color=RIGHT, alpha=0.2, linewidth=0
    )
    axis.plot(x, [s.middle for s in spreads], color=RIGHT, marker="o", markersize=4, linewidth=1.6)
    axis.set_xscale("log")
    axis.set_yscale("log")
    # Small enough for neighbours a factor of two apart.
    axis.set_xticks(x, [str(value) for value in x], fontsize=7)
    axis.set_xticks([], minor=True)
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    axis.yaxis.set_minor_formatter(lambda y, _: "")
    axis.set_xlabel(label)
    axis.grid(color=PALE, linewidth=0.8)
    axis.tick_params(colors=GREY, labelcolor=INK)
    axis.spines[["top", "right"]].set_visible(False)
