"""Writes the table of docs/gpu.md: for every file of GPU kernels, what was executed on what, and what was only compiled.

The emulator's column comes from its tests themselves: they are run with the executor replaced by one that notes what
it would execute. `tests/gpu/test_kernel_table.py` compares the page with what comes out.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mtl_fast.kernels.triton.ahead import CHIPS
from mtl_fast.kernels.triton.launch import Launch
from mtl_fast.kernels.triton.shipped import configurations, shipped
from mtl_fast.text_table import grid
from tests.gpu import budgets

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "gpu.md"
BEGIN, END = "<!-- kernels: python -m tools.kernel_table -->", "<!-- end of kernels -->"
KERNELS, TESTS = ROOT / "kernels" / "triton", ROOT / "tests" / "gpu"
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
# Where the interpreter runs the kernels of a file, in float32 and float16, against float64.
INTERPRETED = {
    "base_learner": "test_base_learner",
    "base_learner_backward": "test_base_learner",
    "base_learner_loop_backward": "test_base_learner",
    "effective_weights": "test_effective_weights",
    "epilogue": "test_routes",
    "epilogue_backward": "test_epilogue_backward",
    "episode_norm": "test_episode_norm",
    "episode_norm_backward": "test_episode_norm",
    "images": "test_images",
    "partial_sums": "test_scale_gradient",
    "scale_gradient": "test_scale_gradient",
    "ss_conv_first_layer": "test_ss_conv",
    "ss_conv_product": "test_ss_conv",
}
# (chip, type) by the file of the kernel.
Executed = Mapping[str, Iterable[tuple[str, str]]]


def kernels_of() -> dict[str, list[str]]:
    """The kernels of each file that has any."""
    found = {
        path.stem: re.findall(r"^def (\w+_kernel)\(", path.read_text("utf-8"), re.MULTILINE)
        for path in sorted(KERNELS.glob("*.py"))
    }
    return {stem: names for stem, names in found.items() if names}


def table(executed: Executed, launches: Mapping[str, Launch], stored: budgets.Budgets) -> str:
    """A line a file of kernels.

    Args:
        executed: what the emulator's tests execute.
        launches: those that are shipped, whose configurations are compiled.
        stored: budgets of what was compiled for every chip.
    """
    compiled = {
        version: {
            _file(launches[name]) for name in configurations(launches) if None not in by.get(name, [None])
        }
        for version, by in stored.items()
    }
    body = []
    for stem, names in kernels_of().items():
        by_type: dict[str, set[str]] = {}
        for chip, kind in executed.get(stem, ()):
            by_type.setdefault(kind, set()).add(chip)
        emulated = {chip for chips in by_type.values() for chip in chips}
        by_chips: dict[str, list[str]] = {}
        for kind, chips in sorted(by_type.items()):
            by_chips.setdefault(_chips(chips), []).append(kind)
        body.append(
            [
                f"`{stem}`",
                ", ".join(name.removesuffix("_kernel") for name in names),
                f"fp32, fp16: `{INTERPRETED[stem]}`",
                "; ".join(f"{chips}: {', '.join(kinds)}" for chips, kinds in by_chips.items()) or "–",
                _chips(set(CHIPS) - emulated),
                ", ".join(version for version, stems in compiled.items() if stem in stems) or "–",
                "not run",
            ]
        )
    head = [
        "file",
        "kernels",
        "interpreted",
        "executed by the emulator",
        "compiled only",
        "by Triton",
        "device",
    ]
    return grid(head, body, "markdown")


def _chips(chips: Iterable[str]) -> str:
    return ", ".join(chip for chip in CHIPS if chip in set(chips)) or "–"


def _file(launch: Launch) -> str:
    """Of the launch's kernel, without its ending."""
    return str(launch.kernel.__module__).rpartition(".")[2]


def kind_of(launch: Launch) -> str:
    """What its products and images are: bf16, fp16, TF32 or fp32."""
    dtypes = {v.dtype for v in launch.arguments.values() if isinstance(v, Tensor) and v.dtype in TYPES}
    narrow = dtypes - {torch.float32}
    if not narrow:
        return "TF32" if launch.constants.get("PRECISION") == "tf32" else "fp32"
    return TYPES[min(narrow, key=str)]


class Noting:
    """A pytest plugin: launches that tests have executed by the emulator are noted, and nothing is executed."""

    def __init__(self) -> None:
        self.found: dict[str, set[tuple[str, str]]] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        # Planted faults are there to fail.
        items[:] = [item for item in items if "planted" not in item.name]

    @pytest.fixture(autouse=True)
    def _noted(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from tests.gpu.ptx import launcher

        def note(launch: Launch, chip: str, *_: Any) -> None:
            self.found.setdefault(_file(launch), set()).add((chip, kind_of(launch)))

        monkeypatch.setattr(launcher, "_run", note)


def noted(folder: Path) -> dict[str, list[tuple[str, str]]]:
    """What tests of a folder execute, found in a process of its own: (chip, type) by the kernel's file."""
    done = subprocess.run(
        [sys.executable, "-m", "tools.kernel_table", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    return {stem: [(chip, kind) for chip, kind in pairs] for stem, pairs in found.items()}


def written(page: str) -> str:
    """The table that a page has between the marks."""
    return page.partition(BEGIN)[2].partition(END)[0].strip()


def main() -> None:
    """Writes the table into the page; with a folder of tests, prints what they execute."""
    if sys.argv[1:]:
        noting = Noting()
        # Tests fail, for nothing is executed; what they would have executed is all that counts.
        options = ["-q", "--tb=no", "-p", "no:cacheprovider", "-p", "no:benchmark", "-p", "no:xdist"]
        pytest.main([*options, *sys.argv[1:]], plugins=[noting])
        print("\n" + json.dumps({stem: sorted(pairs) for stem, pairs in noting.found.items()}))
        return
    made = table(noted(TESTS / "execution"), shipped(), budgets.read())
    text = PAGE.read_text("utf-8")
    before, _, rest = text.partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{made}\n\n{END}{rest.partition(END)[2]}", "utf-8")


if __name__ == "__main__":
    main()
