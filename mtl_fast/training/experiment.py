"""The paper's comparison on one data set: pre-train once, meta-train each row, test all on the same tasks."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ..config import GLYPHS_MAML, Config, InnerConfig
from ..data import load_split
from ..data.store import ImageStore
from ..engine.evaluate import Adapt, embed_episodes, fit_and_score
from ..engine.inner_loops import evaluate_all_weights
from ..engine.scores import Evaluation
from ..episodes import Episodes
from ..nn import LinearHead
from .evaluate import Score, drawn_episodes, score
from .meta_train import MetaTraining
from .models import Model, device_of, load_model, preprocess_of
from .pretrain import Pretraining, validation_episodes
from .subject import nothing_learned


@dataclass(frozen=True)
class Row:
    """One row of the paper's comparison.

    Attributes:
        key, label: of files and tables.
        learn: what meta-training moves beside the head's start, as `MetaConfig.learn`.
        hard: the hard-task meta-batch, as `MetaConfig.hard`.
        adapt: what the inner loop moves; with ``all``, meta-training follows the recipe of MAML.
        pretrained: whether meta-training starts from the pre-trained network; otherwise from MAML's own, random.
    """

    key: str
    label: str
    learn: str = "head"
    hard: str = "none"
    adapt: Adapt = "head"
    pretrained: bool = True


UPDATE_HEAD = Row("update-head", "update θ")
UPDATE_ALL = Row("update-all", "update [Θ;θ]", adapt="all")
FT_HEAD = Row("ft-head", "FT θ")
FT_ALL = Row("ft-all", "FT[Θ;θ]", learn="weights")
SS = Row("ss", "SS[Θ;θ]", learn="scale_shift")
SS_HT = Row("ss-ht", "SS[Θ;θ] + HT", learn="scale_shift", hard="resample")
MAML = Row("maml", "MAML", learn="weights", adapt="all", pretrained=False)
MAML_HT = Row("maml-ht", "MAML + HT", learn="weights", hard="resample", adapt="all", pretrained=False)
MAML_DEEP = Row("maml-deep", "MAML deep", learn="weights", adapt="all")
MAML_DEEP_HT = Row("maml-deep-ht", "MAML deep + HT", learn="weights", hard="resample", adapt="all")

# Where "update θ" and "update [Θ;θ]" look for their step size and number of steps, on the validation split.
INNER_GRID = tuple(itertools.product((0.002, 0.005, 0.01, 0.02, 0.05, 0.1), (10, 20, 50, 100, 200)))
ALL_RATES, ALL_STEPS = (0.003, 0.01, 0.03, 0.1), (5, 10, 20, 50)


class Experiment:
    """One seed's runs in one folder; whatever is finished there is read instead of made again.

    Args:
        config: settings of all rows; a row changes what it learns and its hard tasks.
        output: the folder.
        maml: where the rows of MAML take inner loop and meta-training from, and Conv-4 the network.
    """

    def __init__(self, config: Config, output: str | Path, *, maml: Config = GLYPHS_MAML) -> None:
        self.config = config
        self.maml = maml
        self.output = Path(output)
        self.device = device_of(config)

    @cached_property
    def stores(self) -> dict[str, ImageStore]:
        """The three splits, loaded once."""
        data = self.config.data
        return {
            split: load_split(data.source, split, data.image_size, **data.reading).to(self.device)
            for split in ("train", "val", "test")
        }

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

    def settings(self, row: Row, n_shot: int, *, lr: float | None = None) -> Config:
        """A row's settings of meta-training; `lr` replaces the rate of what it learns (MAML: of all it learns)."""
        config, recipe = self.with_shot(n_shot), self.maml if row.adapt == "all" else self.config
        meta: dict[str, Any] = {"learn": row.learn, "hard": row.hard}
        if lr is not None:
            rates = ("lr", "head_lr") if row.adapt == "all" else ("head_lr" if row.learn == "head" else "lr",)
            meta |= dict.fromkeys(rates, lr)
        network = config.encoder if row.pretrained else recipe.encoder
        return replace(config, encoder=network, inner=recipe.inner, meta=replace(recipe.meta, **meta))

    def meta_train(self, row: Row, n_shot: int, *, lr: float | None = None) -> Model:
        """Meta-trains a row, from the pre-trained encoder unless it starts from random weights; see `settings`."""
        config = self.settings(row, n_shot, lr=lr)
        folder = self.output / (f"{row.key}-{n_shot}shot" + ("" if lr is None else f"-lr{lr:g}"))
        train, val = self.stores["train"], self.stores["val"]
        pretrained = self.pretrain() if row.pretrained else None
        MetaTraining(config, pretrained, folder, resume=True, train=train, val=val).run()
        return load_model(folder, device=self.device)

    def choose_inner(self, model: Model, n_shot: int, row: Row = UPDATE_HEAD) -> InnerConfig:
        """The inner loop of "update θ" or "update [Θ;θ]" that is best on the validation episodes."""
        config = self.with_shot(n_shot)
        store = self.stores["val"]
        episodes = validation_episodes(config, store, config.meta.validation_tasks)
        preprocess = preprocess_of(config)
        head = LinearHead(model.encoder.feature_dim, config.episodes.n_way, init="zeros").to(self.device)
        accuracies: dict[tuple[float, int], float] = {}
        if row.adapt == "all":
            for lr in ALL_RATES:
                found = evaluate_all_weights(
                    model.encoder, head, store, episodes, preprocess, inner_lr=lr, n_steps=ALL_STEPS
                )
                for steps, evaluation in zip(ALL_STEPS, found, strict=True):
                    accuracies[lr, steps] = float(evaluation.accuracy.mean())
        else:
            embedded = embed_episodes(model.encoder, store, episodes, preprocess)
            for lr, steps in INNER_GRID:
                evaluation = fit_and_score(embedded, head, inner_lr=lr, inner_steps=steps)
                accuracies[lr, steps] = float(evaluation.accuracy.mean())
        lr, steps = max(accuracies, key=accuracies.__getitem__)
        return replace(config.inner, lr=lr, test_lr=None, test_steps=steps, adapt=row.adapt)

    def test(
        self, model: Model, n_shot: int, inner: InnerConfig | None = None
    ) -> tuple[Score, Evaluation, Episodes]:
        """Scores a model on the test tasks of this seed, the same ones for every row.

        Args:
            model: meta-trained, or the pre-trained one ("update").
            n_shot: support images a class.
            inner: None is the inner loop that the model was made with.
        """
        config = self.with_shot(n_shot)
        meta = nothing_learned(config.meta) if model.head is None else model.config.meta
        tested = replace(config.evaluation, split="test")
        config = replace(config, inner=inner or model.config.inner, meta=meta, evaluation=tested)
        store = self.stores["test"]
        episodes = drawn_episodes(config, store)
        result, evaluation = score(model, config, store, episodes)
        return result, evaluation, episodes
