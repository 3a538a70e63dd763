"""Meta-training, algorithms 1 and 2 of MTL (arXiv 1812.02391): random tasks, then hard tasks."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import Config
from ..data.residency import Gathered
from ..data.store import ImageStore
from ..engine.base import Engine, StepOutput
from ..engine.capture import N_WARM_UP, capture
from ..engine.evaluate import evaluate
from ..engine.inner_loops import WholeNetworkEngine
from ..engine.memory import bytes_per_image, free_memory, images_in_flight, in_words
from ..engine.ranks import ALONE, Ranks
from ..engine.step import EpisodicEngine
from ..episodes import Episodes, EpisodeSampler, HardTaskPool
from ..errors import InputError
from ..nn import LinearHead
from . import checkpoint
from .hard_classes import PICTURE, HardClasses, draw_hard_classes
from .logging import RunLog
from .meta_checks import check_normalisation, check_random_start, check_rounds, check_statistics
from .meta_update import adam, guarded_step, keep_on_device, set_rates
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
from .pace import N_TRACED
from .phase import Phase
from .pretrain import validation_episodes
from .ranks import common_free_memory
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
        ranks: the processes that share out the tasks of an update. With several, no step is captured: they exchange
            gradients in the middle of it.
        profile: write ``profile.json``, a trace of the first updates.
    """

    head: LinearHead
    name, command, kind, counts = "meta-training", "meta-train", "meta", "tasks"
    lighter = "give a smaller --meta.images-per-chunk"
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
        profile: bool = False,
    ) -> None:
        free = common_free_memory(ranks)
        with ranks.together():
            self._prepare(config, pretrained, train, val, ranks, profile, free)
        self._open(output, resume=resume, inputs=self.inputs)

    def _prepare(
        self,
        config: Config,
        pretrained: Model | None,
        train: ImageStore | None,
        val: ImageStore | None,
        ranks: Ranks,
        profile: bool,
        free: int | None,
    ) -> None:
        check_rounds(config.meta)
        if pretrained is None:
            check_random_start(config.meta)
        super().__init__(config, train, val, ranks, profile=profile, free=free)
        self.meta = config.meta
        if pretrained is None:
            initial = self.streams.stream("initial")
            self.encoder = build_encoder(config.encoder, image_size=self.network_size, generator=initial)
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
        self.optimizer = adam(self.meta, self.moved, list(self.head.parameters()))
        shape = config.episodes
        self.sampler = EpisodeSampler(
            self.train,
            shape.n_way,
            shape.n_shot,
            shape.n_query_at_test if shape.n_query_train is None else shape.n_query_train,
            self.streams.stream("tasks"),
        )
        self.pool: HardTaskPool | None = None
        if self.meta.hard != "none":
            self.pool = HardTaskPool(
                self.sampler,
                self.meta.hard,
                self.streams.stream("hard_tasks"),
                per_task=self.meta.hard_classes_per_task,
                size=self.meta.hard_pool_size,
            )
            self.hard_classes = HardClasses(
                self.train.class_names,
                self.device,
                self.meta.random_tasks_per_round + self.meta.hard_tasks_per_round,
            )
        self.engine = self._new_engine(ranks)
        self.engine.require_whole_splits(*self._images_of_splits)
        # What is traced is not replayed, so that the trace shows its ranges.
        n_plain = N_WARM_UP + (N_TRACED + 1) * profile
        captured = ranks.alone and config.inner.adapt == "head"
        self._step = capture(self._train_on, self.device, n_plain) if captured else self._train_on
        self.validation = validation_episodes(config, self.val, self.meta.validation_tasks)
        self.total = self.meta.n_tasks // self.meta.tasks_per_update
        self.coming: deque[Episodes] = deque()  # drawn, an update each, and not yet trained on
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
            "spans": self.spans,
            "ranks": ranks,
        }
        if inner.adapt == "all":
            return WholeNetworkEngine(*parts, **options, checkpoint=inner.checkpoint)
        return EpisodicEngine(
            *parts,
            **options,
            encoder_dtype=self.encoder_dtype,
            loss_scale=None if self.loss_scale is None else self.loss_scale.scale,
        )

    def next_episodes(self) -> tuple[Episodes, bool]:
        """The tasks of the next update, and whether they are hard ones."""
        n_left, hard = self._left_of_part()
        if not self.coming:
            # Images in host memory: all tasks until the pool is next asked are drawn and read back at once.
            n_updates = 1 if self.ahead is None else n_left
            source = self.pool if hard and self.pool is not None else self.sampler
            per_update = self.meta.tasks_per_update
            drawn = source.sample(n_updates * per_update)
            self.coming.extend([drawn] if n_updates == 1 else drawn.chunks(per_update))
        if self.ahead is not None and not len(self.ahead):
            rows = torch.stack([self._own(episodes).in_order()[0] for episodes in self.coming])
            self.ahead.submit(rows.cpu())
        return self.coming.popleft(), hard

    def _own(self, episodes: Episodes) -> Episodes:
        """This rank's share of the tasks."""
        return episodes[self.ranks.share(episodes.n_tasks)]

    def _left_of_part(self) -> tuple[int, bool]:
        """Updates until the random or the hard part of this round, or the run, ends; whether it is the hard one."""
        n_left = self.total - self.update
        if self.pool is None:
            return min(n_left, max(1, self.meta.random_tasks_per_round // self.meta.tasks_per_update)), False
        n_random = self.meta.random_tasks_per_round // self.meta.tasks_per_update
        place = self.update % self._updates_per_round
        hard = place >= n_random
        return min(n_left, (self._updates_per_round if hard else n_random) - place), hard

    def _update(self) -> None:
        with self.spans("data"):
            episodes, hard = self.next_episodes()
            tensors = tuple(vars(episodes).values())
            if self.ahead is not None:
                own = vars(self._own(episodes).in_order()[1]).values()
                tensors = (*(self.ranks.spread(t, episodes.n_tasks) for t in own), self.ahead.next())
        set_rates(self.optimizer, self.meta, self.update)
        output = StepOutput(*self._step(*tensors))
        if self.pool is not None and not hard:
            with self.spans("data"):
                self.hard_classes.add(self.pool.add(episodes, output.class_accuracy))
        self.update += 1
        if self.pool is not None and self.update % self._updates_per_round == 0:
            self.pool.clear()
            self.hard_classes.end_round()

    def _train_on(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The step and its optimiser; asks the device for nothing.

        Args:
            tensors: the five of `Episodes`; then, where the store is in host memory, the images that this rank's share
                of them are rows of.
        """
        self.optimizer.zero_grad(set_to_none=True)
        if self.ahead is not None:
            self.engine.store = Gathered(tensors[-1])
        output = self.engine.step(Episodes(*tensors[:5]))
        with self.spans("optimiser"):
            finite = output.loss.isfinite().all()
            if self.loss_scale is None:
                self.all_finite &= guarded_step(self.optimizer, finite)
            else:
                # A gradient that overflowed is what the scale is for; a loss that did is not.
                self.loss_scale.update(guarded_step(self.optimizer, finite, self.loss_scale.scale))
                self.all_finite &= finite & self.loss_scale.is_useful()
            means = [output.loss.mean(), output.class_accuracy.mean(), self.sums.new_ones(())]
            self.sums += torch.stack(means)
        return tuple(output)

    @property
    def _n_items(self) -> int:
        return self.meta.tasks_per_update

    @property
    def _images_of_splits(self) -> tuple[int, int]:
        """Support and query images of a task."""
        return self.sampler.n_way * self.sampler.n_shot, self.sampler.n_way * self.sampler.n_query

    def _begin(self, log: RunLog) -> None:
        super()._begin(log)
        # What a rank says of its own memory is not the first one's to say.
        if self.ranks.first:
            self.engine.say = log.say
        if self.engine.images_per_chunk is None:
            self.engine.images_per_chunk = self._images_per_chunk(log)

    def _images_per_chunk(self, log: RunLog) -> int:
        """The default: for the memory that is free now; a resumed run keeps the one that it began with.

        Ranks on CPUs count as sharing one memory, and all take what the least of them can.
        """
        n_groups = 0 if self.meta.norm == "frozen" else 1
        dtype = self.encoder_dtype or self.head.weight.dtype
        per_image = bytes_per_image(self.encoder, self.network_size, dtype, n_groups=n_groups)
        ranks = self.ranks
        n_images = -(-self.meta.tasks_per_update // ranks.size) * sum(self._images_of_splits)
        free = free_memory(self.device)
        if free is not None and self.device.type == "cpu":
            free //= ranks.size
        least = self.engine.smallest_chunk(*self._images_of_splits)
        found = min(ranks.gather_objects(images_in_flight(n_images, least, per_image, free)))
        whose = "an update's" if ranks.alone else "a rank's"
        memory = "unknown free memory" if free is None else f"{in_words(free)} free"
        log.say(
            f"images in flight: {min(found, n_images)} of {whose} {n_images} "
            f"({memory}, about {in_words(per_image)} an image; --meta.images-per-chunk {found})"
        )
        return found

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
            inner_lr=inner.lr_at_test,
            inner_steps=inner.test_steps,
            mirror_support=self.config.evaluation.mirror_support,
            norm=self.meta.norm,
            adapt=inner.adapt,
            ranks=self.ranks,
        )
        mean, interval = mean_interval(result.accuracy)
        tasks = self.update * self.meta.tasks_per_update
        self.curve.append([tasks, mean, interval])
        self._keep_if_best(mean)
        row: dict[str, float | str | None] = {
            "tasks": tasks,
            "validation_accuracy": mean,
            "validation_interval": interval,
        }
        if self.update:
            loss, accuracy = (self.sums[:2] / self.sums[2]).tolist()
            row |= {"loss": loss, "train_accuracy": accuracy}
            self.sums.zero_()
        if self.pool is not None:
            row["hardest"] = self.hard_classes.hardest() or None
            if self.ranks.first:
                self.hard_classes.save(self.folder.path, tasks)
        log.row(self.update, **row)

    def _finish(self) -> None:
        folder = self.folder.path
        if not (folder / PICTURE).exists():
            draw_hard_classes(folder, folder / PICTURE, title="Classes that hard tasks were made of")

    def _best_weights(self) -> dict[str, Tensor]:
        return weights_of(self.encoder, self.head)

    def _model_facts(self) -> dict[str, Any]:
        return {"tasks": self.best_update * self.meta.tasks_per_update}

    def _loop_state(self) -> dict[str, dict[str, Tensor]]:
        drawn = [
            torch.stack(tensors) for tensors in zip(*(vars(e).values() for e in self.coming), strict=True)
        ]
        return {
            "loop": {"sums": self.sums},
            "pool": {} if self.pool is None else self.pool.state_dict(),
            "hard_classes": {} if self.pool is None else self.hard_classes.state_dict(),
            "coming": {str(i): tensor for i, tensor in enumerate(drawn)},
        }

    def _loop_facts(self) -> dict[str, Any]:
        return {"images_per_chunk": self.engine.images_per_chunk}

    def _load_loop_state(self) -> None:
        keep_on_device(self.optimizer)
        self.engine.images_per_chunk = self.folder.meta["images_per_chunk"]
        self.sums = self.folder.section("loop")["sums"].to(self.device)
        if self.pool is not None:
            self.pool.load_state_dict(self.folder.section("pool"))
            self.hard_classes.load_state_dict(self.folder.section("hard_classes"))
        drawn = self.folder.section("coming")
        stacked = [drawn[str(i)].to(self.device) for i in range(len(drawn))]
        self.coming.extend(Episodes(*tensors) for tensors in zip(*stacked, strict=True))


def meta_train(
    config: Config,
    pretrained: str | Path | None,
    output: str | Path,
    *,
    resume: bool = False,
    ranks: Ranks = ALONE,
    profile: bool = False,
) -> Path:
    """Meta-trains from a pre-trained model file (None: from random weights) as `config` says; returns the model file.

    See `MetaTraining`.
    """
    if pretrained is None:
        return MetaTraining(config, None, output, resume=resume, ranks=ranks, profile=profile).run()
    with ranks.together():
        model = load_model(pretrained, kind="pretrained")
    # The network is the pre-trained one, whatever the recipe's default.
    config = replace(
        config,
        encoder=replace(model.config.encoder, shortcut_scale_shift=config.encoder.shortcut_scale_shift),
    )
    return MetaTraining(config, model, output, resume=resume, ranks=ranks, profile=profile).run()
