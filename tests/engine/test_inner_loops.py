"""Whole-network inner loops against the same tasks one by one in torch.nn, in float64; chunks; checkpointing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from mtl_fast.data.store import ImageStore
from mtl_fast.engine import WholeNetworkEngine
from mtl_fast.episodes import Episodes
from mtl_fast.nn import Encoder, LinearHead
from tests.conv_cases import assert_near
from tests.engine.cases import NORMS, ORDERS, PREPROCESS, images, make_encoder, tasks
from tests.nn.plain_networks import plain_network, plain_norms

# Convolutions of about 60 terms, four of them deep, as often as there are passes, twice for second order; batch
# statistics of as few as 12 values amplify each.
TOLERANCE = 1000 * 4 * 8 * 60**0.5 * torch.finfo(torch.float64).eps
by_norm = pytest.mark.parametrize("norm", NORMS)
by_order = pytest.mark.parametrize("order", ORDERS)


def engine_of(
    store: ImageStore, kind: str = "conv4", *, n_way: int = 3, **options: Any
) -> WholeNetworkEngine:
    encoder = make_encoder(kind, "head", options.pop("dtype", torch.float64))
    encoder.requires_grad_(True)
    dtype = next(encoder.parameters()).dtype
    head = LinearHead(encoder.feature_dim, n_way, generator=torch.Generator().manual_seed(1)).to(dtype)
    options = {"inner_lr": 0.05, "inner_steps": 3, **options}
    return WholeNetworkEngine(encoder, head, store, PREPROCESS, **options)


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


def one_by_one(engine: WholeNetworkEngine, episodes: Episodes) -> tuple[Plain, Tensor, Tensor]:
    """The network with its gradients (and running averages), losses [T] and logits [T, m, n_way]."""
    network = Plain(engine)
    names, shared = zip(*network.named_parameters(), strict=True)
    losses, logits = [], []
    for t in range(episodes.n_tasks):
        support, query = (
            images(engine.store, rows, engine.head.weight.dtype)
            for rows in (episodes.support[t], episodes.query[t])
        )
        weights = shared
        for _ in range(engine.inner_steps):
            out = functional_call(network, dict(zip(names, weights, strict=True)), (support,))
            loss = F.cross_entropy(out, episodes.support_labels[t])
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
    check(engine_of(small_store, norm=norm, order=order, checkpoint=checkpoint), tasks(small_store, 3))


@by_norm
def test_resnet12_is_its_tasks_one_by_one(small_store: ImageStore, norm: str) -> None:
    check(engine_of(small_store, "common", norm=norm, inner_steps=2), tasks(small_store, 2))
