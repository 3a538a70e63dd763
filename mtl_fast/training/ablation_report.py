"""What an ablation publishes: one table as Markdown, CSV and LaTeX, the claims, the convergence figure, the numbers."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..text_table import Style, grid
from . import claims
from .cells import Cell, Study
from .checkpoint import provenance, short_commit
from .figures import Curve, convergence_figure
from .folder_lock import FolderLock
from .report import differences
from .rows import MAML, SS, Row
from .run import make_folder, write_text
from .scope import Scope
from .statistics import seeds_interval

DRAWN = (SS, MAML)  # the rows of the figure, each plain and with hard tasks

_ABOUT_THE_TABLE = """\
The rows of one seed see the same tasks, those that adapt all weights the first ones of them. "Meta-learned" counts
what meta-training moves, "adapted" what the inner loop moves for a task, "of all" the network with its head (Φ, which
goes into the weights, is not counted again). "Prepared" is meta-training, or for "update" the choice of the inner loop,
both after pre-training: by the clock, one thread a run, on a machine that may have had other work. Seeds differ in
level: rows of different seeds are compared by the differences below, which are over the seeds that both have."""
_ABOUT_THE_CLAIMS = """\
What the paper claims, by the paired difference on the same test tasks, ± its 95 % interval. Confirmed: the interval
lies above 0, and so does every seed; not confirmed: both lie below; otherwise, also where seeds disagree, undecided.
The interval covers the draw of test tasks, the single seeds show the luck of training."""
_ABOUT_CONVERGENCE = f"""\
A run has converged when its validation accuracy first reaches the start and {100 * claims.REACHED:.0f} % of what the
plain run of its seed has gained by its end (0 tasks where it gained nothing); it is linear between validations, and a
run that never gets there counts with its whole length. The interval is over seeds, by Student's t."""
_ABOUT_THE_FIGURE = """\
The figure, convergence.png, shows the mean validation accuracy of the seeds. Its band is the 95 % interval over seeds,
by Student's t, of what was gained since the start, for the seeds' levels differ; of a single seed, that over its
validation tasks."""


def publish(folder: Path, study: Study, scope: Scope, cells: Mapping[tuple[str, int], Cell]) -> None:
    """Writes ablation.md, .csv, .tex, .json and convergence.png.

    Args:
        folder: made where there is none.
        study, scope: what was asked for.
        cells: (row key, n_shot) → what is finished of it.
    """
    make_folder(folder)
    shots = tuple(dict.fromkeys((*scope.shots, *scope.whole_network_shots)))
    panels = _panels(cells, shots)
    summary = json.dumps(_summary(study, scope, cells, shots), indent=1)
    with FolderLock(folder):
        write_text(folder / "ablation.md", _markdown(study, scope, cells, shots, bool(panels)))
        write_text(folder / "ablation.tex", table(scope.rows, cells, shots, "latex") + "\n")
        write_text(folder / "ablation.csv", _csv(scope.rows, cells, shots))
        write_text(folder / "ablation.json", summary + "\n")
        if panels:
            convergence_figure(folder / "convergence.png", panels)


def table(
    rows: Sequence[Row], cells: Mapping[tuple[str, int], Cell], shots: Sequence[int], style: Style
) -> str:
    """A row a method: accuracies with their intervals, how much was tested, parameters and times."""
    head = [
        "accuracy, %",
        *(f"{n}-shot" for n in shots),
        "seeds × tasks",
        "meta-learned",
        "adapted",
        "of all",
        "prepared, min",
        "test, ms a task",
    ]
    body = []
    for row in rows:
        found = [cells.get((row.key, n)) for n in shots]
        there = [cell for cell in found if cell is not None]
        accuracies = ["–" if cell is None else cell.interval().percent() for cell in found]
        if not there:
            body.append([row.label, *accuracies, *["–"] * 6])
            continue
        tested = dict.fromkeys(f"{len(c.seeds)} × {len(c.outcomes[0].task_accuracy):,}" for c in there)
        one = there[0].outcomes[0]
        sizes = [f"{n:,}" for n in (one.n_learned, one.n_adapted, one.n_total)]
        minutes, milliseconds = _times(there[0])
        body.append(
            [row.label, *accuracies, "; ".join(tested), *sizes, f"{minutes:.1f}", f"{milliseconds:.1f}"]
        )
    return grid(head, body, style)


