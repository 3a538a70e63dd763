"""The demo's table, texts and pictures, from scores that no training made."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from mtl_fast.config import Config, InnerConfig, preset
from mtl_fast.engine.scores import Evaluation
from mtl_fast.episodes import Episodes, EpisodeSampler
from mtl_fast.errors import InputError
from mtl_fast.training import checkpoint
from mtl_fast.training import demo as module
from mtl_fast.training.demo import demo
from mtl_fast.training.evaluate import Score
from mtl_fast.training.rows import FT_HEAD, SS, SS_HT, UPDATE_HEAD, Row
from mtl_fast.training.statistics import mean_interval
from tests.training import tiny

MEANS = {"update-head": 0.5, "ft-head": 0.5, "ss": 0.625, "ss-ht": 0.4375}
N_TASKS = 16


def accuracies(row: Row, n_shot: int) -> Tensor:
    """Half of the tasks an eighth better, half an eighth worse than the mean."""
    wave = torch.tensor([0.125, -0.125]).repeat(N_TASKS // 2)
    return MEANS[row.key] + wave + (0.25 if n_shot == 5 else 0.0)


class FakeExperiment:
    """What the demo asks of an experiment, with scores known beforehand."""

    def __init__(self, config: Config, output: Path) -> None:
        self.config = config
        self.output = output
        self.stores = {"test": tiny.split("test")}
        self.asked: list[str] = []

    def pretrain(self) -> Any:
        return SimpleNamespace(row=UPDATE_HEAD, meta={"curve": [[1, 0.3], [2, 0.4]]})

    def meta_train(self, row: Row, n_shot: int) -> Any:
        folder = self.output / f"{row.key}-{n_shot}shot"
        folder.mkdir(parents=True, exist_ok=True)
        if row is SS_HT:
            joined = {"round": 1, "tasks": 30, "joined": {"train3": 4, "train0": 1}}
            (folder / "hard_classes.jsonl").write_text(json.dumps(joined) + "\n")
        curve = [[0, 0.3, 0.01], [120, 0.4, 0.01], [240, 0.45, 0.01]]
        return SimpleNamespace(row=row, meta={"curve": curve}, path=folder / "model.safetensors")

    def choose_inner(self, model: Any, n_shot: int) -> InnerConfig:
        assert model.row is UPDATE_HEAD
        return replace(self.config.inner, lr=0.2 / n_shot, test_steps=10 * n_shot)

    def test(self, model: Any, n_shot: int, inner: InnerConfig | None) -> tuple[Score, Evaluation, Episodes]:
        assert (inner is not None) == (model.row is UPDATE_HEAD)
        config = replace(self.config, inner=inner or self.config.inner)
        sampler = EpisodeSampler(self.stores["test"], 5, n_shot, 3, torch.Generator().manual_seed(0))
        episodes = sampler.sample(N_TASKS)
        accuracy = accuracies(model.row, n_shot)
        predictions = torch.where(torch.arange(15) % 4 == 0, 0, episodes.query_labels)
        evaluation = Evaluation(accuracy, accuracy[:, None].expand(-1, 5), predictions)
        return Score(accuracy, mean_interval(accuracy), config), evaluation, episodes


@pytest.fixture(autouse=True)
def _fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "Experiment", FakeExperiment)


def test_the_demo_leaves_table_report_and_pictures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "demo"
    table = demo(output, seed=3, device="cpu")
    lines = table.splitlines()
    assert [line.split("  ")[0] for line in lines[2:]] == [r.label for r in (UPDATE_HEAD, FT_HEAD, SS, SS_HT)]
    assert lines[0].split()[-2:] == ["1-shot", "5-shot"]
    # s = 0.125·√(16/15), so ± is 1.96·s/4.
    half = mean_interval(accuracies(SS, 1)).percent().split(" ± ")[1]
    assert float(half) == pytest.approx(100 * 1.96 * 0.125 * (16 / 15) ** 0.5 / 4, abs=0.05)
    cells = {
        line.split("  ")[0]: [f"{100 * MEANS[k]:.1f} ± {half}", f"{100 * MEANS[k] + 25:.1f} ± {half}"]
        for line, k in zip(lines[2:], MEANS, strict=True)
    }
    for line in lines[2:]:
        assert all(cell in line for cell in cells[line.split("  ")[0]]), line
    said = capsys.readouterr().out
    assert table in said
    assert f"{output}/report.md" in said

    text = (output / "report.md").read_text()
    for row in (UPDATE_HEAD, FT_HEAD, SS, SS_HT):
        (line,) = [
            x for x in text.splitlines() if x.startswith("| ") and x.split("|")[1].strip() == row.label
        ]
        assert all(cell in line for cell in cells[row.label])
    for picture in ("curves.png", "episode.png", "hard_classes.png"):
        assert f"]({picture})" in text
        with Image.open(output / picture) as image:
            image.load()
            assert image.format == "PNG"
            assert image.width >= 1000
            assert len(image.convert("RGB").resize((64, 64)).getcolors(4096) or []) > 5  # not blank
    assert "seed 3" in text
    assert "16 test tasks" in text or f"{preset('glyphs').evaluation.n_tasks} test tasks" in text
    assert "1-shot: rate 0.2, 10 steps" in text
    assert "5-shot: rate 0.04, 50 steps" in text
    assert "Quick run" not in text
    assert json.loads((output / "config.json").read_text()) == json.loads(
        replace(preset("glyphs"), seed=3, device="cpu").to_json()
    )


def test_differences_are_told_whichever_way_they_came_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The differences of single tasks have no spread here: their interval is 0 wide."""
    demo(tmp_path / "demo", quick=True)
    for text in (capsys.readouterr().out, (tmp_path / "demo" / "report.md").read_text()):
        for n_shot in (1, 5):
            assert f"{n_shot}-shot: SS[Θ;θ] is better than update θ by 12.5 ± 0.0 points." in text
            assert f"{n_shot}-shot: SS[Θ;θ] is better than FT θ by 12.5 ± 0.0 points." in text
            assert f"{n_shot}-shot: SS[Θ;θ] + HT is worse than SS[Θ;θ] by 18.8 ± 0.0 points." in text


