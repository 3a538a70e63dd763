"""On a machine with an NVIDIA GPU: correctness in all dtypes, times of every kernel and operation, and a whole step.

Writes one report, gpu-check-<card>.md and .json. What fails its correctness is not timed. Elsewhere it is a dry run:
every part is named with the reason for which it was left out.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.gpu.cards import CARDS
from mtl_fast.errors import InputError
from mtl_fast.ops import routes
from mtl_fast.text_table import grid
from mtl_fast.tune import require_gpu

ROOT = Path(__file__).resolve().parents[1]
HEAD = [
    "",
    "kernel, µs",
    "launcher, µs",
    "wall, µs",
    "graph, µs",
    "TFLOP/s",
    "GB/s",
    "of its limit",
    "peak MB",
]


@dataclass
class Section:
    """A part's result: a table, or a line; `failed` if something is wrong."""

    title: str
    rows: list[list[str]] = field(default_factory=list)
    note: str = ""
    failed: bool = False

    def __str__(self) -> str:
        lines = [f"## {self.title}", "", self.note] if self.note else [f"## {self.title}"]
        return "\n".join([*lines, "", grid(HEAD, self.rows, "markdown")] if self.rows else lines)


@dataclass(frozen=True)
class Part:
    """A part of the check, by name; `contents` names what it consists of, where that is more than one thing."""

    name: str
    run: Callable[[torch.device], Section]
    contents: Callable[[], Iterable[str]] = tuple

    def named(self) -> list[str]:
        """A line for each of its contents."""
        return [f"{self.name}: {content}" for content in self.contents()] or [self.name]


def checked() -> Iterator[str]:
    """What `correctness` consists of."""
    from tests.gpu.checks import summary

    yield "the interpreter's tests, with every launch on the device"
    yield from summary()


def correctness(_: torch.device) -> Section:
    """The tests of the interpreter with launches on the device, and operations in every dtype by every route."""
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:benchmark"]
    section = Section("Correctness")
    for tests in (
        ["-p", "tests.gpu.device.plugin", "tests/gpu/interpreted"],
        ["-m", "gpu", "tests/gpu/device"],
    ):
        done = subprocess.run([*pytest, *tests], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        print(done.stdout, flush=True)
        section.note += f"{tests[-1]}: {done.stdout.strip().splitlines()[-1]}. "
        section.failed |= done.returncode != 0
    return section


def kernels(device: torch.device) -> Section:
    """Every configuration by itself, beside the limit that the model gives."""
    from bench.gpu.cases import materialised
    from bench.gpu.model import modelled
    from bench.gpu.timing import measured
    from mtl_fast.kernels.triton.inspection import inspect
    from mtl_fast.kernels.triton.shipped import configurations, shipped

    major, minor = torch.cuda.get_device_capability(device)
    same_chip = [card for card in CARDS if card.capability == f"sm_{major}{minor}"]
    section = Section(
        "Kernels",
        note=f"p20 / p50 / p80; the limit is modelled for {same_chip[0].title}"
        if same_chip
        else "p20 / p50 / p80",
    )
    # A chip without configurations of its own has the base's.
    launches = shipped(same_chip[0].capability) if same_chip else shipped()
    for name in configurations(launches):
        launch = materialised(launches[name], device)
        limit = (
            modelled(launch, inspect(launch, same_chip[0].chip), same_chip[0]).seconds if same_chip else None
        )
        work = launch.work
        section.rows.append(row(name, measured(launch.start), work.flop, work.read + work.written, limit))
    return section


def operations(device: torch.device) -> Section:
    """Layers with their gradients, beside PyTorch channels-last, compiled, and max-autotuned."""
    from bench.gpu.cases import convolutions

    return contested("Operations against PyTorch in bfloat16, cudnn.benchmark on", convolutions(device))


def whole_step(device: torch.device) -> Section:
    """A meta-training step at both input sizes."""
    from bench.gpu.cases import STEP, whole_step

    contests = (whole_step(device, pixels, STEP, torch.bfloat16) for pixels in (84, 32))
    return contested("Meta-training step, 2 tasks, 5-way 5-shot, first order, 100 inner steps", contests)


def contested(title: str, contests: Any) -> Section:
    """A row a contender."""
    from bench.gpu.timing import measured

    section = Section(title, note="p20 / p50 / p80")
    for contest in contests:
        for name, build in contest.contenders.items():
            section.rows.append(row(f"{contest.name}: {name}", measured(build())))
    return section


def row(name: str, times: Any, flop: int = 0, n_bytes: int = 0, limit: float | None = None) -> list[str]:
    """A row of the table; what is 0 or not known is a dash."""
    seconds = times.kernel.p50
    return [
        name,
        str(times.kernel),
        str(times.launcher),
        str(times.wall),
        str(times.graph or "–"),
        f"{flop / seconds / 1e12:.1f}" if flop else "–",
        f"{n_bytes / seconds / 1e9:.0f}" if n_bytes else "–",
        f"{limit / seconds:.0%}" if limit else "–",
        f"{times.peak / 1e6:.1f}",
    ]


PARTS = (
    Part("correctness on the device", correctness, checked),
    Part("kernels: kernel, launcher, wall and graph-replay times", kernels),
    Part("operations against PyTorch", operations),
    Part("meta-training step", whole_step),
)


def main(arguments: list[str] | None = None) -> int:
    """0 if nothing is wrong, or nothing could be run; 1 if a part failed."""
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_check", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "results")
    options = parser.parse_args(arguments)
    try:
        device = require_gpu(options.device)
    except InputError as error:
        print("gpu-check: a dry run, nothing was measured")
        for name in (name for part in PARTS for name in part.named()):
            print(f"skipped: {name}: {error}")
        return 0
    torch.backends.cudnn.benchmark = True
    sections = run_parts(PARTS, device)
    print(write(options.output, sections, device))
    return int(any(section.failed for section in sections))


def run_parts(parts: Sequence[Part], device: torch.device) -> list[Section]:
    """One after the other; after a failure nothing more, for no time of a wrong kernel counts."""
    sections: list[Section] = []
    for part in parts:
        print(f"gpu-check: {part.name}", flush=True)
        sections.append(part.run(device))
        if sections[-1].failed:
            break
    return sections


def write(folder: Path, sections: Sequence[Section], device: torch.device) -> Path:
    """The report's page, and the same as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = routes.facts(device)
    card = facts["card"]
    page = folder / f"gpu-check-{'-'.join(card.lower().split())}.md"
    versions = ", ".join(f"{name} {value}" for name, value in facts.items() if name != "card")
    text = "\n\n".join([f"# Measured on {card}", f"{versions}.", *map(str, sections)])
    page.write_text(text + "\n", encoding="utf-8")
    stored = {"facts": facts, "head": HEAD, "sections": [asdict(section) for section in sections]}
    page.with_suffix(".json").write_text(json.dumps(stored, ensure_ascii=False, indent=1) + "\n", "utf-8")
    return page


if __name__ == "__main__":
    raise SystemExit(main())
