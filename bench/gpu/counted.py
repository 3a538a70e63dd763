"""The GPU launches of a meta-training step, counted without a GPU: a row of `python -m bench step`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from bench.harness import Line, Measurable, Settings, Target
from bench.networks import FULL, SLIM

from .launches import INNER, N_TASKS, ours_elsewhere, plain

PLAIN = "per task, eager"
# A step launches the same at any number of pixels; at two there is no doubt of it.
SIZES = (84, 32)


@dataclass(frozen=True)
class LaunchRow:
    """The plain program's launches over ours, of one size of images; nothing is timed."""

    name: str
    pixels: int
    target: Target

    def measure(self, settings: Settings) -> Iterable[Line]:
        if find_spec("triton") is None:
            return [Line(self.name, skipped="Triton is not installed, whose launches are counted")]
        widths = SLIM if settings.quick else FULL
        try:
            ways = ours_elsewhere(widths, [self.pixels])
        except RuntimeError as error:
            return [Line(self.name, skipped=f"ours could not be counted: {error}")]
        theirs = plain(widths, self.pixels)
        count = ways["ours"][self.pixels]
        others = [
            f"{way.removeprefix('ours, ')}: {by_size[self.pixels].launches}"
            for way, by_size in ways.items()
            if way != "ours"
        ]
        return [
            Line(
                self.name,
                implementation="triton",
                ours=f"{count.launches}",
                against=PLAIN,
                peers=(PLAIN,),
                peer=f"{theirs.launches}",
                values=(theirs.launches / count.launches,),
                target=self.target,
                unit="× fewer",
                note=f"counted on tensors that hold nothing, not timed; {'; '.join(others)}",
                details={
                    "launches": {way: by_size[self.pixels].launches for way, by_size in ways.items()}
                    | {PLAIN: theirs.launches},
                    "parts": dict(count.parts),
                },
            )
        ]


def rows(quick: bool) -> Sequence[Measurable]:
    return [
        LaunchRow(
            f"GPU launches of a meta-training step (counted), first order, ResNet-12 @ {pixels}, "
            f"{N_TASKS} tasks, {INNER.n_steps} steps",
            pixels,
            Target(20, 40),
        )
        for pixels in (SIZES[1:] if quick else SIZES)
    ]
