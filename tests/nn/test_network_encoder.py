"""A user's network in the engine: values, gradients and accuracies of the network written out, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtl_fast.data.store import ImageStore
from mtl_fast.engine import EpisodicEngine, evaluate
from mtl_fast.nn import Embeddings, Encoder, LinearHead, NetworkEncoder, convert, fold, scale_shift_parameters
from tests.conv_cases import assert_near
from tests.engine.cases import PREPROCESS, fitted, images, tasks
from tests.nn.user_network import UserNetwork, user_images, user_network

# Six layers of at most 72 terms, four inner steps and a loss over all of it.
TOLERANCE = 1000 * 6 * 72**0.5 * torch.finfo(torch.float64).eps


def encoder_of(network: nn.Module) -> NetworkEncoder:
    return NetworkEncoder(network, UserNetwork.feature_dim)


def engine_of(store: ImageStore, **options: Any) -> EpisodicEngine:
    encoder = encoder_of(convert(user_network()))
    with torch.no_grad():
        for p in encoder.scale_shift_parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(5), dtype=p.dtype))
    head = LinearHead(encoder.feature_dim, 3, generator=torch.Generator().manual_seed(1)).double()
    return EpisodicEngine(encoder, head, store, PREPROCESS, inner_lr=0.1, inner_steps=4, **options)


def test_features_are_the_network_s() -> None:
    network = user_network()
    encoder = encoder_of(convert(network))
    expected = network.eval()(user_images())
    out = encoder.embed(user_images())
    assert torch.equal(out.features, expected)
    assert out.statistics == []
    assert torch.equal(encoder(user_images()), expected)
    assert encoder.feature_dim == 10
    assert len(encoder.convs()) == 5
    assert encoder.norms() == []
    assert encoder.refresh() == (None,) * 5


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_a_network_that_ends_with_a_view_gets_contiguous_images(backend: str) -> None:
    class Viewed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            x = F.max_pool2d(self.conv(x), 4)
            return x.view(x.size(0), -1)

    torch.manual_seed(0)
    network, x = Viewed(), torch.randn(2, 3, 8, 8)
    encoder = NetworkEncoder(convert(network, backend=backend), 16)
    for given in (x.contiguous(memory_format=torch.channels_last), x):
        assert_near(encoder(given), network(x), 1e-5)

    class Wrong(Viewed):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) @ x

    with pytest.raises(RuntimeError, match=r"must match|size mismatch|shapes"):
        NetworkEncoder(Wrong(), 16)(x)


def test_it_stays_in_evaluation_mode() -> None:
    encoder = encoder_of(convert(user_network()))
    expected, mean = encoder(user_images()), encoder.network.norm.running_mean.clone()
    assert encoder.train() is encoder
    assert not any(m.training for m in encoder.modules())
    nn.ModuleList([encoder]).train()
    assert torch.equal(encoder(user_images()), expected)
    assert torch.equal(encoder.network.norm.running_mean, mean)


def test_a_network_set_to_training_mode_apart_is_an_error(small_store: ImageStore) -> None:
    engine, episodes = engine_of(small_store), tasks(small_store, 1)
    network = engine.encoder.network
    state = {name: value.clone() for name, value in network.state_dict().items()}
    for module in (network, network.norm, network.dropout):
        module.train()
        name = type(module).__name__
        refused = rf"encoder: its {name} is in training mode; call encoder\.eval\(\) first"
        with pytest.raises(ValueError, match=refused):
            evaluate(
                engine.encoder, engine.head, small_store, episodes, PREPROCESS, inner_lr=0.2, inner_steps=2
            )
        with pytest.raises(ValueError, match=refused):
            engine.step(episodes)
        engine.encoder.eval()
    engine.step(episodes)
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


class OwnEncoder(Encoder):
    """A user's own, around a network."""

    feature_dim = UserNetwork.feature_dim

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def embed(self, images: Tensor, **options: Any) -> Embeddings:
        return Embeddings(self.network(images), [])


def test_batch_norms_and_dropout_of_any_encoder_in_training_mode_are_an_error(
    small_store: ImageStore,
) -> None:
    encoder, head = OwnEncoder(user_network()), LinearHead(UserNetwork.feature_dim, 3).double()
    options: Any = {"inner_lr": 0.2, "inner_steps": 2}
    for module in (nn.BatchNorm2d, nn.Dropout):
        encoder.eval()
        for m in encoder.modules():
            m.training = not isinstance(m, (nn.BatchNorm2d, nn.Dropout)) or isinstance(m, module)
        with pytest.raises(ValueError, match=f"encoder: its {module.__name__} is in training mode"):
            evaluate(encoder, head, small_store, tasks(small_store, 1), PREPROCESS, **options)
    encoder.eval()
    evaluate(encoder, head, small_store, tasks(small_store, 1), PREPROCESS, **options)


