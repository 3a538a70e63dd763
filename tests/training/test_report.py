from __future__ import annotations

import math

import pytest

from mtl_fast.training.report import difference_sentence, differences, table
from mtl_fast.training.statistics import Interval, SeedsDifference, pooled_difference

ROWS = {
    "update θ": [(0.601, 0.0081), (0.76, 0.006)],
    "SS[Θ;θ] + HT": [Interval(0.7391, 0.0081), None],
}


def test_markdown_table() -> None:
    assert table(ROWS).splitlines() == [
        "| accuracy, %  |     1-shot |     5-shot |",
        "|--------------|-----------:|-----------:|",
        "| update θ     | 60.1 ± 0.8 | 76.0 ± 0.6 |",
        "| SS[Θ;θ] + HT | 73.9 ± 0.8 |          – |",
    ]


def test_plain_table() -> None:
    assert table(ROWS, style="plain").splitlines() == [
        "accuracy, %       1-shot      5-shot",
        "────────────  ──────────  ──────────",
        "update θ      60.1 ± 0.8  76.0 ± 0.6",
        "SS[Θ;θ] + HT  73.9 ± 0.8           –",
    ]


def test_columns_align_whatever_the_names_are_made_of() -> None:
    lines = table(
        {"a|b": [(0.5, 0.1)], "e\u0301": [(0.25, 0.1)], "漢字": [(1.0, 0.0)]}, ["1-shot"]
    ).splitlines()
    assert lines[2].startswith("| a\\|b ")
    assert lines[3].startswith("| e\u0301           |")
    assert lines[4].startswith("| 漢字        |")


def test_differences_mark_what_excludes_zero() -> None:
    several = pooled_difference([[0.9, 0.8], [0.7, 0.8]], [[0.5, 0.5], [0.5, 0.5]])
    text = differences(
        {"SS − update": [Interval(0.053, 0.006), Interval(-0.002, 0.006)], "SS − FT": [several, None]}
    )
    assert " +5.3 ± 0.6 * |" in text
    assert "-0.2 ± 0.6 |" in text
    assert "+30.0 ± 8.0 * (seeds ± 7.1)" in text
    assert len({len(line) for line in text.splitlines()}) == 1


@pytest.mark.parametrize(
    ("difference", "text"),
    [
        (Interval(0.053, 0.006), "1-shot: SS is better than FT by 5.3 ± 0.6 points."),
        (Interval(-0.053, 0.006), "1-shot: SS is worse than FT by 5.3 ± 0.6 points."),
        (
            Interval(0.002, 0.006),
            "1-shot: SS and FT are not told apart: +0.2 ± 0.6 points, an interval that includes 0.",
        ),
        (
            Interval(0.002, math.inf),
            "1-shot: SS and FT are not told apart: +0.2 ± inf points, an interval that includes 0.",
        ),
        (
            SeedsDifference(Interval(0.02, 0.01), (Interval(0.03, 0.02), Interval(0.01, 0.02)), 0.0141),
            "1-shot: SS is better than FT by 2.0 ± 1.0 points (single seeds: +3.0, +1.0).",
        ),
    ],
    ids=["better", "worse", "neither", "one-task", "seeds"],
)
def test_a_difference_is_told_whichever_way_it_came_out(
    difference: Interval | SeedsDifference, text: str
) -> None:
    assert difference_sentence("SS", "FT", difference, "1-shot") == text


@pytest.mark.parametrize("make", [table, differences])
def test_a_row_of_another_length_is_named(make: object) -> None:
    with pytest.raises(ValueError, match="row 'FT' has 1 cells for 2 columns"):
        make({"FT": [Interval(0.5, 0.1)]})  # type: ignore[operator]


def test_an_unknown_style_is_named() -> None:
    with pytest.raises(ValueError, match="style must be one of 'markdown', 'plain', 'latex', it is 'html'"):
        table(ROWS, style="html")  # type: ignore[arg-type]
