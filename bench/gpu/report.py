"""The report of all shipped kernels on one card, as Markdown and as JSON: inspected, and modelled."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Any

from mtl_fast.kernels.triton.inspection import Inspection
from mtl_fast.kernels.triton.launch import Launch
from mtl_fast.text_table import grid

from .cards import Card
from .launches import Count
from .model import modelled

COLUMNS = {
    "launch": "name",
    "regs": "registers",
    "spill": "spilled",
    "shared": "shared",
    "CTAs": "programs",
    "matrix instruction": "matrix",
    "loop": "loop",
    "MFLOP": "flop",
    "KB": "n_bytes",
    "products": "products",
    "memory": "memory",
    "L2": "l2",
    "issue": "issue",
    "waves": "waves",
    "padding": "padding",
    "µs": "seconds",
    "limit": "limit",
}
MICROSECONDS = ("products", "memory", "l2", "issue", "seconds")
Row = dict[str, Any]
# Program → input size → what a step of it launches.
Steps = Mapping[str, Mapping[int, Count]]


def rows(launches: Mapping[str, Launch], found: Mapping[str, Inspection], card: Card) -> list[Row]:
    """A row a launch: what its code takes of the chip, and each term of its modelled time."""
    made = []
    for name, launch in launches.items():
        inspection = found[name]
        time = modelled(launch, inspection, card)
        work = launch.work
        made.append(
            {"name": name, "kernel": launch.name, "grid": prod(launch.grid)}
            | asdict(inspection)
            | {"flop": work.flop, "n_bytes": work.read + work.written}
            | {"products": time.products, "memory": time.memory, "l2": time.l2, "issue": time.issue}
            | {"waves": time.waves, "padding": time.padding, "seconds": time.seconds, "limit": time.limit}
        )
    return made


def markdown(made: Sequence[Row], steps: Steps, card: Card) -> str:
    """The page."""
    head = list(COLUMNS)
    body = [[_cell(row, column) for column in COLUMNS.values()] for row in made]
    modelled_as = (
        f"Triton {version('triton')}. Registers, spills, shared memory, instructions: of the compiled code. "
        "**Times are modelled, none was measured**: max(products, memory, L2, issue) × waves, padding "
        "inside products and issue, all in µs; "
        f"`bench/gpu/model.py` says how. The card's figures are those of the {card.source}."
    )
    counted = (
        "2 tasks, 5-way 5-shot, 15 queries, ResNet-12 64-128-256-512, first order, 100 inner steps, Adam. "
        "**Counted** on tensors that hold nothing, by `bench/gpu/launches.py`; ours in a half type, the plain "
        "program a task at a time in float32, both eagerly."
    )
    return "\n".join(
        [
            f"# GPU kernels on {card.title} ({card.capability})",
            "",
            modelled_as,
            "",
            grid(head, body, "markdown"),
            "",
            "## Launches of a whole meta-training step",
            "",
            counted,
            "",
            steps_table(steps),
            "",
        ]
    )


def _cell(row: Row, column: str) -> str:
    value = row[column]
    if column in MICROSECONDS:
        return f"{value * 1e6:.1f}" if value else "–"
    if column in ("waves", "padding"):
        return f"{value:.2f}"
    if column == "flop":
        return f"{value / 1e6:.0f}"
    if column == "n_bytes":
        return f"{value / 1e3:.0f}"
    return str(value) or "–"


def steps_table(steps: Steps) -> str:
    """A line a program and input size, the plain program's launches over it."""
    body = []
    for program, by_size in steps.items():
        for pixels, count in by_size.items():
            fewer = steps["plain PyTorch"][pixels].launches / count.launches
            body.append(
                [
                    f"{program} @ {pixels}",
                    str(count.launches),
                    f"{count.kernels.total()} + {count.operators.total()}",
                    f"{count.n_bytes / 1e9:.2f}",
                    f"{fewer:.1f}×",
                ]
            )
    head = ["step", "launches", "kernels of ours + PyTorch's", "compulsory GB", "fewer"]
    return grid(head, body, "markdown")


def write(folder: Path, made: Sequence[Row], steps: Steps, card: Card) -> Path:
    """Writes kernels-<card>.md and .json, and returns the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / f"kernels-{card.name}.md"
    page.write_text(markdown(made, steps, card), encoding="utf-8")
    counted = {name: {str(size): vars(count) for size, count in by.items()} for name, by in steps.items()}
    facts = {"card": asdict(card), "triton": version("triton"), "times": "modelled", "steps": counted}
    # A row a line, so that a difference shows which kernels changed.
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in made)
    text = json.dumps(facts, ensure_ascii=False)[:-1] + f', "kernels": [\n{lines}\n]}}\n'
    page.with_suffix(".json").write_text(text, encoding="utf-8")
    return page
