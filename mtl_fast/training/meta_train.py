"""Meta-training, algorithms 1 and 2 of MTL (arXiv 1812.02391): random tasks, then hard tasks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import Config, MetaConfig
from ..data.store import ImageStore
from ..engine.evaluate import evaluate
from ..engine.inner_loops import WholeNetworkEngine
from ..engine.ranks import ALONE, Ranks
from ..engine.step import Engine, EpisodicEngine
from ..episodes import Episodes, EpisodeSampler, HardTaskPool
from ..errors import InputError
from . import checkpoint
from .logging import RunLog
from .models import (
    Model,
    architecture,
    build_encoder,
    facts_of,
    fingerprint,
    learnable,
    load_model,
    new_head,
    weights_of,
)
from .phase import Phase
from .pretrain import validation_episodes
from .statistics import mean_interval


class MetaTraining(Phase):
    """The state of a meta-training run and its loop.

    A round is K random tasks, `tasks_per_update` of them an Adam step, then (with hard tasking) K' hard tasks
    trained on in the same way. The pool of failed classes fills during the first part and is emptied at the end.
    Hard tasks count in `n_tasks`, so that runs with and without them see equally many tasks.

    Args:
        config: settings.
        pretrained: the pre-trained model; None starts from random weights, where that makes sense.
        output: the run's folder.
        resume: go on with the run that is there.
        train, val: the splits; None loads them from `config.data.source`.
        ranks: the processes that share out the tasks of an update.
    """

    name, command, kind = "meta-training", "meta-train", "meta"
    reports_start = True  # the curve begins with the pre-trained network

    def __init__(
        self,
        config: Config,
        pretrained: Model | None,
        output: str | Path,
        *,
        resume: bool = False,
        train: ImageStore | None = None,
        val: ImageStore | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        with ranks.together():
            self._prepare(config, pretrained, train, val, ranks)
        self._open(output, resume=resume, inputs=self.inputs)

    def _prepare(
        self,
        config: Config,
        pretrained: Model | None,
        train: ImageStore | None,
        val: ImageStore | None,
        ranks: Ranks,
    ) -> None:
        check_rounds(config.meta)
        if pretrained is None:
            check_random_start(config.meta)
        super().__init__(config, train, val, ranks)
        self.meta = config.meta
        if pretrained is None:
            initial = self.streams.stream("initial")
            self.encoder = build_encoder(config.encoder, image_size=self.image_size, generator=initial)
        else:
            wanted = architecture(config, self.image_size)
            checkpoint.check_architecture(pretrained.meta, wanted, pretrained.path)
            check_normalisation(config, pretrained)
            check_statistics(config.meta, pretrained)
            self.encoder = pretrained.encoder
        self.encoder.to(self.device)
        self.inputs = {
            "train": facts_of(self.train),
            "val": facts_of(self.val),
            "pretrained": None if pretrained is None else fingerprint(weights_of(self.encoder)),
        }
        self.head = new_head(config, self.encoder, self.streams).to(self.device)
        self.moved = learnable(self.encoder, config)
        self.optimizer = _adam(self.meta, self.moved, list(self.head.parameters()))
        shape = config.episodes
        self.sampler = EpisodeSampler(
            self.train,
            shape.n_way,
            shape.n_shot,
            shape.n_query if shape.n_query_train is None else shape.n_query_train,
            self.streams.stream("tasks"),
        )
        self.pool: HardTaskPool | None = None
        if self.meta.hard != "none":
            self.pool = HardTaskPool(self.sampler, self.meta.hard, self.streams.stream("hard_tasks"))
        self.engine = self._new_engine(ranks)
        self.validation = validation_episodes(config, self.val, self.meta.validation_tasks)
        self.total = self.meta.n_tasks // self.meta.tasks_per_update
        self.sums = torch.zeros(3, device=self.device)  # loss, accuracy, updates since the last log row
        self.all_finite = torch.ones((), dtype=torch.bool, device=self.device)

    def _new_engine(self, ranks: Ranks) -> Engine:
        inner, parts = self.config.inner, (self.encoder, self.head, self.train, self.preprocess)
        options: dict[str, Any] = {
            "norm": self.meta.norm,
            "order": inner.order,
            "inner_lr": inner.lr,
            "inner_steps": inner.train_steps,
            "images_per_chunk": self.meta.images_per_chunk,
            "ranks": ranks,
        }
        if inner.adapt == "all":
            return WholeNetworkEngine(*parts, **options, checkpoint=inner.checkpoint)
        return EpisodicEngine(*parts, **options)

    def next_episodes(self) -> tuple[Episodes, bool]:
        """The tasks of the next update, and whether they are hard ones."""
        per_update = self.meta.tasks_per_update
        if self.pool is None:
            return self.sampler.sample(per_update), False
        n_random = self.meta.random_tasks_per_round // per_update
        n_hard = self.meta.hard_tasks_per_round // per_update
        hard = self.update % (n_random + n_hard) >= n_random
        return (self.pool if hard else self.sampler).sample(per_update), hard

    def _update(self) -> None:
        episodes, hard = self.next_episodes()
        self.optimizer.zero_grad(set_to_none=True)
        output = self.engine.step(episodes)
        if self.pool is not None and not hard:
            self.pool.add(episodes, output.class_accuracy)
        set_rates(self.optimizer, self.meta, self.update)
        self.all_finite &= guarded_step(self.optimizer, output.loss.isfinite().all())
        self.sums += torch.stack([output.loss.mean(), output.class_accuracy.mean(), self.sums.new_ones(())])
        self.update += 1
        if self.pool is not None and self.update % self._updates_per_round == 0:
            self.pool.clear()

    @property
    def _updates_per_round(self) -> int:
        return (
            self.meta.random_tasks_per_round + self.meta.hard_tasks_per_round
        ) // self.meta.tasks_per_update

    def _require_finite(self) -> None:
        """Reads the flag that a non-finite loss sets; before every checkpoint."""
        if not bool(self.all_finite):
            raise InputError(
                f"meta-training: a loss or gradient became non-finite by update {self.update}; the last checkpoint and the "
                f"weights are untouched; try a lower --meta.lr (now {self.meta.lr:g}) or --inner.lr "
                f"(now {self.config.inner.lr:g})"
            )

    def _is_checkpoint(self) -> bool:
        every = max(1, self.meta.validate_every // self.meta.tasks_per_update)
        return self.update % every == 0 or self.update == self.total

    def _report(self, log: RunLog) -> None:
        inner = self.config.inner
        result = evaluate(
            self.encoder,
            self.head,
            self.val,
            self.validation,
            self.preprocess,
            inner_lr=inner.lr,
            inner_steps=inner.test_steps,
            norm=self.meta.norm,
            adapt=inner.adapt,
            ranks=self.ranks,
        )
        mean, interval = mean_interval(result.accuracy)
        tasks = self.update * self.meta.tasks_per_update
        self.curve.append([tasks, mean, interval])
        self._keep_if_best(mean)
        row = {"tasks": tasks, "validation_accuracy": mean, "validation_interval": interval}
        if self.update:
            loss, accuracy = (self.sums[:2] / self.sums[2]).tolist()
            row |= {"loss": loss, "train_accuracy": accuracy}
            self.sums.zero_()
        log.row(self.update, **row)

    def _best_weights(self) -> dict[str, Tensor]:
        return weights_of(self.encoder, self.head)

    def _model_facts(self) -> dict[str, Any]:
        return {"tasks": self.best_update * self.meta.tasks_per_update}

    def _loop_state(self) -> dict[str, dict[str, Tensor]]:
        return {"loop": {"sums": self.sums}, "pool": {} if self.pool is None else self.pool.state_dict()}

    def _load_loop_state(self) -> None:
        self.sums = self.folder.section("loop")["sums"].to(self.device)
        if self.pool is not None:
            self.pool.load_state_dict(self.folder.section("pool"))


def check_rounds(meta: MetaConfig) -> None:
    """K, K' and the number of tasks divide into updates.

    Raises:
        InputError: one does not; both numbers are named.
    """
    counts = {"n_tasks": meta.n_tasks}
    if meta.hard != "none":
        counts |= {
            "random_tasks_per_round": meta.random_tasks_per_round,
            "hard_tasks_per_round": meta.hard_tasks_per_round,
        }
    if meta.tasks_per_update < 1:
        raise InputError(f"--meta.tasks-per-update is {meta.tasks_per_update}; it must be at least 1")
    for name, value in counts.items():
        if value < 1 or value % meta.tasks_per_update:
            raise InputError(
                f"--meta.{name.replace('_', '-')} is {value}, which is no positive multiple of "
                f"--meta.tasks-per-update {meta.tasks_per_update}"
            )


def check_random_start(meta: MetaConfig) -> None:
    """Meta-training without a pre-trained network learns all weights, with batch statistics.

    Raises:
        InputError: it would learn only a part of a random network, or use statistics that nobody took.
    """
    if meta.learn != "weights" or meta.last_block_only or meta.norm != "episode":
        raise InputError(
            "--pretrained is missing: only --meta.learn weights of all blocks with --meta.norm episode starts from "
            "random weights (such as --preset maml); `mtl-fast pretrain` makes a model file"
        )


def check_normalisation(config: Config, pretrained: Model) -> None:
    """Images enter the network as they did in its pre-training.

    Raises:
        InputError: mean or standard deviation differ.
    """
    for name in ("mean", "std"):
        there, here = getattr(pretrained.config.data, name), getattr(config.data, name)
        if there != here:
            raise InputError(
                f"{pretrained.path}: was pre-trained with --data.{name} {' '.join(map(str, there))}, not "
                f"{' '.join(map(str, here))}; give the same, or the same --preset"
            )


def check_statistics(meta: MetaConfig, pretrained: Model) -> None:
    """`frozen` norms have statistics to freeze.

    Raises:
        InputError: the encoder was imported without any.
    """
    if meta.norm == "frozen" and not pretrained.stored_statistics:
        raise InputError(
            f"{pretrained.path}: was imported without running statistics, which --meta.norm frozen needs; give "
            "--meta.norm episode"
        )


def set_rates(optimizer: torch.optim.Optimizer, meta: MetaConfig, update: int) -> None:
    """Both rates, halved every `decay_every` updates down to the floor (a rate below the floor stays)."""
    for group in optimizer.param_groups:
        start = group["start_lr"]
        group["lr"] = max(start * 0.5 ** (update // meta.decay_every), min(meta.lr_floor, start))


@torch.no_grad()
def guarded_step(optimizer: torch.optim.Optimizer, finite: Tensor) -> Tensor:
    """A step that leaves parameters and state as they were where a loss or a gradient is not finite.

    Args:
        optimizer: Adam, or another whose state begins at zeros and is changed in place.
        finite: bool scalar, whether the losses are; nothing is read back.

    Returns:
        bool scalar: whether the gradients are finite as well and the step was taken.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    gradients = [p.grad for p in parameters if p.grad is not None]
    finite = torch.stack([finite, *(gradient.isfinite().all() for gradient in gradients)]).all()

    def tensors() -> Iterator[Tensor]:
        for p in parameters:
            yield p
            yield from (value for value in optimizer.state[p].values() if isinstance(value, Tensor))

    before = {id(tensor): tensor.clone() for tensor in tensors()}
    for gradient in gradients:  # else the moments would take the NaN up
        gradient.copy_(torch.where(finite, gradient, 0))
    optimizer.step()
    for tensor in tensors():
        if tensor.device == finite.device:  # a GPU's step counters are the host's, which must not wait for it
            old = before.get(id(tensor))  # None: the first step made it, from zeros
            tensor.copy_(torch.where(finite, tensor, 0 if old is None else old))
    return finite


def _adam(
    meta: MetaConfig, moved: list[torch.nn.Parameter], head: list[torch.nn.Parameter]
) -> torch.optim.Adam:
    groups = [{"params": head, "start_lr": meta.head_lr}]
    if moved:
        groups.insert(0, {"params": moved, "start_lr": meta.lr})
    return torch.optim.Adam(groups)


def meta_train(
    config: Config,
    pretrained: str | Path | None,
    output: str | Path,
    *,
    resume: bool = False,
    ranks: Ranks = ALONE,
) -> Path:
    """Meta-trains from a pre-trained model file (None: from random weights) as `config` says; returns the model file.

    See `MetaTraining`.
    """
    if pretrained is None:
        return MetaTraining(config, None, output, resume=resume, ranks=ranks).run()
    with ranks.together():
        model = load_model(pretrained, kind="pretrained")
    # The network is the pre-trained one, whatever the recipe's default.
    config = replace(
        config,
        encoder=replace(model.config.encoder, shortcut_scale_shift=config.encoder.shortcut_scale_shift),
    )
    return MetaTraining(config, model, output, resume=resume, ranks=ranks).run()
