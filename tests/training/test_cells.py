"""Cells over seeds: what is made, what is read, how they are averaged, and workers that end with their command."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from mtl_fast.config import Config
from mtl_fast.training import cells
from mtl_fast.training.cells import Cell, Wanted
from mtl_fast.training.experiment import Outcome
from mtl_fast.training.rows import FT_HEAD, MAML, SS, Row
from tests.training.pools import Here


def outcome(*curve: float) -> Outcome:
    """With these validation accuracies, a hundred tasks apart."""
    return Outcome([0.5, 0.7], max(curve), [[100 * i, a, 0.01] for i, a in enumerate(curve)], (0.01, 50))


def test_mean_curve_averages_seeds_and_narrows_the_interval() -> None:
    cell = Cell(FT_HEAD, 1, 1e-3, [outcome(0.5, 0.6), outcome(0.6, 0.8), outcome(0.7, 0.7)])
    assert cell.mean_curve()[0] == pytest.approx([0, 0.6, 0.01 / 3**0.5])
    assert cell.mean_curve()[1] == pytest.approx([100, 0.7, 0.01 / 3**0.5])


def test_each_run_goes_to_its_cell_seed_by_seed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made: list[tuple[str, int]] = []

    class FakeExperiment:
        def __init__(self, config: Config, output: Path, **options: object) -> None:
            self.seed = config.seed
            self.is_pretrained = True
            assert output == tmp_path / f"seed{config.seed}"

        def outcome(self, row: Row, n_shot: int, *, lr: float | None, n_tasks: int | None) -> Outcome:
            made.append((row.key, self.seed))
            return Outcome([self.seed / 10], float(lr or 0), [], (n_tasks or 0, n_shot))

        def finished(self, row: Row, n_shot: int, **options: Any) -> Outcome | None:
            return self.outcome(row, n_shot, **options) if self.seed == 2 and row == SS else None

    monkeypatch.setattr(cells, "Experiment", FakeExperiment)
    study = cells.Study(Config(), tmp_path)
    wanted = [Wanted(FT_HEAD, 1, 0.5, (0, 2)), Wanted(SS, 5, None, (2,), 7)]
    head, scales = cells.run_cells(Here(), study, wanted, "test")
    assert made == [("ft-head", 0), ("ft-head", 2), ("ss", 2)]
    assert (head.seeds, head.accuracies(), head.validation) == ((0, 2), [[0.0], [0.2]], 0.5)
    assert (scales.seeds, scales.outcomes[0].inner) == ((2,), (7, 5))
    assert cells.finished_cells(study, wanted) == [scales]


def test_one_worker_pretrains_a_seed_while_others_go_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Two workers, three seeds: the last pre-training ends only after all that can be made without it."""
    lock, there, made = threading.Lock(), {7}, list[tuple[str, int]]()
    all_others_made = threading.Event()

    class FakeExperiment:
        def __init__(self, config: Config, output: Path, **options: object) -> None:
            self.seed = config.seed
            self.is_pretrained = config.seed in there

        def pretrain(self) -> None:
            with lock:
                assert self.seed not in there
            assert self.seed != 2 or all_others_made.wait(20)
            with lock:
                there.add(self.seed)

        def outcome(self, row: Row, n_shot: int, **options: Any) -> Outcome:
            with lock:
                assert self.seed in there or not row.pretrained
                made.append((row.key, self.seed))
                if len(made) == 7:
                    all_others_made.set()
            return Outcome([self.seed / 10], 0, [], None)

    monkeypatch.setattr(cells, "Experiment", FakeExperiment)
    wanted = [Wanted(row, 1, None, (0, 7, 2)) for row in (FT_HEAD, SS, MAML)]
    with ThreadPoolExecutor(2) as pool:
        found = cells.run_cells(pool, cells.Study(Config(), tmp_path), wanted, "test")
    assert [cell.accuracies() for cell in found] == [[[0.0], [0.7], [0.2]]] * 3
    assert sorted(made[-2:]) == [("ft-head", 2), ("ss", 2)]
    assert len(made) == 9


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
