"""What a comparison found, as text: the table of accuracies and what each difference says."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from typing import Literal

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

Style = Literal["markdown", "plain"]


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
    return _grid([corner, *columns], body, style)


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
    return _grid([corner, *columns], body, style)


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


def _width(text: str) -> int:
    """Columns of a terminal; combining marks take none, wide characters two."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(bool(unicodedata.combining(c)) for c in text)


def _grid(head: list[str], body: list[list[str]], style: Style) -> str:
    """The first column to the left, the others to the right."""
    if style not in ("markdown", "plain"):
        raise ValueError(f"style must be 'markdown' or 'plain', it is {style!r}")
    lines = [head, *body]
    if style == "markdown":
        lines = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    widths = [max(_width(line[i]) for line in lines) for i in range(len(head))]

    def padded(line: list[str]) -> list[str]:
        spaces = [" " * (width - _width(cell)) for cell, width in zip(line, widths, strict=True)]
        return [line[0] + spaces[0], *(s + cell for s, cell in zip(spaces[1:], line[1:], strict=True))]

    if style == "plain":
        rule = "  ".join("─" * width for width in widths)
        return "\n".join([("  ".join(padded(head))).rstrip(), rule, *("  ".join(padded(x)) for x in body)])
    rule = "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])])
    rows = ["| " + " | ".join(padded(line)) + " |" for line in lines]
    return "\n".join([rows[0], f"|{rule}|", *rows[1:]])
