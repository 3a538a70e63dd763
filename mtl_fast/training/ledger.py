"""Accounts for every tensor of a foreign weight file: where it went, or why it was left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import Tensor

from ..config import Config
from ..errors import InputError

Source = Literal["tensorflow", "pytorch", "libfewshot"]


@dataclass(frozen=True)
class Entry:
    """One line of the account: a source tensor (or none), our tensor (or none), and what was done."""

    source: str
    shape: tuple[int, ...]
    target: str
    note: str


class Ledger:
    """The tensors of one source, each to be taken or left out.

    Args:
        name: of the file, for messages.
        tensors: by their names there.
    """

    def __init__(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        self.name = name
        self.tensors = dict(tensors)
        self.entries: list[Entry] = []
        self._open = dict(tensors)

    def __contains__(self, key: str) -> bool:
        return key in self.tensors

    def width(self, key: str, axis: int) -> int:
        """Channels of a network of this source, read off one of its tensors.

        Raises:
            InputError: there is no such tensor.
        """
        if key not in self.tensors or not self.tensors[key].dim():
            raise InputError(f"{self.name}: has no {key!r}, whose shape tells the network's width")
        return self.tensors[key].shape[axis]

    def take(
        self,
        key: str,
        target: str,
        shape: tuple[int, ...],
        note: str = "",
        convert: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    ) -> Tensor:
        """The tensor `key`, converted to `shape`, contiguous.

        Raises:
            InputError: it is missing, or of another shape.
        """
        if key not in self.tensors:
            raise InputError(f"{self.name}: has no {key!r}, which {target} needs")
        source = self.tensors[key]
        converted = convert(source) if source.dim() == len(shape) else source
        if tuple(converted.shape) != shape:
            how = f" ({note})" if note else ""
            raise InputError(
                f"{self.name}: {key!r} is {list(source.shape)}{how}, which does not fit {target} {list(shape)}"
            )
        self._open.pop(key, None)
        self.entries.append(Entry(key, tuple(source.shape), target, note))
        return converted.contiguous()

    def leave(self, belongs: Callable[[str], bool], why: str) -> None:
        """Leaves out the open tensors whose names `belongs` picks."""
        for key in [key for key in self._open if belongs(key)]:
            self.entries.append(Entry(key, tuple(self._open.pop(key).shape), "", f"left out: {why}"))

    def close(self) -> None:
        """Every tensor is accounted for.

        Raises:
            InputError: one is not; it is named.
        """
        if self._open:
            more = f" and {len(self._open) - 1} more" if len(self._open) > 1 else ""
            key = next(iter(self._open))
            raise InputError(
                f"{self.name}: {key!r} {list(self._open[key].shape)}{more} is unknown to this format; "
                "give the encoder's own file, or another --format"
            )


@dataclass
class Imported:
    """A foreign model in our terms.

    Attributes:
        source: the format it had.
        config: its settings, as far as its program fixes them.
        tensors: as of `weights_of`.
        entries: what became of every source tensor, and where our other tensors come from.
        is_meta: whether it is a meta-trained model, or a pre-trained encoder.
        stored_statistics: whether its norms have running statistics.
    """

    source: Source
    config: Config
    tensors: dict[str, Tensor] = field(default_factory=dict)
    entries: list[Entry] = field(default_factory=list)
    is_meta: bool = False
    stored_statistics: bool = True

    def take_head(self, weight: Tensor, bias: Tensor) -> None:
        """θ: weight [n_way, D] and bias [n_way]; the settings are then of as many classes a task."""
        self.tensors |= {"head.weight": weight, "head.bias": bias}
        self.config = replace(self.config, episodes=replace(self.config.episodes, n_way=len(weight)))

    def __str__(self) -> str:
        kind = "meta-trained model" if self.is_meta else "pre-trained encoder"
        left_out = sum(not entry.target for entry in self.entries)
        added = sum(not entry.source for entry in self.entries)
        taken = len(self.entries) - left_out - added
        return (
            f"{kind} from {self.source}: {taken} tensors taken, {left_out} left out, {added} not in the source"
            + ("" if self.stored_statistics else "; no running statistics: norm 'episode' only")
        )


def table(entries: Sequence[Entry]) -> Iterator[str]:
    """The account as aligned lines: source, shape, our tensor, what was done."""
    rows = [("source", "shape", "ours", "")] + [
        (e.source or "–", "×".join(map(str, e.shape)) or "–", e.target or "–", e.note) for e in entries
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        yield "  ".join([*cells, row[3]]).rstrip()
