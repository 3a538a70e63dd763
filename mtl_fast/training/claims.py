"""What the paper claims of its rows, and what paired differences over the same tasks say of each claim."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from .cells import Cell
from .experiment import Outcome
from .report import difference_sentence
from .rows import FT_ALL, FT_LAST, MAML, MAML_DEEP, PLAIN_ROWS, SS, SS_LAST, Row
from .statistics import Interval, SeedsDifference, pooled_difference, seeds_interval

Verdict = Literal["confirmed", "not confirmed", "undecided at this size"]

# Share of what the plain run gains in validation; a run has converged so far when it has reached that level.
REACHED = 0.9


@dataclass(frozen=True)
class Claim:
    """A claim of the paper: for each pair, the first row is better than the second."""

    words: str
    pairs: tuple[tuple[Row, Row], ...]


_META_TRAINED = tuple(row for row in PLAIN_ROWS if row.meta_trained)
HARD_PAIRS = tuple((row.with_hard_tasks(), row) for row in (SS, *(r for r in _META_TRAINED if r != SS)))
CLAIMS = (
    Claim(
        "SS is better than FT",
        (
            (SS, FT_ALL),
            (SS.with_hard_tasks(), FT_ALL.with_hard_tasks()),
            (SS_LAST, FT_LAST),
            (SS_LAST.with_hard_tasks(), FT_LAST.with_hard_tasks()),
        ),
    ),
    Claim(
        "[Θ;θ] is better than [Θ4;θ]",
        (
            (SS, SS_LAST),
            (SS.with_hard_tasks(), SS_LAST.with_hard_tasks()),
            (FT_ALL, FT_LAST),
            (FT_ALL.with_hard_tasks(), FT_LAST.with_hard_tasks()),
        ),
    ),
    Claim("HT is better than the plain meta-batch", HARD_PAIRS),
    Claim("MTL is better than MAML", tuple((SS.with_hard_tasks(), row) for row in (MAML, MAML_DEEP))),
)

Cells = Mapping[tuple[str, int], Cell]


def verdict(pooled: Interval, means: Sequence[float]) -> Verdict:
    """Of a difference that the claim says is positive.

    Args:
        pooled: the difference and its interval.
        means: of single seeds.

    Returns:
        ``confirmed`` where the interval lies above 0, ``not confirmed`` where it lies below, both only where all
        seeds agree in sign; otherwise undecided.
    """
    sign = math.copysign(1.0, pooled.mean)
    if not pooled.excludes_zero or any(sign * mean <= 0 for mean in means):
        return "undecided at this size"
    return "confirmed" if sign > 0 else "not confirmed"


def difference(cells: Cells, a: Row, b: Row, n_shot: int) -> SeedsDifference | None:
    """The paired difference a − b over the seeds and test tasks that both have; None where there are none."""
    if not {(a.key, n_shot), (b.key, n_shot)} <= cells.keys():
        return None
    pairs = [
        (x.task_accuracy, y.task_accuracy) for x, y in _common(cells[a.key, n_shot], cells[b.key, n_shot])
    ]
    if not pairs:
        return None
    n = min(min(len(x), len(y)) for x, y in pairs)
    return pooled_difference([x[:n] for x, _ in pairs], [y[:n] for _, y in pairs])


def tasks_to_reach(curve: Sequence[Sequence[float]], level: float) -> float:
    """Tasks seen when the validation accuracy first reaches `level`, linear between validations.

    Args:
        curve: points of tasks, accuracy, …; the first is the start.
        level: an accuracy.

    Returns:
        The number of tasks; that of the whole run where it never gets there.
    """
    before: Sequence[float] | None = None
    for point in curve:
        if point[1] >= level:
            if before is None:
                return point[0]
            return before[0] + (point[0] - before[0]) * (level - before[1]) / (point[1] - before[1])
        before = point
    return curve[-1][0]


def tasks_saved(cells: Cells, row: Row, n_shot: int) -> list[tuple[float, float]]:
    """For each seed, tasks until the plain and the HT run reach `REACHED` of what the plain run gains by its end."""
    hard = row.with_hard_tasks()
    if not {(row.key, n_shot), (hard.key, n_shot)} <= cells.keys():
        return []
    found = []
    for plain, other in _common(cells[row.key, n_shot], cells[hard.key, n_shot]):
        start, end = plain.curve[0][1], plain.curve[-1][1]
        level = start + REACHED * (end - start)
        found.append((tasks_to_reach(plain.curve, level), tasks_to_reach(other.curve, level)))
    return found


def claims_text(cells: Cells, shots: Sequence[int]) -> str:
    """A line a claim and task shape, about its first pair that is there, and its verdict."""
    lines = []
    for claim in CLAIMS:
        for n_shot in shots:
            for a, b in claim.pairs:
                found = difference(cells, a, b, n_shot)
                if found is not None:
                    said: str = verdict(found.pooled, [one.mean for one in found.per_seed])
                    if found.n_seeds == 1:
                        said += ", from one seed"
                    sentence = difference_sentence(a.label, b.label, found)
                    rising = _still_rising(b, cells[b.key, n_shot])
                    lines.append(f"- {claim.words}, {n_shot}-shot: **{said}**. {sentence}{rising}")
                    break
    for n_shot in shots:
        if saved := tasks_saved(cells, SS, n_shot):
            lines.append(f"- HT converges faster, {n_shot}-shot: {_speed_sentence(SS, saved)}")
    return "\n".join(lines)


def _still_rising(row: Row, cell: Cell) -> str:
    """A sentence where longer runs of what a claim says is worse might have been better."""
    rising = [
        outcome
        for outcome in cell.outcomes
        if len(outcome.curve) > 1 and outcome.curve[-1][1] > max(point[1] for point in outcome.curve[:-1])
    ]
    if not rising:
        return ""
    seeds = f" in {len(rising)} of {len(cell.outcomes)} seeds" if len(cell.outcomes) > 1 else ""
    return f" {row.label} was best at its end{seeds}, so still rising."


def speed_verdict(saved: Sequence[tuple[float, float]]) -> tuple[Interval, Verdict]:
    """Plain minus HT tasks over the seeds, and whether HT is faster; one seed decides nothing."""
    fewer = [plain - hard for plain, hard in saved]
    interval = seeds_interval(fewer)
    return interval, verdict(interval, fewer)


def _speed_sentence(row: Row, saved: Sequence[tuple[float, float]]) -> str:
    interval, said = speed_verdict(saved)
    seeds = "; ".join(f"{plain:,.0f} and {hard:,.0f}" for plain, hard in saved)
    half = "" if math.isinf(interval.half) else f" ± {interval.half:,.0f}"
    way = "more" if interval.mean >= 0 else "fewer"
    return (
        f"**{said}**. {row.label} without hard tasks takes {abs(interval.mean):,.0f}{half} tasks {way} than with them "
        f"(without and with, each seed: {seeds})."
    )


def _common(a: Cell, b: Cell) -> list[tuple[Outcome, Outcome]]:
    """The outcomes of the seeds that both cells have."""
    others = dict(zip(b.seeds, b.outcomes, strict=True))
    return [(x, others[seed]) for seed, x in zip(a.seeds, a.outcomes, strict=True) if seed in others]
