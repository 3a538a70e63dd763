"""The cells of a comparison: rows, task shapes and rates over seeds, run by a pool of workers."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..config import GLYPHS_MAML, GLYPHS_MAML_DEEP, Config
from ..errors import InputError
from .experiment import Experiment, Outcome
from .outcomes import Outcomes
from .rows import Row
from .run import Interrupted
from .statistics import Interval, mean_interval


def require_distinct(option: str, numbers: Sequence[int]) -> None:
    """What is computed for each number of an option needs one, and each once.

    Raises:
        InputError: there is none, or one comes twice.
    """
    if not numbers:
        raise InputError(
            f"{option} needs at least one number; to leave rows out, name the others with --rows"
        )
    twice = next((number for number in numbers if list(numbers).count(number) > 1), None)
    if twice is not None:
        raise InputError(f"{option} names {twice} twice")


@dataclass(frozen=True)
class Study:
    """What all cells of a comparison have in common.

    Attributes:
        config: settings of all rows; each seed takes its place in them.
        output: folder of the runs, one a seed.
        maml, maml_deep, n_drawn: as of `Experiment`.
        outcomes: runs of other machines or days, which are not made again; the runs of this one join them.
    """

    config: Config
    output: Path
    maml: Config = GLYPHS_MAML
    maml_deep: Config = GLYPHS_MAML_DEEP
    n_drawn: int | None = None
    outcomes: Path | None = None

    def experiment(self, seed: int) -> Experiment:
        """One seed's runs."""
        return Experiment(
            replace(self.config, seed=seed),
            self.output / f"seed{seed}",
            maml=self.maml,
            maml_deep=self.maml_deep,
            n_drawn=self.n_drawn,
        )


@dataclass(frozen=True)
class Wanted:
    """One row at one task shape and rate, over some seeds; `n_tasks` of the test tasks, None: all."""

    row: Row
    n_shot: int
    rate: float | None
    seeds: tuple[int, ...]
    n_tasks: int | None = None


@dataclass
class Cell:
    """One method at one task shape and rate, over the seeds that are finished."""

    row: Row
    n_shot: int
    rate: float | None
    outcomes: list[Outcome] = field(default_factory=list)
    seeds: tuple[int, ...] = ()

    @property
    def validation(self) -> float:
        """Mean over seeds of the best validation accuracy: what the rate is chosen by."""
        return sum(outcome.validation for outcome in self.outcomes) / len(self.outcomes)

    def accuracies(self) -> list[list[float]]:
        """Each seed's accuracies of single test tasks."""
        return [outcome.task_accuracy for outcome in self.outcomes]

    def interval(self) -> Interval:
        """Mean and 95 % interval over all seeds' tasks."""
        return mean_interval(list(itertools.chain(*self.accuracies())))

    def mean_curve(self) -> list[list[float]]:
        """Validation curve averaged over seeds: tasks, mean, half-width of its 95 % interval."""
        n = len(self.outcomes)
        points = zip(*(outcome.curve for outcome in self.outcomes), strict=True)
        return [
            [same[0][0], sum(p[1] for p in same) / n, sum(p[2] ** 2 for p in same) ** 0.5 / n]
            for same in points
        ]


def best_cell(cells: Sequence[Cell], row: Row, n_shot: int) -> Cell:
    """The row's cell with the best validation accuracy; the first of equal ones."""
    return max((c for c in cells if c.row == row and c.n_shot == n_shot), key=lambda cell: cell.validation)


_Job = tuple[Wanted, int]  # with the seed


def run_cells(pool: Executor, study: Study, wanted: Sequence[Wanted], what: str) -> list[Cell]:
    """Makes, or reads where finished, every run of the cells, in their order; `what` stands at the bar."""
    shared = _Shared(study)
    jobs = [(want, seed) for want in wanted for seed in want.seeds]
    outcomes = {job: outcome for job in jobs if (outcome := shared.find(*job)) is not None}
    missing = [job for job in jobs if job not in outcomes]
    handed_out = _hand_out(pool, study, missing)
    for want, seed in tqdm(missing, desc=what, unit="run"):
        outcomes[want, seed] = shared.add(want, seed, handed_out[want, seed].result())
    return [_cell(want, {seed: outcomes[want, seed] for seed in want.seeds}) for want in wanted]


