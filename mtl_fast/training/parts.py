"""Pieces of a long evaluation, each in a file of its own: a killed run, and another shard, finds what is done."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from . import checkpoint


@dataclass(frozen=True)
class Shard:
    """The share `number`, from 1, of `total` equal ones."""

    number: int = 1
    total: int = 1

    @classmethod
    def parse(cls, text: str) -> Shard:
        """``2/4`` is the second of four.

        Raises:
            InputError: it is not of that form, or there is no such share.
        """
        number, _, total = text.partition("/")
        if not (number.isdecimal() and total.isdecimal() and 1 <= int(number) <= int(total)):
            raise InputError(f"--shard {text}: expected I/N with I in 1..N, such as 2/4")
        return cls(int(number), int(total))

    def share(self, n: int) -> range:
        """This shard's part of 0..n-1; shards differ by one at most, and may be empty."""
        return range((self.number - 1) * n // self.total, self.number * n // self.total)

    def folder(self, parts: Path) -> Path:
        """Where this shard's pieces lie, below the folder of all."""
        return parts / f"{self.number}-of-{self.total}"

    def __str__(self) -> str:
        return f"{self.number}/{self.total}"


class Parts:
    """The pieces below a folder: what this run wrote, and what other shards did.

    Each shard writes to a folder of its own, so that no two write one file; it reads all of them.

    Args:
        folder: where; None keeps nothing.
        facts: what the pieces depend on, for JSON.
        shard: who writes.
        resume: go on with the pieces that this shard wrote before.
        replace: compute a piece that is damaged or of other facts anew instead of raising.

    Raises:
        InputError: the folder holds pieces and `resume` is off.
    """

    def __init__(
        self,
        folder: Path | None,
        facts: Mapping[str, Any],
        *,
        shard: Shard,
        resume: bool = False,
        replace: bool = False,
    ) -> None:
        self.facts, self._replace = facts, replace
        self._folder = folder
        if folder is None:
            return
        self._own = shard.folder(folder)
        # Beside a shard the others are at work; alone, pieces of whatever shard are of an earlier run.
        pieces = (self._own if shard.total > 1 else folder).rglob("*.safetensors")
        if not resume and next(pieces, None) is not None:
            raise InputError(
                f"{folder}: holds parts of an evaluation; --resume goes on with it; or remove them, or give another --output"
            )

    def get(self, name: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The piece of that name, computed and written if nobody has done so yet; on the CPU if it was read.

        Raises:
            InputError: a piece there is damaged, or was computed from other facts; not with `replace`.
        """
        path = self._find(name)
        if path is not None:
            try:
                return self._read(path)
            except InputError:
                if not self._replace:
                    raise
        tensors = compute()
        if self._folder is not None:
            facts = {"kind": "part", "facts": self.facts, "provenance": checkpoint.provenance()}
            checkpoint.save(self._own / f"{name}.safetensors", tensors, facts)
        return tensors

    def remove(self) -> None:
        """Deletes all pieces, those of other shards too."""
        if self._folder is not None and self._folder.exists():
            shutil.rmtree(self._folder)

    def _read(self, path: Path) -> dict[str, Tensor]:
        tensors, meta = checkpoint.load(path)
        difference = checkpoint.first_difference(meta.get("facts", {}), self.facts)
        if difference:
            raise InputError(
                f"{path}: is of another evaluation ({difference}); go on with the same settings, or give "
                "another --output"
            )
        return tensors

    def _find(self, name: str) -> Path | None:
        if self._folder is None:
            return None
        return min(self._folder.glob(f"*/{name}.safetensors"), default=None)


class TimedParts:
    """Pieces with the time that each took, which adds up over runs that were killed.

    Attributes:
        parts: where pieces are kept and found; None: nowhere.
        seconds: that the pieces asked for so far took, whenever they were computed.
    """

    def __init__(self, parts: Parts | None = None) -> None:
        self.parts = parts or Parts(None, {}, shard=Shard())
        self.seconds = 0.0

    def get(self, name: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """As `Parts.get`, with ``seconds`` beside the piece's own tensors."""

        def timed() -> dict[str, Tensor]:
            start = time.monotonic()
            tensors = compute()
            return tensors | {"seconds": torch.tensor(time.monotonic() - start, dtype=torch.float64)}

        piece = self.parts.get(name, timed)
        self.seconds += float(piece["seconds"])
        return piece
