"""Any network, meta-trained: a ResNet of one's own with groups and dilation, converted, a minute of tasks.

1. The network is written in torch.nn alone and pre-trained on all training classes, as anyone would.
2. `convert` makes a frozen copy whose convolutions have a scale and a shift, equal at the start.
3. `NetworkEncoder` hands it to the engine, which learns scale, shift and the head's start from tasks.
4. `fold` turns the result into plain nn.Conv2d again, for wherever it is to run.

The accuracy before is that of a fresh head fitted on the pre-trained features ("update θ"). The longer the network
was pre-trained, the less a minute of tasks adds; the paired difference says whether it added anything.

    python examples/converted_network.py [--quick]
"""

from __future__ import annotations

import argparse
import time

import torch
from pretraining import pretrain
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
    convert,
    evaluate,
    fold,
    load_split,
)
from mtl_fast.nn import Encoder

WIDTH, FEATURE_DIM = 32, 128
INNER_LR, TRAIN_STEPS, TEST_STEPS = 0.01, 20, 50
PREPROCESS = Preprocess(mean=(127.5, 127.5, 127.5), std=(64.0, 64.0, 64.0))


class Block(nn.Module):
    """A residual block of grouped convolutions; `dilation` widens its view where `stride` does not."""

    def __init__(self, n_in: int, n_out: int, *, stride: int = 1, dilation: int = 1, groups: int = 4) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(n_in, n_out, 3, stride, dilation, dilation, groups, bias=False),
            nn.BatchNorm2d(n_out),
            nn.ReLU(),
            nn.Conv2d(n_out, n_out, 3, padding="same", dilation=dilation, groups=groups, bias=False),
            nn.BatchNorm2d(n_out),
        )
        self.shortcut = nn.Conv2d(n_in, n_out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def small_resnet() -> nn.Sequential:
    """[N, 3, H, W] → [N, 128]."""
    return nn.Sequential(
        nn.Conv2d(3, WIDTH, 3, stride=2, padding=1, padding_mode="reflect"),
        nn.BatchNorm2d(WIDTH),
        nn.ReLU(),
        Block(WIDTH, WIDTH),
        Block(WIDTH, 2 * WIDTH, stride=2),
        Block(2 * WIDTH, FEATURE_DIM, dilation=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


def accuracy(encoder: Encoder, head: LinearHead, store: ImageStore, episodes: Episodes) -> Tensor:
    """Of each task, [T]."""
    return evaluate(
        encoder, head, store, episodes, PREPROCESS, inner_lr=INNER_LR, inner_steps=TEST_STEPS
    ).accuracy


def shown(values: Tensor) -> str:
    """Mean and 95 % interval, in percent."""
    return f"{100 * values.mean():.1f} ± {196 * values.std() / len(values) ** 0.5:.1f} %"


def main() -> None:
    parser = argparse.ArgumentParser(description="A network of one's own, converted and meta-trained.")
    parser.add_argument("--quick", action="store_true", help="a few seconds; the accuracy means little")
    quick = parser.parse_args().quick
    n_epochs, seconds, n_tests = (1, 1.0, 20) if quick else (3, 60.0, 600)

    torch.manual_seed(0)
    streams = RandomStreams(0)
    train, test = load_split("glyphs", "train"), load_split("glyphs", "test")
    if quick:
        few = train.labels < 20
        train = ImageStore(train.images[few], train.labels[few], train.class_names[:20], name=train.name)
    tests = EpisodeSampler(test, 5, 1, 15, streams.stream("evaluation")).sample(n_tests)

    network = small_resnet()
    print(f"pre-training on {train}", flush=True)
    print(
        f"  training accuracy {100 * pretrain(network, FEATURE_DIM, train, PREPROCESS, n_epochs=n_epochs):.1f} %"
    )
    head = LinearHead(FEATURE_DIM, 5, init="zeros")
    before = accuracy(NetworkEncoder(network, FEATURE_DIM), head, test, tests)

    encoder = NetworkEncoder(convert(network), FEATURE_DIM)
    same = torch.equal(accuracy(encoder, head, test, tests), before)
    learned = list(encoder.scale_shift_parameters())
    n_learned, n_frozen = (sum(p.numel() for p in ps) for ps in (learned, network.parameters()))
    print(
        f"converted: {len(encoder.convs())} convolutions, {n_learned} scales and shifts over {n_frozen} frozen"
    )
    print(f"  the accuracy of each of {n_tests} tasks is {'the same' if same else 'another'} at the start")

    engine = EpisodicEngine(
        encoder, head, train, PREPROCESS, order="second", inner_lr=INNER_LR, inner_steps=TRAIN_STEPS
    )
    sampler = EpisodeSampler(train, 5, 1, 5, streams.stream("tasks"))
    optimizer = torch.optim.Adam([{"params": learned, "lr": 3e-4}, {"params": head.parameters(), "lr": 1e-4}])
    start, n_updates, loss = time.monotonic(), 0, torch.zeros(())
    while time.monotonic() < start + seconds:
        optimizer.zero_grad()
        loss = engine.step(sampler.sample(4)).loss.mean()
        optimizer.step()
        n_updates += 1
    print(f"meta-trained for {seconds:.0f} s: {4 * n_updates} tasks, the last ones' query loss {loss:.2f}")

    after = accuracy(encoder, head, test, tests)
    print(f"5-way 1-shot, {n_tests} tasks of scripts never seen:")
    print(f"  before  {shown(before)}\n  after   {shown(after)}\n  paired  {shown(after - before)}")

    plain = fold(encoder)
    n_left = sum(isinstance(module, nn.Conv2d) for module in plain.modules())
    images = PREPROCESS(test, torch.arange(64))
    with torch.no_grad():
        error = (plain(images) - encoder(images)).abs().max() / encoder(images).abs().max()
    print(f"folded into {n_left} plain nn.Conv2d: largest relative difference of a feature {error:.0e}")


if __name__ == "__main__":
    main()
