"""Stores how long the main loop of every configuration is, for every chip, with the Triton that is installed.

`make kernel-budgets` runs it with each version; the difference of tests/gpu/budgets.json is what to review.
"""

from __future__ import annotations

from mtl_fast.kernels.triton.ahead import CHIPS
from mtl_fast.kernels.triton.inspection import inspected
from mtl_fast.kernels.triton.shipped import configurations, shipped
from tests.gpu import budgets


def main() -> None:
    """Compiles everything and writes the file."""
    lengths: dict[str, dict[str, int]] = {}
    for name, found in inspected(configurations(shipped()), CHIPS):
        lengths.setdefault(name, {})[found.chip] = found.loop
    budgets.write(lengths)
    print(f"{len(lengths)} configurations for {len(CHIPS)} chips: {budgets.FILE.name}")


if __name__ == "__main__":
    main()
