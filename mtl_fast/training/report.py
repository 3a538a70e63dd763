"""What a comparison found, as text: the table of accuracies and what each difference says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..text_table import Style, grid
from .figures import Curve, convergence_figure, episode_picture, rate_sensitivity_figure
from .statistics import Interval, SeedsDifference

__all__ = [
    "Curve",
    "convergence_figure",
    "difference_sentence",
    "differences",
    "episode_picture",
    "rate_sensitivity_figure",
    "table",
]


def table(
    rows: Mapping[str, Sequence[tuple[float, float] | None]],
    columns: Sequence[str] = ("1-shot", "5-shot"),
    *,
    style: Style = "markdown",
    corner: str = "accuracy, %",
) -> str:
    """The table of accuracies: a row a method, a column a task shape, cells mean ± 95 % interval in percent.

    Args:
        rows: method → one (mean, half-width) a column, as fractions; None leaves the cell out as ``–``.
        columns: names of the columns.
        style: ``markdown``, or ``plain`` for a terminal.
        corner: what stands above the methods.

    Returns:
        Lines without a final line break.

    Raises:
        ValueError: a row has another number of cells than there are columns; it is named.
    """
    for name, cells in rows.items():
        if len(cells) != len(columns):
            raise ValueError(f"row {name!r} has {len(cells)} cells for {len(columns)} columns")
    body = [
        [name, *("–" if cell is None else Interval(*cell).percent() for cell in cells)]
        for name, cells in rows.items()
    ]
    return grid([corner, *columns], body, style)


def differences(
    rows: Mapping[str, Sequence[Interval | SeedsDifference | None]],
    columns: Sequence[str] = ("1-shot", "5-shot"),
    *,
    style: Style = "markdown",
    corner: str = "difference, points",
) -> str:
    """The table of paired differences, such as ``SS[Θ;θ] − update θ``; a ``*`` marks what excludes 0.

    Args:
        rows: what is compared → one paired difference a column; for several seeds the pooled interval stands
            first and the seeds' standard deviation behind it.
        columns, style, corner: as in `table`.

    Raises:
        ValueError: a row has another number of cells than there are columns; it is named.
    """
    for name, cells in rows.items():
        if len(cells) != len(columns):
            raise ValueError(f"row {name!r} has {len(cells)} cells for {len(columns)} columns")
    body = [[name, *map(_difference, cells)] for name, cells in rows.items()]
    return grid([corner, *columns], body, style)


def difference_sentence(a: str, b: str, difference: Interval | SeedsDifference, where: str = "") -> str:
    """What a paired difference a − b says in words, whichever way it came out.

    >>> difference_sentence("SS[Θ;θ]", "update θ", Interval(0.053, 0.006), "1-shot")
    '1-shot: SS[Θ;θ] is better than update θ by 5.3 ± 0.6 points.'
    """
    interval = difference if isinstance(difference, Interval) else difference.pooled
    start = f"{where}: " if where else ""
    if interval.excludes_zero:
        way = "better" if interval.mean > 0 else "worse"
        size = Interval(abs(interval.mean), interval.half).percent()
        sentence = f"{start}{a} is {way} than {b} by {size} points"
    else:
        size = interval.percent(signed=True)
        sentence = f"{start}{a} and {b} are not told apart: {size} points, an interval that includes 0"
    if isinstance(difference, SeedsDifference) and difference.n_seeds > 1:
        means = ", ".join(f"{100 * one.mean:+.1f}" for one in difference.per_seed)
        sentence += f" (single seeds: {means})"
    return sentence + "."


def _difference(cell: Interval | SeedsDifference | None) -> str:
    if cell is None:
        return "–"
    interval = cell if isinstance(cell, Interval) else cell.pooled
    text = interval.percent(signed=True) + (" *" if interval.excludes_zero else "")
    if isinstance(cell, SeedsDifference) and cell.n_seeds > 1:
        text += f" (seeds ± {100 * cell.spread:.1f})"
    return text
