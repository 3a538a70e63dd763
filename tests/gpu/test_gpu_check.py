"""`make gpu-check`: without a GPU every part is named with its reason; what it measures and writes, on a stand-in."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.gpu.cases import BATCHED, OURS, PLAIN, convolutions, materialised, whole_step
from bench.gpu.timing import Percentiles, Times, sampled
from bench.networks import SLIM
from bench.peers.meta_step import InnerLoop
from bench.step import Shape
from mtl_fast.kernels.triton.launch import Launch
from mtl_fast.ops import backend, routes
from tests.gpu.block_cases import decided
from tests.gpu.checks import CHECKS, PRECISIONS, every_check
from tools import gpu_check
from tools.gpu_check import PARTS, Part, Section, main, row, run_parts, write

pytestmark = pytest.mark.proof
CPU = torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_dry_run_names_every_part_and_its_reason(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["--output", str(tmp_path)]) == 0
    first, *skipped = capsys.readouterr().out.splitlines()
    assert first == "gpu-check: a dry run, nothing was measured"
    reason = ": an NVIDIA GPU is needed, and torch finds none ("
    assert [line.partition(reason)[0] for line in skipped] == [
        "skipped: correctness on the device: the interpreter's tests, with every launch on the device",
        "skipped: correctness on the device: ss_conv in fp32, tf32, fp16, bf16, by triton and cudnn",
        "skipped: correctness on the device: ss_block in fp32, tf32, fp16, bf16, by triton and cudnn",
        "skipped: correctness on the device: effective_weights in fp32, tf32, fp16, bf16",
        "skipped: correctness on the device: base_learner in fp32, tf32, fp16, bf16",
        "skipped: correctness on the device: episode_norm in fp32, tf32, fp16, bf16",
        "skipped: correctness on the device: images in fp32, tf32, fp16, bf16",
        "skipped: kernels: kernel, launcher, wall and graph-replay times",
        "skipped: operations against PyTorch",
        "skipped: meta-training step",
    ]
    assert all(reason in line for line in skipped)
    assert not list(tmp_path.iterdir())


def test_every_operation_that_triton_has_is_checked() -> None:
    assert set(CHECKS) == {op for op, backends in backend._REGISTRY.items() if "triton" in backends}
    names = every_check(PRECISIONS)
    # By both routes where there are two, in every precision.
    n_cases = sum(len(check.cases) * len(check.routes) for check in CHECKS.values())
    assert len(names) == n_cases * len(PRECISIONS) == 128
    assert names["ss_block common filter bf16 cudnn"] == ("ss_block", "common filter", "bf16", "cudnn")
    assert names["images centre tf32"] == ("images", "centre", "tf32", None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.timeout(320)
def test_where_there_is_no_gpu_every_check_says_so() -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:benchmark",
        "-p",
        "no:cacheprovider",
        "-m",
        "gpu",
    ]
    done = subprocess.run(
        [*command, "tests/gpu/device"], cwd=gpu_check.ROOT, stdout=subprocess.PIPE, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout
    assert f"SKIPPED [{len(every_check(PRECISIONS))}]" in done.stdout
    assert "torch finds no NVIDIA GPU" in done.stdout
    assert " passed" not in done.stdout


@pytest.mark.parametrize("form", ["common", "tensorflow"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_operands_of_blocks_are_found_in_every_precision(form: str, precision: str) -> None:
    """Far enough from all kinks for the precision; a GPU is not needed to look for them."""
    settings = PRECISIONS[precision]
    x, layers, exact = decided(form, "filter", settings.dtype, settings.rounds_as)
    assert x.dtype == settings.dtype
    assert (len(layers), len(exact)) == (4, 10)


def test_after_a_failure_nothing_is_timed(capsys: pytest.CaptureFixture[str]) -> None:
    wrong = Part("wrong", lambda _: Section("Correctness", failed=True))
    timed = Part("timed", lambda _: pytest.fail("timed"))
    assert [section.failed for section in run_parts([wrong, timed], CPU)] == [True]


def test_percentiles_are_those_of_the_samples() -> None:
    samples = iter([float(i) for i in range(11)])
    found = sampled(lambda: next(samples), 11)
    assert found == Percentiles(2, 5, 8)
    assert str(Percentiles(1e-6, 2e-6, 3.25e-6)) == "1.0 / 2.0 / 3.2"


def test_the_report_holds_every_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "facts", lambda _: {"card": "NVIDIA X 1", "torch": "2.13"})
    some = Percentiles(1e-6, 2e-6, 3e-6)
    times = Times(some, some, some, None, 5 * 10**6)
    section = Section(
        "Kernels", [row("a kernel", times, flop=4 * 10**6, n_bytes=2000, limit=1e-6)], "modelled"
    )
    page = write(tmp_path, [section], CPU)
    assert page.name == "gpu-check-nvidia-x-1.md"
    line = next(line for line in page.read_text("utf-8").splitlines() if line.startswith("| a kernel"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == ["a kernel", *["1.0 / 2.0 / 3.0"] * 3, "–", "2.0", "1", "50%", "5.0"]
    stored = json.loads(page.with_suffix(".json").read_text("utf-8"))
    assert stored["sections"][0]["rows"][0] == cells


def test_operands_are_made_as_they_are_described() -> None:
    x = torch.empty(2, 4, 3, 3, device="meta", memory_format=torch.channels_last)
    codes = torch.empty(5, dtype=torch.uint8, device="meta")
    launch = Launch(None, (1,), {"p_x": x, "p_codes": codes, "p_none": None, "n": 7}, {}, 1, 1)
    made = materialised(launch, CPU).arguments
    found, zeros = made["p_x"], made["p_codes"]
    assert isinstance(found, torch.Tensor)
    assert isinstance(zeros, torch.Tensor)
    assert (found.shape, found.stride(), float(found.std()) > 0) == (x.shape, x.stride(), True)
    assert not zeros.any()
    assert (made["p_none"], made["n"]) == (None, 7)


def test_contests_have_ours_first_and_all_of_pytorchs_ways() -> None:
    contest = next(iter(convolutions(CPU, n_images=1)))
    assert list(contest.contenders) == [
        OURS,
        "PyTorch channels-last",
        "torch.compile",
        "torch.compile, max-autotune",
    ]
    gradients = contest.contenders["PyTorch channels-last"]()()
    assert [t.shape[0] for t in gradients] == [1, 64, 64]


@pytest.mark.parametrize("name", [f"{OURS}, captured", f"{OURS}, eager", PLAIN])
def test_steps_run_where_their_device_is_the_cpu(name: str) -> None:
    shape = Shape(n_query=2, widths=SLIM, inner=InnerLoop(lr=0.05, n_steps=2))
    contest = whole_step(CPU, 32, shape, torch.bfloat16)
    assert BATCHED in contest.contenders
    contest.contenders[name]()()


def test_every_part_is_a_function_of_the_tool() -> None:
    assert [part.run for part in PARTS] == [
        gpu_check.correctness,
        gpu_check.kernels,
        gpu_check.operations,
        gpu_check.whole_step,
    ]
