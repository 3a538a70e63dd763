"""Writes bench/results/kernels-<card>.md and .json for every card: what each configuration takes, and its modelled time.

Needs no GPU. Beside the kernels stand the launches of a whole meta-training step, ours and the plain program's.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

from bench.gpu import launches as counting
from bench.gpu import report
from bench.gpu.cards import CARDS
from bench.gpu.launches import Count
from mtl_fast.kernels.triton.inspection import Inspection, inspected
from mtl_fast.kernels.triton.shipped import configurations, distinct, shipped
from tools.gpu_proof import INSPECTIONS

ROOT = Path(__file__).resolve().parents[1]
WIDTHS, SIZES = (64, 128, 256, 512), (84, 32)


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
    steps = {"plain PyTorch": {size: counting.plain(WIDTHS, size) for size in SIZES}, "ours": ours()}
    for card in (card for card in CARDS if card.name in options.cards):
        launches = shipped(card.capability)
        chosen = list(launches) if options.every_launch else configurations(launches)
        groups = distinct({name: launches[name] for name in chosen})
        found: dict[str, Inspection] = {}
        for name, inspection in inspected([(name, card.capability) for name in groups], kept=INSPECTIONS):
            found |= dict.fromkeys(groups[name], inspection)
        made = report.rows({name: launches[name] for name in chosen}, found, card)
        print(report.write(options.output, made, steps, card), flush=True)


def ours() -> dict[int, Count]:
    """Counted in a process of its own, where kernels are interpreted and take tensors of the CPU."""
    done = subprocess.run(
        [sys.executable, "-m", "tools.kernel_report", "count"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return {int(size): _count(fields) for size, fields in json.loads(done.stdout.splitlines()[-1]).items()}


def _count(fields: dict[str, dict[str, int] | int]) -> Count:
    kernels, operators, n_bytes = (fields[name] for name in ("kernels", "operators", "n_bytes"))
    return Count(Counter(kernels), Counter(operators), int(str(n_bytes)))


if __name__ == "__main__":
    if sys.argv[1:] == ["count"]:
        print(json.dumps({size: vars(counting.ours(WIDTHS, size)) for size in SIZES}))
    else:
        main()
