"""The pre-training step: ResNet-12 at 32 pixels, batch 128, batch statistics, backward and SGD with momentum."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtl_fast.nn import LinearHead, ResNet12

from .accuracy import Expected, behind_kinks, convolution_bound
from .harness import Against, Case, Contender, Measurable, Row, Target
from .networks import (
    FULL,
    N_CONVS_DEEP,
    N_KINKS_DEEP,
    SLIM,
    direct_flops,
    images,
    native_backend,
    new_resnet12,
)
from .peers.resnet12 import TrainableResNet12

N_CLASSES, PIXELS = 64, 32
PEERS = ("NCHW", "channels-last", "channels-last, compiled")


def rows(quick: bool) -> Sequence[Measurable]:
    return [Row(f"pre-training step, SGD, ResNet-12 @ {PIXELS}, batch {_batch(quick)}", lambda: _case(quick))]


def _batch(quick: bool) -> int:
    return 16 if quick else 128


def _case(quick: bool) -> Case:
    widths = SLIM if quick else FULL
    x = images(_batch(quick), PIXELS)
    labels = torch.arange(len(x)) % N_CLASSES
    exact = _peer(widths, torch.contiguous_format, x.double(), labels)()
    bound = convolution_bound(9 * widths[-1], N_CONVS_DEEP)
    expected = {name: behind_kinks(value, bound, N_KINKS_DEEP) for name, value in exact.items()}
    return Case(
        ours=Contender("ours", _ours(widths, x, labels)),
        peers=tuple(
            Contender(
                name,
                _peer(
                    widths,
                    torch.contiguous_format if name == "NCHW" else torch.channels_last,
                    x,
                    labels,
                    compiled="compiled" in name,
                ),
            )
            for name in PEERS
        ),
        against=(Against(PEERS, Target(1.3, 2)),),
        expected=expected | {"loss": Expected(exact["loss"], bound)},
        flops=3 * len(x) * direct_flops(widths, PIXELS),
        why_not_native=native_backend()[1],
    )


def _network(widths: Sequence[int]) -> tuple[ResNet12, LinearHead]:
    head = LinearHead(widths[-1], N_CLASSES, generator=torch.Generator().manual_seed(1))
    return new_resnet12(tuple(widths)).train(), head


def _ours(widths: Sequence[int], x: Tensor, labels: Tensor) -> Callable[[], Mapping[str, Tensor]]:
    encoder, head = _network(widths)
    named = {f"weight {i}": conv.weight for i, conv in enumerate(encoder.convs())}
    for i, norm in enumerate(encoder.norms()):
        named |= {f"gamma {i}": norm.weight, f"beta {i}": norm.bias}
    named |= {"head weight": head.weight, "head bias": head.bias}
    return _step(lambda: head(encoder(x)), [*encoder.parameters(), *head.parameters()], named, labels)


def _peer(
    widths: Sequence[int],
    memory_format: torch.memory_format,
    x: Tensor,
    labels: Tensor,
    *,
    compiled: bool = False,
) -> Callable[[], Mapping[str, Tensor]]:
    encoder, head = _network(widths)
    peer = TrainableResNet12(widths, N_CLASSES)
    with torch.no_grad():
        for (conv, _), ours in zip(peer.layers, encoder.convs(), strict=True):
            conv.weight.copy_(ours.weight)
            nn.init.zeros_(conv.bias)
        peer.head.weight.copy_(head.weight)
        peer.head.bias.copy_(head.bias)
    peer = peer.to(dtype=x.dtype, memory_format=memory_format).train()
    x = x.contiguous(memory_format=memory_format)
    named = {f"weight {i}": conv.weight for i, (conv, _) in enumerate(peer.layers)}
    for i, (_, norm) in enumerate(peer.layers):
        named |= {f"gamma {i}": norm.weight, f"beta {i}": norm.bias}
    named |= {"head weight": peer.head.weight, "head bias": peer.head.bias}
    logits = torch.compile(peer, dynamic=False) if compiled else peer
    return _step(lambda: logits(x), list(peer.parameters()), named, labels)


def _step(
    logits: Callable[[], Tensor], parameters: list[Tensor], named: Mapping[str, Tensor], labels: Tensor
) -> Callable[[], Mapping[str, Tensor]]:
    """Forward, backward and update; gives the loss and the gradients of `named`.

    The convolutions' biases are not among them: batch statistics take a bias out, their gradient is rounding.
    """
    optimizer = torch.optim.SGD(parameters, lr=0.01, momentum=0.9, nesterov=True, weight_decay=5e-4)

    def step() -> Mapping[str, Tensor]:
        optimizer.zero_grad()
        loss = F.cross_entropy(logits(), labels)
        loss.backward()
        optimizer.step()
        return {"loss": loss.detach()} | {name: p.grad for name, p in named.items() if p.grad is not None}

    return step
