"""What an ablation publishes, from made-up outcomes: one table in three forms, the claims, the figure, the numbers."""

from __future__ import annotations

import csv
import io
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from mtl_fast.config import preset
from mtl_fast.training import ablation_report as module
from mtl_fast.training.ablation_report import publish, table
from mtl_fast.training.cells import Cell, Study
from mtl_fast.training.experiment import Outcome
from mtl_fast.training.rows import ALL_ROWS, MAML, SS
from mtl_fast.training.scope import Scope

Cells = dict[tuple[str, int], Cell]
STUDY = Study(preset("glyphs"), Path("runs"))


def outcome(rng: random.Random, accuracy: float, n_tasks: int) -> Outcome:
    curve = [
        [tasks, accuracy - 0.1 + tasks / 9000 + rng.gauss(0, 0.005), 0.01] for tasks in range(0, 901, 180)
    ]
    tasks = [rng.gauss(accuracy, 0.05) for _ in range(n_tasks)]
    return Outcome(tasks, accuracy, curve, (0.01, 50), 1234, 965, 1_129_205, 90.0, 3.0)


@pytest.fixture
def cells() -> Cells:
    """All that a scope with its defaults asks for; scaling is far better than fine-tuning."""
    rng = random.Random(0)
    found = {}
    for row in ALL_ROWS:
        for n in (1,) if row.is_whole_network else (1, 5):
            seeds, n_tasks = ((0,), 60) if row.is_whole_network else ((0, 1, 2), 200)
            accuracy = 0.7 + 0.1 * (n == 5) + 0.1 * (row.learn == "scale_shift")
            outcomes = [outcome(rng, accuracy, n_tasks) for _ in seeds]
            found[row.key, n] = Cell(row, n, 1e-3 if row.key.startswith("ss") else None, outcomes, seeds)
    return found


def test_the_table_has_a_row_a_method_and_says_what_was_tested(cells: Cells) -> None:
    head, _, *rows = table(ALL_ROWS, cells, (1, 5), "markdown").splitlines()
    assert [part.strip() for part in head.split("|")[1:-1]] == [
        "accuracy, %",
        "1-shot",
        "5-shot",
        "seeds × tasks",
        "meta-learned",
        "adapted",
        "of all",
        "prepared, min",
        "test, ms a task",
    ]
    by_row = {
        parts[1].strip(): [p.strip() for p in parts[2:-1]] for parts in (row.split("|") for row in rows)
    }
    assert list(by_row) == [row.label for row in ALL_ROWS]
    one, five = (cells["ss", n].interval().percent() for n in (1, 5))
    assert by_row[SS.label] == [one, five, "3 × 200", "1,234", "965", "1,129,205", "1.5", "15.0"]
    one = cells["maml", 1].interval().percent()
    assert by_row[MAML.label] == [one, "–", "1 × 60", "1,234", "965", "1,129,205", "1.5", "50.0"]
    del cells["ss", 1], cells["ss", 5]
    assert "| SS[Θ;θ]        |          – |          – |" in table(ALL_ROWS, cells, (1, 5), "markdown")


def test_publishing_writes_the_same_numbers_in_each_form(cells: Cells, tmp_path: Path) -> None:
    publish(tmp_path / "docs", STUDY, Scope(), cells)
    files = {path.name: path for path in (tmp_path / "docs").iterdir()}
    assert set(files) == {"ablation.md", "ablation.csv", "ablation.tex", "ablation.json", "convergence.png"}
    summary = json.loads(files["ablation.json"].read_text("utf-8"))
    rows = list(csv.DictReader(io.StringIO(files["ablation.csv"].read_text("utf-8"))))
    assert len(rows) == len(summary["rows"]) == len(cells)
    markdown, latex = (files[name].read_text("utf-8") for name in ("ablation.md", "ablation.tex"))
    for told, row in zip(summary["rows"], rows, strict=True):
        mean, half = cells[told["row"], told["n_shot"]].interval()
        assert (told["mean"], told["interval95"]) == (mean, half)
        assert (float(row["mean"]), float(row["interval95"]), row["row"]) == (mean, half, told["row"])
        assert row["seeds"] == " ".join(map(str, told["seeds"]))
        assert f"{100 * mean:.1f} ± {100 * half:.1f}" in markdown
        assert rf"{100 * mean:.1f} $\pm$ {100 * half:.1f}" in latex
    with Image.open(files["convergence.png"]) as picture:
        assert picture.width == 1600


