"""Engines and tasks for tests, and the same step one task at a time through autograd."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mtl_fast.data.store import ImageStore
from mtl_fast.engine import Engine, EpisodicEngine, Preprocess, WholeNetworkEngine
from mtl_fast.episodes import Episodes, EpisodeSampler
from mtl_fast.nn import Conv4, Encoder, LinearHead, ResNet12, ResNet25
from mtl_fast.nn.encoder import Embeddings
from tests.conv_cases import assert_near
from tests.nn.plain_networks import randomise

PREPROCESS = Preprocess((125.3, 123.0, 113.9), (63.0, 62.1, 66.7))
# Twelve layers of about 60 terms, batch statistics of as few as 24 values, and a loss over all of it.
TOLERANCE = 1000 * 12 * 60**0.5 * torch.finfo(torch.float64).eps
NORMS, ORDERS = ("frozen", "episode", "running"), ("first", "second")


def tasks(store: ImageStore, n_tasks: int, n_way: int = 3, n_shot: int = 2, n_query: int = 3) -> Episodes:
    generator = torch.Generator().manual_seed(n_tasks)
    return EpisodeSampler(store, n_way, n_shot, n_query, generator).sample(n_tasks)


def make_encoder(kind: str = "common", learn: str = "kernel", dtype: torch.dtype = torch.float64) -> Encoder:
    """A small encoder that learns Φ (`kernel`, `filter`), with γ and β (`affine`), its `weights`, or nothing (`head`)."""
    torch.manual_seed(0)
    widths = (4, 5, 6, 7)
    made: dict[str, Any] = {
        "common": lambda: ResNet12(widths),
        "tensorflow": lambda: ResNet12.tensorflow(widths),
        "conv4": lambda: Conv4(5, image_size=16),
        "resnet25": lambda: ResNet25((4, 5, 6), n_blocks=2),
    }
    encoder = made[kind]().to(dtype).eval()
    encoder.freeze()
    if learn in ("kernel", "filter", "affine"):
        encoder.enable_scale_shift("kernel" if learn == "affine" else learn)
    randomise(encoder, scale_shift=True)
    if learn == "affine":
        for norm in encoder.norms():
            norm.requires_grad_()
    if learn == "weights":
        for conv in encoder.convs():
            conv.weight.requires_grad_()
    return encoder


def make_engine(
    store: ImageStore, encoder: Encoder | None = None, *, n_way: int = 3, **options: Any
) -> EpisodicEngine:
    encoder = encoder or make_encoder()
    dtype = next(encoder.parameters()).dtype
    head = LinearHead(encoder.feature_dim, n_way, generator=torch.Generator().manual_seed(1)).to(dtype)
    options = {"inner_lr": 0.1, "inner_steps": 4, **options}
    with warnings.catch_warnings():
        # What batch statistics cancel has its own test.
        warnings.simplefilter("ignore", UserWarning)
        return EpisodicEngine(encoder, head, store, PREPROCESS, **options)


def whole_engine(
    store: ImageStore, kind: str = "conv4", *, n_way: int = 3, **options: Any
) -> WholeNetworkEngine:
    """All weights of a small plain network adapt and learn."""
    encoder = make_encoder(kind, "head", options.pop("dtype", torch.float64))
    encoder.requires_grad_(True)
    dtype = next(encoder.parameters()).dtype
    head = LinearHead(encoder.feature_dim, n_way, generator=torch.Generator().manual_seed(1)).to(dtype)
    options = {"inner_lr": 0.05, "inner_steps": 3, **options}
    return WholeNetworkEngine(encoder, head, store, PREPROCESS, **options)


def parameters(engine: Engine) -> list[tuple[str, Tensor]]:
    named = [*engine.encoder.named_parameters(prefix="encoder"), *engine.head.named_parameters(prefix="head")]
    return [(name, p) for name, p in named if p.requires_grad]


def gradients(engine: Engine) -> dict[str, Tensor]:
    """Clears and returns the gradients."""
    found = {}
    for name, parameter in parameters(engine):
        assert parameter.grad is not None, name
        found[name] = parameter.grad
        parameter.grad = None
    return found


def fitted(
    support: Tensor, labels: Tensor, weight: Tensor, bias: Tensor, lr: float, n_steps: int, order: str
) -> tuple[Tensor, Tensor]:
    """θ' of one task, step by step through autograd."""
    if order == "first":
        support = support.detach()
        w, b = weight.detach().requires_grad_(), bias.detach().requires_grad_()
    else:
        w, b = weight, bias
    for _ in range(n_steps):
        loss = F.cross_entropy(support @ w.T + b, labels)
        gw, gb = torch.autograd.grad(loss, (w, b), create_graph=order == "second")
        w, b = w - lr * gw, b - lr * gb
    if order == "first":
        # θ' = θ minus constants
        w, b = weight - (weight - w).detach(), bias - (bias - b).detach()
    return w, b


