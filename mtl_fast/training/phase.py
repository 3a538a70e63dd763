"""The loop that pre-training and meta-training share: update, validate, save, stop, and go on where it stopped."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..config import Config
from ..data import load_split
from ..data.residency import Ahead, placed
from ..data.store import ImageStore
from ..engine.memory import free_memory, in_words
from ..engine.ranks import ALONE, Ranks
from ..engine.spans import WHOLE, Spans
from ..errors import InputError
from ..nn import Encoder
from ..random_streams import RandomStreams
from . import checkpoint
from .logging import NoLog, RunLog
from .meta_update import LossScale
from .models import (
    device_of,
    encoder_dtype,
    load_weights,
    network_size,
    preprocess_of,
    save_model,
    square_size,
    weights_of,
)
from .pace import Pace, StepTrace
from .ranks import require_same_start, require_same_state
from .run import RunFolder, prefixed, stop_on_ctrl_c, tell_of_missing_kernels


class Phase(ABC):
    """One phase's state and its loop; a subclass says what an update is and when to validate.

    A subclass calls `__init__`, builds `encoder`, `head`, `optimizer` and `total`, and then `_open`.

    Args:
        config: settings.
        train, val: the splits; None loads them from `config.data.source`.
        ranks: the processes that share the work; all are given the same.
        profile: write ``profile.json``, a trace of the first updates (of the first rank).
        free: bytes of the device that the images are placed by; None asks the device.
    """

    name: ClassVar[str]  # in messages, such as "pre-training"
    command: ClassVar[str]  # in logs and checkpoints
    kind: ClassVar[str]  # of the model file
    counts: ClassVar[str]  # what the progress line counts a second
    lighter: ClassVar[str]  # what to do where memory runs out
    reports_start: ClassVar[bool] = False  # whether a report comes before the first update

    encoder: Encoder
    head: nn.Module
    optimizer: torch.optim.Optimizer
    total: int

    def __init__(
        self,
        config: Config,
        train: ImageStore | None,
        val: ImageStore | None,
        ranks: Ranks = ALONE,
        *,
        profile: bool = False,
        free: int | None = None,
    ) -> None:
        self.config = config
        self.ranks = ranks
        self.device = device_of(config) if ranks.device is None else ranks.device
        self._free = free
        data = config.data
        self.train, self.val = (
            self._placed(
                load_split(data.source, split, data.image_size, **data.reading) if store is None else store
            )
            for split, store in (("train", train), ("val", val))
        )
        self.image_size = square_size(self.train, self.val)
        self.network_size = network_size(config, self.image_size)
        self.ahead = Ahead(self.train.images, self.device) if self.train.kept_on_host else None
        self.preprocess = preprocess_of(config)
        self.streams = RandomStreams(config.seed)
        self.spans = Spans(self.device)
        self.profile = profile
        self.encoder_dtype = encoder_dtype(config)
        self.loss_scale = LossScale(self.device) if self.encoder_dtype == torch.float16 else None
        self.update = 0
        self.best: dict[str, Tensor] = {}
        self.best_accuracy, self.best_update = -1.0, 0
        self.curve: list[list[float]] = []
        self._began, self._seconds_before = time.monotonic(), 0.0

    @property
    def seconds(self) -> float:
        """The run's time up to now, validations included; of what was stopped, up to the checkpoint."""
        return self._seconds_before + time.monotonic() - self._began

    def _placed(self, store: ImageStore) -> ImageStore:
        store = placed(
            store, self.device, lambda: free_memory(self.device) if self._free is None else self._free
        )
        if self._free is not None and not store.kept_on_host:
            self._free -= store.images.nbytes
        return store

    def run(self) -> Path:
        """Runs to the end, gives the folder back and returns the model file.

        Raises:
            InputError: the loss became non-finite, memory ran out, or the disk is full.
            Interrupted: Ctrl-C; the state is saved.
        """
        with self.folder.lock:
            return self._run()

    def _run(self) -> Path:
        if self.update >= self.total and self.folder.finished:
            if self.ranks.first:
                self._finish()  # it may have been killed between the model and what follows it
            return self.folder.model
        ranks, folder = self.ranks, self.folder.path
        label = self.command if folder.name == self.command else f"{self.command} {folder.name}"
        with ranks.together():
            log = (
                RunLog(folder, phase=label, total=self.total, unit="update", step=self.update)
                if ranks.first
                else NoLog()
            )
        self._began = time.monotonic()
        path = folder / "profile.json" if self.profile and ranks.first else None
        trace = StepTrace(path, self.device, self.spans)
        with log, self._enough_memory(), self._gathering(), stop_on_ctrl_c() as stop:
            self._begin(log)
            if self.reports_start and self.update == 0 and not self.curve:
                self._report(log)
            pace = Pace(self.spans, self.device, self.counts)
            with trace:
                while self.update < self.total:
                    self.spans.begin()
                    with self.spans(WHOLE):
                        self._update()
                    trace.step()
                    told = pace.count(self._n_items)
                    # Ctrl-C reaches the ranks in different updates: they stop after the same one.
                    stopping = ranks.any(stop.requested)
                    if self._is_checkpoint():
                        self._checkpoint(log)
                        pace.restart()
                    elif stopping:
                        self._checkpoint()
                    if stopping and self.update < self.total:
                        raise self.folder.interrupted(
                            f"{self.name} after update {self.update} of {self.total}"
                        )
                    log.advance(self.update, told)
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
                    seconds=self.seconds,
                    **self._model_facts(),
                )
        stopping = ranks.any(stop.requested)
        if ranks.first:  # when nobody waits for it any more
            self._finish()
        if stopping:
            raise self.folder.interrupted(f"{self.name} after its last update, {self.total}")
        return self.folder.model

    def time_updates(self, n: int) -> float:
        """Seconds an update takes, from `n` of them after one to warm up; the state moves on, and nothing is saved."""
        with self._gathering():
            self._begin(NoLog())
            for i in range(n + 1):
                if i == 1:
                    start = time.monotonic()
                self._update()
                float(next(self.head.parameters()).detach().flatten()[0])  # waits for the device
            return (time.monotonic() - start) / n

    def _gathering(self) -> AbstractContextManager[object]:
        """While images are needed: the worker that gathers those in host memory ends with it."""
        return nullcontext() if self.ahead is None else self.ahead

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

    @contextmanager
    def _enough_memory(self) -> Iterator[None]:
        """Lack of memory is the user's to mend."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            reason = str(error).partition("\n")[0]
            raise InputError(
                f"{self.name}: out of memory after update {self.update} ({reason}); {self.lighter}"
            ) from None

    def _begin(self, log: RunLog) -> None:
        """Says what the user should know before the first update."""
        for name, store in (("training", self.train), ("validation", self.val)):
            if store.kept_on_host:
                size = in_words(store.images.nbytes)
                log.say(f"{name} images stay in host memory: {size} are too many for the device")
        if self.device.type != "cpu" or not self.ranks.first:
            return
        tell_of_missing_kernels()
        if self.encoder_dtype is not None:
            log.say(
                f"precision {self.config.precision}: on a CPU the encoder then runs on the torch backend, which is "
                "right but slower than fp32"
            )

    @property
    @abstractmethod
    def _n_items(self) -> int:
        """What an update counts, in units of `counts`."""

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

    def _finish(self) -> None:  # noqa: B027 - most have nothing to add
        """What the first rank leaves beside the model file; nothing by default."""

    def _loop_facts(self) -> dict[str, Any]:
        """The subclass's own plain facts for the checkpoint's header."""
        return {}

    @property
    def _keeps_last(self) -> bool:
        """Whether the last of the validated states is kept, however good it is."""
        return False

    def _keep_if_best(self, accuracy: float) -> None:
        if accuracy > self.best_accuracy or self._keeps_last:
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
        scale = {} if self.loss_scale is None else {"loss_scale": self.loss_scale.state_dict()}
        self.folder.save(
            optimizer
            | prefixed(
                current=weights_of(self.encoder, self.head),
                best=self.best,
                streams=self.streams.state_dict(),
                **scale,
                **self._loop_state(),
            ),
            {
                **self._loop_facts(),
                "phase": self.command,
                "update": self.update,
                "optimizer": optimizer_state,
                "best_accuracy": self.best_accuracy,
                "best_update": self.best_update,
                "curve": self.curve,
                "seconds": self.seconds,
            },
        )

    def _restore(self) -> None:
        folder, meta = self.folder, self.folder.meta
        if meta.get("phase") != self.command:
            raise InputError(f"{folder.checkpoint}: is of phase {meta.get('phase')!r}, not of {self.name}")
        load_weights(folder.section("current"), self.encoder, self.head)
        checkpoint.unpack_optimizer(self.optimizer, folder.tensors, meta["optimizer"])
        self.streams.load_state_dict(folder.section("streams"))
        if self.loss_scale is not None:
            self.loss_scale.load_state_dict(folder.section("loss_scale"))
        self._load_loop_state()
        self.best = folder.section("best")
        self.update, self.curve = meta["update"], meta["curve"]
        self._seconds_before = meta.get("seconds", 0.0)
        self.best_accuracy, self.best_update = meta["best_accuracy"], meta["best_update"]
