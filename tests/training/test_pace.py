"""The pace in the progress line, and the trace of the first updates."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mtl_fast.engine.spans import WHOLE, Spans
from mtl_fast.training import pace
from mtl_fast.training.pace import N_TRACED, Pace, StepTrace, peak_memory
from tests.training import tiny

CPU = torch.device("cpu")


def test_peak_memory_is_the_most_that_was_resident() -> None:
    before = peak_memory(CPU)
    assert before > 50 * 2**20, "PyTorch alone takes more"
    torch.ones(before // 4 + 2**24).sum()
    assert peak_memory(CPU) >= before + 2**25


def test_the_pace_counts_what_happened_since_it_was_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "peak_memory", lambda _: 3 * 2**30)
    spans, now = Spans(), [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    reading = Pace(spans, CPU, "tasks", clock=lambda: now[0])

    def update(seconds: float) -> str:
        with spans(WHOLE), spans("encoder"):
            now[0] += seconds
        return reading.count(2)

    assert update(0.5) == "", "too early to tell"
    assert update(0.5) == "4 tasks/s, 3 GiB peak, encoder 100 %"
    assert update(0.9) == "4 tasks/s, 3 GiB peak, encoder 100 %", "the last reading"
    now[0] += 60  # a validation
    reading.restart()
    assert update(2.0) == "1 tasks/s, 3 GiB peak, encoder 100 %"


def ranges(path: Path) -> dict[str, int]:
    """How often each named range is in a trace."""
    trace = json.loads(path.read_text())
    assert "traceEvents" in trace
    names = [e["name"] for e in trace["traceEvents"] if e.get("cat") == "user_annotation" and e["ph"] == "X"]
    return {name: names.count(name) for name in names}


def test_a_meta_training_run_leaves_a_trace(
    pretrained: Path, meta_trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tiny.meta_training(tmp_path, pretrained, profile=True)
    run.run()
    found = ranges(tmp_path / "profile.json")
    assert {"data", "encoder", "inner loop", "optimiser", "update"} <= found.keys()
    assert found["update"] == N_TRACED
    assert not run.spans.record
    # The run itself is the one that nobody looked at.
    assert tiny.same_tensors(tiny.model_of(tmp_path), tiny.model_of(meta_trained))
    assert (tmp_path / "log.csv").read_text() == (meta_trained / "log.csv").read_text()
    assert not (meta_trained / "profile.json").exists()


def test_a_run_that_ends_early_leaves_what_it_has(pretrained: Path, tmp_path: Path) -> None:
    tiny.meta_training(tmp_path, pretrained, tiny.with_meta(n_tasks=6, hard="none"), profile=True).run()
    assert ranges(tmp_path / "profile.json")["update"] == 2


def test_pretraining_leaves_a_trace(tmp_path: Path) -> None:
    tiny.pretraining(tmp_path, tiny.with_pretrain(epochs=1), profile=True).run()
    assert {"data", "encoder", "optimiser"} <= ranges(tmp_path / "profile.json").keys()


def test_the_progress_line_tells_the_pace(
    pretrained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        pace.Pace.__init__, "__kwdefaults__", {"least_seconds": 0.0, "clock": pace.time.monotonic}
    )
    tiny.meta_training(tmp_path, pretrained, tiny.with_meta(n_tasks=4, hard="none")).run()
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("meta-train")]
    assert "tasks/s" in line
    assert "iB peak" in line
    assert all(f"{name} " in line for name in ("data", "encoder", "inner loop", "optimiser"))


def test_nothing_is_profiled_without_a_path(tmp_path: Path) -> None:
    spans = Spans()
    with StepTrace(None, CPU, spans) as trace:
        trace.step()
    assert not spans.record