def images(store: ImageStore, rows: Tensor, dtype: torch.dtype) -> Tensor:
    mean, std = (torch.tensor(v).to(dtype) for v in (PREPROCESS.mean, PREPROCESS.std))
    return ((store.images[rows].to(dtype) - mean) / std).permute(0, 3, 1, 2)


def one_by_one(
    engine: EpisodicEngine, episodes: Episodes
) -> tuple[Tensor, Tensor, dict[str, Tensor], Encoder]:
    """Losses [T], class accuracies [T, n_way], gradients, and the encoder afterwards; the engine stays as it is."""
    encoder, head = copy.deepcopy(engine.encoder), copy.deepcopy(engine.head)
    n_groups = 0 if engine.norm == "frozen" else 1
    losses, accuracies = [], []
    for t in range(episodes.n_tasks):
        embedded = []
        for rows in (episodes.query[t], episodes.support[t]):
            out = encoder.embed(images(engine.store, rows, head.weight.dtype), n_groups=n_groups)
            embedded.append(out.features)
            if engine.norm == "running":
                encoder.update_running(out.statistics)
        query, support = embedded
        w, b = fitted(
            support,
            episodes.support_labels[t],
            head.weight,
            head.bias,
            engine.inner_lr,
            engine.inner_steps,
            engine.order,
        )
        logits, labels = query @ w.T + b, episodes.query_labels[t]
        losses.append(F.cross_entropy(logits, labels))
        right = logits.argmax(dim=1) == labels
        accuracies.append(torch.stack([right[labels == c].float().mean() for c in range(episodes.n_way)]))
    torch.stack(losses).mean().backward()
    twin = copy.copy(engine)
    twin.encoder, twin.head = encoder, head
    return torch.stack(losses).detach(), torch.stack(accuracies), gradients(twin), encoder


def assert_same_gradients(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert ours.keys() == expected.keys()
    # A shift before batch statistics has no gradient but rounding: compare with the largest of all.
    largest = max(float(g.abs().max()) for g in expected.values())
    for name, gradient in expected.items():
        assert torch.isfinite(ours[name]).all(), name
        assert (ours[name] - gradient).abs().max() <= TOLERANCE * largest, name


def assert_same_state(ours: Encoder, expected: Encoder) -> None:
    state = expected.state_dict()
    assert ours.state_dict().keys() == state.keys()
    for name, value in ours.state_dict().items():
        assert_near(value, state[name], TOLERANCE, name)


class Watched(Encoder):
    """Notes the images of each embedding and whether it has a graph."""

    def __init__(self, inner: Encoder) -> None:
        super().__init__()
        self.inner, self.seen, self.feature_dim = inner, [], inner.feature_dim
        self.eval()

    def embed(self, images: Tensor, **options: Any) -> Embeddings:
        out = self.inner.embed(images, **options)
        self.seen.append((len(images), out.features.requires_grad))
        return out
