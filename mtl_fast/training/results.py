"""The README's numbers: the demo's rows and FT[Θ;θ] over several seeds and a range of meta learning rates."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..config import Config, preset
from ..errors import InputError
from . import report
from .checkpoint import provenance
from .demo import draw_curves, draw_episode
from .evaluate import save_score
from .experiment import FT_ALL, FT_HEAD, SS, SS_HT, UPDATE_HEAD, Experiment, Row
from .folder_lock import FolderLock
from .models import device_of
from .run import Interrupted, make_folder, tell_of_missing_kernels, write_text
from .statistics import Interval, SeedsDifference, mean_interval, pooled_difference

SHOTS = (1, 5)
# Meta learning rates tried, of what the row learns (FT θ: of the head's start): each method's own neighbourhood,
# with two rates that weights (FT[Θ;θ]) and scale and shift have in common.
RATES = {
    FT_HEAD: (1e-4, 3e-4, 1e-3),
    FT_ALL: (3e-5, 1e-4, 3e-4, 1e-3),
    SS: (3e-4, 1e-3, 3e-3, 1e-2),
    SS_HT: (3e-4, 1e-3, 3e-3, 1e-2),
}
ROWS = tuple(RATES)
ALL_RATES = tuple(sorted(set(itertools.chain(*RATES.values()))))
COMPARED = ((SS, UPDATE_HEAD), (SS, FT_HEAD), (SS, FT_ALL), (SS_HT, SS))


@dataclass(frozen=True)
class Job:
    """One run of one seed: a row of the table at one task shape and rate ("update θ" has no rate)."""

    config: Config
    folder: str
    row: Row
    n_shot: int
    rate: float | None


@dataclass(frozen=True)
class Outcome:
    """What a job gave: each test task's accuracy, the best validation accuracy, its curve, the inner loop."""

    task_accuracy: list[float]
    validation: float
    curve: list[list[float]]
    inner: tuple[float, int]


@dataclass
class Cell:
    """One method at one task shape and rate, over the seeds."""

    row: Row
    n_shot: int
    rate: float | None
    outcomes: list[Outcome] = field(default_factory=list)

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


def results(
    output: str | Path,
    publish: str | Path,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    workers: int = 0,
    device: str = "auto",
) -> None:
    """Makes (or reads, where finished) every run and publishes results.json, results.md and the pictures.

    Every seed pre-trains its own encoder and is tested on tasks of its own; within a seed all methods see the
    same tasks. Each method is meta-trained 1-shot at every rate; the one with the best validation accuracy,
    averaged over the seeds, is its row of the table and is also used 5-shot.

    Args:
        output: folder of the runs, one a seed.
        publish: folder of the summary.
        seeds: one experiment each.
        workers: runs at a time, each on one thread, so that the bits depend on no thread count; 0: a core each.
        device: as in `Config`.

    Raises:
        InputError: a folder cannot be made, or another process is at work in `output`.
    """
    if workers < 0:
        raise InputError(f"--workers is {workers}; give a number of runs at a time, or 0 for one a core")
    output, publish = Path(output), Path(publish)
    config = replace(preset("glyphs"), device=device)
    if device_of(config).type == "cpu":
        tell_of_missing_kernels()  # here, for the workers are silent
    for folder in (output, publish):  # before the work, not after it
        make_folder(folder)
    with FolderLock(output):
        _results(config, output, publish, seeds, workers)


