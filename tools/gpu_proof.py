"""Compiles every shipped configuration for every chip with the Triton that is installed, and holds it to the gates.

`make gpu-proof` runs it with each version of Triton; with `--every-launch` each number of channels, half type and
specialisation of a configuration is compiled as well (its main loop has no budget of its own). What passed is
remembered in bench/results/gpu-proof.json by a digest of the sources, so that an unchanged tree is not compiled again,
on any machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import subprocess
import sys
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from mtl_fast.files import user_cache
from mtl_fast.kernels.triton.ahead import CHIPS
from mtl_fast.kernels.triton.inspection import faults, inspected
from mtl_fast.kernels.triton.shipped import configurations, distinct, shipped
from tests.gpu import budgets

ROOT = Path(__file__).resolve().parents[1]
# The last proof with each version of Triton, of each list of chips and tests.
RECORD = ROOT / "bench" / "results" / "gpu-proof.json"
# What was read off each code, so that only what changed is compiled again, for whichever gate asks first.
INSPECTIONS = user_cache("inspections")
# What the proof depends on, beside versions and options: kernels, and what executes them.
SOURCES = (
    ("kernels", "contracts.py"),
    ("kernels/triton", "*.py"),
    ("tests", "*_cases.py"),
    ("tests/gpu", "[!t]*.*"),  # what tests share, not the tests of other things
    ("tests/gpu/execution", "*.py"),
    ("tests/gpu/ptx", "*.py"),
    ("tools", "gpu_proof.py"),
)


def main(arguments: list[str] | None = None) -> int:
    """0 if everything passes, else 1; each fault is a line."""
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_proof", description=__doc__)
    parser.add_argument("--tests", nargs="*", default=[], help="tests to run with this Triton as well")
    parser.add_argument("--chips", nargs="*", choices=CHIPS, default=list(CHIPS))
    parser.add_argument("--every-launch", action="store_true", help="all that compiles differently: an hour")
    options = parser.parse_args(arguments)
    installed = f"Triton {version('triton')}"
    what = {"triton": version("triton"), **vars(options)}
    found_before = next((proof for proof in _record() if proof["digest"] == digest(what)), None)
    if found_before is not None:
        print(
            f"gpu-proof: {installed}: {found_before['found']} ({found_before['date']}; nothing changed since)"
        )
        return 0
    start = time.monotonic()
    launches, stored = {chip: shipped(chip) for chip in options.chips}, budgets.read()
    chosen = {chip: configurations(launches[chip]) for chip in options.chips}
    jobs = [
        (name, chip)
        for chip in options.chips
        for name in (distinct(launches[chip]) if options.every_launch else chosen[chip])
    ]
    wrong = []
    for name, found in inspected(jobs, kept=INSPECTIONS):
        longest = budgets.longest_loop(stored, name, found.chip) if name in chosen[found.chip] else found.loop
        for fault in faults(launches[found.chip][name], found, longest):
            wrong.append(f"{name} for {found.chip}: {fault}")
            print(f"gpu-proof: {installed}: {wrong[-1]}", flush=True)
    summary = (
        f"{len(jobs)} of {sum(map(len, launches.values()))} shipped launches compiled for "
        f"{', '.join(options.chips)}; {len(wrong)} faults"
    )
    print(f"gpu-proof: {installed}: {summary} ({time.monotonic() - start:.0f} s)", flush=True)
    if options.tests:
        command = [sys.executable, "-m", "pytest", "-q", "-n", "auto", "-p", "no:benchmark", "-m", "proof"]
        if subprocess.run([*command, *options.tests], cwd=ROOT).returncode:
            wrong.append("tests")
    if wrong:
        return 1
    others = [proof for proof in _record() if proof["what"] != what]
    proof = {"what": what, "found": summary, "date": date.today().isoformat(), "digest": digest(what)}
    lines = (json.dumps(one) for one in sorted([*others, proof], key=lambda one: repr(one["what"])))
    RECORD.write_text("[\n  " + ",\n  ".join(lines) + "\n]\n", encoding="utf-8")
    return 0


def _record() -> list[dict[str, Any]]:
    proofs: list[dict[str, Any]] = json.loads(RECORD.read_text("utf-8")) if RECORD.exists() else []
    return proofs


def digest(what: dict[str, Any]) -> str:
    """Of all that the proof depends on: sources, versions, and what is run."""
    python = platform.python_version_tuple()[:2]
    found = hashlib.sha256(repr((torch.__version__, python, sorted(what.items()))).encode())
    for folder, pattern in SOURCES:
        for path in sorted((ROOT / folder).glob(pattern)):
            if path.is_file() and path.suffix in (".py", ".json"):
                content = path.read_bytes()
                found.update(f"{path.relative_to(ROOT)} {len(content)} ".encode() + content)
    return found.hexdigest()[:32]


if __name__ == "__main__":
    raise SystemExit(main())
