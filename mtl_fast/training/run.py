"""One phase's folder: its settings, its checkpoint, Ctrl-C, and going on where it stopped."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from torch import Tensor

from ..config import Config
from ..engine.ranks import ALONE, CommonEnd, Ranks
from ..errors import InputError
from ..files import replace_file, utf8
from ..kernels import native
from ..kernels.native.build import runnable_variants
from ..ops.backend import ENVIRONMENT_VARIABLE
from . import checkpoint
from .folder_lock import FolderLock


class Interrupted(CommonEnd):
    """Ctrl-C arrived and the state is saved; the message says how to go on."""


class Stop:
    """Set by the first Ctrl-C; the loop looks at it between updates. The second one ends the program."""

    requested = False


@contextmanager
def stop_on_ctrl_c() -> Iterator[Stop]:
    """Turns the first SIGINT into a request that the loop honours after the update at hand."""
    stop = Stop()

    def handler(signum: int, frame: FrameType | None) -> None:
        if stop.requested:
            raise KeyboardInterrupt
        stop.requested = True

    try:
        previous = signal.signal(signal.SIGINT, handler)
    except ValueError:  # not in the main thread: signals are somebody else's
        yield stop
        return
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, previous)


@functools.cache
def tell_of_missing_kernels() -> None:
    """Says on the error stream, once a process, why training on this CPU goes without its native kernels.

    Silent where the choice is the user's, and where no build would help.
    """
    if os.environ.get(ENVIRONMENT_VARIABLE, "auto") not in ("", "auto") or not runnable_variants():
        return
    can, reason = native.load()
    if not can:
        print(f"running on the torch backend: {reason}", file=sys.stderr)


class RunFolder:
    """The folder of one phase; of several ranks only the first reads and writes it.

    Args:
        path: made if missing.
        config: the phase's settings, written to ``config.json``.
        resume: continue the run that is there; without one, begin it.
        inputs: what the run is given beside its settings (sizes of the data, say), to be the same on resume.
        ranks: the processes of this run.

    Raises:
        InputError: the folder cannot be made, or another process is at work there, or it holds a run and `resume` is
            off, or a run that cannot go on: its checkpoint is gone, or it has other settings or inputs.

    Attributes:
        lock: nobody else gets the folder before it is released.
    """

    def __init__(
        self,
        path: str | Path,
        config: Config,
        *,
        resume: bool,
        inputs: Mapping[str, Any] | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.path = Path(path)
        self.config = config
        self.inputs = inputs or {}
        self.tensors: dict[str, Tensor] = {}
        self.meta: dict[str, Any] = {}
        self.finished = False
        self.lock = FolderLock(None)
        with ranks.together():
            if ranks.first:
                self._take(resume)
        self.tensors, self.meta, self.finished = ranks.from_first((self.tensors, self.meta, self.finished))

    def _take(self, resume: bool) -> None:
        occupied = [p for p in (self.checkpoint, self.model) if p.exists()]
        if occupied and not resume:
            raise InputError(
                f"{self.path}: holds a run already ({occupied[0].name}); --resume continues it, or give another --output"
            )
        make_folder(self.path)
        self.lock = FolderLock(self.path, finished=self.model.exists())
        if self.checkpoint.exists():
            self.tensors, self.meta = checkpoint.load(self.checkpoint)
            self._check_same()
        elif occupied:
            raise InputError(
                f"{self.path}: holds {occupied[0].name} but no {self.checkpoint.name} to go on from; "
                "give another --output"
            )
        write_text(self.path / "config.json", self.config.to_json() + "\n")
        self.finished = self.model.exists()

    @property
    def checkpoint(self) -> Path:
        """All that the phase needs to go on to the same bits."""
        return self.path / "checkpoint.safetensors"

    @property
    def model(self) -> Path:
        """What the finished phase leaves."""
        return self.path / "model.safetensors"

    @property
    def resumed(self) -> bool:
        """Whether there was a checkpoint to go on from."""
        return bool(self.meta)

    def save(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Writes the checkpoint, atomically; the settings go with it."""
        facts = {
            "kind": "checkpoint",
            "config": dataclasses.asdict(self.config),
            "inputs": self.inputs,
            **meta,
        }
        checkpoint.save(self.checkpoint, tensors, facts | {"provenance": checkpoint.provenance()})

    def section(self, name: str) -> dict[str, Tensor]:
        """The loaded tensors under ``name.``, without the prefix."""
        return checkpoint.part(self.tensors, name)

    def interrupted(self, where: str) -> Interrupted:
        """What to raise when Ctrl-C was honoured."""
        return Interrupted(f"stopped {where}; saved in {self.path}; the same command with --resume goes on")

    def _check_same(self) -> None:
        check_settings(self.checkpoint, self.meta.get("config", {}), self.config)
        difference = checkpoint.first_difference(self.meta.get("inputs", self.inputs), self.inputs)
        if difference:
            raise InputError(
                f"{self.checkpoint}: the run there was given other data or another encoder ({difference}); "
                "resume with the same ones or give another --output"
            )


def check_settings(path: Path, saved: dict[str, Any], config: Config) -> None:
    """Compares the settings that `path` holds with those asked for.

    A setting that is not there had, when that was written, no other value than its default.

    Raises:
        InputError: they differ, in more than the device: where a run runs is no part of what it computes.
    """
    try:
        there = dataclasses.replace(Config.from_dict(saved), device=config.device)
    except (InputError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path}: holds settings that this version does not know ({error}); give another --output"
        ) from None
    difference = checkpoint.first_difference(dataclasses.asdict(there), dataclasses.asdict(config))
    if difference:
        raise InputError(
            f"{path}: the run there has other settings ({difference}); "
            "resume with the same ones or give another --output"
        )


def read_settings(path: Path) -> dict[str, Any]:
    """What a ``config.json`` holds.

    Raises:
        InputError: it is missing or damaged.
    """
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        settings = None
    if not isinstance(settings, dict):
        raise InputError(f"{path}: cannot be read as settings; mend it or give another --output")
    return settings


def make_folder(path: Path) -> None:
    """Makes a folder for results where there is none.

    Raises:
        InputError: that cannot be done, for a file is in the way or the disk is read-only.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{path}: cannot make this folder ({error.strerror}); give another --output"
        ) from None


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of a text in UTF-8, as `utf8` makes it."""
    write_bytes(path, utf8(text))


def write_bytes(path: Path, payload: bytes) -> None:
    """Replaces a file in one step.

    Raises:
        InputError: it cannot be written; the old one is as it was.
    """
    try:
        replace_file(path, [payload])
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror}); free some space or give another --output"
        ) from None


def prefixed(**groups: dict[str, Tensor]) -> dict[str, Tensor]:
    """``name.key`` → tensor for each named group of tensors."""
    return {
        key: value for name, group in groups.items() for key, value in checkpoint.nest(name, group).items()
    }