def _hand_out(pool: Executor, study: Study, jobs: Sequence[_Job]) -> dict[_Job, Future[Outcome]]:
    """Each job to a worker, those that start from a pre-trained network as soon as their seed's is there."""
    needed = dict.fromkeys(seed for want, seed in jobs if want.row.pretrained)
    missing = [seed for seed in needed if not study.experiment(seed).is_pretrained]
    pretraining = {pool.submit(_pretrain, study, seed): seed for seed in missing}
    futures: dict[_Job, Future[Outcome]] = {}
    waiting: dict[int, list[_Job]] = {seed: [] for seed in missing}
    for want, seed in jobs:
        if want.row.pretrained and seed in waiting:
            waiting[seed].append((want, seed))
        else:
            futures[want, seed] = pool.submit(_run, study, want, seed)
    ended = as_completed(pretraining)
    for future in tqdm(ended, desc="pre-training", total=len(missing), unit="run", disable=not missing):
        future.result()
        for job in waiting[pretraining[future]]:
            futures[job] = pool.submit(_run, study, *job)
    return futures


def finished_cells(study: Study, wanted: Sequence[Wanted]) -> list[Cell]:
    """Of the cells what is finished; a cell without any finished seed is left out."""
    shared = _Shared(study)
    cells = []
    for want in wanted:
        found = {seed: shared.find(want, seed) or shared.finished(want, seed) for seed in want.seeds}
        there = {seed: outcome for seed, outcome in found.items() if outcome is not None}
        if there:
            cells.append(_cell(want, there))
    return cells


class _Shared:
    """The file of outcomes of a study, if it has one, asked by cell and seed."""

    def __init__(self, study: Study) -> None:
        self._experiment = lru_cache(maxsize=None)(study.experiment)
        self._outcomes = None if study.outcomes is None else Outcomes(study.outcomes)

    def find(self, want: Wanted, seed: int) -> Outcome | None:
        if self._outcomes is None:
            return None
        return self._outcomes.find(self._experiment(seed), want.row, want.n_shot, **_which(want))

    def finished(self, want: Wanted, seed: int) -> Outcome | None:
        return self._experiment(seed).finished(want.row, want.n_shot, **_which(want))

    def add(self, want: Wanted, seed: int, outcome: Outcome) -> Outcome:
        if self._outcomes is None:
            return outcome
        return self._outcomes.add(self._experiment(seed), want.row, want.n_shot, outcome, **_which(want))


def _which(want: Wanted) -> dict[str, Any]:
    return {"lr": want.rate, "n_tasks": want.n_tasks}


def _cell(want: Wanted, outcomes: dict[int, Outcome]) -> Cell:
    return Cell(want.row, want.n_shot, want.rate, list(outcomes.values()), tuple(outcomes))


@contextmanager
def worker_pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Processes of one thread each, so that the bits depend on no thread count; 0: a core each."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        workers or os.cpu_count() or 1, mp_context=context, initializer=_quiet_worker
    ) as pool:
        try:
            yield pool
        except (Interrupted, KeyboardInterrupt):
            pool.shutdown(cancel_futures=True)
            raise Interrupted("stopped; what was made is kept, and the same command goes on") from None
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _quiet_worker() -> None:
    """One thread a run, the parent's bar as the only progress, and no life after the parent's."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - for the life of the worker


def _end_with_parent() -> None:
    # Otherwise a killed command's workers would go on writing into folders that the next one uses.
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _pretrain(study: Study, seed: int) -> None:
    study.experiment(seed).pretrain()


def _run(study: Study, want: Wanted, seed: int) -> Outcome:
    return study.experiment(seed).outcome(want.row, want.n_shot, **_which(want))
