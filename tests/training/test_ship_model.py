"""The model in the package: where it comes from, how well it does, and that packing it costs nothing."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from mtl_fast.config import EvaluationConfig, preset
from mtl_fast.training import checkpoint
from mtl_fast.training.evaluate import evaluate_model
from mtl_fast.training.models import SHIPPED, load_model, weights_of
from tests.training import tiny

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def tool() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("ship_model", ROOT / "tools" / "ship_model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_it_is_small_and_says_how_it_was_made() -> None:
    assert SHIPPED.stat().st_size < 1_300_000
    tensors, meta = checkpoint.load(SHIPPED)
    recipe = preset("glyphs")
    assert meta["made_by"] == "make shipped-model"
    assert "\nshipped-model:" in (ROOT / "Makefile").read_text()
    assert meta["kind"] == "meta"
    config = load_model(SHIPPED).config
    assert (config.data, config.encoder, config.pretrain, config.inner, config.seed) == (
        recipe.data,
        recipe.encoder,
        recipe.pretrain,
        recipe.inner,
        recipe.seed,
    )
    assert config.episodes.n_shot == 1
    assert config.meta.hard == "resample"
    assert len(meta["trained"]["source_commit"].removesuffix("+changes")) == 40
    assert sum(t.dtype == torch.int8 for t in tensors.values()) == 12  # the 3×3 convolutions


@pytest.mark.parametrize(("n_shot", "expected"), [(1, 0.7492), (5, 0.8820)])
def test_its_accuracy_on_test_tasks_is_pinned(n_shot: int, expected: float) -> None:
    """300 tasks of six scripts that no training saw."""
    tasks = EvaluationConfig(n_tasks=300)
    found = evaluate_model(SHIPPED, n_shot=n_shot, evaluation=tasks, device="cpu").interval.mean
    # Processors round differently, so that answers close to a tie may flip: 22 of 22,500 at most.
    assert abs(found - expected) <= 0.001


def test_packing_moves_each_weight_by_half_a_step_at_most(
    tool: ModuleType, meta_trained: Path, tmp_path: Path
) -> None:
    model = load_model(meta_trained)
    small = tool.ship(model, tmp_path / "small.safetensors")
    before, after = weights_of(model.encoder, model.head), weights_of(small.encoder, small.head)
    assert before.keys() == after.keys()
    scaled = {name.removesuffix("scale") for name in before if name.endswith(".scale")}
    assert scaled
    for name, tensor in before.items():
        layer = name.rpartition(".")[0] + "."
        if layer not in scaled or not name.endswith((".weight", ".scale")):
            assert torch.equal(tensor, after[name]), name
        elif name.endswith(".weight"):
            assert torch.equal(after[layer + "scale"], torch.ones(len(tensor), 1, 1, 1))
            step = after[name].abs().amax(dim=(1, 2, 3), keepdim=True) / 127
            error = (tensor * before[layer + "scale"] - after[name]).abs()
            assert bool((error <= step * (0.5 + 1e-5)).all()), name
    images = tiny.split("test").images[:40]
    features = [m.encoder(images.permute(0, 3, 1, 2).float() / 64 - 2) for m in (model, small)]
    # Twelve layers, an eighth of a percent of each filter's largest weight in each.
    assert float((features[0] - features[1]).norm() / features[0].norm()) < 0.05


@torch.no_grad()
def test_a_scale_that_starts_anew_starts_from_what_was_learned() -> None:
    model = load_model(SHIPPED)
    pixels = tiny.split("test").images[:4].permute(0, 3, 1, 2).float() / 64 - 2
    before = model.encoder(pixels)
    model.encoder.enable_scale_shift("kernel")
    # Scales are 1 in the file's network too; only what the shift learned is dropped.
    after = model.encoder(pixels)
    assert bool(torch.isfinite(after).all())
    assert float((after - before).norm() / before.norm()) < 0.5


def test_a_filter_of_zeros_packs(tool: ModuleType, meta_trained: Path) -> None:
    model = load_model(meta_trained)
    conv = model.encoder.convs()[0]
    with torch.no_grad():
        conv.weight[0] = 0
    packed = tool.packed(model)
    assert all(bool(torch.isfinite(t).all()) for t in packed.values() if t.is_floating_point())
