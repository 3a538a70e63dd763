"""What a test is about: a model and the images it is tested on, or features from a file."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from ..config import Config, EvaluationChanges, EvaluationConfig, MetaConfig
from ..data.features import FeatureStore
from ..data.store import ImageStore
from ..engine.base import NormMode
from ..engine.evaluate import Adapt
from ..errors import InputError
from ..nn import Encoder, LinearHead
from .checkpoint import nest
from .embeddings import load_embeddings
from .models import fingerprint, load_model, split_for, weights_of

HeadStart = Literal["learned", "zeros"]


@dataclass(frozen=True)
class Changes:
    """A test's own settings; None takes the model's."""

    n_way: int | None = None
    n_shot: int | None = None
    n_query: int | None = None
    inner_steps: int | None = None
    inner_lr: float | None = None
    adapt: Adapt | None = None
    evaluation: EvaluationConfig | EvaluationChanges = field(default_factory=EvaluationChanges)
    seed: int = 0
    device: str = "auto"

    def over(self, config: Config) -> Config:
        """The model's settings with these over them.

        Raises:
            InputError: one is out of its range; all weights to adapt of a model that learned something else.
        """
        shape: dict[str, Any] = {"n_way": self.n_way, "n_shot": self.n_shot, "n_query": self.n_query}
        inner: dict[str, Any] = {
            "test_lr": self.inner_lr,
            "test_steps": self.inner_steps,
            "adapt": self.adapt,
        }
        test = vars(self.evaluation)
        return replace(
            config,
            episodes=replace(config.episodes, **{k: v for k, v in shape.items() if v is not None}),
            inner=replace(config.inner, **{k: v for k, v in inner.items() if v is not None}),
            evaluation=replace(config.evaluation, **{k: v for k, v in test.items() if v is not None}),
            seed=self.seed,
            device=self.device,
            precision="fp32",  # of training alone
        )


@dataclass(frozen=True)
class Subject:
    """What is tested, on the device of the test.

    Attributes:
        file: the model, or the features.
        config: settings of the test.
        store: images, with the encoder for them, or features.
        encoder: None with features.
        norm: of the encoder.
        head: where the heads start.
        where: what a report says of the data; empty for those trained on.
        known_split: false for features from elsewhere, whose file does not say what split they are of.
    """

    file: str
    config: Config
    store: ImageStore | FeatureStore
    encoder: Encoder | None
    norm: NormMode
    head: LinearHead
    where: str = ""
    known_split: bool = True

    def facts(self, **more: Any) -> dict[str, Any]:
        """All that the result depends on, with `more`, for JSON; where it is computed is no part of that."""
        store = self.store
        data = {"labels": store.labels}
        if isinstance(store, ImageStore):
            data["images"] = store.images
        else:
            data["features"] = store.features
            if store.mirrored is not None:
                data["mirrored"] = store.mirrored
        weights = nest("head", self.head.state_dict())
        if self.encoder is not None:
            weights |= weights_of(self.encoder)
        config = dataclasses.asdict(self.config)
        del config["device"]
        return {"data": fingerprint(data), "weights": fingerprint(weights), **more, "config": config}


def model_subject(
    checkpoint: str | Path,
    changes: Changes,
    device: torch.device,
    *,
    data: str | None = None,
    head: HeadStart = "learned",
) -> Subject:
    """A model file and a split to test it on.

    Args:
        checkpoint: the file, or a run's folder.
        changes: settings of the test.
        device: where to run.
        data: another source of images than the one trained on.
        head: ``zeros`` fits fresh heads though there is a meta-learned one.

    Raises:
        InputError: no such model or data; a head of another n_way; a setting out of its range; all weights to adapt
            of a model that learned something else.
    """
    model = load_model(checkpoint, device=device)
    config = model.config
    if model.head is None:
        config = replace(config, meta=nothing_learned(config.meta))
    config = changes.over(config)
    start = head_for(model.head, config.episodes.n_way, model.encoder.feature_dim, head, str(checkpoint))
    store = split_for(model, data, config.evaluation.split)
    trained_on = model.config.data.source
    where = "" if data in (None, trained_on) else f"{data} (trained on {trained_on})"
    if data is not None and model.is_imported:
        where = f"{data} (imported weights)"
    return Subject(
        str(checkpoint), config, store.to(device), model.encoder, model.norm, start.to(device), where
    )


def features_subject(
    file: str | Path, changes: Changes, device: torch.device, *, head: HeadStart = "learned"
) -> Subject:
    """A file of features, with the settings of the model that made them.

    Raises:
        InputError: as `model_subject`; mirrored support is asked for, and the file has no features of mirror images;
            all weights are to adapt, which needs images; another split is asked for than the file holds.
    """
    if changes.adapt == "all":
        raise InputError(
            f"{file}: holds features, of which the head alone can adapt; --adapt all takes a model, --checkpoint"
        )
    found = load_embeddings(file, device=device)
    split: Any = found.meta.get("split")
    # Of `EvaluationConfig` it may be the default, which nobody asked for.
    asked = changes.evaluation.split if isinstance(changes.evaluation, EvaluationChanges) else None
    if asked not in (None, split):
        held = f"the {split} split" if split else "a split that it does not name"
        raise InputError(
            f"{file}: holds features of {held}, --evaluation.split asks for {asked}; leave that out, or "
            f"`mtl-fast embed --split {asked}` makes those"
        )
    kept: Any = split or changes.evaluation.split
    evaluation = replace(changes.evaluation, split=kept)
    config = replace(changes, adapt="head", evaluation=evaluation).over(found.config)
    if config.evaluation.mirror_support and found.store.mirrored is None:
        raise InputError(
            f"{file}: holds no features of mirror images, which mirrored support takes; `mtl-fast embed --mirror` "
            "makes them"
        )
    width = found.store.features.shape[1]
    start = head_for(found.head, config.episodes.n_way, width, head, str(file))
    return Subject(
        str(file),
        config,
        found.store,
        None,
        "frozen",
        start.to(device),
        where=str(file),
        known_split=split is not None,
    )


def nothing_learned(meta: MetaConfig) -> MetaConfig:
    """Settings of meta-training for a model without any: its inner loop may adapt the head or all weights."""
    return replace(meta, learn="weights", last_block_only=False)


def head_for(
    learned: LinearHead | None, n_way: int, feature_dim: int, start: HeadStart, file: str
) -> LinearHead:
    """Where the heads start: the meta-learned head, or zeros where there is none ("update θ") or they are asked for.

    Raises:
        InputError: the meta-learned head is of another n_way.
    """
    if learned is None or start == "zeros":
        return LinearHead(feature_dim, n_way, init="zeros")
    if len(learned.bias) != n_way:
        raise InputError(
            f"{file}: its head was meta-trained for {len(learned.bias)} classes a task, --n-way asks for {n_way}; "
            f"start from zeros with --head zeros, or meta-train with --episodes.n-way {n_way}"
        )
    return learned
