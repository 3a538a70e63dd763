"""The benchmarks judge before they time, count rightly, and run."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from bench.__main__ import main
from bench.accuracy import Expected, behind_kinks, convolution_bound, mismatch, winograd_amplification
from bench.encoder import rows as encoder_rows
from bench.evaluate import SHARES, evaluation_case
from bench.evaluate import Problem as EvaluationProblem
from bench.evaluate import rows as evaluation_rows
from bench.fits import rows as fit_rows
from bench.harness import (
    Against,
    Case,
    Contender,
    Family,
    Line,
    Row,
    Settings,
    Spread,
    Target,
    geometric_mean,
    interleaved,
    ratios,
)
from bench.inner_loops import Problem as MamlProblem
from bench.inner_loops import rows as maml_rows
from bench.ops.bench_ss_conv import bare, conv_case
from bench.ops.bench_ss_conv import rows as conv_rows
from bench.pretrain import rows as pretrain_rows
from bench.report import lines_of, text, verdict
from bench.scaling import NOT_FALLING, throughput
from bench.scaling import rows as scaling_rows
from bench.step import HardTaskRow
from bench.step import rows as step_rows
from mtl_fast.ops import ConvOperands

ROOT = Path(__file__).resolve().parents[1]
QUICK = Settings(rounds=3, quick=True)
ONE = torch.ones(3, dtype=torch.float64)


def returning(value: Tensor, name: str = "ours", calls: list[str] | None = None) -> Contender:
    def run() -> Mapping[str, Tensor]:
        if calls is not None:
            calls.append(name)
        return {"y": value}

    return Contender(name, run)


def case(ours: Contender, *peers: Contender, target: Target | None = None) -> Case:
    names = tuple(peer.name for peer in peers)
    return Case(ours, peers, (Against(names, target),), {"y": Expected(ONE, 1e-6)}, flops=10)


def test_ratios_are_taken_round_by_round() -> None:
    assert ratios([1.0, 2.0, 4.0], [3.0, 4.0, 4.0]) == (3.0, 2.0, 1.0)


def test_the_spread_is_median_and_the_fifths_around_it() -> None:
    assert Spread.of([6.0, 1.0, 2.0, 3.0, 4.0, 5.0]) == Spread(3.5, 2.0, 5.0)
    assert Spread.of([2.0]) == Spread(2.0, 2.0, 2.0)


def test_the_fastest_peer_is_the_one_of_the_smallest_median() -> None:
    row = Row(
        "a row", lambda: case(returning(ONE), returning(ONE, "a"), returning(ONE, "b"), returning(ONE, "c"))
    )
    times = {"ours": [1.0, 1.0, 1.0], "a": [9.0, 1.0, 9.0], "b": [4.0, 5.0, 3.0], "c": [5.0, 6.0, 4.0]}
    line = row._line(row.build(), Against(("a", "b", "c"), Target(2, 3)), times, peak=5.0)
    assert (line.values, line.against) == ((4.0, 5.0, 3.0), "b")
    assert line.best == 3.0
    assert line.share == 10 / 1.0 / 5.0


def test_every_contender_is_timed_once_a_round_and_the_order_turns() -> None:
    calls: list[str] = []
    contenders = [returning(ONE, name, calls) for name in ("ours", "a", "b")]
    slow = replace(QUICK, rounds=4)
    times, peak = interleaved(contenders, slow)
    assert {name: len(seconds) for name, seconds in times.items()} == {"ours": 4, "a": 4, "b": 4}
    assert peak > 0
    turns = [name for i, name in enumerate(calls) if i == 0 or calls[i - 1] != name]
    # Warming, then rounds that start with ours, a, b and the matrix product, which leaves no trace.
    assert turns == ["ours", "a", "b", "ours", "a", "b", "a", "b", "ours", "b", "ours", "a", "ours", "a", "b"]


def test_warming_is_a_round_where_one_call_is_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(QUICK), "shortest_sample", 0.0)
    calls: list[str] = []
    times, _ = interleaved([returning(ONE, name, calls) for name in ("ours", "a")], replace(QUICK, rounds=3))
    assert {name: len(seconds) for name, seconds in times.items()} == {"ours": 3, "a": 3}
    assert sorted(calls) == ["a"] * 3 + ["ours"] * 3


def family_line(*values: float, refused: str = "") -> Line:
    return Line("a row", values=values, best=2.0, refused=refused)


def test_the_geometric_mean_is_that_of_each_round() -> None:
    family = Family("convs", 2, Target(2, 3))
    mean = geometric_mean(family, [family_line(1.0, 4.0), family_line(4.0, 9.0)])
    assert mean.values == pytest.approx((2.0, 6.0))
    assert mean.best == pytest.approx(2.0)
    assert mean.target == family.target


def test_a_part_of_the_rows_has_no_target_and_a_refused_one_no_mean() -> None:
    family = Family("convs", 3, Target(2, 3))
    part = geometric_mean(family, [family_line(1.0), family_line(4.0)])
    assert part.target is None
    assert part.row == "convs, geometric mean of 2 of 3 rows"
    none = geometric_mean(
        family, [family_line(1.0), replace(family_line(refused="wrong"), row="the red one")]
    )
    assert not none.values
    assert "the red one" in none.refused


@pytest.mark.parametrize(
    ("target", "value", "words"),
    [
        (Target(2, 3), 2.5, "must ≥ 2× holds, aim ≥ 3× MISSED"),
        (Target(2, 3), 1.9, "must ≥ 2× MISSED, aim ≥ 3× MISSED"),
    ],
)
def test_verdicts(target: Target, value: float, words: str) -> None:
    assert verdict(target, value, "×") == words


def test_a_bound_from_above_holds_below_it() -> None:
    words = verdict(Target(0.05, 0.01, at_most=True), 0.03, "%")
    assert words == "must ≤ +5.0% holds, aim ≤ +1.0% MISSED"


def test_nothing_is_timed_when_any_value_is_wrong() -> None:
    for wrong in ("ours", "peer"):
        calls: list[str] = []
        contenders = [
            returning(ONE * (1.1 if name == wrong else 1), name, calls) for name in ("ours", "peer")
        ]
        (line,) = Row("a row", lambda c=contenders: case(*c, target=Target(2, 3))).measure(QUICK)
        assert calls == ["ours", "peer"]
        assert not line.values
        assert line.refused.startswith(f"{wrong}: y is off by 1.0e-01")
        assert "×" not in text(line, QUICK)
        assert "refused" in text(line, QUICK)


@pytest.mark.parametrize(
    ("actual", "word"),
    [
        ({"y": ONE * math.nan}, "nan"),
        ({}, "missing"),
        ({"y": ONE[:2]}, "(2,)"),
        ({"y": ONE + 1e-5}, "1.0e-05"),
    ],
    ids=["nan", "missing", "shape", "off"],
)
def test_what_is_wrong_with_values(actual: Mapping[str, Tensor], word: str) -> None:
    assert not mismatch({"y": ONE + 1e-8}, {"y": Expected(ONE, 1e-7)})
    assert word in mismatch(actual, {"y": Expected(ONE, 1e-7)})


def test_amplification_of_two_by_two_tiles_is_the_one_by_hand() -> None:
    # Products of size √2, √1.5, √1.5, √2; an output sums three of them and has the size √3.
    assert winograd_amplification((0.0, 1.0, -1.0)) == pytest.approx(5 / 3)


@pytest.mark.parametrize("granularity", ["kernel", "filter"])
@pytest.mark.parametrize("fault", ["unscaled", "unshifted", "no-shift-gradient", "last-row"])
def test_a_broken_convolution_is_refused(granularity: str, fault: str) -> None:
    def broken(x: Tensor, conv: ConvOperands) -> Tensor:
        if fault == "unscaled":
            return bare(x, replace(conv, scale=torch.ones_like(conv.scale) + 0 * conv.scale))
        if fault == "unshifted":
            return bare(x, replace(conv, shift=0 * conv.shift))
        if fault == "no-shift-gradient":
            return bare(x, replace(conv, shift=conv.shift.detach() + 0 * conv.shift))
        keep = torch.ones(x.shape[2], 1)
        keep[-1] = 0
        return bare(x, conv) * keep

    (line,) = Row("broken", lambda: conv_case(granularity, 2, 8, 7, ours=broken)).measure(QUICK)
    assert line.refused.startswith("ours: ")
    (line,) = Row("right", lambda: conv_case(granularity, 2, 8, 7, ours=bare)).measure(QUICK)
    assert len(line.values) == 3


def test_bounds_see_a_wrong_term() -> None:
    value = torch.randn(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert mismatch({"y": 1.001 * value}, {"y": Expected(value, convolution_bound(9 * 512))})
    # The deepest gradient of a full ResNet-12.
    deepest = behind_kinks(value, convolution_bound(9 * 512, 12), 16)
    assert mismatch({"y": 1.1 * value}, {"y": deepest})


def test_behind_kinks_a_single_value_may_differ_but_not_all() -> None:
    ones = torch.ones(100_000, dtype=torch.float64)
    expected = {"y": behind_kinks(ones, 1e-4, 2)}
    one, all_of_them = ones.clone(), ones * 1.1
    one[0] = -0.5
    assert not mismatch({"y": one}, expected)
    assert mismatch({"y": all_of_them}, expected)


def test_every_row_of_the_targets_is_there() -> None:
    convs = conv_rows(quick=False)
    assert [row.family.n_rows for row in convs if row.family] == [8] * 16
    assert {row.family.name for row in convs if row.family} == {"ss_conv, kernel", "ss_conv, filter"}
    assert [row.name for row in encoder_rows(quick=False)] == [
        "encoder, forward, ResNet-12 @ 84, batch 80",
        "encoder, forward, ResNet-12 @ 32, batch 80",
    ]
    assert len(fit_rows(quick=False)) == 4
    assert [row.name.split(",")[0] for row in [*step_rows(quick=False), *pretrain_rows(quick=False)]] == [
        "meta-training step",
        "peak memory of a meta-training step",
        "peak memory of a meta-training step",
        "pool and sampling of hard tasks",
        "pre-training step",
    ]
    names = [row.name for row in maml_rows(quick=False)]
    assert len(names) == len(set(names)) == 4 + 4 + 3
    for part in (
        "second order, Conv-4 @ 84, 4 tasks",
        "first order, Conv-4 @ 32, 4 tasks",
        "kept, 1 in flight",
        "20 inner steps, check",
    ):
        assert any(part in name for name in names), part


def test_a_step_of_maml_is_the_plain_loop() -> None:
    timed = [row for row in maml_rows(quick=True) if row.name.startswith("MAML step")]
    lines = [line for lines in lines_of(timed, replace(QUICK, rounds=2)) for line in lines]
    assert len(lines) == 2
    assert all(line.values for line in lines), [line.refused for line in lines]


def test_the_sides_whose_memory_is_measured_take_the_same_step() -> None:
    problem = MamlProblem(n_tasks=3, quick=True)
    sides = ("maml plain", "maml kept 3 5", "maml kept 1 5", "maml checkpointed 2 5")
    losses = torch.stack([problem.side(side)()["loss"] for side in sides])
    assert float(losses.std() / losses.mean()) < 1e-3
    assert not torch.equal(problem.side("maml kept 3 1")()["loss"], losses[1])


def test_evaluation_and_scaling_have_the_rows_asked_for() -> None:
    assert [row.name for row in evaluation_rows(quick=False)] == [
        "evaluation, 600 tasks, ResNet-12 @ 32",
        "evaluation, 10,000 tasks, ResNet-12 @ 32",
    ]
    axes = ("tasks", "n_shot", "n_way", "inner steps", "features")
    assert [row.name for row in scaling_rows(quick=False)] == [
        f"scaling, {what}, {axis}" for what in ("meta-training step", "fit and predict") for axis in axes
    ]


def test_a_share_of_the_work_stands_for_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.harness._sample", lambda contender, n_calls: 2.0)
    whole, quarter = returning(ONE), replace(returning(ONE, "a"), share=0.25)
    times, _ = interleaved([whole, quarter], QUICK)
    assert times == {"ours": [2.0] * 3, "a": [8.0] * 3}


def test_plain_evaluation_is_timed_with_tasks_spread_over_all() -> None:
    problem = EvaluationProblem.make(30, quick=True)
    assert problem.episodes[problem.every].n_tasks == problem.n_sampled == 3
    assert torch.equal(problem.episodes[problem.every].support, problem.episodes.support[[0, 10, 20]])
    n_distinct = len(torch.cat([problem.episodes.support, problem.episodes.query], dim=1).unique())
    assert problem.factor == 30 * 5 * 16 / n_distinct
    case = evaluation_case(problem, quick=True)
    assert {peer.share for peer in case.peers} == {0.1}
    assert case.ours.share == 1
    for against in case.against:
        assert against.target == Target(SHARES.must * problem.factor, SHARES.aim * problem.factor)
    row = Row("wrong", lambda: evaluation_case(problem, quick=True, ours=lambda: torch.zeros(3, 75, 5)))
    (line,) = row.measure(QUICK)
    assert line.refused.startswith("ours: logits is off by 1.0e+00")


def test_falling_throughput_is_found_wherever_it_falls() -> None:
    def line(n_tasks: int, *values: float) -> Line:
        return Line("a row", values=values, details={"value": n_tasks})

    rising = throughput("step", [line(1, 1.0, 1.1), line(2, 2.0, 2.2), line(4, 2.0, 2.1)])
    assert rising.values == pytest.approx((1.0, 2.1 / 2.2))
    # What is chosen is what is told: 4 tasks' median is half of 1 task's, but in most rounds they are faster.
    uneven = throughput("step", [line(1, 4.0, 8.0, 1.0), line(2, 3.8, 7.6, 0.95), line(4, 5.0, 2.0, 1.5)])
    assert uneven.values == pytest.approx((0.95, 0.95, 0.95))
    falling = throughput("step", [line(1, 4.0), line(2, 2.0), line(4, 5.0)])
    assert (falling.values, falling.ours, falling.peer) == ((0.5,), "2 tasks", "(1)")
    assert "must ≥ 0.97× MISSED" in verdict(NOT_FALLING, 0.5, "×")


def test_scaling_runs_and_draws(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "new" / "scaling.jsonl"
    assert main(["scaling", "--quick", "--rows", "tasks", "--threads", "1", "--output", str(file)]) == 0
    assert "refused" not in capsys.readouterr().out
    lines = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    assert [(line["details"].get("axis"), line["details"].get("value")) for line in lines] == [
        ("tasks", 1),
        ("tasks", 2),
        (None, None),
        ("tasks", 1),
        ("tasks", 4),
        (None, None),
    ]
    assert lines[1]["unit"] == " tasks/s"
    seconds = lines[1]["details"]["seconds"]
    assert lines[1]["values"] == pytest.approx([2 / s for s in seconds])
    with Image.open(file.with_suffix(".png")) as drawn:
        assert drawn.width == 1600


def test_evaluation_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--quick", "--threads", "1"]) == 0
    printed = capsys.readouterr().out
    assert (
        printed.count("images embedded plainly for a distinct one; plain sides extrapolated from 3 tasks")
        == 2
    )


def test_hard_tasks_are_a_share_of_a_round() -> None:
    row = HardTaskRow("hard tasks", Target(0.03, 0.01, at_most=True))
    (line,) = row.measure(QUICK)
    seconds = line.details["seconds"]
    assert len(line.values) == QUICK.rounds
    assert line.values == tuple(p / s for p, s in zip(seconds["ours"], seconds["15 steps"], strict=True))
    assert all(0 < value < 1 for value in line.values)
    assert line.against == "15 steps"


def test_families_end_with_their_mean(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "new" / "lines.jsonl"
    assert main(["ops", "--quick", "--rows", "ss_conv", "--threads", "1", "--output", str(file)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("quick: not to be quoted")
    assert "must" not in printed
    lines = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    assert [(line["operation"], line["mode"]) for line in lines] == [("ss_conv", "kernel")] * 3 + [
        ("ss_conv", "filter")
    ] * 3
    assert lines[2]["row"].endswith("geometric mean")
    assert all(line["quick"] and "must_holds" not in line and line["threads"] == 1 for line in lines)
    assert {"ours", "NCHW", "channels-last"} == set(lines[0]["details"]["seconds"])
    scaled = {"output scaled, NCHW", "output scaled, channels-last"}
    assert scaled <= set(next(line for line in lines if line["mode"] == "filter")["details"]["seconds"])


def test_fits_run() -> None:
    lines = [line for lines in lines_of(fit_rows(quick=True), QUICK) for line in lines]
    assert len(lines) == 12
    assert all(line.values for line in lines), [line.refused for line in lines]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["step", "--rows", "nothing of this name"], "no row of step"),
        (["ops", "--rounds", "3"], "at least 7"),
        (["everything"], "invalid choice"),
    ],
)
def test_errors_of_the_command(capsys: pytest.CaptureFixture[str], arguments: list[str], word: str) -> None:
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
    assert word in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(("part", "row"), [("ops", "encoder"), ("step", ""), ("pretrain", ""), ("maml", "")])
def test_networks_and_memory_run(part: str, row: str) -> None:
    # In a process of its own: importing the compiler warns.
    command = [sys.executable, "-m", "bench", part, "--quick", "--rows", row, "--threads", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=390)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "quick: not to be quoted" in done.stdout
    assert "refused" not in done.stdout
