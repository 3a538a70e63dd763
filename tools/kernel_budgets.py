"""Stores how long the main loop of every configuration is, for every chip, with the Triton that is installed.

`make kernel-budgets` runs it with each version; the difference of tests/gpu/budgets.json is what to review.
"""

from __future__ import annotations

import argparse

from mtl_fast.kernels.triton.ahead import CHIPS
from mtl_fast.kernels.triton.inspection import inspected
from mtl_fast.kernels.triton.shipped import configurations, shipped
from tests.gpu import budgets
from tools.gpu_proof import INSPECTIONS


def main(arguments: list[str] | None = None) -> None:
    """Compiles what is not known yet and writes the file."""
    parser = argparse.ArgumentParser(prog="python -m tools.kernel_budgets", description=__doc__)
    parser.add_argument(
        "--chips", nargs="*", choices=CHIPS, default=list(CHIPS), help="others keep what is stored"
    )
    options = parser.parse_args(arguments)
    jobs = [(name, chip) for chip in options.chips for name in configurations(shipped(chip))]
    lengths: dict[str, dict[str, int]] = {}
    for name, found in inspected(jobs, kept=INSPECTIONS):
        lengths.setdefault(name, {})[found.chip] = found.loop
    budgets.write(lengths, options.chips)
    print(f"{len(lengths)} configurations for {', '.join(options.chips)}: {budgets.FILE.name}")


if __name__ == "__main__":
    main()