def _results(config: Config, output: Path, publish: Path, seeds: Sequence[int], workers: int) -> None:
    """The results in a folder that is this process's own."""
    with _pool(workers or os.cpu_count() or 1) as pool:

        def run(rows: Sequence[tuple[Row, int, float | None]], what: str) -> list[Cell]:
            jobs = [
                Job(replace(config, seed=seed), str(output / f"seed{seed}"), row, n_shot, rate)
                for row, n_shot, rate in rows
                for seed in seeds
            ]
            outcomes = list(tqdm(pool.map(_run, jobs), desc=what, total=len(jobs), unit="run"))
            return [
                Cell(*row, outcomes=part)
                for row, part in zip(rows, _grouped(outcomes, len(seeds)), strict=True)
            ]

        cells = run([(UPDATE_HEAD, 1, None)], "pre-training")
        cells += run([(row, 1, rate) for row in ROWS for rate in RATES[row]], "1-shot, all rates")
        chosen = {row: _best(cells, row, 1).rate for row in (UPDATE_HEAD, *ROWS)}
        cells += run([(row, 5, rate) for row, rate in chosen.items()], "5-shot")
    best = {(row.key, n): _best(cells, row, n) for row in (UPDATE_HEAD, *ROWS) for n in SHOTS}
    write_text(publish / "results.json", json.dumps(_summary(config, seeds, cells, best), indent=1) + "\n")
    write_text(publish / "results.md", _markdown(cells, best, seeds))
    draw_curves(publish / "curves.png", {key: _mean_curve(cell) for key, cell in best.items()})
    report.rate_sensitivity_figure(publish / "rates.png", {"1-shot": _rate_curves(cells)})
    first = Experiment(replace(config, seed=seeds[0]), output / f"seed{seeds[0]}")
    model = first.meta_train(SS_HT, 1, lr=chosen[SS_HT])
    _, evaluation, episodes = first.test(model, 1)
    draw_episode(publish / "episode.png", first, evaluation, episodes)
    print(f"published in {publish}")


@contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_quiet_worker) as pool:
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


@lru_cache(maxsize=1)
def _experiment(config: Config, folder: str) -> Experiment:
    """The last experiment of this process, with its rendered stores."""
    return Experiment(config, folder)


def _run(job: Job) -> Outcome:
    experiment = _experiment(job.config, job.folder)
    if job.row == UPDATE_HEAD:
        model = experiment.pretrain()
        inner = experiment.choose_inner(model, job.n_shot)
    else:
        model = experiment.meta_train(job.row, job.n_shot, lr=job.rate)
        inner = job.config.inner
    result, _, _ = experiment.test(model, job.n_shot, inner)
    name = f"{job.row.key}-{job.n_shot}shot" + ("" if job.rate is None else f"-lr{job.rate:g}")
    save_score(experiment.output / "test" / name, result, job.row.label)
    return Outcome(
        result.task_accuracy.tolist(),
        model.meta["validation_accuracy"],
        model.meta["curve"],
        (inner.lr, inner.test_steps),
    )


def _grouped(outcomes: list[Outcome], size: int) -> Iterator[list[Outcome]]:
    return (outcomes[i : i + size] for i in range(0, len(outcomes), size))


def _best(cells: Sequence[Cell], row: Row, n_shot: int) -> Cell:
    """The row's cell with the best validation accuracy; the first of equal ones."""
    return max((c for c in cells if c.row == row and c.n_shot == n_shot), key=lambda cell: cell.validation)


def _at(cells: Sequence[Cell], row: Row, rate: float) -> Cell:
    """The row's 1-shot cell at a rate."""
    return next(c for c in cells if c.row == row and c.rate == rate and c.n_shot == 1)


def _mean_curve(cell: Cell) -> list[list[float]]:
    """Validation curve averaged over seeds: tasks, mean, half-width of its 95 % interval."""
    points = zip(*(outcome.curve for outcome in cell.outcomes), strict=True)
    n = len(cell.outcomes)
    if cell.row == UPDATE_HEAD:
        return []
    return [
        [same[0][0], sum(p[1] for p in same) / n, sum(p[2] ** 2 for p in same) ** 0.5 / n] for same in points
    ]


def _differences(best: dict[tuple[str, int], Cell]) -> dict[str, list[SeedsDifference]]:
    return {
        f"{a.label} − {b.label}": [
            pooled_difference(best[a.key, n].accuracies(), best[b.key, n].accuracies()) for n in SHOTS
        ]
        for a, b in COMPARED
    }


