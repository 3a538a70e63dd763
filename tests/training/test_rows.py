"""The rows are those of the paper's ablation, each once plain and, where it meta-learns, once with hard tasks."""

from __future__ import annotations

from mtl_fast.training.rows import ALL_ROWS, FT_LAST, PLAIN_ROWS, RATES, SS_HT, SS_LAST


def test_rows_are_those_of_the_ablation() -> None:
    assert [row.label for row in ALL_ROWS] == [
        "update [Θ;θ]",
        "update θ",
        *(
            label + hard
            for label in ("FT θ", "FT[Θ4;θ]", "FT[Θ;θ]", "SS[Θ4;θ]", "SS[Θ;θ]", "MAML", "MAML deep")
            for hard in ("", " + HT")
        ),
    ]
    assert len({row.key for row in ALL_ROWS}) == len(ALL_ROWS)


def test_what_each_row_learns_and_adapts() -> None:
    assert {
        row.key: (row.learn, row.last_block_only, row.adapt, row.pretrained, row.meta_trained)
        for row in PLAIN_ROWS
    } == {
        "update-all": ("head", False, "all", True, False),
        "update-head": ("head", False, "head", True, False),
        "ft-head": ("head", False, "head", True, True),
        "ft-last": ("weights", True, "head", True, True),
        "ft-all": ("weights", False, "head", True, True),
        "ss-last": ("scale_shift", True, "head", True, True),
        "ss": ("scale_shift", False, "head", True, True),
        "maml": ("weights", False, "all", False, True),
        "maml-deep": ("weights", False, "all", True, True),
    }


def test_hard_tasks_change_nothing_else() -> None:
    for row in PLAIN_ROWS:
        hard = row.with_hard_tasks()
        assert (hard.hard, hard.plain_key, row.plain_key) == ("resample", row.key, row.key)
        assert {name for name, value in vars(hard).items() if value != getattr(row, name)} == {
            "key",
            "label",
            "hard",
        }
    assert SS_HT in ALL_ROWS


def test_the_last_block_alone_tries_and_takes_the_rates_of_the_whole_network() -> None:
    by_key = {row.key: row for row in PLAIN_ROWS}
    for row in (FT_LAST, SS_LAST):
        assert RATES[row] == RATES[by_key[row.rate_of]]
        assert by_key[row.rate_of].learn == row.learn
