"""The table on the terminal, and the same lines for a file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from .harness import Line, Measurable, Settings, Spread, Target, geometric_mean
from .networks import native_backend
from .records import machine

HEADINGS = ("row", "ours", "against", "ratio (p20–p80), best/best", "of peak", "target")
WIDTHS = (62, 9, 40, 32, 8)


def lines_of(
    rows: Iterable[Measurable], settings: Settings, kept: Mapping[str, Sequence[Line]] | None = None
) -> Iterator[list[Line]]:
    """Measures the rows one after the other, each with its lines together; a family's mean follows its last row.

    `kept` has the lines of rows that were measured before, which are given as they are.
    """
    backend = "torch" if native_backend()[1] else "native"

    def told(line: Line, source: str = "") -> Line:
        return replace(line, source=source, implementation=line.implementation or backend)

    family: list[Line] = []
    for row in rows:
        lines = (kept or {}).get(row.name) or row.measure(settings)
        lines = [told(line, row.name) for line in lines]
        if family and lines[0].family != family[0].family:
            yield [told(_mean(family))]
            family = []
        family += [line for line in lines if line.family]
        yield lines
    if family:
        yield [told(_mean(family))]


def _mean(lines: list[Line]) -> Line:
    assert lines[0].family is not None
    return geometric_mean(lines[0].family, lines)


def header(settings: Settings) -> str:
    facts = ", ".join(f"{key} {_words(value)}" for key, value in machine().items())
    quick = "quick: not to be quoted\n" if settings.quick else ""
    return (
        f"{quick}{facts}; {settings.rounds} rounds, interleaved; median of the ratios of each round\n"
        "Of peak: arithmetic of the direct algorithm against a large matrix product of the same run; "
        "Winograd's algorithm can exceed it.\n" + _columns(HEADINGS)
    )


def _words(value: object) -> str:
    return " ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)


def text(line: Line, settings: Settings) -> str:
    """One line of the table, and its note below."""
    note = f"\n    note: {line.note}" if line.note else ""
    spread = line.spread
    if spread is None:
        why = f"skipped: {line.skipped}" if line.skipped else f"refused: {line.refused}"
        return f"{line.row:<{WIDTHS[0]}} {why}{note}"
    ratio = " ".join(with_range(spread, line.unit))
    if line.best is not None:
        ratio += f", {value_in_unit(line.best, line.unit)}"
    share = "" if line.share is None else f"{line.share:.0%}"
    # Small shapes have no target.
    judged = line.target is not None and not settings.quick
    target = verdict(line.target, spread.middle, line.unit) if judged else ""
    return _columns((line.row, line.ours, f"{line.against} {line.peer}".strip(), ratio, share, target)) + note


def verdict(target: Target, value: float, unit: str) -> str:
    sign = "≤" if target.at_most else "≥"
    parts = [
        f"{name} {sign} {value_in_unit(bound, unit)} {'holds' if holds else 'MISSED'}"
        for name, bound, holds in zip(
            ("must", "aim"), (target.must, target.aim), target.holds(value), strict=True
        )
    ]
    return ", ".join(parts)


def value_in_unit(value: float, unit: str) -> str:
    """3.21× or +4.5%."""
    if unit == "%":
        return f"{value:+.1%}"
    return f"{value:,.0f}{unit}" if value >= 1000 else f"{value:.3g}{unit}"


def with_range(spread: Spread, unit: str) -> list[str]:
    """["3.21×", "(3.1×–3.3×)"]; without a range where all values are one, as of what is counted."""
    low, middle, high = (value_in_unit(value, unit) for value in (spread.low, spread.middle, spread.high))
    return [middle] if spread.low == spread.high else [middle, f"({low}–{high})"]


def _columns(cells: tuple[str, ...]) -> str:
    return " ".join(f"{cell:<{width}}" for cell, width in zip(cells, (*WIDTHS, 0), strict=True)).rstrip()
