"""A step whose encoder is in half precision, against the one in float32; what stays in float32."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mtl_fast
from mtl_fast.data.store import ImageStore
from mtl_fast.engine import EpisodicEngine
from tests.engine.cases import NORMS, ORDERS, gradients, make_encoder, make_engine, parameters, tasks

HALVES = (torch.bfloat16, torch.float16)
by_norm = pytest.mark.parametrize("norm", NORMS)
by_order = pytest.mark.parametrize("order", ORDERS)
by_dtype = pytest.mark.parametrize("dtype", HALVES, ids=str)
SCALE = 2.0**10


def bound(dtype: torch.dtype, n_layers: int) -> float:
    """Relative: in each layer image, weight, sum and epilogue are rounded, on the way there and back.

    Twice that, for a value beside a kink (of the activation, of the pooling) falls on its other side. Where that is
    more: independent roundings of relative size δ put a share δ/π of the values on the other side of a kink, and their
    gradients are others altogether; kinks of a layer each and of four poolings, on the support's way and the query's.
    """
    eps = torch.finfo(dtype).eps
    rounding, n_kinks = 4 * n_layers**0.5 * eps, 2 * (n_layers + 4)
    return min(2 * 2 * 4 * n_layers * eps, rounding + (n_kinks * rounding / math.pi) ** 0.5)


def engine_of(store: ImageStore, kind: str, dtype: torch.dtype | None, **options: Any) -> EpisodicEngine:
    engine = make_engine(store, make_encoder(kind, dtype=torch.float32), encoder_dtype=dtype, **options)
    if dtype == torch.float16:
        engine.loss_scale = torch.tensor(SCALE)
    return engine


def joined(engine: EpisodicEngine) -> Tensor:
    """All gradients in one vector, without the scale of the loss."""
    found = gradients(engine)
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}
    vector = torch.cat([gradient.flatten() for gradient in found.values()])
    return vector if engine.loss_scale is None else vector / engine.loss_scale


@by_norm
@by_order
@by_dtype
def test_losses_and_gradients_are_those_of_float32_to_rounding(
    small_store: ImageStore, norm: str, order: str, dtype: torch.dtype
) -> None:
    episodes = tasks(small_store, 3)
    outputs, vectors = [], []
    for one in (None, dtype):
        engine = engine_of(small_store, "conv4", one, norm=norm, order=order)
        outputs.append(engine.step(episodes))
        vectors.append(joined(engine))
        assert {p.dtype for _, p in parameters(engine)} == {torch.float32}
        assert outputs[-1].loss.dtype == torch.float32
    tolerance = bound(dtype, n_layers=4)
    assert (outputs[1].loss - outputs[0].loss).abs().max() <= tolerance * outputs[0].loss.max()
    if order == "second":
        tolerance *= 2**0.5 if dtype == torch.bfloat16 else 2  # the support images come and go as well
    assert tolerance < 1
    assert (vectors[1] - vectors[0]).norm() <= tolerance * vectors[0].norm()
    # And not merely by being float32 after all.
    assert (vectors[1] - vectors[0]).norm() > 1e-5 * vectors[0].norm()


@by_norm
@pytest.mark.parametrize("kind", ["common", "tensorflow"])
def test_a_deep_network_too(small_store: ImageStore, norm: str, kind: str) -> None:
    """Twelve layers; in bfloat16 the bound would say nothing."""
    vectors = []
    for dtype in (None, torch.float16):
        engine = engine_of(small_store, kind, dtype, norm=norm)
        engine.step(tasks(small_store, 3))
        vectors.append(joined(engine))
    assert (vectors[1] - vectors[0]).norm() <= bound(torch.float16, n_layers=12) * vectors[0].norm()


@by_dtype
def test_images_are_half_and_the_base_learner_gets_float32(
    small_store: ImageStore, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    engine = engine_of(small_store, "common", dtype)
    seen: list[torch.dtype] = []
    embed, logits = engine.encoder.embed, engine._logits
    monkeypatch.setattr(
        engine.encoder, "embed", lambda images, **kw: (seen.append(images.dtype), embed(images, **kw))[1]
    )
    monkeypatch.setattr(
        engine, "_logits", lambda part, features: (seen.append(features[0].dtype), logits(part, features))[1]
    )
    engine.step(tasks(small_store, 2))
    assert seen == [dtype, torch.float32]


def test_a_scaled_loss_scales_the_gradients_and_nothing_else(small_store: ImageStore) -> None:
    """A power of two is exact."""
    episodes = tasks(small_store, 2)
    plain, scaled = (make_engine(small_store) for _ in range(2))
    scaled.loss_scale = torch.tensor(SCALE, dtype=torch.float64)
    assert torch.equal(plain.step(episodes).loss, scaled.step(episodes).loss)
    for name, gradient in gradients(scaled).items():
        assert torch.equal(gradient / SCALE, gradients_of(plain)[name])


def gradients_of(engine: EpisodicEngine) -> dict[str, Tensor]:
    return {name: p.grad for name, p in parameters(engine) if p.grad is not None}


def test_the_refresh_knows_the_images_to_come(
    small_store: ImageStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(small_store, "conv4", torch.bfloat16)
    asked, refresh = [], engine.encoder.refresh
    monkeypatch.setattr(
        engine.encoder, "refresh", lambda **options: asked.append(options) or refresh(**options)
    )
    engine.step(tasks(small_store, 1))
    assert asked == [{"fold": True, "dtype": torch.bfloat16}]


def test_tf32_is_left_to_the_switches_of_torch() -> None:
    root = Path(mtl_fast.__file__).parent
    # Kernels read them; nothing sets one.
    switches = re.compile(r"(allow_tf32|fp32_precision) = |set_float32_matmul_precision")
    files = [*root.rglob("*.py"), *(root / "kernels").rglob("*.py")]
    touching = [path for path in files if switches.search(path.read_text("utf-8"))]
    assert not touching
