"""The paper's comparison on one data set: pre-train once, meta-train each row, test all on the same tasks."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ..config import Config, InnerConfig
from ..data import load_split
from ..data.store import ImageStore
from ..engine.evaluate import Evaluation, embed_episodes, fit_and_score
from ..episodes import Episodes
from ..nn import LinearHead
from .evaluate import Score, drawn_episodes, score
from .meta_train import MetaTraining
from .models import Model, device_of, load_model, preprocess_of
from .pretrain import Pretraining, validation_episodes


@dataclass(frozen=True)
class Row:
    """One row of the paper's comparison."""

    key: str
    label: str
    learn: str = "head"
    hard: str = "none"


UPDATE_HEAD = Row("update-head", "update θ")
FT_HEAD = Row("ft-head", "FT θ")
FT_ALL = Row("ft-all", "FT[Θ;θ]", learn="weights")
SS = Row("ss", "SS[Θ;θ]", learn="scale_shift")
SS_HT = Row("ss-ht", "SS[Θ;θ] + HT", learn="scale_shift", hard="resample")

# Where "update θ" looks for its step size and number of steps, on the validation split.
INNER_GRID = tuple(itertools.product((0.002, 0.005, 0.01, 0.02, 0.05, 0.1), (10, 20, 50, 100, 200)))


class Experiment:
    """One seed's runs in one folder; whatever is finished there is read instead of made again.

    Args:
        config: settings of all rows; a row changes what it learns and its hard tasks.
        output: the folder.
    """

    def __init__(self, config: Config, output: str | Path) -> None:
        self.config = config
        self.output = Path(output)
        self.device = device_of(config)

    @cached_property
    def stores(self) -> dict[str, ImageStore]:
        """The three splits, loaded once."""
        source, size = self.config.data.source, self.config.data.image_size
        return {split: load_split(source, split, size).to(self.device) for split in ("train", "val", "test")}

    @cached_property
    def _pretrained(self) -> Path:
        """The pre-trained model file; validation is 1-shot: one encoder serves all tasks."""
        train, val = self.stores["train"], self.stores["val"]
        folder = self.output / "pretrain"
        return Pretraining(self.with_shot(1), folder, resume=True, train=train, val=val).run()

    def pretrain(self) -> Model:
        """The pre-trained encoder, read anew each time: meta-training changes the one it is given."""
        return load_model(self._pretrained, device=self.device)

    def with_shot(self, n_shot: int) -> Config:
        """The settings for tasks of that many support images a class."""
        return replace(self.config, episodes=replace(self.config.episodes, n_shot=n_shot))

    def meta_train(self, row: Row, n_shot: int, *, lr: float | None = None) -> Model:
        """Meta-trains a row from the pre-trained encoder; `lr` replaces the rate of what it learns."""
        config = self.with_shot(n_shot)
        meta: dict[str, Any] = {"learn": row.learn, "hard": row.hard}
        if lr is not None:
            meta |= {"head_lr": lr} if row.learn == "head" else {"lr": lr}
        config = replace(config, meta=replace(config.meta, **meta))
        folder = self.output / (f"{row.key}-{n_shot}shot" + ("" if lr is None else f"-lr{lr:g}"))
        train, val = self.stores["train"], self.stores["val"]
        MetaTraining(config, self.pretrain(), folder, resume=True, train=train, val=val).run()
        return load_model(folder, device=self.device)

    def choose_inner(self, model: Model, n_shot: int) -> InnerConfig:
        """The inner loop of "update θ" that is best on the validation episodes."""
        config = self.with_shot(n_shot)
        store = self.stores["val"]
        episodes = validation_episodes(config, store, config.meta.validation_tasks)
        embedded = embed_episodes(model.encoder, store, episodes, preprocess_of(config))
        head = LinearHead(model.encoder.feature_dim, config.episodes.n_way, init="zeros").to(self.device)
        accuracies = [
            float(fit_and_score(embedded, head, inner_lr=lr, inner_steps=steps).accuracy.mean())
            for lr, steps in INNER_GRID
        ]
        lr, steps = INNER_GRID[accuracies.index(max(accuracies))]
        return replace(config.inner, lr=lr, test_steps=steps)

    def test(
        self, model: Model, n_shot: int, inner: InnerConfig | None = None
    ) -> tuple[Score, Evaluation, Episodes]:
        """Scores a model on the test tasks of this seed, the same ones for every row."""
        config = self.with_shot(n_shot)
        config = replace(
            config, inner=inner or config.inner, evaluation=replace(config.evaluation, split="test")
        )
        store = self.stores["test"]
        episodes = drawn_episodes(config, store)
        result, evaluation = score(model, config, store, episodes)
        return result, evaluation, episodes
