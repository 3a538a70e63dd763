"""Writes bench/results/kernels-<card>.md and .json for every card: what each configuration takes, and its modelled time.

Needs no GPU. Beside the kernels stand the launches of a whole meta-training step, ours and the plain program's.
"""

from __future__ import annotations

import argparse
import time
from itertools import islice
from pathlib import Path

from bench.gpu import launches as counting
from bench.gpu import report
from bench.gpu.cards import CARDS
from mtl_fast.kernels.triton.inspection import Inspection, inspected
from mtl_fast.kernels.triton.launch import Launch
from mtl_fast.kernels.triton.shipped import configurations, distinct, shipped
from tools.gpu_proof import INSPECTIONS

ROOT = Path(__file__).resolve().parents[1]
WIDTHS, SIZES = (64, 128, 256, 512), (84, 32)
PROGRESS = 50  # launches from one word to the next


def main(arguments: list[str] | None = None) -> None:
    """Compiles for each card's chip, counts, and writes the pages."""
    parser = argparse.ArgumentParser(prog="python -m tools.kernel_report", description=__doc__)
    names = [card.name for card in CARDS]
    parser.add_argument("--cards", nargs="*", choices=names, default=names)
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument(
        "--every-launch", action="store_true", help="not one launch of each configuration only"
    )
    options = parser.parse_args(arguments)
    began = time.monotonic()

    def say(text: object) -> None:
        print(f"{time.monotonic() - began:5.0f} s  {text}", flush=True)

    say("counting the launches of a step")
    steps = {"plain PyTorch": {size: counting.plain(WIDTHS, size) for size in SIZES}}
    steps |= counting.ours_elsewhere(WIDTHS, SIZES)
    say("describing what is shipped")
    cards = [card for card in CARDS if card.name in options.cards]
    launches = {card: _modelled(card.capability, every=options.every_launch) for card in cards}
    groups = {card: distinct(launches[card]) for card in cards}
    jobs = [(name, card.capability) for card in cards for name in groups[card]]
    say(f"compiling {len(jobs)} launches for {', '.join(card.title for card in cards)}")
    # One pool of workers for all cards; what was read off a code is kept: a second run only reads.
    results = inspected(jobs, kept=INSPECTIONS)
    for card in cards:
        found: dict[str, Inspection] = {}
        for i, (name, inspection) in enumerate(islice(results, len(groups[card])), 1):
            found |= dict.fromkeys(groups[card][name], inspection)
            if i % PROGRESS == 0:
                say(f"{card.name}: {i} of {len(groups[card])}")
        made = report.rows(launches[card], found, card)
        say(report.write(options.output, made, steps, card))


def _modelled(capability: str, *, every: bool) -> dict[str, Launch]:
    """What is shipped for a chip, of each configuration one launch or `every` one."""
    # Products for lost channels alone have nothing to do as a rule: there is no time to model.
    launches = {
        name: launch
        for name, launch in shipped(capability).items()
        if launch.work.flop or not launch.work.matrix
    }
    return launches if every else {name: launches[name] for name in configurations(launches)}


if __name__ == "__main__":
    main()
