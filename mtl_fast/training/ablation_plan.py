"""What an ablation would cost: the runs that are missing, and their hours from measured runs or a short probe."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from tqdm import tqdm

from ..config import Config, InnerConfig
from ..nn import LinearHead
from ..text_table import grid
from .cells import Cell, Study, Wanted
from .experiment import Experiment, Outcome
from .meta_train import MetaTraining
from .models import Model, architecture, build_encoder, learnable, load_model, square_size
from .pretrain import Pretraining
from .rows import Row
from .scope import Scope

N_UPDATES = 3  # of a probe, after one that warms up
N_TASKS, N_TASKS_WHOLE = 20, 4  # tested in a probe; of rows that adapt all weights

_NOT_MADE = Outcome([], 0.0, [], (0.0, 0))


@dataclass(frozen=True)
class Estimate:
    """Seconds of a run, training and test, and where the number is from: ``measured`` or ``probe``."""

    seconds: float
    source: str


class Costs:
    """Seconds of single runs: the mean of finished ones of the same row and task shape, else a probe of the parts.

    A probe trains a few updates from random weights and tests a few tasks, and multiplies; hard tasks cost what
    random ones do.

    Args:
        study: whose runs.
        seed: of the one that is looked at.
    """

    def __init__(self, study: Study, seed: int) -> None:
        self._experiment = study.experiment(seed)
        self._measured: dict[tuple[str, int], list[float]] = {}
        self._probed: dict[tuple[str, int], Estimate] = {}

    def add(self, row: Row, n_shot: int, outcome: Outcome) -> None:
        """A finished run."""
        seconds = outcome.seconds + outcome.test_seconds
        if not math.isnan(seconds):
            self._measured.setdefault((row.plain_key, n_shot), []).append(seconds)

    def of(self, row: Row, n_shot: int, n_tasks: int | None) -> Estimate:
        """A run of this row, tested on `n_tasks`."""
        key = row.plain_key, n_shot
        if key in self._measured:
            return Estimate(sum(self._measured[key]) / len(self._measured[key]), "measured")
        if key not in self._probed:
            self._probed[key] = Estimate(self._probe(row, n_shot, n_tasks), "probe")
        return self._probed[key]

    def of_pretraining(self, experiments: Sequence[Experiment]) -> Estimate:
        """A pre-training, measured in one of the seeds' experiments if one is finished there."""
        for experiment in experiments:
            if experiment.is_pretrained:
                seconds = load_model(experiment.pretrain_folder).meta.get("seconds")
                if seconds is not None:
                    return Estimate(seconds, "measured")
        config, stores = self._experiment.with_shot(1), self._experiment.stores
        with TemporaryDirectory() as scratch:
            run = Pretraining(config, scratch, train=stores["train"], val=stores["val"])
            training = run.total * run.time_updates(N_UPDATES)
        n_validations = config.pretrain.epochs // config.pretrain.validate_every
        one = self._test(self._random(config, head=False), 1, "val", config.pretrain.validation_tasks)
        return Estimate(training + n_validations * one, "probe")

    def _probe(self, row: Row, n_shot: int, n_tasks: int | None) -> float:
        experiment, n_tested = self._experiment, n_tasks or self._experiment.n_drawn
        if not row.meta_trained:
            config = experiment.with_shot(n_shot)
            model, few = self._random(config, head=False), N_TASKS_WHOLE if row.is_whole_network else N_TASKS
            start = time.monotonic()
            inner = experiment.choose_inner(model, n_shot, row, n_tasks=few)
            searching = (time.monotonic() - start) * experiment.n_searched(row) / few
            return searching + self._test(model, n_shot, "test", n_tested, inner)
        config, stores = experiment.settings(row, n_shot), experiment.stores
        model = self._random(config, head=True)
        with TemporaryDirectory() as folder:
            pretrained = self._random(config, head=False) if row.pretrained else None
            run = MetaTraining(config, pretrained, folder, train=stores["train"], val=stores["val"])
            training = run.total * run.time_updates(N_UPDATES)
        n_validations = 1 + -(-config.meta.n_tasks // config.meta.validate_every)
        validating = n_validations * self._test(model, n_shot, "val", config.meta.validation_tasks)
        return training + validating + self._test(model, n_shot, "test", n_tested)

    def _random(self, config: Config, *, head: bool) -> Model:
        """Random weights in the form of a pre-trained model, or with a head of a meta-trained one."""
        size = square_size(self._experiment.stores["train"], self._experiment.stores["val"])
        encoder = build_encoder(config.encoder, image_size=size).to(self._experiment.device).eval()
        meta = {"architecture": architecture(config, size)}
        start = None
        if head:
            learnable(encoder, config)
            start = LinearHead(encoder.feature_dim, config.episodes.n_way, init="zeros")
        encoder.freeze()
        return Model(config, encoder, start, size, meta, Path("probe"))

    def _test(
        self, model: Model, n_shot: int, split: str, n_tasks: int, inner: InnerConfig | None = None
    ) -> float:
        """Seconds that so many tasks of a split take, from a few of the test split."""
        whole = (inner or model.config.inner).adapt == "all"
        few = min(n_tasks, N_TASKS_WHOLE if whole else N_TASKS)
        start = time.monotonic()
        self._experiment.test(model, n_shot, inner, n_tasks=few)
        seconds = time.monotonic() - start
        if whole or model.norm == "episode":
            return seconds * n_tasks / few
        # Each image is embedded once, whatever the number of tasks.
        shape, stores = model.config.episodes, self._experiment.stores
        per_task = shape.n_way * (n_shot + shape.n_query_at_test)
        embedded = min(n_tasks * per_task, stores[split].n_images)
        return seconds * embedded / min(few * per_task, stores["test"].n_images)


def plan_text(
    study: Study, scope: Scope, finished: Callable[[Sequence[Wanted]], list[Cell]], workers: int
) -> str:
    """The table of runs, those that are finished at no cost, and the hours in all.

    Args:
        study, scope: what is asked for. Where rates are still to be chosen, a row's first one stands for it.
        finished: what of some cells is there, as `finished_cells`.
        workers: runs at a time.
    """
    costs = Costs(study, scope.seeds[0])
    asked: list[tuple[str, Wanted, int]] = []

    def make(wanted: Sequence[Wanted], stage: str) -> list[Cell]:
        there = {(cell.row, cell.rate): cell for cell in finished(wanted)}
        cells = []
        for want in wanted:
            cell = there.get((want.row, want.rate), Cell(want.row, want.n_shot, want.rate))
            for outcome in cell.outcomes:
                costs.add(want.row, want.n_shot, outcome)
            asked.append((stage, want, len(want.seeds) - len(cell.seeds)))
            n_missing = len(want.seeds) - len(cell.seeds)
            cells.append(replace(cell, outcomes=cell.outcomes + [_NOT_MADE] * n_missing, seeds=want.seeds))
        return cells

    scope.run(make)
    experiments = [study.experiment(seed) for seed in scope.pretrained_seeds]
    n_missing = sum(not experiment.is_pretrained for experiment in experiments)
    lines, total = [], 0.0
    if n_missing:
        estimate = costs.of_pretraining(experiments)
        lines.append(_line("pre-training", "", n_missing, len(experiments), estimate))
        total += n_missing * estimate.seconds
    # A probe of a row that adapts all weights takes a minute on a slow machine.
    for stage, want, n in tqdm(asked, desc="estimated", unit="row", leave=False):
        estimate = costs.of(want.row, want.n_shot, want.n_tasks) if n else Estimate(0.0, "finished")
        rate = "" if want.rate is None else f"{want.rate:g}"
        lines.append(_line(f"{stage}: {want.row.label}", rate, n, len(want.seeds), estimate))
        total += n * estimate.seconds
    head = ["run", "meta lr", "missing", "of", "min a run", "hours", "estimated from"]
    hours = total / 3600
    return (
        f"{grid(head, lines, 'plain')}\n\n{sum(int(line[2]) for line in lines)} runs to make, about {hours:.1f} hours of "
        f"one worker, {hours / workers:.1f} with {workers}; measured: from finished runs of the row, probe: from "
        f"{N_UPDATES} updates and a few tasks just timed"
    )


def _line(name: str, rate: str, n_missing: int, n: int, estimate: Estimate) -> list[str]:
    minutes = estimate.seconds / 60
    return [
        name,
        rate,
        str(n_missing),
        str(n),
        f"{minutes:.1f}",
        f"{n_missing * minutes / 60:.2f}",
        estimate.source,
    ]
