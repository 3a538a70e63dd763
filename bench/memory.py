"""Peak memory of a meta-training step, in a process of its own: `python -m bench.memory SIDE TASKS`.

What is counted is the growth of the resident set from before the network is built to the highest point of a step; the
one before it (caches, transformed weights, optimiser, compiler) is left out of the peak but not of what it keeps.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median

import torch

from .harness import Line, Settings, Target, ratios

OURS = "ours"
N_PROCESSES = 3
PROC = Path("/proc/self")


def _resident(field: str) -> int:
    """Bytes of a field of the kernel's accounting: VmRSS now, VmHWM the highest since the last reset."""
    lines = (PROC / "status").read_text("utf-8").splitlines()
    (kilobytes,) = (line.split()[1] for line in lines if line.startswith(field + ":"))
    return int(kilobytes) * 1024


def measure(side: str, n_tasks: int, *, quick: bool) -> int:
    """Bytes that a step of `n_tasks` needs; `side` is ours, two tasks at a time, or the name of a peer.

    A side that is called `inner_loops.SIDE` and something is one of the inner loops of whole networks.
    """
    from . import inner_loops, step

    problem: inner_loops.Problem | step.Problem
    if side.startswith(inner_loops.SIDE):
        problem = inner_loops.Problem(n_tasks=n_tasks, quick=quick)
    else:
        problem = step.Problem(step.Shape.of(quick=quick), n_tasks=n_tasks)
    # Compiler, optimizer and threads are there: what they keep is no side's. No side of an inner loop is compiled, but
    # the first optimizer imports the compiler all the same.
    sine = torch.sin if isinstance(problem, inner_loops.Problem) else torch.compile(torch.sin)
    one = torch.ones(1, requires_grad=True)
    sine(one).sum().backward()
    torch.optim.Adam([one]).step()
    before = _resident("VmRSS")
    take = problem.side(side)
    take()
    (PROC / "clear_refs").write_text("5", "utf-8")
    take()
    return _resident("VmHWM") - before


@cache
def in_processes(side: str, n_tasks: int, settings: Settings) -> tuple[tuple[int, ...], str]:
    """Bytes of some fresh processes, and why there are none; measured once for all rows that ask."""
    if not (PROC / "clear_refs").exists():
        return (), "this system does not tell the peak of a process (no /proc/self/clear_refs)"
    command = [
        sys.executable,
        "-m",
        "bench.memory",
        side,
        str(n_tasks),
        "--threads",
        str(torch.get_num_threads()),
    ]
    found = []
    for _ in range(1 if settings.quick else N_PROCESSES):
        done = subprocess.run(
            [*command, *(["--quick"] if settings.quick else [])], capture_output=True, text=True, check=False
        )
        if done.returncode:
            return (), f"{side}: {done.stderr.strip().splitlines()[-1]}"
        found.append(int(done.stdout.split()[-1]))
    return tuple(found), ""


@dataclass(frozen=True)
class MemoryRow:
    """Each peer's peak over ours."""

    name: str
    peers: tuple[str, ...]
    ours: str = OURS
    n_tasks: int = 2

    def measure(self, settings: Settings) -> Iterable[Line]:
        ours, why_not = in_processes(self.ours, self.n_tasks, settings)
        for name in self.peers:
            peer, why_not_peer = in_processes(name, self.n_tasks, settings)
            if why_not or why_not_peer:
                yield Line(self.name, skipped=why_not or why_not_peer)
                continue
            yield Line(
                self.name,
                against=name,
                peers=(name,),
                ours=megabytes(median(ours)),
                peer=megabytes(median(peer)),
                values=ratios(ours, peer),
                best=min(peer) / min(ours),
                details={"bytes": {OURS: ours, name: peer}},
            )


@dataclass(frozen=True)
class MemoryGrowthRow:
    """How much more a large step needs than a small one; each is a side, a number of tasks and a name."""

    name: str
    target: Target | None
    small: tuple[str, int, str] = (OURS, 2, "2 tasks")
    large: tuple[str, int, str] = (OURS, 64, "64 tasks")

    def measure(self, settings: Settings) -> Iterable[Line]:
        few, why_not = in_processes(*self.small[:2], settings)
        many, why_not_many = in_processes(*self.large[:2], settings)
        if why_not or why_not_many:
            return [Line(self.name, skipped=why_not or why_not_many)]
        return [
            Line(
                self.name,
                against=self.small[2],
                peers=(self.small[2],),
                ours=megabytes(median(many)),
                peer=megabytes(median(few)),
                values=tuple(m / f - 1 for f, m in zip(few, many, strict=True)),
                best=min(many) / min(few) - 1,
                target=self.target,
                unit="%",
                details={"bytes": {self.small[2]: few, self.large[2]: many}},
            )
        ]


def megabytes(n_bytes: float) -> str:
    return f"{n_bytes / 2**20:.0f} MiB"


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("side")
    parser.add_argument("tasks", type=int)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(measure(arguments.side, arguments.tasks, quick=arguments.quick))
