"""Verdicts of claims, from made-up accuracies and curves."""

from __future__ import annotations

import math

import pytest

from mtl_fast.training import claims
from mtl_fast.training.cells import Cell
from mtl_fast.training.experiment import Outcome
from mtl_fast.training.rows import FT_ALL, SS, SS_HT, Row
from mtl_fast.training.statistics import Interval, paired_difference

CURVE = [[0, 0.5, 0.01], [100, 0.6, 0.01], [200, 0.7, 0.01]]


def cell(row: Row, *accuracies: list[float], seeds: tuple[int, ...] = (0, 1), curve: object = CURVE) -> Cell:
    outcomes = [Outcome(a, 0.7, curve, (0.01, 5)) for a in accuracies]  # type: ignore[arg-type]
    return Cell(row, 1, None, outcomes, seeds)


@pytest.mark.parametrize(
    ("pooled", "means", "said"),
    [
        (Interval(0.02, 0.01), (0.01, 0.03), "confirmed"),
        (Interval(-0.02, 0.01), (-0.01, -0.03), "not confirmed"),
        (Interval(0.02, 0.03), (0.01, 0.03), "undecided at this size"),
        (Interval(0.02, 0.01), (-0.01, 0.05), "undecided at this size"),
        (Interval(-0.02, 0.01), (0.01, -0.05), "undecided at this size"),
        (Interval(0.0, 0.0), (0.0, 0.0), "undecided at this size"),
        (Interval(0.02, math.inf), (0.02,), "undecided at this size"),
    ],
)
def test_verdict(pooled: Interval, means: tuple[float, ...], said: str) -> None:
    assert claims.verdict(pooled, means) == said


def test_a_difference_is_over_common_seeds_and_the_first_common_tasks() -> None:
    a = cell(SS, [0.9, 0.9, 0.5], [0.7, 0.8, 0.1], [0.1, 0.1, 0.1], seeds=(2, 0, 1))
    b = cell(FT_ALL, [0.6, 0.5], [0.8, 0.6], seeds=(0, 2))
    cells = {("ss", 1): a, ("ft-all", 1): b}
    found = claims.difference(cells, SS, FT_ALL, 1)
    assert found is not None
    assert found.per_seed == (
        paired_difference([0.9, 0.9], [0.8, 0.6]),
        paired_difference([0.7, 0.8], [0.6, 0.5]),
    )
    assert claims.difference(cells, SS, FT_ALL, 5) is None
    assert (
        claims.difference({("ss", 1): a, ("ft-all", 1): cell(FT_ALL, [0.5], seeds=(7,))}, SS, FT_ALL, 1)
        is None
    )


def test_tasks_to_reach_is_linear_between_validations() -> None:
    assert claims.tasks_to_reach(CURVE, 0.65) == pytest.approx(150)
    assert claims.tasks_to_reach(CURVE, 0.6) == pytest.approx(100)
    assert claims.tasks_to_reach(CURVE, 0.4) == 0
    assert claims.tasks_to_reach(CURVE, 0.9) == 200


def test_tasks_saved_compares_with_the_gain_of_the_plain_run_of_the_same_seed() -> None:
    quick = [[0, 0.5, 0.01], [100, 0.72, 0.01], [200, 0.6, 0.01]]
    cells = {
        ("ss", 1): cell(SS, [0.5, 0.6], [0.5, 0.6]),
        ("ss-ht", 1): cell(SS_HT, [0.5, 0.6], [0.5, 0.6], seeds=(1, 0), curve=quick),
    }
    # The level is 0.5 + 0.9 · 0.2 = 0.68.
    (plain, hard), again = claims.tasks_saved(cells, SS, 1)
    assert (plain, hard) == pytest.approx((180, 100 * 0.18 / 0.22))
    assert again == pytest.approx((plain, hard))
    interval, said = claims.speed_verdict([(180, 80), (175, 80), (170, 80)])
    assert (interval.mean, said) == (95, "confirmed")
    assert claims.speed_verdict([(180, 80)])[1] == "undecided at this size"
    assert claims.speed_verdict([(80, 180), (80, 175), (80, 170)])[1] == "not confirmed"
    # A run that loses accuracy has nothing to reach.
    falling = [[0, 0.7, 0.01], [100, 0.6, 0.01]]
    both = {
        ("ss", 1): cell(SS, [0.5, 0.6], curve=falling, seeds=(0,)),
        ("ss-ht", 1): cell(SS_HT, [0.5, 0.6], seeds=(0,)),
    }
    assert claims.tasks_saved(both, SS, 1)[0][0] == 0


def test_a_verdict_from_one_seed_says_so() -> None:
    cells = {
        ("ss", 1): cell(SS, [0.8, 0.9, 0.85], seeds=(0,)),
        ("ft-all", 1): cell(FT_ALL, [0.6, 0.7, 0.7], seeds=(0,)),
    }
    assert "1-shot: **confirmed, from one seed**. SS[Θ;θ] is better" in claims.claims_text(cells, (1,))


def test_what_was_still_rising_is_said_of_what_a_claim_calls_worse() -> None:
    better, worse = [0.8, 0.9, 0.85], [0.6, 0.7, 0.7]
    flat = [[0, 0.6, 0.01], [100, 0.7, 0.01], [200, 0.7, 0.01]]
    ss = {("ss", 1): cell(SS, better, better)}
    for curve, sentence in (
        (CURVE, " FT[Θ;θ] was best at its end in 2 of 2 seeds, so still rising."),
        (flat, ""),
    ):
        found = claims.claims_text(ss | {("ft-all", 1): cell(FT_ALL, worse, worse, curve=curve)}, (1,))
        assert found.splitlines()[0].endswith(").") == (not sentence)
        assert found.splitlines()[0].endswith(sentence)
    one = {("ss", 1): cell(SS, better, seeds=(0,)), ("ft-all", 1): cell(FT_ALL, worse, seeds=(0,))}
    assert "FT[Θ;θ] was best at its end, so still rising." in claims.claims_text(one, (1,))


def test_each_claim_is_a_sentence_with_its_verdict() -> None:
    better, worse = [0.8, 0.9, 0.85, 0.8], [0.6, 0.7, 0.7, 0.6]
    cells = {
        ("ss", 1): cell(SS, better, better),
        ("ft-all", 1): cell(FT_ALL, worse, worse),
        ("ss-ht", 1): cell(SS_HT, better, better),
    }
    first, hard, speed = claims.claims_text(cells, (1, 5)).splitlines()
    assert first.startswith(
        "- SS is better than FT, 1-shot: **confirmed**. SS[Θ;θ] is better than FT[Θ;θ] by 18.8 ±"
    )
    assert hard.startswith(
        "- HT is better than the plain meta-batch, 1-shot: **undecided at this size**. SS[Θ;θ] + HT and"
    )
    assert speed.startswith("- HT converges faster, 1-shot: **undecided at this size**. SS[Θ;θ]")
    assert speed.endswith(
        "takes 0 ± 0 tasks more than with them (without and with, each seed: 180 and 180; 180 and 180)."
    )
