"""The commands around the gates: what `gpu-proof` says and remembers, what `kernel-report` and `kernel-budgets` write."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from mtl_fast.kernels.triton import interpreted

pytest.importorskip("triton")
if interpreted():
    pytest.skip("in this process kernels are interpreted, not compiled", allow_module_level=True)

from bench.gpu.launches import Count
from mtl_fast.kernels.triton.ahead import CHIPS
from mtl_fast.kernels.triton.inspection import Inspection
from tests.gpu import budgets, planted
from tools import gpu_proof, kernel_budgets, kernel_report

pytestmark = pytest.mark.proof

FOUND = Inspection("", 64, 0, 1024, 4, 2, "", 300, 120, 2**20, True, False, False)
NAME = "planted/product"


def inspected(
    jobs: Sequence[tuple[str, str]], kept: Path | None = None, **changed: int
) -> Iterator[tuple[str, Inspection]]:
    """As the real one, with an instruction that every chip takes for its own."""
    for name, chip in jobs:
        matrix = CHIPS[chip].matrix.replace(r"\w*", "H")
        yield name, replace(FOUND, chip=chip, matrix=matrix, **changed)


@pytest.fixture(autouse=True)
def one_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted product is all that is shipped; its main loop may be as long as it is."""
    for tool in (gpu_proof, kernel_report, kernel_budgets):
        monkeypatch.setattr(tool, "shipped", lambda chip: {NAME: planted.launch()})
        monkeypatch.setattr(tool, "inspected", inspected)
    monkeypatch.setattr(gpu_proof, "RECORD", tmp_path / "gpu-proof.json")
    monkeypatch.setattr(gpu_proof.budgets, "longest_loop", lambda *_: FOUND.loop)


def test_a_proof_is_given_once(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu_proof.main([]) == 0
    assert f"6 of 6 shipped launches compiled for {', '.join(CHIPS)}; 0 faults" in capsys.readouterr().out
    monkeypatch.setattr(gpu_proof, "inspected", lambda *_, **__: pytest.fail("compiled again"))
    assert gpu_proof.main([]) == 0
    assert "; nothing changed since)" in capsys.readouterr().out
    # Other chips or tests are another proof, beside the first.
    monkeypatch.setattr(gpu_proof, "inspected", inspected)
    assert gpu_proof.main(["--chips", "sm_86"]) == 0
    assert "1 of 1 shipped launches compiled for sm_86" in capsys.readouterr().out
    assert len(json.loads(gpu_proof.RECORD.read_text("utf-8"))) == 2


def test_after_a_change_a_proof_is_given_anew(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sources = tmp_path / "kernels"
    sources.mkdir()
    monkeypatch.setattr(gpu_proof, "ROOT", tmp_path)
    for text in ("BLOCK = 64", "BLOCK = 32"):
        (sources / "contracts.py").write_text(text, "utf-8")
        assert gpu_proof.main([]) == 0
        assert "nothing changed since" not in capsys.readouterr().out
    assert len(json.loads(gpu_proof.RECORD.read_text("utf-8"))) == 1


def test_planted_fault_fails_the_proof_each_time(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_proof, "inspected", lambda jobs, kept: inspected(jobs, spilled=8))
    for _ in range(2):
        assert gpu_proof.main([]) == 1
        out = capsys.readouterr().out
        assert f"{NAME} for sm_120: spills: 8 bytes of local memory a thread" in out
        assert f"{len(CHIPS)} faults" in out


def test_budgets_are_written_for_every_chip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "budgets.json"
    write = budgets.write
    monkeypatch.setattr(kernel_budgets.budgets, "write", lambda lengths, chips: write(lengths, chips, path))
    kernel_budgets.main([])
    assert list(budgets.read(path).values()) == [{NAME: [FOUND.loop] * len(CHIPS)}]


def test_a_report_is_written_for_each_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = Count(Counter(a=1), Counter(mm=2), 10**9)
    ways = {"ours": dict.fromkeys(kernel_report.SIZES, count)}
    monkeypatch.setattr(kernel_report.counting, "ours_elsewhere", lambda *_: ways)
    monkeypatch.setattr(kernel_report.counting, "plain", lambda widths, size: count)
    kernel_report.main(["--cards", "h100", "l4", "--output", str(tmp_path)])
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == [
        "kernels-h100.json",
        "kernels-h100.md",
        "kernels-l4.json",
        "kernels-l4.md",
    ]
    for name, other in (("h100", "sm_89"), ("l4", "sm_90")):
        # Each page has the code of its own chip.
        page = (tmp_path / f"kernels-{name}.md").read_text("utf-8")
        assert f"| {NAME.partition('/')[2]} " in page
        assert other not in page + (tmp_path / f"kernels-{name}.json").read_text("utf-8")


def test_launches_without_work_are_not_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    idle = replace(planted.launch(), work=replace(planted.launch().work, flop=0))
    monkeypatch.setattr(kernel_report, "shipped", lambda *_: {NAME: planted.launch(), "planted/idle": idle})
    monkeypatch.setattr(kernel_report.counting, "plain", lambda *_: Count(Counter(), Counter(mm=2)))
    monkeypatch.setattr(kernel_report.counting, "ours_elsewhere", lambda *_: {})
    kernel_report.main(["--cards", "h100", "--output", str(tmp_path)])
    page = (tmp_path / "kernels-h100.md").read_text("utf-8")
    assert "| product " in page
    assert "idle" not in page
