"""The loop that pre-training and meta-training share: update, validate, save, stop, and go on where it stopped."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..config import Config
from ..data import load_split
from ..data.store import ImageStore
from ..engine.ranks import ALONE, Ranks
from ..errors import InputError
from ..nn import Encoder, LinearHead
from ..random_streams import RandomStreams
from . import checkpoint
from .logging import NoLog, RunLog
from .models import device_of, load_weights, preprocess_of, save_model, square_size, weights_of
from .ranks import require_same_start, require_same_state
from .run import RunFolder, prefixed, stop_on_ctrl_c, tell_of_missing_kernels


class Phase(ABC):
    """One phase's state and its loop; a subclass says what an update is and when to validate.

    A subclass calls `__init__`, builds `encoder`, `head`, `optimizer` and `total`, and then `_open`.

    Args:
        config: settings.
        train, val: the splits; None loads them from `config.data.source`.
        ranks: the processes that share the work; all are given the same.
    """

    name: ClassVar[str]  # in messages, such as "pre-training"
    command: ClassVar[str]  # in logs and checkpoints
    kind: ClassVar[str]  # of the model file
    reports_start: ClassVar[bool] = False  # whether a report comes before the first update

    encoder: Encoder
    head: LinearHead
    optimizer: torch.optim.Optimizer
    total: int

    def __init__(
        self, config: Config, train: ImageStore | None, val: ImageStore | None, ranks: Ranks = ALONE
    ) -> None:
        self.config = config
        self.ranks = ranks
        self.device = device_of(config) if ranks.device is None else ranks.device
        data = config.data
        self.train, self.val = (
            (load_split(data.source, split, data.image_size, **data.reading) if store is None else store).to(
                self.device
            )
            for split, store in (("train", train), ("val", val))
        )
        self.image_size = square_size(self.train, self.val)
        self.preprocess = preprocess_of(config)
        self.streams = RandomStreams(config.seed)
        self.update = 0
        self.best: dict[str, Tensor] = {}
        self.best_accuracy, self.best_update = -1.0, 0
        self.curve: list[list[float]] = []

    def run(self) -> Path:
        """Runs to the end and returns the model file.

        Raises:
            InputError: the loss became non-finite.
            Interrupted: Ctrl-C; the state is saved.
        """
        if self.update >= self.total and self.folder.finished:
            return self.folder.model
        ranks = self.ranks
        if self.device.type == "cpu" and ranks.first:
            tell_of_missing_kernels()
        folder = self.folder.path
        label = self.command if folder.name == self.command else f"{self.command} {folder.name}"
        with ranks.together():
            log = (
                RunLog(folder, phase=label, total=self.total, unit="update", step=self.update)
                if ranks.first
                else NoLog()
            )
        with log, stop_on_ctrl_c() as stop:
            if self.reports_start and self.update == 0 and not self.curve:
                self._report(log)
            while self.update < self.total:
                self._update()
                # Ctrl-C reaches the ranks in different updates: they stop after the same one.
                stopping = ranks.any(stop.requested)
                if self._is_checkpoint():
                    self._checkpoint(log)
                elif stopping:
                    self._checkpoint()
                if stopping and self.update < self.total:
                    raise self.folder.interrupted(f"{self.name} after update {self.update} of {self.total}")
                log.advance(self.update)
        with ranks.together():
            if ranks.first:
                save_model(
                    self.folder.model,
                    self.kind,
                    self.config,
                    self.best,
                    image_size=self.image_size,
                    validation_accuracy=self.best_accuracy,
                    curve=self.curve,
                    **self._model_facts(),
                )
        if ranks.any(stop.requested):
            raise self.folder.interrupted(f"{self.name} after its last update, {self.total}")
        return self.folder.model

    def _checkpoint(self, log: RunLog | None = None) -> None:
        """Saves the state, after a report where there is a log for it."""
        with self.ranks.together():
            self._require_finite()
        require_same_state(self.ranks, self.update, self.encoder, self.head, self.streams)
        if log is not None:
            self._report(log)
        with self.ranks.together():
            if self.ranks.first:
                self._save()

    @abstractmethod
    def _update(self) -> None:
        """One optimiser step; counts `update`."""

    @abstractmethod
    def _is_checkpoint(self) -> bool:
        """Whether this update is followed by a report and a checkpoint."""

    @abstractmethod
    def _report(self, log: RunLog) -> None:
        """Writes a row of the log, with a validation where one is due."""

    @abstractmethod
    def _require_finite(self) -> None:
        """Before every checkpoint: raises InputError where a non-finite number has spoilt the state."""

    @abstractmethod
    def _best_weights(self) -> dict[str, Tensor]:
        """What the model file holds of the present state."""

    @abstractmethod
    def _model_facts(self) -> dict[str, Any]:
        """What the model file's header says beside the common facts."""

    @abstractmethod
    def _loop_state(self) -> dict[str, dict[str, Tensor]]:
        """The subclass's own state, in named groups of tensors."""

    @abstractmethod
    def _load_loop_state(self) -> None:
        """The inverse, from `folder.section(name)`."""

    def _keep_if_best(self, accuracy: float) -> None:
        if accuracy > self.best_accuracy:
            self.best_accuracy, self.best_update = accuracy, self.update
            self.best = self._best_weights()

    def _open(self, output: str | Path, *, resume: bool, inputs: dict[str, Any]) -> None:
        """Takes the run's folder and, where it holds this run, goes back to its state."""
        require_same_start(self.ranks, self.config, {"train": self.train, "val": self.val}, inputs)
        self.folder = RunFolder(output, self.config, resume=resume, inputs=inputs, ranks=self.ranks)
        if self.folder.resumed:
            self._restore()

    def _save(self) -> None:
        optimizer, optimizer_state = checkpoint.pack_optimizer(self.optimizer)
        self.folder.save(
            optimizer
            | prefixed(
                current=weights_of(self.encoder, self.head),
                best=self.best,
                streams=self.streams.state_dict(),
                **self._loop_state(),
            ),
            {
                "phase": self.command,
                "update": self.update,
                "optimizer": optimizer_state,
                "best_accuracy": self.best_accuracy,
                "best_update": self.best_update,
                "curve": self.curve,
            },
        )

    def _restore(self) -> None:
        folder, meta = self.folder, self.folder.meta
        if meta.get("phase") != self.command:
            raise InputError(f"{folder.checkpoint}: is of phase {meta.get('phase')!r}, not of {self.name}")
        load_weights(folder.section("current"), self.encoder, self.head)
        checkpoint.unpack_optimizer(self.optimizer, folder.tensors, meta["optimizer"])
        self.streams.load_state_dict(folder.section("streams"))
        self._load_loop_state()
        self.best = folder.section("best")
        self.update, self.curve = meta["update"], meta["curve"]
        self.best_accuracy, self.best_update = meta["best_accuracy"], meta["best_update"]
