"""What both phases tell of their time: a run's seconds over all its parts, and how long an update takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from mtl_fast.training import checkpoint, phase
from mtl_fast.training.run import Interrupted
from tests.training import tiny


def test_seconds_of_a_resumed_run_are_those_up_to_its_checkpoint_and_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(phase.time, "monotonic", lambda: now[0])
    run = tiny.pretraining(tmp_path)
    now[0] = 100.0  # before it began
    run_until = 3

    def stop() -> None:
        now[0] += 40
        tiny.ctrl_c()

    tiny.at_update(run, run_until, stop)
    with pytest.raises(Interrupted):
        run.run()
    assert checkpoint.load(tmp_path / "checkpoint.safetensors")[1]["seconds"] == 40
    now[0] = 1000.0
    run = tiny.pretraining(tmp_path, resume=True)
    now[0] = 2000.0

    def wait() -> None:
        now[0] += 2

    tiny.at_update(run, run_until + 2, wait)
    run.run()
    assert checkpoint.load(tmp_path / "model.safetensors")[1]["seconds"] == 42


def test_time_updates_warms_up_and_saves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tiny.pretraining(tmp_path)
    monkeypatch.setattr(phase.time, "monotonic", lambda: 10.0 * run.update)
    assert run.time_updates(3) == 10
    assert run.update == 4
    assert not (tmp_path / "checkpoint.safetensors").exists()
