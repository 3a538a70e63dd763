"""The README's numbers: the demo's rows and FT[Θ;θ] over several seeds and a range of meta learning rates."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..config import Config, preset
from . import report
from .checkpoint import provenance
from .demo import draw_curves, draw_episode
from .evaluate import Score, save_score
from .experiment import FT_ALL, FT_HEAD, SS, SS_HT, UPDATE_HEAD, Experiment, Row
from .models import Model
from .run import write_text
from .statistics import SeedsDifference, mean_interval, pooled_difference

SHOTS = (1, 5)
# A decade and a half around each method's usual rate; the rate is of what the row learns (head: its own start).
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
ROWS = (FT_HEAD, FT_ALL, SS, SS_HT)
COMPARED = ((SS, UPDATE_HEAD), (SS, FT_HEAD), (SS, FT_ALL), (SS_HT, SS))


@dataclass
class Cell:
    """One method at one rate and task shape, over the seeds."""

    row: Row
    n_shot: int
    rate: float | None
    scores: list[Score]
    models: list[Model]

    @property
    def validation(self) -> float:
        """Mean over seeds of the best validation accuracy: what the rate is chosen by."""
        return sum(model.meta["validation_accuracy"] for model in self.models) / len(self.models)

    def accuracies(self) -> list[Any]:
        """Each seed's accuracies of single test tasks."""
        return [score.task_accuracy for score in self.scores]

    def interval(self) -> tuple[float, float]:
        """Mean and 95 % interval over all seeds' tasks."""
        values = [value for seed in self.accuracies() for value in seed.tolist()]
        return mean_interval(values)


def results(
    output: str | Path, publish: str | Path, *, seeds: Sequence[int] = (0, 1, 2), device: str = "auto"
) -> None:
    """Makes (or reads, where finished) every run and publishes results.json, results.md and the pictures.

    Every seed pre-trains its own encoder and is tested on 600 tasks of its own; within a seed all methods see
    the same tasks. A method's rate is the one with the best validation accuracy, averaged over the seeds.
    """
    output, publish = Path(output), Path(publish)
    config = replace(preset("glyphs-results"), device=device)
    experiments = [Experiment(replace(config, seed=seed), output / f"seed{seed}") for seed in seeds]
    cells = [_update_head(experiments, n_shot) for n_shot in SHOTS]
    for n_shot in SHOTS:
        for row in ROWS:
            cells += [_cell(experiments, row, n_shot, rate) for rate in RATES]
    publish.mkdir(parents=True, exist_ok=True)
    best = {(row.key, n): _best(cells, row, n) for row in (UPDATE_HEAD, *ROWS) for n in SHOTS}
    write_text(publish / "results.json", json.dumps(_summary(config, seeds, cells, best), indent=1) + "\n")
    write_text(publish / "results.md", _markdown(cells, best, seeds))
    draw_curves(publish / "curves.png", {key: cell.models[0] for key, cell in best.items()})
    report.rate_sensitivity_figure(publish / "rates.png", _rate_curves(cells))
    model = best[SS_HT.key, 1].models[0]
    _, evaluation, episodes = experiments[0].test(model, 1)
    draw_episode(publish / "episode.png", experiments[0], evaluation, episodes)
    print(f"published in {publish}")


def _update_head(experiments: Sequence[Experiment], n_shot: int) -> Cell:
    cell = Cell(UPDATE_HEAD, n_shot, None, [], [])
    for experiment in experiments:
        model = experiment.pretrain()
        inner = experiment.choose_inner(model, n_shot)
        _test_into(cell, experiment, model, inner)
    return cell


def _cell(experiments: Sequence[Experiment], row: Row, n_shot: int, rate: float) -> Cell:
    cell = Cell(row, n_shot, rate, [], [])
    for experiment in experiments:
        _test_into(cell, experiment, experiment.meta_train(row, n_shot, lr=rate))
    return cell


def _test_into(cell: Cell, experiment: Experiment, model: Model, inner: Any = None) -> None:
    result, _, _ = experiment.test(model, cell.n_shot, inner)
    name = f"{cell.row.key}-{cell.n_shot}shot" + ("" if cell.rate is None else f"-lr{cell.rate:g}")
    save_score(experiment.output / "test" / name, result, cell.row.label)
    cell.scores.append(result)
    cell.models.append(model)


def _best(cells: Sequence[Cell], row: Row, n_shot: int) -> Cell:
    mine = [cell for cell in cells if cell.row == row and cell.n_shot == n_shot]
    return mine[0] if len(mine) == 1 else max(mine, key=lambda cell: cell.validation)


def _differences(best: dict[tuple[str, int], Cell]) -> dict[str, list[SeedsDifference]]:
    return {
        f"{a.label} − {b.label}": [
            pooled_difference(best[a.key, n].accuracies(), best[b.key, n].accuracies()) for n in SHOTS
        ]
        for a, b in COMPARED
    }


def _rate_curves(cells: Sequence[Cell]) -> dict[str, dict[str, report.Curve]]:
    panels: dict[str, dict[str, report.Curve]] = {}
    for n_shot in SHOTS:
        update = next(c for c in cells if c.row == UPDATE_HEAD and c.n_shot == n_shot).interval()
        flat = report.Curve(RATES, [update[0]] * len(RATES), [update[1]] * len(RATES))
        panels[f"{n_shot}-shot"] = {UPDATE_HEAD.label: flat}
        for row in ROWS:
            intervals = [c.interval() for c in cells if c.row == row and c.n_shot == n_shot]
            panels[f"{n_shot}-shot"][row.label] = report.Curve(
                RATES, [mean for mean, _ in intervals], [half for _, half in intervals]
            )
    return panels


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
    rates = {row.label: [f"{best[row.key, n].rate:g}" for n in SHOTS] for row in ROWS}
    chosen = "; ".join(f"{label} {' / '.join(values)}" for label, values in rates.items())
    by_rate = report.table(
        {
            f"{row.label}, {n}-shot": [c.interval() for c in cells if c.row == row and c.n_shot == n]
            for n in SHOTS
            for row in ROWS
        },
        [f"{rate:g}" for rate in RATES],
        corner="accuracy, % at meta learning rate",
    )
    facts = provenance()
    n_tasks = len(best[SS.key, 1].scores[0].task_accuracy)
    return f"""{table}

{len(seeds)} seeds × {n_tasks} test tasks, ± 95 % interval over the tasks; meta learning rate chosen on the validation
split (1-shot / 5-shot): {chosen}.

The paired difference on the same test tasks, ± its 95 % interval, all seeds pooled:

{report.differences(differences)}

`*`: the interval excludes 0. In words:

{chr(10).join(sentences)}

How much each method depends on its meta learning rate (test accuracy, all seeds):

{by_rate}

Made by `make results` with mtl_fast {facts["mtl_fast"]}, commit {facts["source_commit"][:12]}, torch {facts["torch"]},
{facts["platform"]}, {facts["cpu_capability"]}, {facts["threads"]} threads.
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
            "seed_means": [score.interval.mean for score in cell.scores],
            "validation": None if cell.rate is None else cell.validation,
            "inner": [[score.config.inner.lr, score.config.inner.test_steps] for score in cell.scores],
        }
        if cell.rate is not None:
            entry["curves"] = [model.meta["curve"] for model in cell.models]
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
