"""The demo: the whole way on the embedded characters, one table, the curves, one episode."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ..config import Config, preset
from ..engine.scores import Evaluation
from ..episodes import Episodes
from ..errors import InputError
from . import report
from .checkpoint import provenance
from .evaluate import Score, save_score
from .experiment import Experiment
from .folder_lock import FolderLock
from .hard_classes import PICTURE, draw_hard_classes
from .logging import duration
from .rows import FT_HEAD, SS, SS_HT, UPDATE_HEAD
from .run import check_settings, make_folder, read_settings, write_text
from .statistics import paired_difference

SHOTS = (1, 5)
ROWS = (UPDATE_HEAD, FT_HEAD, SS, SS_HT)
COMPARED = ((SS, UPDATE_HEAD), (SS, FT_HEAD), (SS_HT, SS))

Scores = Mapping[tuple[str, int], Score]


def demo(
    output: str | Path, *, quick: bool = False, seed: int = 0, device: str = "auto", resume: bool = False
) -> str:
    """Pre-trains, meta-trains plain and with hard tasks, tests each row, writes the report; returns the table.

    Args:
        output: folder of report.md, curves.png, episode.png, hard_classes.png, config.json and one run folder a phase.
        quick: the recipe `glyphs-quick`, which shows in 40 seconds that everything works.
        seed: of everything random.
        device: as in `Config`.
        resume: go on in a folder that holds a demo; a finished one is only shown again.

    Raises:
        InputError: the folder holds a demo and `resume` is off, or another process is at work there.
    """
    output = Path(output)
    config = replace(preset("glyphs-quick" if quick else "glyphs"), seed=seed, device=device)
    if (output / "config.json").exists() and not resume:
        raise InputError(
            f"{output}: holds a demo already; --resume goes on with it, or give another --output"
        )
    experiment = Experiment(config, output)  # first: an unknown device leaves nothing behind
    make_folder(output)
    with FolderLock(output):
        return _demo(experiment, output, quick=quick)


def _demo(experiment: Experiment, output: Path, *, quick: bool) -> str:
    """The demo in a folder that is this process's own."""
    config = experiment.config
    if (output / "config.json").exists():
        check_settings(output / "config.json", read_settings(output / "config.json"), config)
    write_text(output / "config.json", config.to_json() + "\n")
    start = time.monotonic()
    scores: dict[tuple[str, int], Score] = {}
    curves: dict[tuple[str, int], list[list[float]]] = {}
    shown: tuple[Evaluation, Episodes] | None = None
    pretrained = experiment.pretrain()
    for n_shot in SHOTS:
        for row in ROWS:
            inner = experiment.choose_inner(pretrained, n_shot) if row is UPDATE_HEAD else None
            model = pretrained if row is UPDATE_HEAD else experiment.meta_train(row, n_shot)
            result, evaluation, episodes = experiment.test(model, n_shot, inner)
            scores[row.key, n_shot], curves[row.key, n_shot] = result, model.meta["curve"]
            save_score(output / "test" / f"{row.key}-{n_shot}shot", result, row.label)
            if row is SS_HT and n_shot == 1:
                shown = evaluation, episodes
                title = f"{row.label}, 1-shot: classes that hard tasks were made of"
                draw_hard_classes(model.path.parent, output / PICTURE, title=title)
    assert shown is not None
    draw_curves(output / "curves.png", curves)
    draw_episode(output / "episode.png", experiment, *shown)
    text = comparison(scores)
    seconds = time.monotonic() - start
    write_text(output / "report.md", _report(config, scores, text, quick, seconds))
    plain = report.table(_cells(scores), style="plain")
    print(f"\n{plain}\n\n{text}\n\nreport and pictures: {output}/report.md ({duration(seconds)})")
    return plain


def _cells(scores: Scores) -> dict[str, list[tuple[float, float] | None]]:
    return {row.label: [scores[row.key, n_shot].interval for n_shot in SHOTS] for row in ROWS}


def comparison(scores: Scores) -> str:
    """One sentence a comparison and task shape: the paired difference on the same test tasks."""
    return "\n".join(
        report.difference_sentence(
            a.label,
            b.label,
            paired_difference(scores[a.key, n_shot].task_accuracy, scores[b.key, n_shot].task_accuracy),
            f"{n_shot}-shot",
        )
        for n_shot in SHOTS
        for a, b in COMPARED
    )


def draw_curves(path: Path, curves: Mapping[tuple[str, int], list[list[float]]]) -> None:
    """Validation accuracy against tasks seen, plain and with hard tasks.

    Args:
        path: the PNG.
        curves: (row key, n_shot) → points of tasks, mean, half-width.
    """
    panels: dict[str, dict[str, report.Curve]] = {}
    for n_shot in SHOTS:
        for row in (SS, SS_HT):
            tasks, accuracy, interval = zip(*curves[row.key, n_shot], strict=True)
            panels.setdefault(f"{n_shot}-shot", {})[row.label] = report.Curve(tasks, accuracy, interval)
    report.convergence_figure(path, panels)


def draw_episode(path: Path, experiment: Experiment, evaluation: Evaluation, episodes: Episodes) -> None:
    """The test episode whose accuracy is nearest to the mean, with its predictions."""
    store = experiment.stores["test"]
    typical = int((evaluation.accuracy - evaluation.accuracy.mean()).abs().argmin())
    rows = episodes.rows()[typical].cpu()
    support, query = rows[:, : episodes.n_shot], rows[:, episodes.n_shot :]
    images = store.images.cpu()
    report.episode_picture(
        path,
        images[support],
        images[query.flatten()],
        episodes.query_labels[typical].cpu(),
        evaluation.predictions[typical].cpu(),
        [store.class_names[int(c)] for c in episodes.classes[typical]],
        title=f"{SS_HT.label}, a typical test task",
    )


def _report(config: Config, scores: Scores, text: str, quick: bool, seconds: float) -> str:
    n_tasks, n_way = config.evaluation.n_tasks, config.episodes.n_way
    facts = provenance()
    inner = {n: scores[UPDATE_HEAD.key, n].config.inner for n in SHOTS}
    chosen = "; ".join(f"{n}-shot: rate {inner[n].lr:g}, {inner[n].test_steps} steps" for n in SHOTS)
    warning = "\n**Quick run: it shows that everything works; its numbers mean little.**\n" if quick else ""
    return f"""# Meta-transfer learning on Glyphs
{warning}
{n_way}-way accuracy on {n_tasks} test tasks of scripts that no training saw, ± 95 % interval (1.96·s/√n), seed {config.seed}.

{report.table(_cells(scores))}

Differences over the same test tasks, ± 95 % interval of the paired difference:

{text.replace(chr(10), chr(10) + chr(10))}

One run, one seed: differences this small move from seed to seed. The README has three seeds.
"update θ" fits a fresh head on the pre-trained features with the step size and number of steps that are best
on the validation split ({chosen}).

![validation accuracy against tasks seen](curves.png)

![a test episode and its predictions](episode.png)

![which classes were hardest over time](hard_classes.png)

Made in {duration(seconds)} by mtl_fast {facts["mtl_fast"]} ({facts["source_commit"]}), torch {facts["torch"]},
{facts["platform"]}, {facts["cpu_capability"]}, {facts["threads"]} threads. Settings: [config.json](config.json).
"""
