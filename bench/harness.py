"""Timing of ours beside its peers: checked first, warmed, interleaved round by round in one process.

A `Row` builds its `Case` when its turn comes. Every contender's first outputs are compared with the expected
ones; one that is wrong refuses the whole row. Then each round times every contender once, beginning with
another one each round, and a large matrix product beside them: the peak that shares refer to.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import Any, Protocol

import torch
from torch import Tensor

from .accuracy import Expected, mismatch


@dataclass(frozen=True)
class Settings:
    """How rows are measured; `quick` is for trying the benchmark out, its figures are not to be quoted."""

    rounds: int = 9
    quick: bool = False

    @property
    def shortest_sample(self) -> float:
        """Seconds: a faster contender is called several times a sample."""
        return 0.002 if self.quick else 0.05


@dataclass(frozen=True)
class Contender:
    """One way of computing the outputs, by name; `run` is what gets timed.

    Where a run does only a `share` of the work, its time stands for all of it, extrapolated linearly.
    """

    name: str
    run: Callable[[], Mapping[str, Tensor]]
    share: float = 1.0


@dataclass(frozen=True)
class Target:
    """A ratio that must be reached and one to aim at; with `at_most`, a bound from above."""

    must: float
    aim: float
    at_most: bool = False

    def holds(self, value: float) -> tuple[bool, bool]:
        """(must, aim)."""
        if self.at_most:
            return value <= self.must, value <= self.aim
        return value >= self.must, value >= self.aim


@dataclass(frozen=True)
class Against:
    """A comparison with the fastest of some peers."""

    peers: tuple[str, ...]
    target: Target | None = None


@dataclass(frozen=True)
class Family:
    """Rows whose geometric mean has a target."""

    name: str
    n_rows: int
    target: Target


@dataclass(frozen=True)
class Case:
    """Everything a row is measured with.

    Attributes:
        ours, peers: the contenders.
        against: the comparisons, a line each.
        expected: outputs that each contender must return, by name.
        flops: arithmetic of the direct algorithm in one call; 0 leaves the share of the peak out.
        note: what the reader must know of this row.
        why_not_native: the reason where ours ran on torch.
    """

    ours: Contender
    peers: tuple[Contender, ...]
    against: tuple[Against, ...]
    expected: Mapping[str, Expected]
    flops: float = 0
    note: str = ""
    why_not_native: str = ""

    @property
    def remark(self) -> str:
        return "; ".join(filter(None, (self.note, self.why_not_native)))


@dataclass(frozen=True)
class Spread:
    """Median of the rounds and their 20th and 80th percentile."""

    middle: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        fifths = quantiles(values, n=5, method="inclusive") if len(values) > 1 else [values[0]] * 4
        return cls(median(values), fifths[0], fifths[3])


@dataclass(frozen=True)
class Line:
    """One line of the table.

    Attributes:
        row: its name, "operation, mode, shape".
        against: the fastest peer, by name.
        peers: of those names.
        source: name of the `Measurable` that gave it.
        implementation: the backend that ran as ours; empty where it is the one that convolutions have here.
        ours, peer: "12.3 ms" of each side.
        values: what the spread is of, a value a round: peer's time over ours, unless `unit` says otherwise.
        best: the same of the two best times.
        share: of the measured peak, in direct arithmetic.
        refused: why there are no values.
        skipped: what is missing here to measure the row, no fault of its.
        details: raw measurements, for the file.
    """

    row: str
    against: str = ""
    peers: tuple[str, ...] = ()
    source: str = ""
    implementation: str = ""
    ours: str = ""
    peer: str = ""
    values: tuple[float, ...] = ()
    best: float | None = None
    share: float | None = None
    target: Target | None = None
    refused: str = ""
    skipped: str = ""
    note: str = ""
    unit: str = "×"
    family: Family | None = None
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def spread(self) -> Spread | None:
        return Spread.of(self.values) if self.values else None


class Measurable(Protocol):
    """A row of whatever kind."""

    @property
    def name(self) -> str: ...

    def measure(self, settings: Settings) -> Iterable[Line]: ...


@dataclass(frozen=True)
class Row:
    """A timed row; tensors live only while it is measured."""

    name: str
    build: Callable[[], Case]
    family: Family | None = None

    def measure(self, settings: Settings) -> Iterable[Line]:
        case = self.build()
        wrong = refusal(case)
        if wrong:
            return [Line(self.name, refused=wrong, note=case.remark, family=self.family)]
        times, peak = interleaved([case.ours, *case.peers], settings)
        return [self._line(case, against, times, peak) for against in case.against]

    def _line(self, case: Case, against: Against, times: Mapping[str, list[float]], peak: float) -> Line:
        fastest = min(against.peers, key=lambda name: median(times[name]))
        ours, peer = times[case.ours.name], times[fastest]
        return Line(
            row=self.name,
            against=fastest,
            peers=against.peers,
            implementation="torch" if case.why_not_native else "native",
            ours=duration(median(ours)),
            peer=duration(median(peer)),
            values=ratios(ours, peer),
            best=min(peer) / min(ours),
            share=case.flops / min(ours) / peak if case.flops else None,
            target=against.target,
            note=case.remark,
            family=self.family,
            details={"seconds": dict(times), "direct_flops": case.flops, "peak_flops_per_second": peak},
        )


def refusal(case: Case) -> str:
    """Runs every contender once and says whose outputs are wrong; the first run also compiles and warms."""
    wrong = []
    for contender in (case.ours, *case.peers):
        found = mismatch(contender.run(), case.expected)
        if found:
            wrong.append(f"{contender.name}: {found}")
    return "; ".join(wrong)


def interleaved(contenders: Sequence[Contender], settings: Settings) -> tuple[dict[str, list[float]], float]:
    """Seconds that every contender's work takes in each round, and the measured peak in operations a second."""
    size = 512 if settings.quick else 2048
    a, b = torch.rand(size, size), torch.rand(size, size)
    product = Contender("matrix product", lambda: {"c": a @ b})
    everyone = [*contenders, product]
    collecting = gc.isenabled()
    gc.disable()
    gc.freeze()  # what was there before is not looked through again in every round
    try:
        once = {c.name: _sample(c, 1) for c in everyone}
        calls = {name: max(1, math.ceil(settings.shortest_sample / t)) for name, t in once.items()}
        # Where one call is sample enough for everybody, that was a round.
        whole = all(n == 1 for n in calls.values())
        times: dict[str, list[float]] = {c.name: [once[c.name] / c.share] if whole else [] for c in everyone}
        for r in range(int(whole), settings.rounds):
            first = r % len(everyone)
            for c in everyone[first:] + everyone[:first]:
                times[c.name].append(_sample(c, calls[c.name]) / c.share)
            gc.collect()
    finally:
        gc.unfreeze()
        if collecting:
            gc.enable()
    return times, 2 * size**3 / min(times.pop(product.name))


