"""What an ablation would cost: runs are counted, finished ones cost nothing, times are measured or probed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mtl_fast.data.store import ImageStore
from mtl_fast.training import ablation_plan as module
from mtl_fast.training import experiment, inner_search
from mtl_fast.training.ablation_plan import Costs, plan_text
from mtl_fast.training.cells import Cell, Study, Wanted
from mtl_fast.training.experiment import Outcome
from mtl_fast.training.rows import ALL_ROWS, FT_ALL, FT_HEAD, MAML, SS, SS_HT, UPDATE_ALL, UPDATE_HEAD
from mtl_fast.training.scope import Scope
from tests.training import tiny

CONFIG = tiny.with_meta(tiny.with_pretrain(epochs=1), n_tasks=6, validate_every=2)


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    def load(source: str, split: str, size: int | None) -> ImageStore:
        return tiny.split(split)

    experiment.splits_of.cache_clear()
    monkeypatch.setattr(experiment, "load_split", load)
    monkeypatch.setattr(inner_search, "INNER_GRID", ((0.01, 1),))
    monkeypatch.setattr(inner_search, "ALL_RATES", (0.01,))
    monkeypatch.setattr(inner_search, "ALL_STEPS", (1,))
    return Study(CONFIG, tmp_path / "runs", tiny.MAML, n_drawn=6)


def outcome(seconds: float, test_seconds: float = 0.0) -> Outcome:
    return replace(Outcome([0.5], 0.5, [], (0.01, 1)), seconds=seconds, test_seconds=test_seconds)


def test_a_probe_of_every_row_makes_nothing(study: Study) -> None:
    costs = Costs(study, 0)
    for row in ALL_ROWS:
        found = costs.of(row, 1, 4)
        assert found.seconds > 0
        assert found.source == "probe"
    assert costs.of_pretraining([study.experiment(0)]).source == "probe"
    assert not study.output.exists()


def test_measured_runs_go_before_a_probe_and_hold_for_hard_tasks(study: Study) -> None:
    costs = Costs(study, 0)
    costs.add(SS, 1, outcome(50, 10))
    costs.add(SS_HT, 1, outcome(90, 10))
    costs.add(FT_ALL, 1, outcome(float("nan"), 1))
    for row in (SS, SS_HT):
        assert costs.of(row, 1, None) == module.Estimate(80, "measured")
    assert costs.of(SS, 2, None).source == costs.of(FT_ALL, 1, None).source == "probe"


def test_a_probe_adds_updates_validations_and_test(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.MetaTraining, "time_updates", lambda self, n: 7.0)
    monkeypatch.setattr(module.Pretraining, "time_updates", lambda self, n: 7.0)
    tested: list[tuple[str, int]] = []

    def test(self: Costs, model: object, n_shot: int, split: str, n_tasks: int) -> float:
        tested.append((split, n_tasks))
        return 100.0 if split == "val" else 1000.0

    monkeypatch.setattr(Costs, "_test", test)
    costs = Costs(study, 0)
    # 6 tasks in updates of 2, a validation before them and after each 2 tasks.
    assert costs.of(SS, 1, None).seconds == 3 * 7 + (1 + 3) * 100 + 1000
    assert tested == [("val", 8), ("test", 6)]
    # 12 tasks in updates of 2, validated each 4.
    assert costs.of(MAML, 1, 4).seconds == 6 * 7 + (1 + 3) * 100 + 1000
    n_updates = tiny.split("train").n_images // CONFIG.pretrain.batch_size
    assert costs.of_pretraining([]).seconds == pytest.approx(n_updates * 7 + 100, abs=7)


def test_tests_grow_with_tasks_or_with_images(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(1000))
    monkeypatch.setattr(module.time, "monotonic", lambda: float(next(now)))
    costs = Costs(study, 0)
    config = costs._experiment.settings(SS, 1)
    assert (
        costs._test(costs._random(config, head=True), 1, "test", 400) == 1
    )  # every image is embedded already
    whole = costs._experiment.settings(MAML, 1)
    assert costs._test(costs._random(whole, head=True), 1, "test", 400) == 400 / module.N_TASKS_WHOLE


def test_the_plan_counts_what_is_missing(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    def of(self: Costs, row: object, n_shot: int, n_tasks: int | None) -> module.Estimate:
        return module.Estimate(1800, "probe")

    monkeypatch.setattr(Costs, "of", of)
    monkeypatch.setattr(Costs, "of_pretraining", lambda self, folders: module.Estimate(3600, "measured"))

    def finished(wanted: list[Wanted]) -> list[Cell]:
        return [Cell(w.row, w.n_shot, w.rate, [outcome(1)], (0,)) for w in wanted if w.row == UPDATE_HEAD]

    scope = Scope(rows=(UPDATE_ALL, UPDATE_HEAD, FT_HEAD), shots=(1, 5), choose=True)
    assert "pre-training" not in plan_text(study, Scope(rows=(MAML,)), finished, 2)
    lines = plan_text(study, scope, finished, 2).splitlines()
    counts = {tuple(line.split()[:-5]): line.split()[-5:-1] for line in lines[2:-2]}
    assert counts["pre-training",] == ["3", "3", "60.0", "3.00"]
    assert counts["1-shot,", "plain:", "update", "θ"] == ["2", "3", "30.0", "1.00"]
    assert counts["1-shot,", "plain:", "FT", "θ", "0.0003"] == ["3", "3", "30.0", "1.50"]
    assert counts["5-shot:", "FT", "θ", "0.0001"] == ["3", "3", "30.0", "1.50"]
    assert counts["whole", "network,", "1-shot:", "update", "[Θ;θ]"] == ["1", "1", "30.0", "0.50"]
    # 3 · 1 h and, at half an hour each, 2 + 9 + 2 + 3 + 1 runs.
    assert lines[-1].startswith("20 runs to make, about 11.5 hours of one worker, 5.8 with 2; measured: from")
