"""The report of all shipped kernels on one card, as Markdown and as JSON: inspected, and modelled."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Any

from mtl_fast.kernels.triton.inspection import Inspection
from mtl_fast.kernels.triton.launch import Launch
from mtl_fast.text_table import grid

from .cards import REACHED_MATRIX, REACHED_MEMORY, Card
from .launches import GRAPH, Count
from .model import l2_bytes, modelled

COLUMNS = {
    "launch": "name",
    "programs": "grid",
    "warps": "num_warps",
    "regs": "registers",
    "spill": "spilled",
    "shared KB": "shared",
    "CTAs": "programs",
    "occupancy": "occupancy",
    "matrix instruction": "matrix",
    "loop": "loop",
    "MFLOP": "flop",
    "KB": "n_bytes",
    "KB of L2": "l2_bytes",
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
KILOBYTES = ("shared", "n_bytes", "l2_bytes")
LEGEND = """\
- **programs**, **warps**: of the launch, and of a program. **regs**, **spill**: registers and bytes of local memory a
  thread. **CTAs**: programs that fit a multiprocessor at once; **occupancy**: the share of its threads that they are.
- **loop**: instructions of the main loop. **MFLOP**: of the algorithm, padding left out. **KB**: compulsory, each element
  once; **KB of L2**: what all programs together ask of L2, modelled from the blocks.
