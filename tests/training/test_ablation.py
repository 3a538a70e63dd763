"""The ablation from end to end on tiny splits: trained once, read afterwards, stopped and gone on with, published."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mtl_fast.config import Config
from mtl_fast.data.store import ImageStore
from mtl_fast.errors import InputError
from mtl_fast.training import ablation as module
from mtl_fast.training import experiment, inner_search
from mtl_fast.training.ablation import ablation
from mtl_fast.training.meta_train import MetaTraining
from mtl_fast.training.phase import Phase
from tests.training import tiny
from tests.training.pools import Here

CONFIG = tiny.with_meta(tiny.with_pretrain(epochs=1), n_tasks=6, validate_every=2)
PRESETS = {"glyphs": CONFIG, "glyphs-maml": tiny.MAML, "glyphs-maml-deep": tiny.MAML}
ROWS = ("update-all", "update-head", "ft-last", "ft-last-ht", "ss", "ss-ht", "maml", "maml-ht")


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(source: str, split: str, size: int | None) -> ImageStore:
        return tiny.split(split)

    @contextmanager
    def pool(workers: int) -> Iterator[Here]:
        yield Here()

    experiment.splits_of.cache_clear()
    monkeypatch.setattr(experiment, "load_split", load)
    monkeypatch.setattr(module, "worker_pool", pool)
    monkeypatch.setattr(module, "preset", PRESETS.__getitem__)
    monkeypatch.setattr(inner_search, "INNER_GRID", ((0.01, 1), (0.3, 4)))
    monkeypatch.setattr(inner_search, "ALL_RATES", (0.01, 0.1))
    monkeypatch.setattr(inner_search, "ALL_STEPS", (1, 2))


def run(folder: Path, **options: Any) -> dict[str, Any]:
    """The published numbers."""
    small: dict[str, Any] = {"shots": (1, 2), "seeds": (0, 1), "test_tasks": 6, "whole_network_tasks": 4}
    ablation(folder / "runs", folder / "docs", recipe="glyphs", **({"rows": ROWS} | small | options))
    found: dict[str, Any] = json.loads((folder / "docs" / "ablation.json").read_text())
    return found


def never(self: Phase) -> None:
    pytest.fail("trained again")


def test_what_is_finished_is_read_and_published_again_to_the_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = run(tmp_path)
    assert [(row["row"], row["n_shot"]) for row in first["rows"]] == [
        (key, n) for key in ROWS for n in ((1,) if key in ("update-all", "maml", "maml-ht") else (1, 2))
    ]
    for row in first["rows"]:
        whole = row["row"] in ("update-all", "maml", "maml-ht")
        assert (row["seeds"], row["n_tasks"]) == (([0], 4) if whole else ([0, 1], 6))
        assert row["seconds"] > 0
        assert row["test_seconds_per_task"] > 0
    sizes = {row["row"]: (row["n_learned"], row["n_adapted"]) for row in first["rows"]}
    n_total, n_head = first["rows"][0]["n_total"], 3 * 5
    assert sizes["update-all"] == (0, n_total)
    assert sizes["update-head"] == (0, n_head)
    assert n_head < sizes["ft-last"][0] < n_total
    assert n_head < sizes["ss"][0] < n_total
    assert sizes["maml"][0] == sizes["maml"][1] == first["rows"][-1]["n_total"]
    monkeypatch.setattr(Phase, "_update", never, raising=False)
    monkeypatch.setattr(MetaTraining, "_update", never)
    monkeypatch.setattr(experiment, "score", lambda *rest: pytest.fail("tested again"))
    files = {path.name: path.read_bytes() for path in (tmp_path / "docs").iterdir()}
    assert set(files) == {"ablation.md", "ablation.csv", "ablation.tex", "ablation.json", "convergence.png"}
    run(tmp_path)
    run(tmp_path, finished=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "docs").iterdir()} == files
    capsys.readouterr()
    run(tmp_path, plan=True)
    assert "\n0 runs to make, about 0.0 hours" in capsys.readouterr().out


def test_a_run_that_was_stopped_goes_on_from_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"rows": ("ss",), "shots": (1,), "seeds": (0,)}
    whole = run(tmp_path / "whole", **options)
    original, updates = MetaTraining._update, []

    def stopped(self: MetaTraining) -> None:
        if self.update == 2:
            raise KeyboardInterrupt
        original(self)

    def counted(self: MetaTraining) -> None:
        updates.append(self.update)
        original(self)

    monkeypatch.setattr(MetaTraining, "_update", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", **options)
    part = run(tmp_path / "parts", finished=True, **options)
    assert part["rows"] == []
    assert "Not finished: SS[Θ;θ] 1-shot (seed 0)." in (tmp_path / "parts/docs/ablation.md").read_text(
        "utf-8"
    )
    monkeypatch.setattr(MetaTraining, "_update", counted)
    both = run(tmp_path / "parts", **options)
    assert updates == [2]  # of updates 0, 1 and 2
    times = {"seconds": None, "test_seconds_per_task": None}
    assert [row | times for row in both["rows"]] == [row | times for row in whole["rows"]]


def test_a_finished_test_of_other_tasks_is_made_again(tmp_path: Path) -> None:
    options: dict[str, Any] = {"rows": ("update-head",), "shots": (1,), "seeds": (0,)}
    assert run(tmp_path, **options)["rows"][0]["n_tasks"] == 6
    assert run(tmp_path, **options, test_tasks=8)["rows"][0]["n_tasks"] == 8
    assert run(tmp_path, **options, finished=True)["rows"] == []


def test_data_and_recipes_are_those_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipes = {name: replace(tiny.CONFIG, seed=i) for i, name in enumerate(("paper", "maml", "maml-deep"))}
    monkeypatch.setattr(module, "preset", recipes.__getitem__)
    data = replace(CONFIG.data, source="mine")
    study = module._study("paper", data, tmp_path, 50, "cpu")
    assert study.config == replace(recipes["paper"], data=data, device="cpu")
    assert (study.maml, study.maml_deep) == (recipes["maml"], recipes["maml-deep"])
    one = study.experiment(3)
    assert (one.config.seed, one.n_drawn, one.output) == (3, 50, tmp_path / "seed3")
    assert isinstance(one.config, Config)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"rows": ("sss",)}, "--rows: 'sss' is unknown; choose of: update-all, update-head, ft-head"),
        ({"rows": ("ss-ht",)}, "--rows: ss-ht takes the rate of ss; name that too"),
        ({"shots": ()}, "--shots needs at least one number; to leave rows out, name the others with --rows"),
        ({"seeds": ()}, "--seeds needs at least one number"),
        ({"whole_network_seeds": ()}, "--whole-network-seeds needs at least one number"),
        ({"whole_network_shots": ()}, "--whole-network-shots needs at least one number"),
        ({"seeds": (1, 0, 1)}, "--seeds names 1 twice"),
        ({"test_tasks": 3}, "--whole-network-tasks is 4; it must be at least 2 and at most --test-tasks, 3"),
        ({"rates": "nowhere.json"}, "nowhere.json: holds no rates"),
    ],
)
def test_wrong_input_is_one_line(tmp_path: Path, options: dict[str, Any], line: str) -> None:
    with pytest.raises(InputError, match=line):
        run(tmp_path, **options)
    assert not (tmp_path / "runs").exists()


def test_runs_of_a_file_of_outcomes_are_not_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = tmp_path / "shared" / "outcomes.jsonl"
    rows = ("update-head", "ft-last", "ft-last-ht", "maml")
    first = run(tmp_path / "one", rows=rows, shots=(1,), seeds=(0,), outcomes=shared)
    n_runs = len(shared.read_text().splitlines())
    assert n_runs == len(rows)
    # Another machine, which has only the file: it trains what is new.
    trained: list[str] = []
    train = MetaTraining.run
    monkeypatch.setattr(
        MetaTraining, "run", lambda self: trained.append(self.folder.path.name) or train(self)
    )
    again = run(tmp_path / "two", rows=rows, shots=(1,), seeds=(0, 1), outcomes=shared)
    assert sorted(trained) == ["ft-last-1shot", "ft-last-ht-1shot"]
    assert len(shared.read_text().splitlines()) == n_runs + 3
    assert [row["seed_means"][0] for row in again["rows"]] == [row["seed_means"][0] for row in first["rows"]]
    assert "7 with commit" in (tmp_path / "two" / "docs" / "ablation.md").read_text()
    # Only read, and to the bit what was written.
    monkeypatch.setattr(Phase, "run", never)
    third = run(tmp_path / "three", rows=rows, shots=(1,), seeds=(0, 1), outcomes=shared, finished=True)
    assert third["rows"] == again["rows"]


def test_a_run_of_other_settings_is_not_taken_from_the_file(tmp_path: Path) -> None:
    shared = tmp_path / "outcomes.jsonl"
    run(tmp_path / "one", rows=("update-head",), shots=(1,), seeds=(0,), outcomes=shared)
    run(tmp_path / "two", rows=("update-head",), shots=(1,), seeds=(0,), test_tasks=7, outcomes=shared)
    assert len(shared.read_text().splitlines()) == 2


def test_a_damaged_file_of_outcomes_is_one_line(tmp_path: Path) -> None:
    shared = tmp_path / "outcomes.jsonl"
    run(tmp_path / "one", rows=("update-head",), shots=(1,), seeds=(0,), outcomes=shared)
    shared.write_text(shared.read_text()[:-40] + "\n")
    with pytest.raises(InputError, match=r"outcomes.jsonl, line 1: not the outcome of a run"):
        run(tmp_path / "two", rows=("update-head",), shots=(1,), seeds=(0,), outcomes=shared)


@pytest.mark.parametrize("cut", [1, 40])
def test_a_line_of_outcomes_that_was_cut_off_is_made_again(tmp_path: Path, cut: int) -> None:
    """By a full disk or a kill; what stands before it is kept."""
    shared = tmp_path / "outcomes.jsonl"
    only = {"rows": ("update-head",), "outcomes": shared}
    run(tmp_path / "one", shots=(1,), seeds=(0,), **only)
    first = shared.read_bytes()
    run(tmp_path / "one", shots=(1,), seeds=(0, 1), **only)
    both = shared.read_bytes()
    assert both.startswith(first)
    assert both.count(b"\n") == 2
    shared.write_bytes(both[:-cut])
    run(tmp_path / "one", shots=(1,), seeds=(0, 1), **only)
    again = shared.read_bytes()
    assert again.startswith(first)
    assert again.count(b"\n") == 2
    assert [json.loads(line)["facts"] for line in again.splitlines()] == [
        json.loads(line)["facts"] for line in both.splitlines()
    ]
