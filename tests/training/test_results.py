"""The summary of `make results`, from made-up outcomes: what is chosen, compared, said and drawn."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from mtl_fast.config import preset
from mtl_fast.training import report, results
from mtl_fast.training.cells import Cell, best_cell
from mtl_fast.training.demo import draw_curves
from mtl_fast.training.experiment import Outcome
from mtl_fast.training.results import ROWS, SHOTS
from mtl_fast.training.rows import FT_ALL, RATES, SS, SS_HT, UPDATE_HEAD


def outcome(rng: random.Random, accuracy: float, validation: float) -> Outcome:
    curve = [[tasks, validation - 0.1 + tasks / 9000, 0.01] for tasks in range(0, 901, 180)]
    return Outcome([rng.gauss(accuracy, 0.05) for _ in range(50)], validation, curve, (0.01, 50))


@pytest.fixture
def cells() -> list[Cell]:
    """Three seeds; the second rate of every row is best in validation, the first in the test."""
    rng = random.Random(0)
    found = [Cell(UPDATE_HEAD, n, None, [outcome(rng, 0.6, 0.6) for _ in range(3)]) for n in SHOTS]
    for row in ROWS:
        for i, rate in enumerate(RATES[row]):
            test, validation = (0.9, 0.5) if i == 0 else (0.7, 0.7 if i == 1 else 0.6)
            found.append(Cell(row, 1, rate, [outcome(rng, test, validation) for _ in range(3)]))
        found.append(Cell(row, 5, RATES[row][1], [outcome(rng, 0.8, 0.8) for _ in range(3)]))
    return found


@pytest.fixture
def best(cells: list[Cell]) -> dict[tuple[str, int], Cell]:
    return {(row.key, n): best_cell(cells, row, n) for row in (UPDATE_HEAD, *ROWS) for n in SHOTS}


def test_the_rate_is_chosen_by_validation_not_by_test(best: dict[tuple[str, int], Cell]) -> None:
    for row in ROWS:
        assert best[row.key, 1].rate == RATES[row][1]


def test_scale_and_shift_and_weights_share_two_rates() -> None:
    assert set(RATES[SS]) == set(RATES[SS_HT])
    assert len(set(RATES[SS]) & set(RATES[FT_ALL])) >= 2


def test_markdown_holds_each_row_each_comparison_and_each_rate(
    cells: list[Cell], best: dict[tuple[str, int], Cell]
) -> None:
    text = results._markdown(cells, best, (0, 1, 2))
    for row in (UPDATE_HEAD, *ROWS):
        one, five = (best[row.key, n].interval().percent() for n in SHOTS)
        assert any(
            line.startswith(f"| {row.label} ") and one in line and five in line for line in text.splitlines()
        )
    assert "3 seeds × 50 test tasks" in text
    assert "1-shot: SS[Θ;θ] is better than update θ by" in text
    assert text.count("single seeds:") == len(results.COMPARED) * len(SHOTS)
    for rate in results.TRIED:
        assert f" {rate:g} |" in text


def test_summary_is_json_with_one_chosen_cell_a_row_and_shot(
    cells: list[Cell], best: dict[tuple[str, int], Cell]
) -> None:
    summary = json.loads(json.dumps(results._summary(preset("glyphs"), (0, 1, 2), cells, best)))
    chosen = [(entry["row"], entry["n_shot"]) for entry in summary["rows"] if entry["chosen"]]
    assert sorted(chosen) == sorted((row.key, n) for row in (UPDATE_HEAD, *ROWS) for n in SHOTS)
    gain = summary["differences"]["SS[Θ;θ] − update θ"][0]
    assert gain["mean"] == pytest.approx(0.1, abs=0.02)
    assert len(gain["seed_means"]) == 3


def test_pictures_are_drawn(cells: list[Cell], best: dict[tuple[str, int], Cell], tmp_path: Path) -> None:
    draw_curves(tmp_path / "curves.png", {key: cell.mean_curve() for key, cell in best.items()})
    report.rate_sensitivity_figure(tmp_path / "rates.png", {"1-shot": results._rate_curves(cells)})
    assert {p.name for p in tmp_path.iterdir()} == {"curves.png", "rates.png"}
