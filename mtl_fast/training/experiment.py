"""The paper's comparison on one data set: pre-train once, meta-train each row, test all on the same tasks."""

from __future__ import annotations

import copy
import dataclasses
import math
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import GLYPHS_MAML, GLYPHS_MAML_DEEP, Config, DataConfig, InnerConfig
from ..data import load_split
from ..data.store import ImageStore
from ..engine.scores import Evaluation
from ..episodes import Episodes
from ..nn import LinearHead
from . import checkpoint, inner_search
from .evaluate import TENSORS, Score, drawn_episodes, save_score, score
from .meta_train import MetaTraining
from .models import (
    Model,
    device_of,
    facts_of,
    fingerprint,
    learnable,
    load_model,
    preprocess_of,
    weights_of,
)
from .parts import Parts, Shard, TimedParts
from .pretrain import Pretraining, validation_episodes
from .rows import UPDATE_HEAD, Row
from .scoring import TASKS_PER_PART
from .statistics import mean_interval
from .subject import nothing_learned


@dataclass(frozen=True)
class Outcome:
    """What a row gave in one seed and task shape.

    Attributes:
        task_accuracy: of each test task.
        validation: the best validation accuracy in training ("update": in pre-training).
        curve: points of tasks seen, validation accuracy, half-width of its interval.
        inner: step size and number of steps at test.
        n_learned: numbers that meta-training moved, the head's start among them.
        n_adapted: numbers that the inner loop moves for a task.
        n_total: numbers of the network with its head; Φ, which goes into the weights, is not counted again.
        seconds: of meta-training ("update": of choosing the inner loop), NaN where a run did not say.
        test_seconds: of the test.
        made: where, of a run that a file of outcomes tells of: parts of `provenance`.
    """

    task_accuracy: list[float]
    validation: float
    curve: list[list[float]]
    inner: tuple[float, int]
    n_learned: int = 0
    n_adapted: int = 0
    n_total: int = 0
    seconds: float = math.nan
    test_seconds: float = math.nan
    made: dict[str, Any] = field(default_factory=dict)


@lru_cache(maxsize=1)
def splits_of(data: DataConfig, device: torch.device) -> dict[str, ImageStore]:
    """The three splits, the last ones asked for kept."""
    return {
        split: load_split(data.source, split, data.image_size, **data.reading).to(device)
        for split in ("train", "val", "test")
    }


