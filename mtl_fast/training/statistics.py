"""Means with 95 % intervals, of one method and of the difference of two over the same tasks.

An interval is 1.96·s/√n, as in the paper (arXiv 1812.02391): s is the sample standard deviation, with n − 1
in its denominator, of the n accuracies of single tasks. It covers the draw of tasks, given the trained model.
Numbers are fractions, 0 to 1, unless a name says percent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Z_95 = 1.96
# Student's t at 97.5 % with 1, 2, … degrees of freedom; the last holds, a little too wide, for all that follow.
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


class Interval(NamedTuple):
    """A mean and the half-width of its 95 % interval; ``mean, half = interval`` takes it apart."""

    mean: float
    half: float

    @property
    def low(self) -> float:
        """The lower end."""
        return self.mean - self.half

    @property
    def high(self) -> float:
        """The upper end."""
        return self.mean + self.half

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval lies on one side of 0; a NaN excludes nothing."""
        return self.low > 0 or self.high < 0

    def percent(self, *, signed: bool = False) -> str:
        """In percent with one digit, ``73.9 ± 0.8``; `signed` writes the plus of a difference."""
        return f"{100 * self.mean:{'+' if signed else ''}.1f} ± {100 * self.half:.1f}"

    def __str__(self) -> str:
        return self.percent()


def format_interval(mean: float, half: float) -> str:
    """Fractions in percent with one digit: ``format_interval(0.739, 0.008) == "73.9 ± 0.8"``."""
    return Interval(mean, half).percent()


@dataclass(frozen=True)
class SeedsDifference:
    """A difference a − b over several seeds.

    Attributes:
        pooled: mean and interval over all (seed, task) pairs: it covers the draw of test tasks, not the luck
            of a training run.
        per_seed: the paired difference of each seed.
        spread: sample standard deviation of the seeds' means, which shows that luck; NaN for one seed.
    """

    pooled: Interval
    per_seed: tuple[Interval, ...]
    spread: float

    @property
    def n_seeds(self) -> int:
        """How many seeds."""
        return len(self.per_seed)

    def percent(self) -> str:
        """One line: pooled difference, whether its interval excludes 0, each seed's mean, their spread."""
        verdict = "excludes 0" if self.pooled.excludes_zero else "includes 0"
        seeds = ", ".join(f"{100 * interval.mean:+.1f}" for interval in self.per_seed)
        line = f"{self.pooled.percent(signed=True)} ({verdict}"
        if self.n_seeds == 1:
            return line + "; one seed)"
        return f"{line}; seeds {seeds}, their standard deviation {100 * self.spread:.1f})"


def mean_interval(values: Any) -> Interval:
    """Mean and 95 % interval of the accuracies of single tasks.

    Args:
        values: [n], n ≥ 1, a tensor (on any device), an array or a sequence.

    Returns:
        The mean and 1.96·s/√n, s with n − 1; the half-width is infinite for n = 1, which tells nothing of it.

    Raises:
        ValueError: no values, or more than one dimension.
    """
    x = _vector("values", values)
    if x.size == 1:
        return Interval(float(x[0]), math.inf)
    return Interval(float(x.mean()), float(Z_95 * x.std(ddof=1) / math.sqrt(x.size)))


def seeds_interval(values: Any) -> Interval:
    """Mean and 95 % interval of what single seeds gave: t·s/√n with Student's t, for seeds are few.

    Args:
        values: [n], n ≥ 1; as in `mean_interval`, one value has an infinite interval.

    Raises:
        ValueError: no values, or more than one dimension.
    """
    interval, n = mean_interval(values), len(values)
    if n == 1:
        return interval
    return Interval(interval.mean, interval.half * T_95[min(n - 1, len(T_95)) - 1] / Z_95)


def paired_difference(a: Any, b: Any) -> Interval:
    """Mean and 95 % interval of a − b, task by task.

    Args:
        a, b: [n] accuracies of two methods on the same tasks in the same order. What the tasks have in common
            (easy or hard for both) cancels, so the interval is narrower than that of two separate means.

    Raises:
        ValueError: different lengths; both are named.
    """
    x, y = _vector("a", a), _vector("b", b)
    if x.shape != y.shape:
        raise ValueError(f"a and b must hold the same tasks: a has {x.size}, b has {y.size}")
    return mean_interval(x - y)


def pooled_difference(a: Sequence[Any], b: Sequence[Any], *, same_tasks: bool = False) -> SeedsDifference:
    """The paired difference a − b over several seeds.

    The seeds' per-task differences are concatenated and treated as one sample of n_seeds · n_tasks. That
    holds where each seed is tested on tasks of its own. Where all seeds share their test tasks
    (`same_tasks`), the differences of one task are not independent: they are averaged over seeds first, and
    the sample is n_tasks.

    Args:
        a, b: for each seed the [n] accuracies of a method, the same tasks in the same order in both.
        same_tasks: all seeds were tested on the same tasks.

    Raises:
        ValueError: no seed, another number of seeds in b than in a, or of tasks; both are named.
    """
    if not a or len(a) != len(b):
        raise ValueError(f"a and b must hold the same seeds, at least one: a has {len(a)}, b has {len(b)}")
    per_seed = tuple(paired_difference(x, y) for x, y in zip(a, b, strict=True))
    differences = [_vector("a", x) - _vector("b", y) for x, y in zip(a, b, strict=True)]
    if same_tasks:
        sizes = {d.size for d in differences}
        if len(sizes) > 1:
            raise ValueError(f"seeds that share their tasks hold equally many, here {sorted(sizes)}")
        pooled = mean_interval(np.mean(differences, axis=0))
    else:
        pooled = mean_interval(np.concatenate(differences))
    means = [interval.mean for interval in per_seed]
    spread = float(np.std(means, ddof=1)) if len(means) > 1 else math.nan
    return SeedsDifference(pooled, per_seed, spread)


def _vector(name: str, values: Any) -> NDArray[np.float64]:
    if hasattr(values, "detach"):
        values = values.detach().cpu().double().numpy()
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or x.size == 0:
        raise ValueError(f"{name} must be a non-empty vector [n], it is {list(x.shape)}")
    return x
