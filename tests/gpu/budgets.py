"""Stored lengths of main loops: the most instructions that each shipped kernel may have, by Triton's version and chip.

A change that makes a loop longer has to store the new length (`make kernel-budgets`), where a reviewer sees it.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from importlib.metadata import version
from pathlib import Path

from mtl_fast.kernels.triton.ahead import CHIPS

FILE = Path(__file__).with_name("budgets.json")
# Triton's version → name of a launch → instructions for each of `CHIPS`, in their order; None for a chip on which another
# launch stands for its configuration (`configurations`).
Budgets = dict[str, dict[str, list[int | None]]]


def read(path: Path = FILE) -> Budgets:
    """What is stored; nothing where there is no file yet."""
    return json.loads(path.read_text("utf-8")) if path.exists() else {}


def longest_loop(budgets: Budgets, name: str, chip: str) -> int | None:
    """The most instructions of a launch's main loop, by the Triton that is installed; None if none is stored."""
    lengths = budgets.get(version("triton"), {}).get(name)
    return None if lengths is None else lengths[list(CHIPS).index(chip)]


def write(lengths: Mapping[str, Mapping[str, int]], chips: Collection[str], path: Path = FILE) -> None:
    """Stores those of the installed Triton for some chips, name → chip → instructions; other chips keep theirs.

    A chip whose launch has another's configuration under another name has None there.
    """
    stored = read(path)
    before = stored.get(version("triton"), {})
    after = {
        name: [
            lengths.get(name, {}).get(chip) if chip in chips else old
            for chip, old in zip(CHIPS, before.get(name, [None] * len(CHIPS)), strict=True)
        ]
        for name in before.keys() | lengths.keys()
    }
    stored[version("triton")] = {name: row for name, row in after.items() if row != [None] * len(CHIPS)}
    parts = []
    for name in sorted(stored):
        lines = (f"    {json.dumps(key)}: {json.dumps(stored[name][key])}" for key in sorted(stored[name]))
        parts.append(f"  {json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n  }")
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")
