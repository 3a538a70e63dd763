"""Training on images that stay in host memory: the same tasks, the same bits, gathered ahead by a worker."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from mtl_fast.data.residency import kept_on_host
from mtl_fast.training import phase
from mtl_fast.training.meta_train import MetaTraining
from mtl_fast.training.run import Interrupted
from tests.training import tiny
from tests.training.tiny import at_update, ctrl_c

CPU = torch.device("cpu")


@pytest.fixture
def on_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """No store fits the device; nothing is pinned where there is no GPU."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self.clone())
    monkeypatch.setattr(phase, "placed", lambda store, device, free: kept_on_host(store, CPU))


def drawn_blocks(run: MetaTraining) -> list[tuple[str, int]]:
    """How many tasks are drawn at a time, and from where."""
    blocks: list[tuple[str, int]] = []

    def watch(owner: Any, name: str) -> None:
        sample = owner.sample
        owner.sample = lambda n: (blocks.append((name, n)), sample(n))[1]

    watch(run.sampler, "random")
    if run.pool is not None:
        watch(run.pool, "hard")
    return blocks


@pytest.mark.usefixtures("on_host")
@pytest.mark.parametrize("hard", ["resample", "reuse", "none"])
def test_the_run_is_the_one_whose_images_are_on_the_device(
    hard: str, pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny.with_meta(hard=hard)
    run = tiny.meta_training(tmp_path / "host", pretrained, config)
    blocks = drawn_blocks(run)
    run.run()
    # Rounds of 4 random and 2 hard tasks, 20 tasks in all: one readback for each part of a round.
    round_ = [("random", 4), ("hard", 2)]
    expected = [("random", 4)] * 5 if hard == "none" else [*round_ * 3, ("random", 2)]
    assert blocks == expected
    monkeypatch.undo()
    tiny.meta_training(tmp_path / "device", pretrained, config).run()
    host, device = tmp_path / "host", tmp_path / "device"
    assert tiny.same_tensors(tiny.model_of(host), tiny.model_of(device))
    assert (host / "log.csv").read_text() == (device / "log.csv").read_text()


@pytest.mark.parametrize("then_on_host", [True, False])
def test_tasks_that_were_drawn_ahead_survive_a_stop(
    then_on_host: bool,
    pretrained: Path,
    meta_trained: Path,
    tmp_path: Path,
    on_host: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stopped after the first update of a round, with one drawn and waiting; going on elsewhere too."""
    run = tiny.meta_training(tmp_path, pretrained)
    at_update(run, 3, ctrl_c)
    with pytest.raises(Interrupted):
        run.run()
    if not then_on_host:
        monkeypatch.undo()
    again = tiny.meta_training(tmp_path, pretrained, resume=True)
    assert len(again.coming) == 1
    again.run()
    assert tiny.same_tensors(tiny.model_of(tmp_path), tiny.model_of(meta_trained))


@pytest.mark.usefixtures("on_host")
def test_pretraining_too(pretrained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = tiny.pretraining(tmp_path)
    at_update(run, 4, ctrl_c)
    with pytest.raises(Interrupted):
        run.run()
    assert "training images stay in host memory" in capfd.readouterr().err
    # It waited for a buffer; left alone, it would keep the process from ending.
    assert not [t for t in threading.enumerate() if t.name.startswith("mtl-fast-gather")]
    tiny.pretraining(tmp_path, resume=True).run()
    tiny.assert_same_run(tmp_path, pretrained)


@pytest.mark.usefixtures("on_host")
def test_timing_leaves_no_worker_waiting(pretrained: Path, tmp_path: Path) -> None:
    """One that waits for a free buffer would keep the process from ending."""
    before = set(threading.enumerate())
    tiny.meta_training(tmp_path / "run", pretrained, tiny.with_meta(n_tasks=40)).time_updates(1)
    assert set(threading.enumerate()) <= before