@pytest.mark.parametrize("order", ["first", "second"])
@pytest.mark.parametrize("images_per_chunk", [None, 20], ids=["whole", "chunked"])
def test_a_step_is_that_of_the_network_task_by_task(
    small_store: ImageStore, order: Any, images_per_chunk: int | None
) -> None:
    engine, episodes = (
        engine_of(small_store, order=order, images_per_chunk=images_per_chunk),
        tasks(small_store, 3),
    )
    network, head = engine.encoder.network, engine.head
    losses = []
    for t in range(3):
        support, query = (
            network(images(small_store, rows[t], torch.float64))
            for rows in (episodes.support, episodes.query)
        )
        w, b = fitted(support, episodes.support_labels[t], head.weight, head.bias, 0.1, 4, order)
        losses.append(F.cross_entropy(query @ w.T + b, episodes.query_labels[t]))
    parameters = [*scale_shift_parameters(network), head.weight, head.bias]
    expected = torch.autograd.grad(torch.stack(losses).mean(), parameters)
    out = engine.step(episodes)
    assert_near(out.loss, torch.stack(losses).detach(), TOLERANCE)
    largest = max(float(g.abs().max()) for g in expected)
    for parameter, gradient in zip(parameters, expected, strict=True):
        assert (parameter.grad - gradient).abs().max() <= TOLERANCE * largest


def test_folded_it_scores_the_same(small_store: ImageStore) -> None:
    engine, episodes = engine_of(small_store), tasks(small_store, 6)
    results = [
        evaluate(encoder, engine.head, small_store, episodes, PREPROCESS, inner_lr=0.2, inner_steps=20)
        for encoder in (engine.encoder, fold(engine.encoder))
    ]
    assert torch.equal(results[0].predictions, results[1].predictions)
    assert fold(engine.encoder).convs() == []


def test_scale_and_shift_start_anew() -> None:
    network = user_network()
    encoder = encoder_of(convert(network))
    with torch.no_grad():
        for parameter in encoder.scale_shift_parameters():
            parameter.add_(1)
    encoder.enable_scale_shift("filter")
    assert torch.equal(encoder(user_images()), network.eval()(user_images()))
    assert encoder.network.stem.scale.shape == (8, 1, 1, 1)
    with pytest.raises(ValueError, match=r"no scale-and-shift convolutions; give NetworkEncoder\(convert"):
        encoder_of(user_network()).enable_scale_shift()


def test_it_has_no_last_block() -> None:
    encoder = encoder_of(convert(user_network()))
    before = list(encoder.scale_shift_parameters())
    with pytest.raises(
        ValueError, match="last_block_only: NetworkEncoder names no blocks, its last one is the whole"
    ):
        encoder.enable_scale_shift(last_block_only=True)
    assert all(p is q for p, q in zip(encoder.scale_shift_parameters(), before, strict=True))


def test_a_plain_network_trains_its_weights(small_store: ImageStore) -> None:
    engine = engine_of(small_store)
    engine.encoder = encoder_of(user_network())
    engine.step(tasks(small_store, 2))
    assert all(p.grad is not None for p in engine.encoder.parameters())


def test_its_backend_is_that_of_its_convolutions() -> None:
    encoder = encoder_of(convert(user_network(), backend="torch"))
    assert encoder.backend == "torch"
    encoder.backend = "nowhere"
    assert {conv.backend for conv in encoder.convs()} == {"nowhere"}
    with pytest.raises(ValueError, match="ss_conv: backend='nowhere' is unknown"):
        encoder(user_images())
    assert encoder_of(user_network()).backend == "auto"


def test_batch_statistics_are_refused(small_store: ImageStore) -> None:
    refused = "n_groups, mask: a NetworkEncoder has stored statistics only; use norm 'frozen'"
    with pytest.raises(ValueError, match=refused):
        engine_of(small_store, norm="episode").step(tasks(small_store, 1))
    with pytest.raises(ValueError, match=refused):
        encoder_of(user_network()).embed(user_images(), mask=torch.tensor([True, False]))

    def norm(n_channels: int) -> nn.Module:
        return nn.BatchNorm2d(n_channels, track_running_stats=False)

    with pytest.raises(ValueError, match="network: norm has no running statistics"):
        encoder_of(user_network(norm=norm))
    encoder_of(user_network(norm=lambda n: nn.GroupNorm(2, n)))


class Pair(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return x, x


@pytest.mark.parametrize(
    ("network", "got"),
    [
        (nn.Conv2d(3, 10, 3, dtype=torch.float64), r"\[2, 10, 10, 8\]"),
        (nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), r"\[2, 3\]"),
        (Pair(), "tuple"),
    ],
    ids=["map", "width", "tuple"],
)
def test_another_output_than_features_is_named(network: nn.Module, got: str) -> None:
    with pytest.raises(
        ValueError, match=rf"network: gives {got} for images \[2, 3, 12, 10\], expected \[2, 10\]"
    ):
        encoder_of(network)(user_images())
