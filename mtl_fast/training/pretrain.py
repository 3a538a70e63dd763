"""Pre-training: encoder and a throw-away classifier on all training classes; the best epoch is kept."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import Config, PretrainConfig
from ..data import load_split
from ..data.store import ImageStore
from ..engine.evaluate import evaluate
from ..episodes import Episodes, EpisodeSampler
from ..errors import InputError
from ..nn import Encoder, LinearHead
from ..random_streams import RandomStreams
from . import checkpoint
from .augment import augmented
from .logging import RunLog
from .models import (
    build_encoder,
    device_of,
    facts_of,
    load_weights,
    preprocess_of,
    save_model,
    square_size,
    weights_of,
)
from .run import RunFolder, prefixed, stop_on_ctrl_c


class Pretraining:
    """The state of a pre-training run and its loop.

    Args:
        config: settings; `pretrain`, `data`, `encoder`, `inner` and `seed` are used.
        output: the run's folder.
        resume: go on with the run that is there.
        train, val: the splits; None loads them from `config.data.source`.
    """

    def __init__(
        self,
        config: Config,
        output: str | Path,
        *,
        resume: bool = False,
        train: ImageStore | None = None,
        val: ImageStore | None = None,
    ) -> None:
        self.config, self.settings = config, config.pretrain
        self.device = device_of(config)
        size = config.data.image_size
        self.train = (load_split(config.data.source, "train", size) if train is None else train).to(
            self.device
        )
        self.val = (load_split(config.data.source, "val", size) if val is None else val).to(self.device)
        self.streams = RandomStreams(config.seed)
        initial = self.streams.stream("initial")
        self.image_size = square_size(self.train, self.val)
        self.encoder = build_encoder(config.encoder, image_size=self.image_size, generator=initial).to(
            self.device
        )
        self.encoder.dropout_generator = self.streams.stream("dropout")
        self.classifier = LinearHead(self.encoder.feature_dim, self.train.n_classes, generator=initial)
        self.classifier.to(self.device)
        self.optimizer = _optimizer(self.settings, self.encoder, self.classifier)
        self.preprocess = preprocess_of(config)
        self.validation = validation_episodes(config, self.val, self.settings.validation_tasks)
        self.updates_per_epoch = max(1, self.train.n_images // self.settings.batch_size)
        self.total = self.settings.epochs * self.updates_per_epoch
        self.update = 0
        self.order = torch.empty(0, dtype=torch.int64)
        self.sums = torch.zeros(3, dtype=torch.float64)  # loss, correct, images since the last log row
        self.best: dict[str, Tensor] = {}
        self.best_accuracy, self.best_epoch = -1.0, 0
        self.curve: list[list[float]] = []
        inputs = {"train": facts_of(self.train), "val": facts_of(self.val)}
        self.folder = RunFolder(output, config, resume=resume, inputs=inputs)
        if self.folder.resumed:
            self._restore()

    def run(self) -> Path:
        """Runs to the end and returns the model file.

        Raises:
            InputError: the loss became non-finite.
            Interrupted: Ctrl-C; the state is saved.
        """
        if self.update >= self.total and self.folder.model.exists():
            return self.folder.model
        log = RunLog(self.folder.path, phase="pretrain", total=self.total, unit="update", step=self.update)
        with log, stop_on_ctrl_c() as stop:
            while self.update < self.total:
                self._update()
                if self.update % self.updates_per_epoch == 0:
                    self._end_of_epoch(log)
                    self._save()
                elif stop.requested:
                    self._require_finite_weights()
                    self._save()
                if stop.requested and self.update < self.total:
                    raise self.folder.interrupted(f"pre-training after update {self.update} of {self.total}")
                log.advance(self.update)
        save_model(
            self.folder.model,
            "pretrained",
            self.config,
            self.best,
            image_size=self.image_size,
            validation_accuracy=self.best_accuracy,
            epoch=self.best_epoch,
            curve=self.curve,
        )
        if stop.requested:
            raise self.folder.interrupted(f"pre-training after its last update, {self.total}")
        return self.folder.model

    def _update(self) -> None:
        place = self.update % self.updates_per_epoch
        if place == 0:
            self.order = torch.randperm(self.train.n_images, generator=self.streams.stream("pretrain_order"))
        rows = self.order[place * self.settings.batch_size :][: self.settings.batch_size].to(self.device)
        self.encoder.train()
        self._seed_dropout()
        x = augmented(self.train, rows, self.preprocess, self.settings, self.streams.stream("augmentation"))
        labels = self.train.labels[rows]
        logits = self.classifier(self.encoder(x))
        loss = F.cross_entropy(logits, labels)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.settings, self.update, self.updates_per_epoch)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            correct = (logits.argmax(dim=1) == labels).sum()
            self.sums += torch.stack(
                [loss.double() * len(rows), correct.double(), loss.new_tensor(len(rows)).double()]
            ).cpu()
        if not math.isfinite(float(self.sums[0])):
            raise self._not_finite(f"the loss became {float(loss.detach())}")
        self.update += 1

    def _seed_dropout(self) -> None:
        """On a GPU dropout draws there, from a generator that each update seeds from the stream."""
        if self.device.type != "cpu" and self.encoder.dropout:
            seed = int(torch.randint(2**62, (), generator=self.streams.stream("dropout")))
            self.encoder.dropout_generator = torch.Generator(self.device).manual_seed(seed)

    def _require_finite_weights(self) -> None:
        """Before every checkpoint: the last update may have spoilt what its loss did not show."""
        for module in (self.encoder, self.classifier):
            for name, tensor in module.state_dict().items():
                if not bool(tensor.isfinite().all()):
                    raise self._not_finite(f"{name} became non-finite")

    def _not_finite(self, what: str) -> InputError:
        epoch = self.update // self.updates_per_epoch + 1
        return InputError(
            f"pre-training: {what} at update {self.update}, in epoch {epoch}; nothing on disk was overwritten; "
            f"try a lower --pretrain.lr (now {self.settings.lr:g})"
        )

    def _end_of_epoch(self, log: RunLog) -> None:
        epoch = self.update // self.updates_per_epoch
        loss, accuracy = (self.sums[:2] / self.sums[2]).tolist()
        self.sums.zero_()
        self._require_finite_weights()
        row = {"epoch": epoch, "loss": loss, "train_accuracy": accuracy}
        if epoch % self.settings.validate_every == 0 or self.update == self.total:
            score = self._validate()
            row["validation_accuracy"] = score
            self.curve.append([epoch, score])
            if score > self.best_accuracy:
                self.best_accuracy, self.best_epoch = score, epoch
                self.best = weights_of(self.encoder)
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
            inner_lr=inner.lr,
            inner_steps=inner.test_steps,
        )
        return float(result.accuracy.mean())

    def _save(self) -> None:
        optimizer, optimizer_state = checkpoint.pack_optimizer(self.optimizer)
        self.folder.save(
            optimizer
            | prefixed(
                current=weights_of(self.encoder, self.classifier),
                best=self.best,
                streams=self.streams.state_dict(),
                loop={"order": self.order, "sums": self.sums},
            ),
            {
                "phase": "pretrain",
                "update": self.update,
                "optimizer": optimizer_state,
                "best_accuracy": self.best_accuracy,
                "best_epoch": self.best_epoch,
                "curve": self.curve,
            },
        )

    def _restore(self) -> None:
        folder, meta = self.folder, self.folder.meta
        if meta.get("phase") != "pretrain":
            raise InputError(f"{folder.checkpoint}: is of phase {meta.get('phase')!r}, not of pre-training")
        load_weights(folder.section("current"), self.encoder, self.classifier)
        checkpoint.unpack_optimizer(self.optimizer, folder.tensors, meta["optimizer"])
        self.streams.load_state_dict(folder.section("streams"))
        loop = folder.section("loop")
        self.order, self.sums, self.best = loop["order"], loop["sums"], folder.section("best")
        self.update, self.curve = meta["update"], meta["curve"]
        self.best_accuracy, self.best_epoch = meta["best_accuracy"], meta["best_epoch"]


def validation_episodes(config: Config, val: ImageStore, n_tasks: int) -> Episodes:
    """The fixed validation episodes of a run, from its stream of that name."""
    episodes = config.episodes
    generator = RandomStreams(config.seed).stream("validation")
    return EpisodeSampler(val, episodes.n_way, episodes.n_shot, episodes.n_query, generator).sample(n_tasks)


def learning_rate(settings: PretrainConfig, update: int, updates_per_epoch: int) -> float:
    """Linear rise over the warm-up, then a cosine to 0 at the last update."""
    warmup = settings.warmup_epochs * updates_per_epoch
    total = settings.epochs * updates_per_epoch
    if update < warmup:
        return settings.lr * (update + 1) / (warmup + 1)
    progress = (update - warmup) / max(1.0, total - warmup)
    return settings.lr * 0.5 * (1 + math.cos(math.pi * progress))


def _optimizer(settings: PretrainConfig, encoder: Encoder, classifier: LinearHead) -> torch.optim.Optimizer:
    parameters = [*encoder.parameters(), *classifier.parameters()]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, lr=settings.lr, momentum=0.9, nesterov=True, weight_decay=settings.weight_decay
        )
    # Decoupled decay is for matrices; norms and biases are left alone, as is usual.
    matrices = [p for p in parameters if p.dim() > 1]
    vectors = [p for p in parameters if p.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.lr)


def pretrain(config: Config, output: str | Path, *, resume: bool = False) -> Path:
    """Pre-trains as `config` says and returns the model file in `output`; see `Pretraining`."""
    # Validation is 1-shot whatever the tasks to come: one encoder serves them all.
    config = replace(config, episodes=replace(config.episodes, n_shot=1))
    return Pretraining(config, output, resume=resume).run()
