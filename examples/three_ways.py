"""One small job in three ways: as learn2learn's users write it, as easyfsl's do, and with mtl_fast.

The job: a small network learns from tasks of five characters with one example each (ANIL: the inner loop fits a
linear head, the outer loop learns network and head), and is tested on characters of scripts it has never seen.

- learn2learn's way clones the head for each task, adapts the clone step by step, and sums up the query losses.
- mtl_fast fits the heads of all tasks together. The same losses, the same gradients, the same accuracy.
- easyfsl's way puts the support set into a method and asks it for scores; here prototypical networks, on the
  network that was just trained. To mtl_fast that is a head of its own for each task with no step taken:
  −|q − p|² = 2·p·q − |p|² − |q|², and |q|² is the same for every class. The same predictions.

The loops call learn2learn and easyfsl where they are installed; where not, stand-ins with the same calls, written
out below in plain PyTorch. The network has group norms, which look at one image at a time, so that it does not
matter who embeds what together.

    python examples/three_ways.py [--quick]
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtl_fast import (
    Episodes,
    EpisodeSampler,
    EpisodicEngine,
    ImageStore,
    LinearHead,
    NetworkEncoder,
    Preprocess,
    RandomStreams,
    base_learner,
    evaluate,
    load_split,
)
from mtl_fast.engine import embed_episodes

N_WAY, N_SHOT, N_QUERY = 5, 1, 5
TASKS_PER_UPDATE, INNER_LR, INNER_STEPS, META_LR = 4, 0.01, 10, 2e-3
PREPROCESS = Preprocess(mean=(127.5, 127.5, 127.5), std=(64.0, 64.0, 64.0))


class PlainMAML:
    """The calls of `learn2learn.algorithms.MAML` that the loop below makes."""

    def __init__(self, module: nn.Module, lr: float, first_order: bool = False) -> None:
        self.module, self.lr, self.first_order = module, lr, first_order
        self.weights: dict[str, Tensor] = dict(module.named_parameters())

    def clone(self) -> PlainMAML:
        return PlainMAML(self.module, self.lr, self.first_order)

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(self.module, self.weights, (x,))
        return out

    def adapt(self, loss: Tensor) -> None:
        gradients = torch.autograd.grad(loss, list(self.weights.values()), create_graph=not self.first_order)
        pairs = zip(self.weights.items(), gradients, strict=True)
        self.weights = {name: weight - self.lr * gradient for (name, weight), gradient in pairs}


class PlainPrototypicalNetworks:
    """The calls of `easyfsl.methods.PrototypicalNetworks` that the loop below makes."""

    def __init__(self, backbone: nn.Module) -> None:
        self.backbone = backbone

    def process_support_set(self, support_images: Tensor, support_labels: Tensor) -> None:
        features = self.backbone(support_images)
        self.prototypes = torch.stack(
            [features[support_labels == c].mean(dim=0) for c in support_labels.unique()]
        )

    def __call__(self, query_images: Tensor) -> Tensor:
        return -torch.cdist(self.backbone(query_images), self.prototypes)


try:
    from learn2learn.algorithms import MAML
except ImportError:
    MAML = PlainMAML
try:
    from easyfsl.methods import PrototypicalNetworks
except ImportError:
    PrototypicalNetworks = PlainPrototypicalNetworks


def small_network() -> nn.Sequential:
    """[N, 3, 32, 32] → [N, 512]."""
    layers: list[nn.Module] = []
    for n_in, n_out in ((3, 16), (16, 32), (32, 32)):
        layers += [nn.Conv2d(n_in, n_out, 3, padding=1), nn.GroupNorm(4, n_out), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten())


def one_task_at_a_time(
    store: ImageStore, episodes: Episodes
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Support images, their labels, query images, their labels: what a loader of tasks hands out."""
    for task in range(episodes.n_tasks):
        yield (
            PREPROCESS(store, episodes.support[task]),
            episodes.support_labels[task],
            PREPROCESS(store, episodes.query[task]),
            episodes.query_labels[task],
        )


def learn2learns_way(
    network: nn.Module, head: nn.Module, store: ImageStore, updates: list[Episodes]
) -> list[float]:
    """Trains both; the mean query loss of each update."""
    maml = MAML(head, lr=INNER_LR, first_order=False)
    optimizer = torch.optim.Adam([*network.parameters(), *head.parameters()], lr=META_LR)
    losses = []
    for episodes in updates:
        optimizer.zero_grad()
        total = 0.0
        for support, support_labels, query, query_labels in one_task_at_a_time(store, episodes):
            learner = maml.clone()
            features = network(support)
            for _ in range(INNER_STEPS):
                learner.adapt(F.cross_entropy(learner(features), support_labels))
            loss = F.cross_entropy(learner(network(query)), query_labels) / episodes.n_tasks
            loss.backward()
            total += float(loss.detach())
        optimizer.step()
        losses.append(total)
    return losses


def our_way(network: nn.Module, head: LinearHead, store: ImageStore, updates: list[Episodes]) -> list[float]:
    """The same training, the tasks of an update together."""
    engine = EpisodicEngine(
        NetworkEncoder(network, feature_dim=512),
        head,
        store,
        PREPROCESS,
        inner_lr=INNER_LR,
        inner_steps=INNER_STEPS,
    )
    optimizer = torch.optim.Adam([*network.parameters(), *head.parameters()], lr=META_LR)
    losses = []
    for episodes in updates:
        optimizer.zero_grad()
        losses.append(engine.step(episodes).loss.mean())
        optimizer.step()
    return [float(loss) for loss in losses]


