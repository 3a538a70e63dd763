"""The table on the terminal, and the same lines for a file."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from .harness import Line, Measurable, Settings, Spread, Target, geometric_mean

HEADINGS = ("row", "ours", "against", "ratio (p20–p80), best/best", "of peak", "target")
WIDTHS = (62, 9, 40, 32, 8)


def lines_of(rows: Iterable[Measurable], settings: Settings) -> Iterator[Line]:
    """Measures the rows one after the other; a family's mean follows its last row."""
    family: list[Line] = []
    for row in rows:
        for line in row.measure(settings):
            if family and line.family != family[0].family:
                yield from _mean(family)
                family = []
            if line.family:
                family.append(line)
            yield line
    yield from _mean(family)


def _mean(family: list[Line]) -> Iterator[Line]:
    if family and family[0].family:
        yield geometric_mean(family[0].family, family)


def machine() -> dict[str, str | int]:
    """What a figure must be read with."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": _processor(),
        "vector": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "dtype": "float32",
    }


def _processor() -> str:
    try:
        models = [
            m for m in Path("/proc/cpuinfo").read_text("utf-8").splitlines() if m.startswith("model name")
        ]
        return models[0].split(":")[1].strip()
    except (OSError, IndexError):
        return platform.processor() or platform.machine()


def header(settings: Settings) -> str:
    facts = ", ".join(f"{key} {value}" for key, value in machine().items())
    quick = "quick: not to be quoted\n" if settings.quick else ""
    return (
        f"{quick}{facts}; {settings.rounds} rounds, interleaved; median of the ratios of each round\n"
        "Of peak: arithmetic of the direct algorithm against a large matrix product of the same run; "
        "Winograd's algorithm can exceed it.\n" + _columns(HEADINGS)
    )


def text(line: Line, settings: Settings) -> str:
    """One line of the table, and its note below."""
    note = f"\n    note: {line.note}" if line.note else ""
    spread = line.spread
    if spread is None:
        return f"{line.row:<{WIDTHS[0]}} refused: {line.refused}{note}"
    ratio = f"{_value(spread.middle, line.unit)} ({_range(spread, line.unit)})"
    if line.best is not None:
        ratio += f", {_value(line.best, line.unit)}"
    share = "" if line.share is None else f"{line.share:.0%}"
    # Small shapes have no target.
    judged = line.target is not None and not settings.quick
    target = verdict(line.target, spread.middle, line.unit) if judged else ""
    return _columns((line.row, line.ours, line.peer, ratio, share, target)) + note


def verdict(target: Target, value: float, unit: str) -> str:
    sign = "≤" if target.at_most else "≥"
    parts = [
        f"{name} {sign} {_value(bound, unit)} {'holds' if holds else 'MISSED'}"
        for name, bound, holds in zip(
            ("must", "aim"), (target.must, target.aim), target.holds(value), strict=True
        )
    ]
    return ", ".join(parts)


def record(line: Line, settings: Settings) -> str:
    """The line as JSON, with the machine."""
    fields = asdict(line)
    fields["spread"] = None if line.spread is None else asdict(line.spread)
    if line.spread is not None and line.target is not None and not settings.quick:
        fields["must_holds"], fields["aim_holds"] = line.target.holds(line.spread.middle)
    return json.dumps(machine() | asdict(settings) | fields, ensure_ascii=False)


def _value(value: float, unit: str) -> str:
    if unit == "%":
        return f"{value:+.1%}"
    return f"{value:,.0f}{unit}" if value >= 1000 else f"{value:.3g}{unit}"


def _range(spread: Spread, unit: str) -> str:
    return f"{_value(spread.low, unit)}–{_value(spread.high, unit)}"


def _columns(cells: tuple[str, ...]) -> str:
    return " ".join(f"{cell:<{width}}" for cell, width in zip(cells, (*WIDTHS, 0), strict=True)).rstrip()
