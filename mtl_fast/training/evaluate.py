"""The test of a model file or of saved features: mean accuracy and 95 % interval, and each task's accuracy."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import Config, EvaluationChanges, EvaluationConfig
from ..data.store import ClassIndex, ImageStore
from ..engine.evaluate import Adapt, evaluate
from ..engine.ranks import ALONE, Ranks
from ..engine.scores import Evaluation
from ..episodes import Episodes, EpisodeSampler
from ..errors import InputError
from ..random_streams import RandomStreams
from . import checkpoint as checkpoints
from .figures import Curve, steps_figure
from .folder_lock import FolderLock
from .models import Model, device_of, preprocess_of
from .parts import Parts, Shard
from .ranks import require_same_start
from .run import make_folder, write_text
from .scoring import Scoring
from .statistics import Interval, mean_interval
from .subject import Changes, HeadStart, Subject, features_subject, head_for, model_subject

TENSORS = "evaluation.safetensors"
STEPS_TABLE, STEPS_PICTURE = "accuracy_by_step.csv", "accuracy_by_step.png"


@dataclass(frozen=True)
class Score:
    """What a test gave.

    Attributes:
        task_accuracy: [T], the same tasks for every model tested with the same seed and shape.
        interval: its mean and 95 % interval.
        config: settings used.
        data: where the images come from, if not from the data trained on.
        accuracy_by_step: [T, n_steps + 1], after 0, 1, … steps of the inner loop, if asked for.
        shard: which share of the tasks this is; None: all.
        known_split: false for features whose file does not say what split they are of.
    """

    task_accuracy: Tensor
    interval: Interval
    config: Config
    data: str = ""
    accuracy_by_step: Tensor | None = None
    shard: str | None = None
    known_split: bool = True

    @property
    def tasks(self) -> str:
        """``test tasks``, or of whichever split; ``tasks`` where that is not known."""
        return f"{self.config.evaluation.split} tasks" if self.known_split else "tasks"

    @property
    def steps(self) -> list[Interval]:
        """Mean and 95 % interval after each step; empty if not asked for."""
        by_step = self.accuracy_by_step
        return [] if by_step is None else [mean_interval(column) for column in by_step.T]

    def steps_text(self) -> str:
        """Accuracy along the inner loop on one line: after 0, 1, 2, 5, 10, … steps and the last."""
        steps = self.steps
        round_numbers = {m * 10**k for k in range(len(str(len(steps)))) for m in (1, 2, 5)}
        shown = [i for i in range(len(steps)) if i in round_numbers | {0, len(steps) - 1}]
        return f"by inner steps: {', '.join(f'{i}: {steps[i]}' for i in shown)} %"

    def __str__(self) -> str:
        shape = self.config.episodes
        where = f" of {self.data or self.config.data.source}"
        where += f" (shard {self.shard})" if self.shard else ""
        return (
            f"{shape.n_way}-way {shape.n_shot}-shot, {len(self.task_accuracy)} {self.tasks}{where}: "
            f"{self.interval} %"
        )


def drawn_episodes(config: Config, store: ClassIndex) -> Episodes:
    """The tasks of a test: the same for every model under one seed and task shape."""
    shape, stream = config.episodes, RandomStreams(config.seed).stream("evaluation")
    sampler = EpisodeSampler(store, shape.n_way, shape.n_shot, shape.n_query_at_test, stream)
    return sampler.sample(config.evaluation.n_tasks)


def score(
    model: Model, config: Config, store: ImageStore, episodes: Episodes, ranks: Ranks = ALONE
) -> tuple[Score, Evaluation]:
    """Fits and scores the episodes, shared out over the ranks; a pre-trained model gets a fresh zero head ("update θ")."""
    head = head_for(model.head, config.episodes.n_way, model.encoder.feature_dim, "learned", str(model.path))
    result = evaluate(
        model.encoder,
        head.to(store.device),
        store,
        episodes,
        preprocess_of(config),
        inner_lr=config.inner.lr_at_test,
        inner_steps=config.inner.test_steps,
        norm=model.norm,
        adapt=config.inner.adapt,
        mirror_support=config.evaluation.mirror_support,
        ranks=ranks,
    )
    return Score(result.accuracy.cpu(), mean_interval(result.accuracy), config), result


def evaluate_model(
    checkpoint: str | Path | None = None,
    *,
    embeddings: str | Path | None = None,
    data: str | None = None,
    n_way: int | None = None,
    n_shot: int | None = None,
    n_query: int | None = None,
    inner_steps: int | None = None,
    inner_lr: float | None = None,
    adapt: Adapt | None = None,
    head: HeadStart = "learned",
    by_step: bool = False,
    evaluation: EvaluationConfig | EvaluationChanges | None = None,
    seed: int = 0,
    device: str = "auto",
    output: Path | None = None,
    resume: bool = False,
    shard: str | None = None,
    ranks: Ranks = ALONE,
) -> Score:
    """Tests a model file, or saved features; every None takes the model's own setting.

    With an output, finished pieces are kept there until the result is written, so that a killed test can go on.

    Args:
        checkpoint, embeddings: one of the two; a file of embeddings brings the meta-learned head with it.
        data: another source of images than the one trained on, which imported weights always need. They are brought
            to the model's size and normalised as in its training, and cropped to boxes and read in the channel order
            of its training where their format knows of these.
        n_way, n_shot, n_query, inner_steps, inner_lr: of the test.
        adapt: what the inner loop moves, the ``head`` or ``all`` weights of the network.
        head: ``zeros`` fits fresh heads though there is a meta-learned one.
        by_step: accuracy after each step of the inner loop, too.
        evaluation: number of tasks, split, mirrored support. Embeddings stay of the split that they were made of;
            `EvaluationChanges` that name another are refused. What it leaves open is as the model's recipe says.
        seed: of the tasks.
        device: where to run.
        output: folder of the result.
        resume: go on with what is in the output folder; what shards have done there is put together.
        shard: ``I/N`` scores only share I of N and leaves its pieces in the output folder; all shards share that
            folder.
        ranks: processes that share out the tasks; they neither resume nor take shards.

    Returns:
        The score of all tasks, or of the shard's.

    Raises:
        InputError: no such model; a head of another n_way; all weights to adapt of a model that learned something
            else, or of features; features of another split than asked for; images of another size; a split with too
            few classes or images; an output that cannot be written, that another process is at work in, or that holds
            pieces of another test or, without `resume`, of any.
    """
    own = Shard() if shard is None else Shard.parse(shard)
    for name, asked in (("--shard", shard), ("--resume", resume)):
        if asked and output is None:
            raise InputError(f"{name} needs --output, the folder that holds what is done")
    evaluation = evaluation or EvaluationChanges()
    if not ranks.alone and (resume or shard is not None):
        raise InputError(
            "--resume and --shard are for one process; with torchrun the processes share out the tasks"
        )
    changes = Changes(n_way, n_shot, n_query, inner_steps, inner_lr, adapt, evaluation, seed, device)
    with ExitStack() as claims:
        with ranks.together():
            target = device_of(Config(device=device)) if ranks.device is None else ranks.device
            subject = _subject(checkpoint, embeddings, changes, target, data=data, head=head)
            folder, facts, found = None, {}, None
            if output is not None or not ranks.alone:
                facts = subject.facts(by_step=by_step)
            if output is not None and ranks.first:
                make_folder(output)  # before the work, not after it
                folder = output / "parts" if ranks.alone else None
                claims.enter_context(FolderLock(output, shared=shard is not None))
                if shard is not None:  # the others may be at work too, each in a folder of its own
                    pieces = own.folder(output / "parts")
                    make_folder(pieces)
                    claims.enter_context(FolderLock(pieces))
            parts = Parts(folder, facts, shard=own, resume=resume)
            if output is not None and resume and shard is None:
                found = _finished(output, facts)
            episodes = drawn_episodes(subject.config, subject.store)
        require_same_start(ranks, subject.config, {}, facts)
        if found is None:
            found = Scoring(subject, episodes, parts, own, by_step=by_step, ranks=ranks).run()
        result = _score_of(found, subject, shard)
        with ranks.together():
            if output is not None and shard is None and ranks.first:
                save_score(output, result, subject.file, facts=facts)
                parts.remove()
    return result


def _subject(
    checkpoint: str | Path | None,
    embeddings: str | Path | None,
    changes: Changes,
    target: torch.device,
    *,
    data: str | None,
    head: HeadStart,
) -> Subject:
    if checkpoint is not None and embeddings is None:
        return model_subject(checkpoint, changes, target, data=data, head=head)
    if embeddings is not None and checkpoint is None:
        if data is not None:
            raise InputError("--data goes with --checkpoint; a file of embeddings holds its own data")
        return features_subject(embeddings, changes, target, head=head)
    raise InputError("give either --checkpoint, a model file, or --embeddings, a file of features")


def _score_of(found: dict[str, Tensor], subject: Subject, shard: str | None) -> Score:
    accuracy = found["task_accuracy"]
    by_step = found.get("accuracy_by_step")
    interval, known = mean_interval(accuracy), subject.known_split
    return Score(accuracy, interval, subject.config, subject.where, by_step, shard, known)


def _finished(folder: Path, facts: dict[str, Any]) -> dict[str, Tensor] | None:
    """The tensors of a test that was finished in this folder, if there is one.

    Raises:
        InputError: it was another test.
    """
    file = folder / TENSORS
    if not file.exists():
        return None
    tensors, meta = checkpoints.load(file)
    difference = checkpoints.first_difference(meta.get("facts", {}), facts)
    if difference:
        raise InputError(
            f"{file}: is the result of another evaluation ({difference}); without --resume it is replaced, or give "
            "another --output"
        )
    return tensors


def save_score(folder: Path, result: Score, model: str, **more: Any) -> None:
    """Writes evaluation.json and evaluation.safetensors (each task's accuracy); by step also a CSV and a picture.

    Args:
        folder: made where there is none.
        result: what a test gave.
        model: its file.
        more: what else evaluation.json and the header of the tensors say.
    """
    make_folder(folder)
    summary = {
        "model": model,
        "data": result.data or result.config.data.source,
        "mean": result.interval.mean,
        "interval95": result.interval.half,
        "n_tasks": len(result.task_accuracy),
        "seed": result.config.seed,
        "config": json.loads(result.config.to_json()),
        **more,
    }
    tensors = {"task_accuracy": result.task_accuracy}
    for name in (STEPS_TABLE, STEPS_PICTURE):  # those of an earlier test would not belong to this one
        (folder / name).unlink(missing_ok=True)
    if result.accuracy_by_step is not None:
        tensors["accuracy_by_step"] = result.accuracy_by_step
        summary["by_step"] = _save_steps(folder, result)
    checkpoints.save(folder / TENSORS, tensors, summary)
    write_text(folder / "evaluation.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n")


def _save_steps(folder: Path, result: Score) -> dict[str, list[float]]:
    """Writes the accuracy after each step as a CSV and a picture, and returns it."""
    means, halves = ([interval[i] for interval in result.steps] for i in (0, 1))
    lines = [f"{step},{mean},{half}\n" for step, (mean, half) in enumerate(zip(means, halves, strict=True))]
    write_text(folder / STEPS_TABLE, "step,mean,interval95\n" + "".join(lines))
    shape = result.config.episodes
    label = f"{len(result.task_accuracy):,} {result.tasks}"
    curves = {f"{shape.n_way}-way {shape.n_shot}-shot": {label: Curve(range(len(means)), means, halves)}}
    steps_figure(folder / STEPS_PICTURE, curves)
    return {"mean": means, "interval95": halves}
