"""The test of a model file: mean accuracy and 95 % interval, and each task's accuracy for paired tests."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from ..config import Config, EvaluationConfig, MetaConfig
from ..data import load_split
from ..data.store import ImageStore
from ..engine.evaluate import Adapt, Evaluation, evaluate
from ..episodes import Episodes, EpisodeSampler
from ..errors import InputError
from ..nn import LinearHead
from ..random_streams import RandomStreams
from . import checkpoint as files
from .models import Model, device_of, load_model, preprocess_of
from .run import make_folder, write_text
from .statistics import Interval, mean_interval


@dataclass(frozen=True)
class Score:
    """What a test gave.

    Attributes:
        task_accuracy: [T], the same tasks for every model tested with the same seed and shape.
        interval: its mean and 95 % interval.
        config: settings used.
    """

    task_accuracy: Tensor
    interval: Interval
    config: Config

    def __str__(self) -> str:
        shape, test = self.config.episodes, self.config.evaluation
        return (
            f"{shape.n_way}-way {shape.n_shot}-shot, {len(self.task_accuracy)} {test.split} tasks: "
            f"{self.interval} %"
        )


def drawn_episodes(config: Config, store: ImageStore) -> Episodes:
    """The tasks of a test: the same for every model under one seed and task shape."""
    shape, stream = config.episodes, RandomStreams(config.seed).stream("evaluation")
    return EpisodeSampler(store, shape.n_way, shape.n_shot, shape.n_query, stream).sample(
        config.evaluation.n_tasks
    )


def nothing_learned(meta: MetaConfig) -> MetaConfig:
    """Settings of meta-training for a model without any: its inner loop may adapt the head or all weights."""
    return replace(meta, learn="weights", last_block_only=False)


def score(model: Model, config: Config, store: ImageStore, episodes: Episodes) -> tuple[Score, Evaluation]:
    """Fits and scores the episodes; a pre-trained model gets a fresh zero head ("update θ")."""
    head = model.head
    if head is None:
        head = LinearHead(model.encoder.feature_dim, config.episodes.n_way, init="zeros").to(store.device)
    result = evaluate(
        model.encoder,
        head,
        store,
        episodes,
        preprocess_of(config),
        inner_lr=config.inner.lr,
        inner_steps=config.inner.test_steps,
        norm=config.meta.norm if model.head is not None else "frozen",
        adapt=config.inner.adapt,
    )
    return Score(result.accuracy.cpu(), mean_interval(result.accuracy), config), result


def evaluate_model(
    checkpoint: str | Path,
    *,
    data: str | None = None,
    n_way: int | None = None,
    n_shot: int | None = None,
    n_query: int | None = None,
    inner_steps: int | None = None,
    inner_lr: float | None = None,
    adapt: Adapt | None = None,
    evaluation: EvaluationConfig | None = None,
    seed: int = 0,
    device: str = "auto",
    output: Path | None = None,
) -> Score:
    """Tests a model file; every None takes the model's own setting.

    Raises:
        InputError: no such model; a head of another n_way; all weights to adapt of a model that learned something
            else; images of another size; a split with too few classes
            or images; an output that cannot be written.
    """
    evaluation = evaluation or EvaluationConfig()
    target = device_of(replace(Config(), device=device))
    model = load_model(checkpoint, device=target)
    config = model.config
    changes = {"n_way": n_way, "n_shot": n_shot, "n_query": n_query}
    shape = replace(config.episodes, **{k: v for k, v in changes.items() if v is not None})
    inner = replace(
        config.inner,
        lr=config.inner.lr if inner_lr is None else inner_lr,
        test_steps=config.inner.test_steps if inner_steps is None else inner_steps,
        adapt=config.inner.adapt if adapt is None else adapt,
    )
    if model.head is not None and shape.n_way != config.episodes.n_way:
        raise InputError(
            f"{checkpoint}: its head was meta-trained for {config.episodes.n_way} classes a task, --n-way asks for "
            f"{shape.n_way}; meta-train with --episodes.n-way {shape.n_way}, or evaluate the pre-trained encoder"
        )
    if model.head is None:
        config = replace(config, meta=nothing_learned(config.meta))
    config = replace(config, episodes=shape, inner=inner, evaluation=evaluation, seed=seed, device=device)
    size = config.data.image_size or (None if data is None else model.image_size)
    store = load_split(data or config.data.source, evaluation.split, size).to(target)
    if store.image_size != (model.image_size, model.image_size):
        height, width = store.image_size
        raise InputError(
            f"{store.name}: images are {width}×{height} pixels, {model.path} was trained on "
            f"{model.image_size}×{model.image_size}; name the data with --data, and they are resized"
        )
    if output is not None:
        make_folder(output)  # before the work, not after it
    result, _ = score(model, config, store, drawn_episodes(config, store))
    if output is not None:
        save_score(output, result, str(checkpoint))
    return result


def save_score(folder: Path, result: Score, model: str) -> None:
    """Writes evaluation.json and evaluation.safetensors (each task's accuracy)."""
    make_folder(folder)
    summary = {
        "model": model,
        "mean": result.interval.mean,
        "interval95": result.interval.half,
        "n_tasks": len(result.task_accuracy),
        "seed": result.config.seed,
        "config": json.loads(result.config.to_json()),
    }
    files.save(folder / "evaluation.safetensors", {"task_accuracy": result.task_accuracy}, summary)
    write_text(folder / "evaluation.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
