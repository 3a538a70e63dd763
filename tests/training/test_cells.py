"""Cells over seeds: what is made, what is read, how they are averaged, and workers that end with their command."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mtl_fast.training.cells import Cell
from mtl_fast.training.experiment import Outcome
from mtl_fast.training.rows import FT_HEAD


def outcome(*curve: float) -> Outcome:
    """With these validation accuracies, a hundred tasks apart."""
    return Outcome([0.5, 0.7], max(curve), [[100 * i, a, 0.01] for i, a in enumerate(curve)], (0.01, 50))


def test_mean_curve_averages_seeds_and_narrows_the_interval() -> None:
    cell = Cell(FT_HEAD, 1, 1e-3, [outcome(0.5, 0.6), outcome(0.6, 0.8), outcome(0.7, 0.7)])
    assert cell.mean_curve()[0] == pytest.approx([0, 0.6, 0.01 / 3**0.5])
    assert cell.mean_curve()[1] == pytest.approx([100, 0.7, 0.01 / 3**0.5])


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads process states from /proc")
def test_workers_do_not_outlive_a_killed_command() -> None:
    code = (
        "import os, time\n"
        "from mtl_fast.training.cells import worker_pool\n"
        "if __name__ == '__main__':\n"
        "    with worker_pool(1) as pool:\n"
        "        print(pool.submit(os.getpid).result(), flush=True)\n"
        "        pool.submit(time.sleep, 100).result()\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as command:
        assert command.stdout is not None
        worker = int(command.stdout.readline())
        os.kill(worker, 0)  # it lives
        command.kill()
    deadline = time.monotonic() + 20
    while is_alive(worker) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not is_alive(worker)


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that ended and that nobody has waited for does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