def _markdown(
    study: Study, scope: Scope, cells: Mapping[tuple[str, int], Cell], shots: Sequence[int], drawn: bool
) -> str:
    """What the README shows between its markers."""
    compared = {
        f"{a.label} − {b.label}": [claims.difference(cells, a, b, n) for n in shots]
        for claim in claims.CLAIMS
        for a, b in claim.pairs
    }
    compared = {name: found for name, found in compared.items() if any(found)}
    speed = []
    for row in (row for _, row in claims.HARD_PAIRS):
        for n in shots:
            if saved := claims.tasks_saved(cells, row, n):
                interval, said = claims.speed_verdict(saved)
                half = "–" if math.isinf(interval.half) else f"{interval.half:,.0f}"
                each = "; ".join(f"{plain:,.0f} / {hard:,.0f}" for plain, hard in saved)
                speed.append([f"{row.label}, {n}-shot", each, f"{interval.mean:+,.0f} ± {half}", said])
    missing = _missing(scope, cells)
    facts = provenance()
    n_way = study.config.episodes.n_way
    parts = [
        table(scope.rows, cells, shots, "markdown"),
        f"{n_way}-way accuracy on test tasks of {study.config.data.source}, ± 95 % interval over all seeds' tasks.\n"
        + _ABOUT_THE_TABLE,
        _about_rates(scope, cells, shots[0]),
    ]
    if missing:
        parts.append(f"Not finished: {missing}.")
    if compared:
        parts += [
            _ABOUT_THE_CLAIMS,
            claims.claims_text(cells, shots),
            "All differences, all seeds pooled; `*`: the interval excludes 0.",
            differences(compared, [f"{n}-shot" for n in shots]),
        ]
    if speed:
        head = ["tasks until converged", "plain / HT, each seed", "plain − HT", "HT is faster"]
        parts += [_ABOUT_CONVERGENCE, grid(head, speed, "markdown")]
    if drawn:
        parts.append(_ABOUT_THE_FIGURE)
    parts.append(
        f"Made by `mtl-fast ablation` with mtl_fast {facts['mtl_fast']}, commit "
        f"{short_commit(facts['source_commit'])}, torch {facts['torch']},\n"
        f"{facts['platform']}, {facts['cpu_capability']}, one thread a run." + _machines(cells)
    )
    return "\n\n".join(parts) + "\n"


def _machines(cells: Mapping[tuple[str, int], Cell]) -> str:
    """Where the runs of a file of outcomes were made, in words; nothing without such a file."""
    made: dict[str, int] = {}
    for outcome in (outcome for cell in cells.values() for outcome in cell.outcomes if outcome.made):
        where = f"commit {short_commit(outcome.made['source_commit'])} on {outcome.made['cpu_capability']}"
        made[where] = made.get(where, 0) + 1
    told = "; ".join(f"{n} with {where}" for where, n in made.items())
    return f" Runs in the file of outcomes: {told}." if made else ""


def _about_rates(scope: Scope, cells: Mapping[tuple[str, int], Cell], n_shot: int) -> str:
    """Which meta learning rates hold, and how they came to be."""
    chosen = {
        row: cells[row.key, n_shot].rate
        for row in scope.rows
        if row.hard == "none" and (row.key, n_shot) in cells and cells[row.key, n_shot].rate is not None
    }
    if not chosen:
        return "Meta learning rates are the recipe's."
    told = ", ".join(f"{row.label} {rate:g}" for row, rate in chosen.items())
    taken = [row.label for row in chosen if row.key not in scope.rates and row.rate_of in scope.rates]
    first, *others = (f"{n}-shot" for n in scope.shots)
    kept = f"{first} and kept {', '.join(others)}" if others else first
    text = f"Meta learning rates, chosen on the validation split {kept}: {told}.\n"
    if taken:
        text += f"The rate of {' and '.join(taken)} is that of the [Θ;θ] row. "
    return text + "With hard tasks the rate is the same; rows that are not named have the recipe's."


def _missing(scope: Scope, cells: Mapping[tuple[str, int], Cell]) -> str:
    """The cells that have not all their seeds, in words."""
    found = []
    for row in scope.rows:
        for n in scope.shots_of(row):
            there = cells[row.key, n].seeds if (row.key, n) in cells else ()
            lacking = [str(seed) for seed in scope.seeds_of(row) if seed not in there]
            if lacking:
                seeds = "seed" if len(lacking) == 1 else "seeds"
                found.append(f"{row.label} {n}-shot ({seeds} {', '.join(lacking)})")
    return "; ".join(found)


def _times(cell: Cell) -> tuple[float, float]:
    """Minutes of preparing one run and milliseconds of testing one task, mean over seeds."""
    n = len(cell.outcomes)
    minutes = sum(outcome.seconds for outcome in cell.outcomes) / n / 60
    tests = sum(1000 * outcome.test_seconds / len(outcome.task_accuracy) for outcome in cell.outcomes) / n
    return minutes, tests