def test_a_quick_demo_says_that_its_numbers_mean_little(tmp_path: Path) -> None:
    demo(tmp_path, quick=True)
    assert "numbers mean little" in (tmp_path / "report.md").read_text()
    settings = json.loads((tmp_path / "config.json").read_text())
    assert settings["meta"]["n_tasks"] == preset("glyphs-quick").meta.n_tasks


def test_each_row_keeps_its_tasks_for_paired_tests(tmp_path: Path) -> None:
    demo(tmp_path)
    files = sorted((tmp_path / "test").glob("*/evaluation.safetensors"))
    assert len(files) == 8
    for row in (UPDATE_HEAD, FT_HEAD, SS, SS_HT):
        for n_shot in (1, 5):
            tensors, meta = checkpoint.load(
                tmp_path / "test" / f"{row.key}-{n_shot}shot" / "evaluation.safetensors"
            )
            assert torch.equal(tensors["task_accuracy"], accuracies(row, n_shot))
            assert meta["model"] == row.label


def test_a_demo_is_not_overwritten(tmp_path: Path) -> None:
    demo(tmp_path, seed=1)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(
        InputError, match=r"holds a demo already; --resume goes on with it, or give another --output"
    ):
        demo(tmp_path, seed=1)
    with pytest.raises(InputError, match=r"other settings \(seed is 1 there and 2 here\)"):
        demo(tmp_path, seed=2, resume=True)
    with pytest.raises(InputError, match="other settings"):
        demo(tmp_path, seed=1, quick=True, resume=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert demo(tmp_path, seed=1, resume=True)


def test_an_output_that_is_a_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(InputError, match="cannot make this folder"):
        demo(file)
    assert file.read_text() == "mine"