def _rate_curves(cells: Sequence[Cell]) -> dict[str, report.Curve]:
    def curve(rates: Sequence[float], intervals: list[Interval]) -> report.Curve:
        return report.Curve(rates, [i.mean for i in intervals], [i.half for i in intervals])

    update = _best(cells, UPDATE_HEAD, 1).interval()
    curves = {UPDATE_HEAD.label: curve(ALL_RATES, [update] * len(ALL_RATES))}
    for row in ROWS:
        curves[row.label] = curve(RATES[row], [_at(cells, row, rate).interval() for rate in RATES[row]])
    return curves


def _markdown(cells: Sequence[Cell], best: dict[tuple[str, int], Cell], seeds: Sequence[int]) -> str:
    """What the README shows between its markers."""
    table = report.table(
        {row.label: [best[row.key, n].interval() for n in SHOTS] for row in (UPDATE_HEAD, *ROWS)}
    )
    differences = _differences(best)
    sentences = []
    for n_shot, (a, b) in ((n, pair) for n in SHOTS for pair in COMPARED):
        difference = differences[f"{a.label} − {b.label}"][SHOTS.index(n_shot)]
        sentences.append("- " + report.difference_sentence(a.label, b.label, difference, f"{n_shot}-shot"))
    chosen = ", ".join(f"{row.label} {best[row.key, 1].rate:g}" for row in ROWS)
    by_rate = report.table(
        {
            row.label: [
                _at(cells, row, rate).interval() if rate in RATES[row] else None for rate in ALL_RATES
            ]
            for row in ROWS
        },
        [f"{rate:g}" for rate in ALL_RATES],
        corner="1-shot accuracy, %, at meta learning rate",
    )
    facts = provenance()
    n_tasks = len(best[SS.key, 1].outcomes[0].task_accuracy)
    return f"""{table}

{len(seeds)} seeds × {n_tasks} test tasks, ± 95 % interval over the tasks; meta learning rate chosen on the validation
split, 1-shot: {chosen}.

The paired difference on the same test tasks, ± its 95 % interval, all seeds pooled:

{report.differences(differences)}

`*`: the interval excludes 0. In words:

{chr(10).join(sentences)}

How much each method depends on its meta learning rate (test accuracy, all seeds):

{by_rate}

Made by `make results` with mtl_fast {facts["mtl_fast"]}, commit {facts["source_commit"][:12]}, torch {facts["torch"]},
{facts["platform"]}, {facts["cpu_capability"]}, one thread a run.
"""


def _summary(
    config: Config, seeds: Sequence[int], cells: Sequence[Cell], best: dict[tuple[str, int], Cell]
) -> dict[str, Any]:
    rows = []
    for cell in cells:
        mean, half = cell.interval()
        entry: dict[str, Any] = {
            "row": cell.row.key,
            "label": cell.row.label,
            "n_shot": cell.n_shot,
            "meta_lr": cell.rate,
            "chosen": best[cell.row.key, cell.n_shot] is cell,
            "mean": mean,
            "interval95": half,
            "seed_means": [sum(seed) / len(seed) for seed in cell.accuracies()],
            "validation": cell.validation,
            "inner": [outcome.inner for outcome in cell.outcomes],
            "curves": [outcome.curve for outcome in cell.outcomes],
        }
        rows.append(entry)
    differences = {
        name: [
            {
                "n_shot": n_shot,
                "mean": d.pooled.mean,
                "interval95": d.pooled.half,
                "seed_means": [one.mean for one in d.per_seed],
            }
            for n_shot, d in zip(SHOTS, values, strict=True)
        ]
        for name, values in _differences(best).items()
    }
    return {
        "seeds": list(seeds),
        "provenance": provenance(),
        "config": json.loads(config.to_json()),
        "rows": rows,
        "differences": differences,
    }
