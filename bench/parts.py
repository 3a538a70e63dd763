"""The parts of the benchmark, by name: what each measures, and its rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module

from .harness import Measurable


@dataclass(frozen=True)
class Part:
    """What `python -m bench NAME` runs.

    Attributes:
        what: in a few words.
        modules: where its rows come from, each with a function `rows(quick)`.
    """

    what: str
    modules: tuple[str, ...]

    def rows(self, quick: bool) -> list[Measurable]:
        return [row for name in self.modules for row in _rows_of(name)(quick)]


def _rows_of(module: str) -> Callable[[bool], Sequence[Measurable]]:
    found: Callable[[bool], Sequence[Measurable]] = import_module(f"bench.{module}").rows
    return found


PARTS = {
    "ops": Part("convolution, encoder, base-learner", ("ops.bench_ss_conv", "encoder", "fits")),
    "step": Part("the meta-training step, its time, its memory, its launches", ("step", "gpu.counted")),
    "maml": Part("the step of MAML, its time and its memory", ("inner_loops",)),
    "pretrain": Part("the pre-training step", ("pretrain",)),
    "evaluate": Part("evaluation of many tasks", ("evaluate",)),
    "libraries": Part("other libraries on the jobs they share with us, where installed", ("libraries",)),
    "scaling": Part("time against tasks, shots, ways, inner steps, width", ("scaling",)),
}
ALL = "all"


def rows_of(part: str, quick: bool) -> list[Measurable]:
    """The rows of a part, or of all parts."""
    names = PARTS if part == ALL else (part,)
    return [row for name in names for row in PARTS[name].rows(quick)]