def _sample(contender: Contender, n_calls: int) -> float:
    start = time.perf_counter()
    for _ in range(n_calls):
        contender.run()
    return (time.perf_counter() - start) / n_calls


def ratios(ours: Sequence[float], peer: Sequence[float]) -> tuple[float, ...]:
    """How many times faster ours is, round by round."""
    return tuple(p / o for o, p in zip(ours, peer, strict=True))


def geometric_mean(family: Family, lines: Sequence[Line]) -> Line:
    """The family's line: the geometric mean over its rows in each round; refused unless all rows have values.

    A part of the rows has another name and no target.
    """
    whole = len(lines) == family.n_rows
    name = f"{family.name}, geometric mean" + ("" if whole else f" of {len(lines)} of {family.n_rows} rows")
    refused = [line.row for line in lines if line.refused]
    if refused:
        return Line(name, refused=f"so are {', '.join(refused)}")
    values = tuple(
        math.prod(in_round) ** (1 / len(lines))
        for in_round in zip(*(line.values for line in lines), strict=True)
    )
    return Line(
        name,
        against="the fastest peer of each",
        peers=tuple(dict.fromkeys(peer for line in lines for peer in line.peers)),
        values=values,
        best=math.prod(line.best or 0 for line in lines) ** (1 / len(lines)),
        target=family.target if whole else None,
    )


def duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"
