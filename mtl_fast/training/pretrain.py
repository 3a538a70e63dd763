"""Pre-training: encoder and a throw-away classifier on all training classes; the best epoch, or the last, is kept."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import Config, PretrainConfig
from ..data.residency import Gathered, moved
from ..data.store import ImageStore
from ..engine.evaluate import evaluate
from ..engine.ranks import ALONE, Ranks
from ..episodes import Episodes, EpisodeSampler
from ..errors import InputError
from ..nn import Encoder, LinearHead
from ..nn.encoder import BatchShare
from ..random_streams import RandomStreams
from .augment import augmented
from .logging import RunLog
from .meta_update import guarded_step
from .models import build_encoder, facts_of, weights_of
from .phase import Phase
from .ranks import common_free_memory


class Pretraining(Phase):
    """The state of a pre-training run and its loop; its head is the throw-away classifier.

    Args:
        config: settings; `pretrain`, `data`, `encoder`, `inner`, `evaluation` and `seed` are used.
        output: the run's folder.
        resume: go on with the run that is there.
        train, val: the splits; None loads them from `config.data.source`.
        ranks: the processes that share out the images of a batch.
        profile: write ``profile.json``, a trace of the first updates.
    """

    name, command, kind, counts = "pre-training", "pretrain", "pretrained", "images"
    lighter = "give a smaller --pretrain.batch-size"

    def __init__(
        self,
        config: Config,
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
            self._prepare(config, train, val, ranks, profile, free)
        inputs = {"train": facts_of(self.train), "val": facts_of(self.val)}
        self._open(output, resume=resume, inputs=inputs)

    def _prepare(
        self,
        config: Config,
        train: ImageStore | None,
        val: ImageStore | None,
        ranks: Ranks,
        profile: bool,
        free: int | None,
    ) -> None:
        super().__init__(config, train, val, ranks, profile=profile, free=free)
        self.settings = config.pretrain
        initial = self.streams.stream("initial")
        self.encoder = build_encoder(config.encoder, image_size=self.network_size, generator=initial)
        self.encoder.to(self.device)
        self.encoder.dropout_generator = self.streams.stream("dropout")
        self.head = _classifier(self.settings, self.encoder.feature_dim, self.train.n_classes, initial)
        self.head.to(self.device)
        self.optimizer = _optimizer(self.settings, self.encoder, self.head)
        self.validation = validation_episodes(config, self.val, self.settings.validation_tasks)
        self.updates_per_epoch = max(1, self.train.n_images // self.settings.batch_size)
        self.total = n_updates(self.settings, self.updates_per_epoch)
        self.order = torch.empty(0, dtype=torch.int64)
        # Loss, correct, images since the last log row.
        self.sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        part = self.settings.crop_size
        if self.settings.crop == "resized" and part is not None and part < self.network_size:
            raise InputError(
                f"pretrain.crop_size is {part}, less than the {self.network_size}×{self.network_size} pixels of which the "
                "network takes the centre; raise it, or leave it out"
            )
        batch_size = min(self.settings.batch_size, self.train.n_images)
        if batch_size < ranks.size:
            raise InputError(
                f"a batch of {batch_size} images is too small for {ranks.size} ranks, each of which takes at least "
                "one; start fewer processes or raise --pretrain.batch-size"
            )

    def _update(self) -> None:
        place = self.update % self.updates_per_epoch
        if place == 0:
            self.order = torch.randperm(self.train.n_images, generator=self.streams.stream("pretrain_order"))
        size = self.settings.batch_size
        rows = moved(self.order[place * size :][:size], self.device)
        self.encoder.train()
        self._seed_dropout()
        with self.spans("data"):
            x, labels = self._batch(rows, place)
        own = self.ranks.share(len(rows))
        if not self.ranks.alone:
            self.encoder.share = BatchShare(own.start, len(rows), self.ranks.gather)
        self.optimizer.zero_grad(set_to_none=True)
        with self.ranks.summing([*self.encoder.parameters(), *self.head.parameters()]) as along:
            with self.spans("encoder"):
                features = self.encoder(x.to(self.encoder_dtype or x.dtype))
                self.encoder.share = None
                logits = self.head(features.to(x.dtype))
                loss = F.cross_entropy(logits, labels)
                part = loss * (len(labels) / len(rows))
                (part if self.loss_scale is None else part * self.loss_scale.scale).backward()
            with torch.no_grad():
                correct = (logits.argmax(dim=1) == labels).sum()
                n_images = torch.full((), len(labels), dtype=torch.float64, device=self.device)
                sums = torch.stack([loss.double() * len(labels), correct.double(), n_images])
            along.append(sums)
        with self.spans("optimiser"):
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(self.settings, self.update, self.updates_per_epoch)
            if self.loss_scale is None:
                self.optimizer.step()
            else:
                # The sum over ranks, as the gradients are: all skip the same updates.
                stepped = guarded_step(self.optimizer, sums[0].isfinite(), self.loss_scale.scale)
                self.loss_scale.update(stepped)
        self.sums += sums
        # A GPU would have to be waited for: there it shows before the next checkpoint.
        if self.device.type == "cpu":
            self._require_finite_loss()
        self.update += 1

    def _batch(self, rows: Tensor, place: int) -> tuple[Tensor, Tensor]:
        """This rank's share of a batch: augmented images [b, 3, H, W] and labels [b].

        Args:
            rows: int64 [B] of the whole batch, on the device.
            place: the batch's number in the epoch.
        """
        ranks = self.ranks
        own = ranks.share(len(rows))
        labels = self.train.labels[rows[own]]
        source: ImageStore | Gathered = self.train
        if self.ahead is not None:
            if not len(self.ahead):
                size = self.settings.batch_size
                left = self.order[place * size : self.updates_per_epoch * size].split(size)
                self.ahead.submit(batch[ranks.share(len(batch))] for batch in left)
            source = Gathered(self.ahead.next())
            rows = ranks.spread(torch.arange(len(labels), device=self.device), len(rows))
        augmentation = self.streams.stream("augmentation")
        return augmented(source, rows, self.preprocess, self.settings, augmentation, own), labels

    @property
    def _n_items(self) -> int:
        return self.settings.batch_size

    def _seed_dropout(self) -> None:
        """On a GPU dropout draws there, from a generator that each update seeds from the stream."""
        if self.device.type != "cpu" and self.encoder.dropout:
            seed = int(torch.randint(2**62, (), generator=self.streams.stream("dropout")))
            self.encoder.dropout_generator = torch.Generator(self.device).manual_seed(seed)

    def _require_finite_loss(self) -> None:
        if not math.isfinite(total := float(self.sums[0])):
            raise self._not_finite(f"the loss became {total}")

    def _require_finite(self) -> None:
        """The last update may have spoilt what its loss did not show."""
        self._require_finite_loss()
        if self.loss_scale is not None and not bool(self.loss_scale.is_useful()):
            raise self._not_finite("gradients overflow float16 whatever the scale of the loss")
        for module in (self.encoder, self.head):
            for name, tensor in module.state_dict().items():
                if not bool(tensor.isfinite().all()):
                    raise self._not_finite(f"{name} became non-finite")

    def _not_finite(self, what: str) -> InputError:
        epoch = self.update // self.updates_per_epoch + 1
        return InputError(
            f"pre-training: {what} at update {self.update}, in epoch {epoch}; nothing on disk was overwritten; "
            f"try a lower --pretrain.lr (now {self.settings.lr:g})"
        )

    def _is_checkpoint(self) -> bool:
        return self.update % self.updates_per_epoch == 0 or self.update == self.total

    @property
    def _keeps_last(self) -> bool:
        return self.settings.keep == "last"

    def _epoch(self, update: int) -> int:
        """The epoch, from 1, that this number of updates ends or breaks off."""
        return -(-update // self.updates_per_epoch)

    def _report(self, log: RunLog) -> None:
        epoch = self._epoch(self.update)
        loss, accuracy = (self.sums[:2] / self.sums[2]).tolist()
        self.sums.zero_()
        row = {"epoch": epoch, "loss": loss, "train_accuracy": accuracy}
        if epoch % self.settings.validate_every == 0 or self.update == self.total:
            row["validation_accuracy"] = self._validate()
            self.curve.append([epoch, row["validation_accuracy"]])
            self._keep_if_best(row["validation_accuracy"])
        log.row(self.update, **row)

    def _validate(self) -> float:
        """Accuracy of a fresh head on the validation episodes: what the features alone are worth."""
        self.encoder.eval()
        head = LinearHead(self.encoder.feature_dim, self.config.episodes.n_way, init="zeros").to(self.device)
        inner = self.config.inner
        result = evaluate(
            self.encoder,
            head,
            self.val,
            self.validation,
            self.preprocess,
            inner_lr=inner.lr_at_test,
            inner_steps=inner.test_steps,
            mirror_support=self.config.evaluation.mirror_support,
            ranks=self.ranks,
        )
        return float(result.accuracy.mean())

    def _best_weights(self) -> dict[str, Tensor]:
        return weights_of(self.encoder)

    def _model_facts(self) -> dict[str, Any]:
        return {"epoch": self._epoch(self.best_update)}

    def _loop_state(self) -> dict[str, dict[str, Tensor]]:
        return {"loop": {"order": self.order, "sums": self.sums}}

    def _load_loop_state(self) -> None:
        loop = self.folder.section("loop")
        self.order, self.sums = loop["order"], loop["sums"].to(self.device)


def validation_episodes(config: Config, val: ImageStore, n_tasks: int) -> Episodes:
    """The fixed validation episodes of a run, from its stream of that name."""
    episodes = config.episodes
    generator = RandomStreams(config.seed).stream("validation")
    sampler = EpisodeSampler(val, episodes.n_way, episodes.n_shot, episodes.n_query_at_test, generator)
    return sampler.sample(n_tasks)


def n_updates(settings: PretrainConfig, updates_per_epoch: int) -> int:
    """Updates in all."""
    return settings.n_updates or settings.epochs * updates_per_epoch


def learning_rate(settings: PretrainConfig, update: int, updates_per_epoch: int) -> float:
    """Linear rise over the warm-up, then a cosine to 0 at the last update, or steps, which count from the start."""
    warmup = settings.warmup_epochs * updates_per_epoch
    total = n_updates(settings, updates_per_epoch)
    if update < warmup:
        return settings.lr * (update + 1) / (warmup + 1)
    if settings.schedule == "steps":
        every = settings.decay_every * (1 if settings.n_updates else updates_per_epoch)
        return settings.lr * settings.decay ** (update // every)
    progress = (update - warmup) / max(1.0, total - warmup)
    return settings.lr * 0.5 * (1 + math.cos(math.pi * progress))


def _classifier(
    settings: PretrainConfig, feature_dim: int, n_classes: int, generator: torch.Generator
) -> nn.Module:
    """The throw-away classifier: [N, feature_dim] → [N, n_classes]."""
    if settings.head_width is None:
        return LinearHead(feature_dim, n_classes, generator=generator)
    return nn.Sequential(
        LinearHead(feature_dim, settings.head_width, generator=generator),
        nn.ReLU(),
        LinearHead(settings.head_width, n_classes, generator=generator),
    )


def _optimizer(settings: PretrainConfig, encoder: Encoder, head: nn.Module) -> torch.optim.Optimizer:
    parameters = [*encoder.parameters(), *head.parameters()]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, lr=settings.lr, momentum=0.9, nesterov=True, weight_decay=settings.weight_decay
        )
    if settings.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=settings.lr, weight_decay=settings.weight_decay)
    # Decoupled decay is for matrices; norms and biases are left alone, as is usual.
    matrices = [p for p in parameters if p.dim() > 1]
    vectors = [p for p in parameters if p.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.lr)


def pretrain(
    config: Config,
    output: str | Path,
    *,
    resume: bool = False,
    ranks: Ranks = ALONE,
    profile: bool = False,
) -> Path:
    """Pre-trains as `config` says and returns the model file in `output`; see `Pretraining`."""
    # Validation is 1-shot whatever the tasks to come: one encoder serves them all.
    config = replace(config, episodes=replace(config.episodes, n_shot=1))
    return Pretraining(config, output, resume=resume, ranks=ranks, profile=profile).run()