class Experiment:
    """One seed's runs in one folder; whatever is finished there is read instead of made again.

    Args:
        config: settings of all rows; a row changes what it learns and its hard tasks.
        output: the folder.
        maml: where the rows of MAML take inner loop and meta-training from, and Conv-4 the network.
        maml_deep: the same for those that start from the pre-trained network.
        n_drawn: test tasks that are drawn, of which a row may be tested on the first ones; None: as in `config`.
    """

    def __init__(
        self,
        config: Config,
        output: str | Path,
        *,
        maml: Config = GLYPHS_MAML,
        maml_deep: Config = GLYPHS_MAML_DEEP,
        n_drawn: int | None = None,
    ) -> None:
        self.config = config
        self.maml, self.maml_deep = maml, maml_deep
        self.n_drawn = config.evaluation.n_tasks if n_drawn is None else n_drawn
        self.output = Path(output)
        self.device = device_of(config)

    @property
    def stores(self) -> dict[str, ImageStore]:
        """The three splits, loaded once for all seeds."""
        return splits_of(self.config.data, self.device)

    @property
    def pretrain_folder(self) -> Path:
        """Where pre-training lies."""
        return self.output / "pretrain"

    @property
    def is_pretrained(self) -> bool:
        """Whether a finished pre-training lies there."""
        return (self.pretrain_folder / "model.safetensors").exists()

    @cached_property
    def _pretrained(self) -> Path:
        """The pre-trained model file; validation is 1-shot: one encoder serves all tasks."""
        train, val = self.stores["train"], self.stores["val"]
        folder = self.pretrain_folder
        return Pretraining(self.with_shot(1), folder, resume=True, train=train, val=val).run()

    def pretrain(self) -> Model:
        """The pre-trained encoder, read anew each time: meta-training changes the one it is given."""
        return load_model(self._pretrained, device=self.device)

    def with_shot(self, n_shot: int) -> Config:
        """The settings for tasks of that many support images a class."""
        return replace(self.config, episodes=replace(self.config.episodes, n_shot=n_shot))

    def settings(self, row: Row, n_shot: int, *, lr: float | None = None) -> Config:
        """A row's settings of meta-training; `lr` replaces the rate of what it learns (MAML: of all it learns)."""
        config, recipe = self.with_shot(n_shot), self.config
        if row.is_whole_network:
            recipe = self.maml_deep if row.pretrained else self.maml
        meta: dict[str, Any] = {
            "learn": row.learn,
            "last_block_only": row.last_block_only,
            "hard": row.hard,
            "train_affine": recipe.meta.train_affine and row.learn != "head",
        }
        if lr is not None:
            rates = (
                ("lr", "head_lr") if row.is_whole_network else ("head_lr" if row.learn == "head" else "lr",)
            )
            meta |= dict.fromkeys(rates, lr)
        network = config.encoder if row.pretrained else recipe.encoder
        return replace(config, encoder=network, inner=recipe.inner, meta=replace(recipe.meta, **meta))

    def meta_train(self, row: Row, n_shot: int, *, lr: float | None = None) -> Model:
        """Meta-trains a row, from the pre-trained encoder unless it starts from random weights; see `settings`."""
        config, folder = self.settings(row, n_shot, lr=lr), self.folder(row, n_shot, lr)
        train, val = self.stores["train"], self.stores["val"]
        pretrained = self.pretrain() if row.pretrained else None
        MetaTraining(config, pretrained, folder, resume=True, train=train, val=val).run()
        return load_model(folder, device=self.device)

    def folder(self, row: Row, n_shot: int, lr: float | None) -> Path:
        """Where a row's meta-training lies."""
        return self.output / _name(row, n_shot, lr)

    def n_searched(self, row: Row) -> int:
        """Validation tasks on which the inner loop of a row that is not meta-trained is chosen."""
        recipe = self.maml_deep if row.is_whole_network else self.config
        return recipe.meta.validation_tasks

    def choose_inner(
        self,
        model: Model,
        n_shot: int,
        row: Row = UPDATE_HEAD,
        *,
        n_tasks: int | None = None,
        pieces: TimedParts | None = None,
    ) -> InnerConfig:
        """The inner loop of "update θ" or "update [Θ;θ]" that is best on validation episodes.

        Args:
            model: the pre-trained one.
            n_shot: support images a class.
            row: which of the two.
            n_tasks: how many episodes; None: `n_searched`.
            pieces: where finished parts of the search are kept and found; None: nowhere.
        """
        config = self.with_shot(n_shot)
        store = self.stores["val"]
        episodes = validation_episodes(config, store, n_tasks or self.n_searched(row))
        preprocess = preprocess_of(config)
        head = LinearHead(model.encoder.feature_dim, config.episodes.n_way, init="zeros").to(self.device)
        lr, steps = inner_search.best_inner_loop(
            model.encoder,
            head,
            store,
            episodes,
            preprocess,
            pieces or TimedParts(),
            adapt=row.adapt,
            mirror_support=config.evaluation.mirror_support,
        )
        return replace(config.inner, lr=lr, test_lr=None, test_steps=steps, adapt=row.adapt)

    def test(
        self, model: Model, n_shot: int, inner: InnerConfig | None = None, *, n_tasks: int | None = None
    ) -> tuple[Score, Evaluation, Episodes]:
        """Scores a model on the test tasks of this seed, the same ones for every row.

        Args:
            model: meta-trained, or the pre-trained one ("update").
            n_shot: support images a class.
            inner: None is the inner loop that the model was made with.
            n_tasks: only the first ones of the tasks that are drawn; None: all.
        """
        config, episodes = self._test_tasks(model, n_shot, inner, n_tasks)
        result, evaluation = score(model, config, self.stores["test"], episodes)
        return result, evaluation, episodes

    def _test_tasks(
        self, model: Model, n_shot: int, inner: InnerConfig | None, n_tasks: int | None
    ) -> tuple[Config, Episodes]:
        config = self._test_settings(model, n_shot)
        config = replace(config, inner=inner or config.inner)
        return config, drawn_episodes(config, self.stores["test"])[: n_tasks or self.n_drawn]

    def _test_settings(self, model: Model, n_shot: int) -> Config:
        """Of the test of a model, with the inner loop that it was made with."""
        config = self.with_shot(n_shot)
        meta = nothing_learned(config.meta) if model.head is None else model.config.meta
        tested = replace(config.evaluation, split="test", n_tasks=self.n_drawn)
        return replace(config, inner=model.config.inner, meta=meta, evaluation=tested)

    def outcome(
        self, row: Row, n_shot: int, *, lr: float | None = None, n_tasks: int | None = None
    ) -> Outcome:
        """Trains and tests a row, or reads what of that is finished; a test of all weights goes on piece by piece."""
        model = self.meta_train(row, n_shot, lr=lr) if row.meta_trained else self.pretrain()
        folder, facts = self._test_folder(row, n_shot, lr), self._test_facts(model, row, n_shot, n_tasks)
        parts = Parts(
            folder / "parts" if row.is_whole_network else None,
            {**facts, "validation data": facts_of(self.stores["val"]), "tasks a piece": TASKS_PER_PART},
            shard=Shard(),
            resume=True,
            replace=True,
        )
        found = self._finished_test(model, row, n_shot, lr, n_tasks)
        if found is not None:
            parts.remove()  # of a run that was stopped between its result and this
            return found
        searching, testing = TimedParts(parts), TimedParts(parts)
        inner = None if row.meta_trained else self.choose_inner(model, n_shot, row, pieces=searching)
        result = self._tested(model, row, n_shot, inner, n_tasks, testing)
        seconds = {"inner loop chosen": searching.seconds, "test": testing.seconds}
        save_score(folder, result, row.label, facts=facts, seconds=seconds)
        parts.remove()
        found = self._finished_test(model, row, n_shot, lr, n_tasks)
        assert found is not None
        return found

    def _tested(
        self,
        model: Model,
        row: Row,
        n_shot: int,
        inner: InnerConfig | None,
        n_tasks: int | None,
        pieces: TimedParts,
    ) -> Score:
        """`test`, in pieces where images cannot be embedded once for all tasks."""
        config, episodes = self._test_tasks(model, n_shot, inner, n_tasks)
        size = TASKS_PER_PART if row.is_whole_network else episodes.n_tasks

        def scores(start: int) -> dict[str, Tensor]:
            found, _ = score(model, config, self.stores["test"], episodes[start : start + size])
            return {"task_accuracy": found.task_accuracy}

        starts = range(0, episodes.n_tasks, size)
        found = [pieces.get(f"tasks-{start:07d}", partial(scores, start)) for start in starts]
        accuracy = torch.cat([piece["task_accuracy"] for piece in found])
        return Score(accuracy, mean_interval(accuracy), config)

    def finished(
        self, row: Row, n_shot: int, *, lr: float | None = None, n_tasks: int | None = None
    ) -> Outcome | None:
        """What `outcome` has made before, if its training and its test are finished; makes nothing."""
        folder = self.folder(row, n_shot, lr) if row.meta_trained else self.pretrain_folder
        if not (folder / "model.safetensors").exists():
            return None
        model = load_model(folder, device=self.device)
        wanted = self._training_settings(row, n_shot, lr)
        if replace(model.config, device=wanted.device) != wanted:
            return None
        return self._finished_test(model, row, n_shot, lr, n_tasks)

    def facts(
        self, row: Row, n_shot: int, *, lr: float | None = None, n_tasks: int | None = None
    ) -> dict[str, Any]:
        """What decides `outcome` beside the machine it is made on, for JSON."""
        return {
            "config": dataclasses.asdict(self._training_settings(row, n_shot, lr)),
            "data": {split: facts_of(store) for split, store in self.stores.items()},
            "inner searched": self._searched(row),
            "drawn tasks": self.n_drawn,
            "first tasks": n_tasks or self.n_drawn,
        }

    def _training_settings(self, row: Row, n_shot: int, lr: float | None) -> Config:
        return self.settings(row, n_shot, lr=lr) if row.meta_trained else self.with_shot(1)

    def _test_folder(self, row: Row, n_shot: int, lr: float | None) -> Path:
        return self.output / "test" / _name(row, n_shot, lr)

    def _test_facts(self, model: Model, row: Row, n_shot: int, n_tasks: int | None) -> dict[str, Any]:
        """All that a test's result depends on, for JSON; where it is computed is no part of that."""
        config = dataclasses.asdict(self._test_settings(model, n_shot))
        del config["device"]
        return {
            "weights": fingerprint(weights_of(model.encoder, model.head)),
            "data": facts_of(self.stores["test"]),
            "config": config,
            "inner searched": self._searched(row),
            "first tasks": n_tasks or self.n_drawn,
        }

    def _searched(self, row: Row) -> Any:
        """Where a row that is not meta-trained looks for its inner loop."""
        if row.meta_trained:
            return None
        if row.is_whole_network:
            grid: list[Any] = [inner_search.ALL_RATES, inner_search.ALL_STEPS, self.n_searched(row)]
        else:
            grid = list(inner_search.INNER_GRID)
        return [*grid, "mirrored"] if self.config.evaluation.mirror_support else grid

    def _finished_test(
        self, model: Model, row: Row, n_shot: int, lr: float | None, n_tasks: int | None
    ) -> Outcome | None:
        """The test that lies there, unless it is of other weights, settings or tasks."""
        file = self._test_folder(row, n_shot, lr) / TENSORS
        if not file.exists():
            return None
        tensors, meta = checkpoint.load(file)
        facts = self._test_facts(model, row, n_shot, n_tasks)
        if checkpoint.first_difference(_with_defaults(meta.get("facts", {})), facts):
            return None
        n_learned, n_total = _sizes(model)
        n_head = (model.encoder.feature_dim + 1) * model.config.episodes.n_way
        inner = meta["config"]["inner"]
        return Outcome(
            tensors["task_accuracy"].tolist(),
            model.meta["validation_accuracy"],
            model.meta["curve"] if row.meta_trained else [],
            (inner["lr"], inner["test_steps"]),
            n_learned + n_head if row.meta_trained else 0,
            n_total + n_head if row.is_whole_network else n_head,
            n_total + n_head,
            model.meta.get("seconds", math.nan) if row.meta_trained else meta["seconds"]["inner loop chosen"],
            meta["seconds"]["test"],
        )


def _with_defaults(facts: dict[str, Any]) -> dict[str, Any]:
    """A test's facts as this version would write them: settings that came later had their defaults."""
    if "config" not in facts:
        return facts
    config = dataclasses.asdict(Config.from_dict(facts["config"]))
    del config["device"]
    return facts | {"config": config}


def _name(row: Row, n_shot: int, lr: float | None) -> str:
    return f"{row.key}-{n_shot}shot" + ("" if lr is None else f"-lr{lr:g}")


def _sizes(model: Model) -> tuple[int, int]:
    """Numbers of the encoder that meta-training moved, and all but Φ."""
    encoder = model.encoder
    n_total = sum(p.numel() for p in encoder.parameters())
    n_total -= sum(p.numel() for p in encoder.scale_shift_parameters())
    if model.head is None:
        return 0, n_total
    # On a copy: opening scale and shift starts them anew.
    n_learned = sum(p.numel() for p in learnable(copy.deepcopy(encoder), model.config))
    return n_learned, n_total
