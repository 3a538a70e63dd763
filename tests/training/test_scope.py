"""Which cells an ablation makes, in which order, and at which rate; from made-up outcomes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from mtl_fast.errors import InputError
from mtl_fast.training.cells import Cell, Wanted
from mtl_fast.training.experiment import Outcome
from mtl_fast.training.rows import (
    ALL_ROWS,
    FT_ALL,
    FT_HEAD,
    FT_LAST,
    MAML,
    MAML_DEEP,
    RATES,
    SS,
    SS_HT,
    SS_LAST,
    UPDATE_HEAD,
    Row,
)
from mtl_fast.training.scope import Scope, rates_of

BEST_RATE = 1e-4


def maker(
    asked: list[tuple[str, list[Wanted]]], unfinished: Sequence[tuple[Row, float | None]] = ()
) -> Callable[[Sequence[Wanted], str], list[Cell]]:
    """Outcomes whose validation is best at `BEST_RATE`; the first seed of what is unfinished is missing."""

    def make(wanted: Sequence[Wanted], stage: str) -> list[Cell]:
        asked.append((stage, list(wanted)))
        cells = []
        for want in wanted:
            seeds = want.seeds[1:] if (want.row, want.rate) in unfinished else want.seeds
            outcome = Outcome([0.5, 0.6], 0.9 if want.rate == BEST_RATE else 0.8, [], (0.01, 5))
            cells.append(Cell(want.row, want.n_shot, want.rate, [outcome] * len(seeds), seeds))
        return cells

    return make


def test_every_row_once_a_shape_with_quick_ones_first() -> None:
    asked: list[tuple[str, list[Wanted]]] = []
    cells = Scope(seeds=(3, 4), whole_network_seeds=(3,)).run(maker(asked))
    assert set(cells) == {
        (row.key, n) for row in ALL_ROWS for n in ((1,) if row.is_whole_network else (1, 5))
    }
    whole = [any(want.row.is_whole_network for want in wanted) for _, wanted in asked]
    assert whole == sorted(whole)
    for _, wanted in asked:
        for want in wanted:
            assert want.seeds == ((3,) if want.row.is_whole_network else (3, 4))
            assert want.n_tasks == (600 if want.row.is_whole_network else None)
            assert want.rate is None  # nothing chosen, nothing given: the recipe's


def test_rates_are_chosen_at_the_first_shot_and_hold_for_hard_tasks_and_other_shots() -> None:
    asked: list[tuple[str, list[Wanted]]] = []
    scope = Scope(rows=(UPDATE_HEAD, FT_ALL, FT_ALL.with_hard_tasks(), SS, SS_HT), choose=True)
    cells = scope.run(maker(asked))
    tried = [want.rate for want in asked[0][1] if want.row == FT_ALL]
    assert tuple(tried) == RATES[FT_ALL]
    assert {n: cells[FT_ALL.key, n].rate for n in (1, 5)} == {1: BEST_RATE, 5: BEST_RATE}
    assert cells["ft-all-ht", 1].rate == cells["ft-all-ht", 5].rate == BEST_RATE
    # No rate of SS is the best: the first of equal ones.
    assert cells[SS.key, 1].rate == cells[SS_HT.key, 5].rate == RATES[SS][0]
    assert sum(want.row.hard != "none" for _, wanted in asked for want in wanted) == 4


def test_a_row_with_unfinished_candidates_is_left_out_and_one_with_a_single_one_is_not() -> None:
    rows = (FT_HEAD, FT_HEAD.with_hard_tasks(), SS, SS_HT)
    scope = Scope(rows=rows, rates={"ss": 1e-3}, choose=True)
    cells = scope.run(maker([], [(FT_HEAD, 1e-3), (SS, 1e-3)]))
    assert {key for key, _ in cells} == {"ss", "ss-ht"}
    assert cells["ss", 1].seeds == (1, 2)


def test_given_rates_are_taken_and_the_last_block_alone_takes_that_of_the_whole() -> None:
    scope = Scope(rates={"ft-all": 3e-5, "ss": 1e-3}, choose=True)
    assert scope.candidates(FT_ALL) == scope.candidates(FT_LAST) == (3e-5,)
    assert scope.candidates(SS_LAST) == (1e-3,)
    assert scope.candidates(FT_HEAD) == RATES[FT_HEAD]
    assert scope.candidates(MAML) == scope.candidates(MAML_DEEP) == scope.candidates(UPDATE_HEAD) == (None,)
    assert Scope().candidates(FT_HEAD) == (None,)


def test_rates_are_read_from_results(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    rows = [
        {"row": "ss", "meta_lr": 1e-3, "chosen": True},
        {"row": "ss", "meta_lr": 1e-2, "chosen": False},
        {"row": "update-head", "meta_lr": None, "chosen": True},
    ]
    file.write_text(json.dumps({"rows": rows}))
    assert rates_of(file) == {"ss": 1e-3}
    assert rates_of(Path(__file__).parents[2] / "docs" / "results" / "results.json").keys() >= {
        "ss",
        "ft-all",
    }
    for text in ("", "[]", '{"rows": [{}]}'):
        file.write_text(text)
        with pytest.raises(InputError, match=r"results\.json: holds no rates; give the results.json of"):
            rates_of(file)
    with pytest.raises(InputError, match="holds no rates"):
        rates_of(tmp_path / "nowhere.json")