def _csv(rows: Sequence[Row], cells: Mapping[tuple[str, int], Cell], shots: Sequence[int]) -> str:
    text = io.StringIO()
    entries = [_entry(row, n, cells[row.key, n]) for row in rows for n in shots if (row.key, n) in cells]
    left_out = ("curves", "seed_means", "chosen")
    columns = [name for name in (entries[0] if entries else {}) if name not in left_out]
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for entry in entries:
        writer.writerow(entry | {"seeds": " ".join(map(str, entry["seeds"]))})
    return text.getvalue()


def _entry(row: Row, n_shot: int, cell: Cell) -> dict[str, Any]:
    """One cell's numbers; accuracies as fractions, times of a mean run."""
    mean, half = cell.interval()
    one = cell.outcomes[0]
    minutes, milliseconds = _times(cell)
    return {
        "row": row.key,
        "label": row.label,
        "n_shot": n_shot,
        "mean": mean,
        "interval95": half,
        "seeds": list(cell.seeds),
        "n_tasks": len(one.task_accuracy),
        "meta_lr": cell.rate,
        "chosen": True,
        "inner_lr": one.inner[0],
        "inner_steps": one.inner[1],
        "validation": cell.validation,
        "n_learned": one.n_learned,
        "n_adapted": one.n_adapted,
        "n_total": one.n_total,
        "seconds": None if math.isnan(minutes) else 60 * minutes,
        "test_seconds_per_task": milliseconds / 1000,
        "seed_means": [sum(seed) / len(seed) for seed in cell.accuracies()],
        "curves": [outcome.curve for outcome in cell.outcomes],
    }


def _panels(cells: Mapping[tuple[str, int], Cell], shots: Sequence[int]) -> dict[str, dict[str, Curve]]:
    panels: dict[str, dict[str, Curve]] = {}
    for row in DRAWN:
        for n in shots:
            pair = {"plain meta-batch": row, "HT meta-batch": row.with_hard_tasks()}
            there = {name: cells[r.key, n] for name, r in pair.items() if (r.key, n) in cells}
            if there:
                # Of the same seeds, for their levels differ.
                common = set.intersection(*(set(cell.seeds) for cell in there.values()))
                if common:
                    panels[f"{row.label}, {n}-shot"] = {k: _band(cell, common) for k, cell in there.items()}
    return panels


def _band(cell: Cell, seeds: set[int]) -> Curve:
    """Mean over seeds; the interval is that of the seeds' gains since the start, or over validation tasks of one."""
    curves = [outcome.curve for seed, outcome in zip(cell.seeds, cell.outcomes, strict=True) if seed in seeds]
    n, tasks = len(curves), [point[0] for point in curves[0]]
    means = [sum(point[1] for point in same) / n for same in zip(*curves, strict=True)]
    if n == 1:
        return Curve(tasks, means, [point[2] for point in curves[0]])
    gains = [[point[1] - curve[0][1] for point in curve] for curve in curves]
    return Curve(tasks, means, [seeds_interval(same).half for same in zip(*gains, strict=True)])


def _summary(
    study: Study, scope: Scope, cells: Mapping[tuple[str, int], Cell], shots: Sequence[int]
) -> dict[str, Any]:
    compared = []
    for claim in claims.CLAIMS:
        for a, b in claim.pairs:
            for n in shots:
                found = claims.difference(cells, a, b, n)
                if found is not None:
                    means = [one.mean for one in found.per_seed]
                    compared.append(
                        {
                            "claim": claim.words,
                            "a": a.key,
                            "b": b.key,
                            "n_shot": n,
                            "mean": found.pooled.mean,
                            "interval95": found.pooled.half,
                            "seed_means": means,
                            "verdict": claims.verdict(found.pooled, means),
                        }
                    )
    return {
        "provenance": provenance(),
        "config": json.loads(study.config.to_json()),
        "config_maml": json.loads(study.maml.to_json()),
        "config_maml_deep": json.loads(study.maml_deep.to_json()),
        "rows": [
            _entry(row, n, cells[row.key, n]) for row in scope.rows for n in shots if (row.key, n) in cells
        ],
        "differences": compared,
        "tasks_to_converge": {
            f"{row.key}, {n}-shot": saved
            for _, row in claims.HARD_PAIRS
            for n in shots
            if (saved := claims.tasks_saved(cells, row, n))
        },
    }