- **products**, **memory**, **L2**, **issue**: modelled terms in µs; **limit** names the largest. **waves**, **padding**:
  factors. **µs**: the modelled time, no measurement. Kernels without products have no issue term, for their trip counts
  are not in the code: for `fit` and `loop_backward`, whose steps wait for each other, it is far below what they take."""
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
        threads = inspection.programs * inspection.num_warps * 32
        made.append(
            {"name": name, "kernel": _kernel(launch), "grid": prod(launch.grid)}
            | asdict(inspection)
            | {"occupancy": threads / card.chip.threads, "flop": work.flop}
            | {"n_bytes": work.read + work.written, "l2_bytes": l2_bytes(work)}
            | {"products": time.products, "memory": time.memory, "l2": time.l2, "issue": time.issue}
            | {"waves": time.waves, "padding": time.padding, "seconds": time.seconds, "limit": time.limit}
        )
    return made


def _kernel(launch: Launch) -> str:
    """With its file, for two files have a `sums_kernel`."""
    return f"{str(launch.kernel.__module__).rpartition('.')[2]}.{launch.name}"


def markdown(made: Sequence[Row], steps: Steps, card: Card) -> str:
    """The page: the card, all kernels in short, a table for each, and the launches of a step."""
    chip, n_spilling = card.chip, sum(bool(row["spilled"]) for row in made)
    facts = (
        f"{card.multiprocessors} multiprocessors at {card.clock / 1e9:.3g} GHz, each with {chip.registers} registers, "
        f"{chip.shared_all // 1024} KB of shared memory ({chip.shared // 1024} KB a program) and {chip.threads} threads; "
        f"tensor cores {card.half / 1e12:.0f} TFLOP/s in half types and {card.tf32 / 1e12:.0f} in TF32, both dense, "
        f"float32 units {card.fp32 / 1e12:.3g}; memory {card.memory / 1e12:.3g} TB/s: {card.source}. The model takes "
        f"{REACHED_MATRIX:.0%} of the tensor cores, {REACHED_MEMORY:.0%} of memory, and {card.l2 / 1e12:.2g} TB/s of L2."
    )
    modelled_as = (
        f"Triton {version('triton')}; {len(made)} configurations, {n_spilling} of which spill. Registers, spills, shared "
        "memory, instructions: of the compiled code. **Times are modelled, none was measured**: max(products, memory, "
        "L2, issue) × waves, padding inside products and issue; `bench/gpu/model.py` says how."
    )
    counted = (
        "2 tasks, 5-way 5-shot, 15 queries, ResNet-12 64-128-256-512, first order, 100 inner steps, with the training "
        "loop's update. **Counted** on tensors that hold nothing, by `bench/gpu/launches.py`; ours in a half type, the "
        "plain program a task at a time in float32, with Adam. A captured step is called with one launch of its graph "
        "and the copies of its tensors; what the graph holds is the line above."
    )
    sections = [
        f"# GPU kernels on {card.title} ({card.capability})",
        facts,
        modelled_as,
        _summary(made),
        LEGEND,
    ]
    head = list(COLUMNS)
    for kernel in dict.fromkeys(row["kernel"] for row in made):
        body = [[_cell(row, c) for c in COLUMNS.values()] for row in made if row["kernel"] == kernel]
        sections += [f"## {kernel}", grid(head, body, "markdown")]
    sections += ["## Launches of a whole meta-training step", counted, steps_table(steps)]
    if parts := parts_table(steps):
        sections += ["Where ours go:", parts]
    return "\n\n".join(sections) + "\n"


def _summary(made: Sequence[Row]) -> str:
    """A line a kernel, over its configurations."""
    body = []
    for kernel in dict.fromkeys(row["kernel"] for row in made):
        own = [row for row in made if row["kernel"] == kernel]
        limits = Counter(row["limit"] for row in own).most_common()
        body.append(
            [
                kernel,
                str(len(own)),
                _span([row["registers"] for row in own]),
                str(sum(bool(row["spilled"]) for row in own)),
                f"{max(row['shared'] for row in own) / 1024:.1f}",
                _span([row["programs"] for row in own]),
                ", ".join(dict.fromkeys(row["matrix"].split(".")[0] for row in own if row["matrix"])) or "–",
                ", ".join(f"{name} {n}" for name, n in limits),
            ]
        )
    head = ["kernel", "configurations", "regs", "spill", "most shared KB", "CTAs", "matrix", "limited by"]
    return grid(head, body, "markdown")


def _span(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}–{high}"


def _cell(row: Row, column: str) -> str:
    value = row[column]
    if column == "name":
        # The section is the kernel's, and the file is in the JSON.
        return str(value).partition("/")[2].removeprefix(f"{row['kernel'].rpartition('.')[2]}/")
    if column in MICROSECONDS:
        return f"{value * 1e6:.1f}" if value else "–"
    if column in ("waves", "padding"):
        return f"{value:.2f}"
    if column == "occupancy":
        return f"{value:.0%}"
    if column == "flop":
        return f"{value / 1e6:.0f}"
    if column in KILOBYTES:
        return f"{value / 1024:.1f}" if value < 100 * 1024 else f"{value / 1024:.0f}"
    return str(value) or "–"


def steps_table(steps: Steps) -> str:
    """A line a program and input size, the plain program's launches over it."""
    body = []
    for program, by_size in steps.items():
        for pixels, count in by_size.items():
            replayed = GRAPH in count.kernels
            fewer = steps["plain PyTorch"][pixels].launches / count.launches
            body.append(
                [
                    f"{program} @ {pixels}",
                    str(count.launches),
                    f"{count.kernels.total()} + {count.operators.total()}",
                    "as recorded" if replayed else f"{count.n_bytes / 1e9:.2f}",
                    "–" if replayed else f"{fewer:.1f}×",
                ]
            )
    head = ["step", "launches", "kernels of ours + PyTorch's", "compulsory GB", "fewer"]
    return grid(head, body, "markdown")


def parts_table(steps: Steps) -> str:
    """A line a part of a step, a column a program and size of those that know their parts; empty where none does."""
    known = {
        f"{program} @ {pixels}": count.parts
        for program, by_size in steps.items()
        for pixels, count in by_size.items()
        if program.startswith("ours") and count.parts
    }
    names = dict.fromkeys(part for parts in known.values() for part in parts)
    body = [[name, *(str(parts[name]) for parts in known.values())] for name in names]
    return grid(["part", *known], body, "markdown") if body else ""


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