def learn2learns_test(network: nn.Module, head: nn.Module, store: ImageStore, episodes: Episodes) -> Tensor:
    """Predicted labels [T, n_query]."""
    maml, predictions = MAML(head, lr=INNER_LR, first_order=True), []
    for support, support_labels, query, _ in one_task_at_a_time(store, episodes):
        learner = maml.clone()
        features = network(support).detach()
        for _ in range(INNER_STEPS):
            learner.adapt(F.cross_entropy(learner(features), support_labels))
        predictions.append(learner(network(query)).argmax(dim=1))
    return torch.stack(predictions)


@torch.no_grad()
def easyfsls_test(network: nn.Module, store: ImageStore, episodes: Episodes) -> Tensor:
    """Predicted labels [T, n_query]."""
    model, predictions = PrototypicalNetworks(network), []
    for support, support_labels, query, _ in one_task_at_a_time(store, episodes):
        model.process_support_set(support, support_labels)
        predictions.append(model(query).argmax(dim=1))
    return torch.stack(predictions)


def our_prototypes(encoder: NetworkEncoder, store: ImageStore, episodes: Episodes) -> Tensor:
    """The same predictions: each task's head made of its prototypes, each distinct image embedded once."""
    embedded = embed_episodes(encoder, store, episodes, PREPROCESS)
    support, query = embedded.features[embedded.support], embedded.features[embedded.query]
    prototypes = support.unflatten(1, (episodes.n_way, -1)).mean(dim=2)  # [T, n_way, D]
    scores = base_learner(
        support,
        episodes.support_labels,
        query,
        weight=2 * prototypes,
        bias=-prototypes.square().sum(dim=2),
        inner_lr=0.0,
        n_steps=0,
    )
    return scores.argmax(dim=2)


def our_test(encoder: NetworkEncoder, head: LinearHead, store: ImageStore, episodes: Episodes) -> Tensor:
    """Predicted labels [T, n_query], heads of many tasks fitted together."""
    return evaluate(
        encoder, head, store, episodes, PREPROCESS, inner_lr=INNER_LR, inner_steps=INNER_STEPS
    ).predictions


def timed(call: Any, *arguments: Any) -> tuple[Any, float]:
    """What a call returns, and its seconds."""
    start = time.perf_counter()
    return call(*arguments), time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description="One small job in three ways.")
    parser.add_argument("--quick", action="store_true", help="a few seconds; the accuracy means little")
    quick = parser.parse_args().quick
    n_updates, n_tests = (4, 20) if quick else (100, 300)
    used = (
        ("learn2learn", MAML, PlainMAML),
        ("easyfsl", PrototypicalNetworks, PlainPrototypicalNetworks),
    )
    for library, found, plain in used:
        where = "not installed, so its calls in plain PyTorch" if found is plain else "the library itself"
        print(f"{library}: {where}")

    streams = RandomStreams(0)
    train, test = load_split("glyphs", "train"), load_split("glyphs", "test")
    sampler = EpisodeSampler(train, N_WAY, N_SHOT, N_QUERY, streams.stream("tasks"))
    updates = [sampler.sample(TASKS_PER_UPDATE) for _ in range(n_updates)]
    tests = EpisodeSampler(test, N_WAY, N_SHOT, 15, streams.stream("evaluation")).sample(n_tests)

    torch.manual_seed(0)
    network, head = small_network(), LinearHead(512, N_WAY, init="zeros")
    for way in (learn2learns_way, our_way):  # the first call of anything is slow
        way(copy.deepcopy(network), copy.deepcopy(head), train, updates[:1])
    twin, twin_head = copy.deepcopy(network), copy.deepcopy(head)
    theirs, their_time = timed(learn2learns_way, twin, twin_head, train, updates)
    ours, our_time = timed(our_way, network, head, train, updates)
    print(f"\n{n_updates} updates of {TASKS_PER_UPDATE} tasks, {N_WAY}-way {N_SHOT}-shot, second order:")
    print(f"  learn2learn's way  loss {theirs[0]:.4f} → {theirs[-1]:.4f}   {their_time:6.2f} s")
    print(f"  mtl_fast           loss {ours[0]:.4f} → {ours[-1]:.4f}   {our_time:6.2f} s")
    first, *_, last = (abs(a - b) for a, b in zip(theirs, ours, strict=True))
    print(f"  the losses differ by {first:.0e} at first, by {last:.0e} at last (rounding grows in training)")

    encoder = NetworkEncoder(network, feature_dim=512)
    print(f"\n{n_tests} tasks of scripts never seen, the network that mtl_fast trained:")
    rows = [
        ("learn2learn's way, head fitted", *timed(learn2learns_test, network, head, test, tests)),
        ("mtl_fast, head fitted", *timed(our_test, encoder, head, test, tests)),
        ("easyfsl's way, prototypes", *timed(easyfsls_test, network, test, tests)),
        ("mtl_fast, prototypes", *timed(our_prototypes, encoder, test, tests)),
    ]
    for name, predictions, seconds in rows:
        accuracy = 100 * (predictions == tests.query_labels).float().mean()
        print(f"  {name:<32} {accuracy:5.1f} %   {seconds:6.2f} s")
    for kind, (a, b) in (("head fitted", rows[:2]), ("prototypes", rows[2:])):
        same = 100 * (a[1] == b[1]).float().mean()
        print(f"  {kind}: {same:.1f} % of the predictions are the same")


if __name__ == "__main__":
    main()
