"""Whole-network inner loops against the same tasks one by one in torch.nn, in float64; chunks; checkpointing."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from bench.accuracy import behind_kinks, convolution_bound, mismatch
from mtl_fast.data.store import ImageStore
from mtl_fast.engine import WholeNetworkEngine, inner_loops
from mtl_fast.episodes import Episodes
from mtl_fast.nn import Encoder, LinearHead, NetworkEncoder
from mtl_fast.nn.encoder import BatchShare
from tests.conv_cases import assert_near
from tests.engine.cases import (
    NORMS,
    ORDERS,
    PREPROCESS,
    gradients,
    images,
    make_encoder,
    tasks,
    whole_engine,
)
from tests.engine.test_step import NothingReadBack, assert_same_state
from tests.native_cases import needs_native
from tests.nn.plain_networks import plain_network, plain_norms

# Convolutions of about 60 terms, four of them deep, as often as there are passes, twice for second order; batch
# statistics of as few as 12 values amplify each.
TOLERANCE = 1000 * 4 * 8 * 60**0.5 * torch.finfo(torch.float64).eps
by_norm = pytest.mark.parametrize("norm", NORMS)
by_order = pytest.mark.parametrize("order", ORDERS)


class Plain(nn.Module):
    """The network of torch.nn, and the names that its parameters have in ours."""

    def __init__(self, engine: WholeNetworkEngine) -> None:
        super().__init__()
        self.encoder = plain_network(engine.encoder)
        # Batch statistics in training mode; momentum as ours.
        self.encoder.train(engine.norm != "frozen")
        self.head = nn.Linear(engine.encoder.feature_dim, len(engine.head.bias)).to(engine.head.weight.dtype)
        self.head.load_state_dict(engine.head.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))


def one_by_one(
    engine: WholeNetworkEngine, episodes: Episodes, *, mirrored: bool = False
) -> tuple[Plain, Tensor, Tensor]:
    """The network with its gradients (and running averages), losses [T] and logits [T, m, n_way]."""
    network = Plain(engine)
    names, shared = zip(*network.named_parameters(), strict=True)
    losses, logits = [], []
    for t in range(episodes.n_tasks):
        support, query = (
            images(engine.store, rows, engine.head.weight.dtype)
            for rows in (episodes.support[t], episodes.query[t])
        )
        labels = episodes.support_labels[t]
        if mirrored:
            support, labels = torch.cat([support, support.flip(3)]), labels.repeat(2)
        weights = shared
        for _ in range(engine.inner_steps):
            out = functional_call(network, dict(zip(names, weights, strict=True)), (support,))
            loss = F.cross_entropy(out, labels)
            steps = torch.autograd.grad(loss, weights, create_graph=engine.order == "second")
            weights = tuple(w - engine.inner_lr * g for w, g in zip(weights, steps, strict=True))
        logits.append(functional_call(network, dict(zip(names, weights, strict=True)), (query,)))
        losses.append(F.cross_entropy(logits[-1], episodes.query_labels[t]))
    torch.stack(losses).mean().backward()
    return network, torch.stack(losses).detach(), torch.stack(logits).detach()


def in_their_order(encoder: Encoder) -> list[Tensor]:
    """Our parameters layer by layer, as torch.nn has them: weight, bias, γ, β."""
    return [
        p
        for conv in encoder.convs()
        for p in (conv.weight, conv.bias, *((conv.norm.weight, conv.norm.bias) if conv.norm else ()))
        if p is not None
    ]


def assert_same_gradients(engine: WholeNetworkEngine, plain: Plain, tolerance: float = TOLERANCE) -> None:
    # What is left out has no value in torch.nn either: a γ of ones that does not exist with us.
    frozen = (
        {id(n.weight) for n in plain_norms(plain.encoder)}
        if engine.encoder.norms()[0].weight is None
        else set()
    )
    theirs = [p for p in plain.encoder.parameters() if id(p) not in frozen]
    ours = in_their_order(engine.encoder)
    pairs = [
        *zip(ours, theirs, strict=True),
        (engine.head.weight, plain.head.weight),
        (engine.head.bias, plain.head.bias),
    ]
    # A bias before batch statistics has no gradient but rounding: compare with the largest of all.
    largest = max(float(p.grad.abs().max()) for _, p in pairs)
    for own, other in pairs:
        assert own.grad is not None
        assert own.shape == other.shape
        assert (own.grad - other.grad).abs().max() <= tolerance * largest


def check(engine: WholeNetworkEngine, episodes: Episodes) -> None:
    plain, losses, logits = one_by_one(engine, episodes)
    out = engine.step(episodes)
    assert_near(out.loss, losses, TOLERANCE)
    right = (logits.argmax(dim=2) == episodes.query_labels).float()
    assert torch.equal(out.class_accuracy, right.unflatten(1, (episodes.n_way, -1)).mean(dim=2))
    assert not out.loss.requires_grad
    assert_same_gradients(engine, plain)
    for own, other in zip(engine.encoder.norms(), plain_norms(plain.encoder), strict=True):
        if engine.norm == "running":
            assert_near(own.running_mean, other.running_mean, TOLERANCE)
            assert_near(own.running_var, other.running_var, TOLERANCE)


@by_norm
@by_order
@pytest.mark.parametrize("checkpoint", [False, True], ids=["kept", "checkpointed"])
def test_conv4_is_its_tasks_one_by_one(
    small_store: ImageStore, norm: str, order: str, checkpoint: bool
) -> None:
    check(whole_engine(small_store, norm=norm, order=order, checkpoint=checkpoint), tasks(small_store, 3))


@by_norm
def test_resnet12_is_its_tasks_one_by_one(small_store: ImageStore, norm: str) -> None:
    check(whole_engine(small_store, "common", norm=norm, inner_steps=2), tasks(small_store, 2))


@by_order
@pytest.mark.parametrize("shape", [(1, 2, 1, 1), (2, 5, 1, 3), (4, 2, 3, 2)], ids=str)
def test_tasks_of_every_shape(small_store: ImageStore, order: str, shape: tuple[int, ...]) -> None:
    check(whole_engine(small_store, n_way=shape[1], norm="episode", order=order), tasks(small_store, *shape))


def test_no_steps_leave_the_shared_weights(small_store: ImageStore) -> None:
    check(whole_engine(small_store, norm="episode", inner_steps=0), tasks(small_store, 2))


def test_norms_without_an_affine_adapt_what_they_have(small_store: ImageStore) -> None:
    """The TensorFlow form has no γ and a shortcut without a norm: checkpointed and kept must agree, and learn."""
    engine = whole_engine(small_store, "tensorflow", norm="episode")
    episodes = tasks(small_store, 2)
    found = []
    for checkpoint in (False, True):
        engine.checkpoint = checkpoint
        engine.step(episodes)
        found.append(gradients(engine))
    assert {name for name, g in found[0].items() if not g.abs().sum()} == set()
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name]), name


@by_norm
@by_order
@pytest.mark.parametrize("images_per_chunk", [1, 31])
def test_chunked_equals_unchunked(
    small_store: ImageStore, norm: str, order: str, images_per_chunk: int
) -> None:
    """Tasks are of 15 images: one a chunk, or two (the last chunk is not full)."""
    whole = whole_engine(small_store, norm=norm, order=order)
    chunked = copy.deepcopy(whole)
    chunked.images_per_chunk = images_per_chunk
    episodes = tasks(small_store, 5)
    expected, out = whole.step(episodes), chunked.step(episodes)
    assert_near(out.loss, expected.loss, TOLERANCE)
    assert torch.equal(out.class_accuracy, expected.class_accuracy)
    ours, theirs = gradients(chunked), gradients(whole)
    largest = max(float(g.abs().max()) for g in theirs.values())
    for name, gradient in theirs.items():
        assert (ours[name] - gradient).abs().max() <= TOLERANCE * largest, name
    assert_same_state(chunked.encoder, whole.encoder)


def test_checkpointing_changes_no_bit(small_store: ImageStore) -> None:
    episodes, found = tasks(small_store, 3), []
    for checkpoint in (False, True):
        engine = whole_engine(small_store, norm="running", checkpoint=checkpoint)
        loss = engine.step(episodes).loss
        found.append([loss, *gradients(engine).values(), *engine.encoder.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_float32_is_near_float64(small_store: ImageStore) -> None:
    """The native kernels, where they are built; one inner step, four convolutions and eight kinks a pass."""
    episodes = tasks(small_store, 4)
    found = []
    for dtype in (torch.float32, torch.float64):
        engine = whole_engine(small_store, norm="episode", inner_steps=1, dtype=dtype)
        loss = engine.step(episodes).loss
        found.append(gradients(engine) | {"loss": loss})
    # A bias before batch statistics has no gradient but rounding.
    wanted = {
        name: value
        for name, value in found[1].items()
        if "layers" not in name or "norm" in name or "weight" in name
    }
    bound = convolution_bound(9 * 5, 3 * 4)
    assert not mismatch(found[0], {name: behind_kinks(value, bound, 3 * 8) for name, value in wanted.items()})


@by_norm
@by_order
def test_a_step_under_autocast(small_store: ImageStore, norm: str, order: str) -> None:
    episodes, found = tasks(small_store, 4), []
    for enabled in (False, True):
        engine = whole_engine(small_store, norm=norm, order=order, dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found.append(engine.step(episodes).loss)
        assert all(torch.isfinite(gradient).all() for gradient in gradients(engine).values())
    # Five layers of at most 45 terms, of factors in bfloat16.
    assert_near(found[1], found[0], 5 * 45**0.5 * torch.finfo(torch.bfloat16).eps)


def test_only_what_requires_a_gradient_gets_one_and_all_adapts(small_store: ImageStore) -> None:
    engine, other = whole_engine(small_store, norm="episode"), whole_engine(small_store, norm="episode")
    engine.encoder.requires_grad_(False)
    episodes = tasks(small_store, 2)
    assert torch.equal(engine.step(episodes).loss, other.step(episodes).loss)
    assert gradients(engine).keys() == {"head.weight", "head.bias"}
    assert all(p.grad is None for p in engine.encoder.parameters())


@by_norm
@by_order
def test_a_step_reads_nothing_back(
    small_store: ImageStore, monkeypatch: pytest.MonkeyPatch, norm: str, order: str
) -> None:
    # The range of indices is checked on the CPU alone, where nothing waits.
    monkeypatch.setattr(sys.modules["mtl_fast.ops.images"], "_check_window", lambda *_: None)
    for kind in ("conv4", "common"):
        engine = whole_engine(
            small_store,
            kind,
            dtype=torch.float32,
            norm=norm,
            order=order,
            inner_steps=1,
            images_per_chunk=20,
        )
        # What a GPU would run: the native kernels are the CPU's.
        engine.encoder.backend = "torch"
        episodes = tasks(small_store, 2)
        with NothingReadBack():
            out = engine.step(episodes)
        assert torch.isfinite(out.loss).all()


@by_norm
def test_a_step_runs_where_tensors_hold_no_values(small_store: ImageStore, norm: str) -> None:
    """On the meta device: shapes alone decide what is computed."""
    engine = whole_engine(small_store, dtype=torch.float32, norm=norm, inner_steps=1)
    engine.encoder.to("meta")
    engine.head.to("meta")
    engine.store = small_store.to("meta")
    out = engine.step(tasks(small_store, 3).to("meta"))
    assert out.loss.is_meta
    assert all(p.grad is not None and p.grad.is_meta for p in engine.encoder.parameters())


def test_what_makes_no_sense_is_an_error(small_store: ImageStore) -> None:
    with pytest.raises(ValueError, match="norm: 'batch' is not one of frozen, episode, running"):
        whole_engine(small_store, norm="batch")
    scaled = make_encoder("conv4", "kernel")
    head = LinearHead(scaled.feature_dim, 3).double()
    with pytest.raises(ValueError, match="encoder: has scale and shift"):
        WholeNetworkEngine(scaled, head, small_store, PREPROCESS)
    other = NetworkEncoder(nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()), 4)
    with pytest.raises(ValueError, match="encoder: is a NetworkEncoder"):
        WholeNetworkEngine(other, LinearHead(4, 3), small_store, PREPROCESS)
    engine = whole_engine(small_store, "common")
    engine.encoder.train()
    with pytest.raises(ValueError, match=r"training mode, with dropout 0\.1"):
        engine.step(tasks(small_store, 1))


@pytest.mark.parametrize("kind", ["conv4", "common"])
def test_weights_of_each_task_take_no_mask_and_are_of_one_process(small_store: ImageStore, kind: str) -> None:
    engine = whole_engine(small_store, kind)
    stacked = {f"encoder.{name}": p.expand(2, *p.shape) for name, p in engine.encoder.named_parameters()}
    x = images(small_store, torch.arange(4), torch.float64)
    embed = nn.Module()
    embed.encoder = engine.encoder
    embed.forward = lambda mask: engine.encoder.embed(x, n_groups=2, mask=mask)
    with pytest.raises(ValueError, match="mask: weights of each task's own take none"):
        functional_call(embed, stacked, (torch.ones(4, dtype=torch.bool),))
    engine.encoder.train()
    engine.encoder.share = BatchShare(0, 4, lambda own: own[None])
    with pytest.raises(ValueError, match="gather: weights of each task's own take none"):
        functional_call(embed, stacked, (None,))


@needs_native
@pytest.mark.parametrize("kind", ["common", "tensorflow"])
def test_first_order_with_stored_statistics_takes_the_fused_layers_of_each_task(
    small_store: ImageStore, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    options: Any = {"dtype": torch.float32, "norm": "frozen", "order": "first", "inner_steps": 2}
    engine = whole_engine(small_store, kind, **options)
    exact = whole_engine(small_store, kind, **{**options, "dtype": torch.float64})
    episodes = tasks(small_store, 3)
    monkeypatch.setattr(
        inner_loops._Network,
        "forward",
        forbidden_with_several_tasks(inner_loops._Network.forward),
    )
    loss = engine.step(episodes).loss
    monkeypatch.undo()
    assert all(conv._filters is None for conv in engine.encoder.convs())  # no task's weights outlive the step
    expected, values = exact.step(episodes).loss, {"loss": loss, **gradients(engine)}
    # Float32 rounding, ten layers and four passes deep: 1e-5 at most was seen, 3e-6 with grouped convolutions.
    for name, value in {"loss": expected, **gradients(exact)}.items():
        assert float((values[name].double() - value).norm() / value.norm()) < 1e-4, name


def forbidden_with_several_tasks(forward: Any) -> Any:
    def checked(self: nn.Module, images: Tensor, n_groups: int) -> Any:
        assert len(self.head.bias) == 1, "batched"
        return forward(self, images, n_groups)

    return checked
