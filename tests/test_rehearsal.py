"""The rehearsal tool: extrapolation, the table, what is kept, on a slim network and few images."""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

TOOL = Path(__file__).resolve().parents[1] / "tools" / "rehearsal.py"


def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("rehearsal", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FOUND = {
    "iterations": 3,
    "validation_tasks": 2,
    "quick": True,
    "seconds": [1.0, 2.0, 3.0],
    "peak_bytes": 3 * 2**30,
    "total_iterations": 1500,
    "validation_seconds": 60.0,
    "n_validations": 10,
}


def test_the_whole_run_is_its_iterations_and_its_validations() -> None:
    module = tool()
    assert module.whole_run(FOUND) == 2.0 * 1500 + 60.0 * 10
    text = module.table({("paper", "pretrain"): FOUND, ("maml", "pretrain"): "none"})
    row, none = (line.split("|")[1:-1] for line in text.splitlines()[2:])
    cells = [cell.strip() for cell in row]
    assert cells == ["paper", "pretrain", "3", "2 (1–3)", "3 GiB", "1,500", "10 × 60 s", "1.0"]
    assert [cell.strip() for cell in none] == ["maml", "pretrain", *["–"] * 5, "none"]


def arguments(output: Path, *presets: str) -> argparse.Namespace:
    return argparse.Namespace(
        output=output, presets=list(presets), iterations=3, validation_tasks=2, quick=True
    )


def test_what_was_measured_is_kept_and_equal_phases_are_measured_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, commands = tool(), []

    def run(command: list[str], **_: object) -> None:
        name, phase = command[3:5]
        commands.append((name, phase))
        (tmp_path / f"{name}-{phase}.json").write_text(json.dumps(FOUND))

    monkeypatch.setattr(module, "write_data", lambda *_, **__: None)
    monkeypatch.setattr(module.subprocess, "run", run)
    (tmp_path / "tensorflow-pretrain.json").write_text(json.dumps(FOUND))
    (tmp_path / "tensorflow-meta-train.json").write_text(json.dumps(FOUND | {"iterations": 2}))
    text = module.rehearse(arguments(tmp_path, "tensorflow", "hard-tasks", "maml"))
    assert commands == [("tensorflow", "meta-train"), ("hard-tasks", "meta-train"), ("maml", "meta-train")]
    assert (tmp_path / "rehearsal.md").read_text() == text + "\n"
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[2:]]
    assert [(row[0], row[1], row[-1]) for row in rows] == [
        ("tensorflow", "pretrain", "1.0"),
        ("tensorflow", "meta-train", "1.0"),
        ("hard-tasks", "pretrain", "as tensorflow"),
        ("hard-tasks", "meta-train", "1.0"),
        ("maml", "pretrain", "none"),
        ("maml", "meta-train", "1.0"),
    ]
    commands.clear()
    assert module.rehearse(arguments(tmp_path, "tensorflow", "hard-tasks", "maml")) == text
    assert commands == []
    for name, other in (("quick", False), ("validation_tasks", 4)):
        changed = arguments(tmp_path, "maml")
        setattr(changed, name, other)
        module.rehearse(changed)
    assert commands == [("maml", "meta-train")] * 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:norm ")
@pytest.mark.parametrize(
    ("name", "phase", "total", "n_validations"),
    [("tensorflow", "pretrain", 10_000, 500), ("hard-tasks", "meta-train", 15_000, 16)],
)
def test_a_phase_is_measured(name: str, phase: str, total: int, n_validations: int, tmp_path: Path) -> None:
    """A slim network, 20 images a class: 20 updates of 64 an epoch."""
    module = tool()
    module.write_data(tmp_path / "data-quick", quick=True)
    found = module.measure(name, phase, arguments(tmp_path))
    assert len(found["seconds"]) == found["iterations"] == 3
    assert (found["total_iterations"], found["n_validations"]) == (total, n_validations)
    assert found["peak_bytes"] > 2**20
    assert found["validation_seconds"] > 0
    assert json.loads(json.dumps(found)) == found