def test_every_claim_has_its_sentence_and_verdict(cells: Cells, tmp_path: Path) -> None:
    publish(tmp_path, STUDY, Scope(), cells)
    lines = (tmp_path / "ablation.md").read_text("utf-8").splitlines()
    told = [line for line in lines if line.startswith("- ")]
    for claim in (
        "SS is better than FT",
        "[Θ;θ] is better than [Θ4;θ]",
        "HT is better than",
        "HT converges faster",
    ):
        for n in (1, 5):
            assert sum(line.startswith(f"- {claim}") and f", {n}-shot: **" in line for line in told) == 1
    assert any(line.startswith("- SS is better than FT, 1-shot: **confirmed**.") for line in told)
    differences = json.loads((tmp_path / "ablation.json").read_text("utf-8"))["differences"]
    first = next(d for d in differences if (d["a"], d["b"], d["n_shot"]) == ("ss", "ft-all", 1))
    assert (first["verdict"], len(first["seed_means"])) == ("confirmed", 3)
    assert not any(line.startswith("Not finished") for line in lines)


def test_rates_are_told_with_where_they_are_from(cells: Cells) -> None:
    assert (
        module._about_rates(Scope(), {("maml", 1): cells["maml", 1]}, 1)
        == "Meta learning rates are the recipe's."
    )
    told = module._about_rates(Scope(rates={"ss": 1e-3}, choose=True), cells, 1)
    assert told.startswith(
        "Meta learning rates, chosen on the validation split 1-shot and kept 5-shot: SS[Θ4;θ] 0.001, SS[Θ;θ] 0.001.\n"
    )
    assert "The rate of SS[Θ4;θ] is that of the [Θ;θ] row." in told
    assert "The rate of" not in module._about_rates(Scope(choose=True), cells, 1)


def test_what_is_missing_is_named(cells: Cells, tmp_path: Path) -> None:
    cells["ss", 5] = replace(cells["ss", 5], outcomes=cells["ss", 5].outcomes[:1], seeds=(1,))
    del cells["maml-ht", 1]
    publish(tmp_path, STUDY, Scope(), cells)
    text = (tmp_path / "ablation.md").read_text("utf-8")
    assert "Not finished: SS[Θ;θ] 5-shot (seeds 0, 2); MAML + HT 1-shot (seed 0)." in text
    publish(tmp_path, STUDY, Scope(), {})
    text = (tmp_path / "ablation.md").read_text("utf-8")
    assert "claims" not in text
    assert "converged" not in text


def test_the_band_is_that_of_what_seeds_gain(cells: Cells) -> None:
    flat = [[0, 0.5, 0.01], [100, 0.6, 0.02]]
    higher = [[0, 0.7, 0.01], [100, 0.8, 0.02]]
    one = cells["ss", 1].outcomes[0]
    two = Cell(SS, 1, None, [replace(one, curve=flat), replace(one, curve=higher)], (0, 1))
    curve = module._band(two, {0, 1})
    assert curve.accuracy == pytest.approx([0.6, 0.7])
    assert curve.interval == pytest.approx([0, 0], abs=1e-12)  # the levels differ, the gains do not
    assert module._band(two, {1}) == module.Curve([0, 100], [0.7, 0.8], [0.01, 0.02])


def test_panels_hold_both_meta_batches_over_their_common_seeds(cells: Cells) -> None:
    cells["ss-ht", 1] = replace(cells["ss-ht", 1], outcomes=cells["ss-ht", 1].outcomes[:1], seeds=(2,))
    panels = module._panels(cells, (1, 5))
    assert list(panels) == ["SS[Θ;θ], 1-shot", "SS[Θ;θ], 5-shot", "MAML, 1-shot"]
    assert all(list(panel) == ["plain meta-batch", "HT meta-batch"] for panel in panels.values())
    last = cells["ss", 1].outcomes[2].curve
    assert list(panels["SS[Θ;θ], 1-shot"]["plain meta-batch"].accuracy) == [point[1] for point in last]
