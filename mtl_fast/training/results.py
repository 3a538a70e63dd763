"""The README's numbers: the demo's rows and FT[Θ;θ] over several seeds and a range of meta learning rates."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..config import Config, preset
from ..errors import InputError
from . import report
from .cells import Cell, Study, Wanted, best_cell, require_distinct, run_cells, worker_pool
from .checkpoint import provenance, short_commit
from .demo import draw_curves, draw_episode
from .folder_lock import FolderLock
from .models import device_of
from .rows import FT_ALL, FT_HEAD, RATES, SS, SS_HT, UPDATE_HEAD, Row
from .run import make_folder, tell_of_missing_kernels, write_text
from .statistics import Interval, SeedsDifference, pooled_difference

SHOTS = (1, 5)
ROWS = (FT_HEAD, FT_ALL, SS, SS_HT)
TRIED = tuple(sorted(set(itertools.chain(*(RATES[row] for row in ROWS)))))
COMPARED = ((SS, UPDATE_HEAD), (SS, FT_HEAD), (SS, FT_ALL), (SS_HT, SS))


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
    require_distinct("--seeds", seeds)
    for seed in seeds:
        replace(config, seed=seed)  # one that is out of range ends it here
    for folder in (output, publish):  # before the work, not after it
        make_folder(folder)
    with FolderLock(output):
        _results(config, output, publish, tuple(seeds), workers)


def _results(config: Config, output: Path, publish: Path, seeds: tuple[int, ...], workers: int) -> None:
    """The results in a folder that is this process's own."""
    study = Study(config, output)
    with worker_pool(workers) as pool:

        def run(rows: Sequence[tuple[Row, int, float | None]], what: str) -> list[Cell]:
            return run_cells(pool, study, [Wanted(*row, seeds) for row in rows], what)

        cells = run([(UPDATE_HEAD, 1, None)], "pre-training")
        cells += run([(row, 1, rate) for row in ROWS for rate in RATES[row]], "1-shot, all rates")
        chosen = {row: best_cell(cells, row, 1).rate for row in (UPDATE_HEAD, *ROWS)}
        cells += run([(row, 5, rate) for row, rate in chosen.items()], "5-shot")
    best = {(row.key, n): best_cell(cells, row, n) for row in (UPDATE_HEAD, *ROWS) for n in SHOTS}
    first = study.experiment(seeds[0])
    model = first.meta_train(SS_HT, 1, lr=chosen[SS_HT])
    _, evaluation, episodes = first.test(model, 1)
    with FolderLock(publish):
        write_text(
            publish / "results.json", json.dumps(_summary(config, seeds, cells, best), indent=1) + "\n"
        )
        write_text(publish / "results.md", _markdown(cells, best, seeds))
        draw_curves(publish / "curves.png", {key: cell.mean_curve() for key, cell in best.items()})
        report.rate_sensitivity_figure(publish / "rates.png", {"1-shot": _rate_curves(cells)})
        draw_episode(publish / "episode.png", first, evaluation, episodes)
    print(f"published in {publish}")


def _at(cells: Sequence[Cell], row: Row, rate: float) -> Cell:
    """The row's 1-shot cell at a rate."""
    return next(c for c in cells if c.row == row and c.rate == rate and c.n_shot == 1)


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

    update = best_cell(cells, UPDATE_HEAD, 1).interval()
    curves = {UPDATE_HEAD.label: curve(TRIED, [update] * len(TRIED))}
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
            row.label: [_at(cells, row, rate).interval() if rate in RATES[row] else None for rate in TRIED]
            for row in ROWS
        },
        [f"{rate:g}" for rate in TRIED],
        corner="1-shot accuracy, %, at meta learning rate",
    )
    facts = provenance()
    commit = short_commit(facts["source_commit"])
    n_tasks = len(best[SS.key, 1].outcomes[0].task_accuracy)
    return f"""{table}

{len(seeds)} seeds × {n_tasks} test tasks, ± 95 % interval over the tasks; meta learning rate chosen on the validation
split 1-shot and kept 5-shot: {chosen}.

The paired difference on the same test tasks, ± its 95 % interval, all seeds pooled:

{report.differences(differences)}

`*`: the interval excludes 0. In words:

{chr(10).join(sentences)}

How much each method depends on its meta learning rate (test accuracy, all seeds):

{by_rate}

Made by `make results` with mtl_fast {facts["mtl_fast"]}, commit {commit}, torch {facts["torch"]},
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
