"""The model of a kernel's time: each term by hand, the larger one limits, factors multiply; the page shows them."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mtl_fast.kernels.triton import interpreted

pytest.importorskip("triton")
if interpreted():
    pytest.skip("in this process kernels are interpreted, not compiled", allow_module_level=True)

from bench.gpu import report
from bench.gpu.cards import CARDS, Card
from bench.gpu.launches import GRAPH, Count
from bench.gpu.model import modelled, rate
from mtl_fast.kernels.triton import epilogue_backward, episode_norm_backward
from mtl_fast.kernels.triton.ahead import CHIPS
from mtl_fast.kernels.triton.inspection import Inspection
from mtl_fast.kernels.triton.launch import Work
from mtl_fast.kernels.triton.shipped import shipped
from tests.gpu import planted

pytestmark = pytest.mark.proof

# Rates that make every term a number to be seen: 8 multiprocessors at 1 GHz.
CARD = Card("test", "Test", "sm_80", 8, 1e9, 100e12, 50e12, 10e12, 1e12, "nowhere")
FOUND = Inspection("sm_80", 64, 0, 1024, 4, 2, "HMMA.16816.F32.BF16", 300, 120, 2**20, True, False, False)
LAUNCH = replace(
    planted.launch(),
    grid=(12, 1),
    work=Work(flop=2**30, read=10**6, written=10**6, l2_read=10**8, matrix=True),
)


def test_terms_are_those_of_the_equation() -> None:
    time = modelled(LAUNCH, FOUND, CARD)
    assert time.products == pytest.approx(2**30 / (100e12 * 750 / 989))
    assert time.memory == pytest.approx(2e6 / (1e12 * 3.0 / 3.35))
    assert time.l2 == pytest.approx(101e6 / (6e12 / (132 * 1.83e9) * 8 * 1e9))
    # 1024 passes of 120 instructions by 4 warps, on 8 multiprocessors of 4 schedulers.
    assert time.issue == pytest.approx(1024 * 120 * 4 / (8 * 4 * 1e9))
    # 12 programs on 8 multiprocessors: the fullest has 2, the mean 1.5.
    assert time.waves == pytest.approx(2 / 1.5)
    assert time.padding == 1
    assert time.limit == "L2"
    assert time.seconds == pytest.approx(time.l2 * time.waves)


def test_padding_is_computed_and_not_read() -> None:
    time, plain = (
        modelled(replace(LAUNCH, work=replace(LAUNCH.work, padded=n)), FOUND, CARD) for n in (3 * 2**29, 0)
    )
    assert (time.padding, plain.padding) == (1.5, 1)
    assert time.products == pytest.approx(1.5 * plain.products)
    assert time.issue == pytest.approx(1.5 * plain.issue)
    assert (time.memory, time.l2, time.seconds) == (plain.memory, plain.l2, plain.seconds)


def test_products_tell_their_padding() -> None:
    launches = {name: launch for name, launch in shipped().items() if launch.work.matrix and launch.work.flop}
    assert {launch.name for launch in launches.values()} >= {
        "ss_conv_kernel",
        "ss_conv_first_layer_kernel",
        "scale_gradient_kernel",
        "image_scale_gradient_kernel",
    }
    padding = {name: launch.work.padded / launch.work.flop for name, launch in launches.items()}
    assert min(padding.values()) >= 1
    assert padding["ss_conv/forward/64-64@84 3x3 training bf16"] == 1, "whole blocks"
    # Three pixels of three channels are computed as four of four.
    assert padding["ss_conv/forward/3-64@84 3x3 training bf16"] == pytest.approx(16 / 9)


def test_a_kernel_without_products_has_no_issue_term_and_the_rate_of_float32() -> None:
    plain = replace(LAUNCH, work=Work(flop=100, read=10**9, written=0))
    time = modelled(plain, replace(FOUND, loop_flop=0), CARD)
    assert (time.issue, time.limit) == (0, "L2")
    assert rate(plain, CARD) == CARD.fp32
    assert time.l2 == pytest.approx(1e9 / CARD.l2)


def test_products_run_at_the_rate_of_their_dtype() -> None:
    assert rate(LAUNCH, CARD) == pytest.approx(100e12 * 750 / 989)
    assert rate(planted.launch(dtype=torch.float32), CARD) == pytest.approx(50e12 * 750 / 989)


def test_there_is_a_card_for_every_chip() -> None:
    assert {card.capability for card in CARDS} == set(CHIPS)
    assert len({card.name for card in CARDS}) == len(CARDS)


# Operations of a multiprocessor in a cycle, half types with float32 sums: the architectures' documents.
HALF_PER_CYCLE = {"sm_80": 2048, "sm_86": 512, "sm_89": 1024, "sm_90": 4096, "sm_100": 8192, "sm_120": 512}


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_the_makers_figures_agree_with_each_other(card: Card) -> None:
    per_second = HALF_PER_CYCLE[card.capability] * card.multiprocessors * card.clock
    assert card.half == pytest.approx(per_second, rel=0.005)
    # The documents round TF32 to three digits at most.
    assert card.tf32 == pytest.approx(card.half / 2, rel=0.03)


def test_a_captured_step_is_told_apart_and_parts_are_shown() -> None:
    steps = {
        "plain PyTorch": {32: Count(Counter(), Counter(mm=100))},
        "ours": {32: Count(Counter(a=5), parts=Counter({"images": 2, "update": 3}))},
        "ours, captured": {32: Count(Counter({GRAPH: 1}), Counter(copy_=5))},
    }
    (captured,) = (line for line in report.steps_table(steps).splitlines() if "captured" in line)
    assert [cell.strip() for cell in captured.strip("|").split("|")][1:] == ["6", "1 + 5", "as recorded", "–"]
    assert "| update |         3 |" in report.parts_table(steps)


def test_the_page_says_what_was_modelled_and_shows_each_term(tmp_path: Path) -> None:
    made = report.rows({"planted/product": LAUNCH}, {"planted/product": FOUND}, CARD)
    steps = {
        "plain PyTorch": {32: Count(Counter(), Counter(mm=100), 10**9)},
        "ours": {32: Count(Counter(product=3), Counter(add=2), 10**8)},
    }
    page = report.write(tmp_path, made, steps, CARD)
    text = page.read_text("utf-8")
    assert "**Times are modelled, none was measured**" in text
    line = next(line for line in text.splitlines() if line.startswith("| product") and "HMMA.16816" in line)
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1:10] == ["12", "4", "64", "0", "1.0", "2", "12%", "HMMA.16816.F32.BF16", "120"]
    assert cells[12] == f"{101e6 / 1024:.0f}"
    assert cells[-1] == "L2"
    assert len(cells) == len(report.COLUMNS)
    assert "20.0×" in next(line for line in text.splitlines() if line.startswith("| ours @ 32"))
    stored = json.loads(page.with_suffix(".json").read_text("utf-8"))
    assert stored["times"] == "modelled"
    assert stored["kernels"][0]["seconds"] == pytest.approx(modelled(LAUNCH, FOUND, CARD).seconds)
    assert stored["steps"]["ours"]["32"]["kernels"] == {"product": 3}


def test_kernels_of_one_name_in_two_files_are_told_apart() -> None:
    launches = {
        name: launch
        for module in (epilogue_backward, episode_norm_backward)
        for name, launch in module.shipped()
        if launch.name == "sums_kernel"
    }
    made = report.rows(launches, dict.fromkeys(launches, FOUND), CARD)
    kernels = {row["kernel"] for row in made}
    assert kernels == {"partial_sums.sums_kernel", "episode_norm_backward.sums_kernel"}
    text = report.markdown(made, {"plain PyTorch": {32: Count(Counter(), Counter(mm=1))}}, CARD)
    for kernel in kernels:
        assert f"\n## {kernel}\n" in text
