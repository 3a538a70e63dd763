"""`python -m bench compare A B`: the same rows of two files of results, ours against ours and ratio against ratio."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median

from mtl_fast.training.checkpoint import short_commit

from .records import Record, latest, read, spread_of

COLUMNS = ("row", "against", "A", "B", "B/A", "ratio A", "ratio B", "")
WIDTHS = (62, 34, 10, 10, 8, 18, 18)


def compare(a: Path, b: Path) -> str:
    """A table: our time in both, its quotient, the ratios against the peer, and whether their spreads part.

    Rows are matched by all that identifies them but the commit; rows of one file alone are counted at the end.
    """
    first, second = latest(read(a)), latest(read(b))
    common = [name for name in first if name in second]
    lines = [_joined(COLUMNS), *(_compared(first[name], second[name]) for name in common)]
    for path, only in ((a, len(first) - len(common)), (b, len(second) - len(common))):
        if only:
            lines.append(f"{only} rows of {path} are not in the other file (or were measured otherwise)")
    if not common:
        lines.append("no row was measured in the same way in both files")
    commits = [
        sorted({short_commit(found["commit"]) for found in found_in.values()}) for found_in in (first, second)
    ]
    lines.append(f"A: commit {', '.join(commits[0]) or '–'}; B: commit {', '.join(commits[1]) or '–'}")
    return "\n".join(lines)


def _compared(a: Record, b: Record) -> str:
    times = [_seconds(found) for found in (a, b)]
    spreads = [spread_of(found) for found in (a, b)]
    quotient = f"{times[1] / times[0]:.2f}" if times[0] and times[1] else ""
    parted = ""
    if spreads[0] and spreads[1]:
        if spreads[1].low > spreads[0].high:
            parted = "higher"
        elif spreads[1].high < spreads[0].low:
            parted = "lower"
    ratios = [
        f"{s.middle:.3g} ({s.low:.3g}–{s.high:.3g})" if s else ("refused" if found["refused"] else "skipped")
        for s, found in zip(spreads, (a, b), strict=True)
    ]
    return _joined((a["row"], a["against"], a["ours"], b["ours"], quotient, *ratios, parted))


def _seconds(found: Record) -> float | None:
    values = found["details"].get("seconds", {}).get("ours")
    return median(values) if values else None


def _joined(cells: Sequence[str]) -> str:
    return " ".join(f"{cell:<{width}}" for cell, width in zip(cells, (*WIDTHS, 0), strict=True)).rstrip()
