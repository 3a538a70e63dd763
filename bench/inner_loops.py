"""A meta-training step of MAML: Conv-4 with 32 filters, 4 tasks of 5-way 1-shot with 15 queries, 5 inner steps.

Ours is `WholeNetworkEngine.step` and a step of Adam, from the uint8 store to moved weights; the peer is the plain
loop over tasks. Memory is that of such a step at 84 pixels, by tasks in flight and with checkpointed inner steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from mtl_fast.engine import WholeNetworkEngine
from mtl_fast.episodes import EpisodeSampler
from mtl_fast.nn import Conv4, LinearHead

from .accuracy import Expected, behind_kinks, convolution_bound
from .harness import Against, Case, Contender, Measurable, Row, Target
from .memory import MemoryGrowthRow, MemoryRow
from .networks import PREPROCESS, native_backend, random_store
from .peers.inner_loops import N_LAYERS, PlainMaml
from .peers.meta_step import Data, InnerLoop, Tasks

N_WAY, N_SHOT, N_QUERY, N_TASKS, N_STEPS, INNER_LR = 5, 1, 15, 4, 5, 0.01
WIDTH, PIXELS = 32, (32, 84)
PLAIN = "per task, NCHW"
# Sides of memory: "maml plain", and "maml kept N S" or "maml checkpointed N S" with N tasks in flight, S steps.
SIDE = "maml "
Step = Callable[[], Mapping[str, Tensor]]


class Problem:
    """The tasks of a step and every way of taking it from the same start."""

    def __init__(self, *, n_tasks: int = N_TASKS, quick: bool, pixels: int = PIXELS[-1]) -> None:
        self.pixels, self.width = (16, 8) if quick else (pixels, WIDTH)
        self.store = random_store(self.pixels)
        generator = torch.Generator().manual_seed(0)
        sampler = EpisodeSampler(self.store, N_WAY, N_SHOT, 3 if quick else N_QUERY, generator)
        self.episodes = sampler.sample(n_tasks)

    def network(self) -> tuple[Conv4, LinearHead]:
        torch.manual_seed(0)
        encoder = Conv4(self.width, image_size=self.pixels).to(memory_format=torch.channels_last)
        return encoder.eval(), LinearHead(
            encoder.feature_dim, N_WAY, generator=torch.Generator().manual_seed(1)
        )

    def ours(
        self,
        order: str = "second",
        *,
        in_flight: int | None = None,
        n_steps: int = N_STEPS,
        checkpoint: bool = False,
    ) -> Step:
        """A step on a new network; `in_flight` tasks at a time."""
        encoder, head = self.network()
        per_task = self.episodes.support.shape[1] + self.episodes.query.shape[1]
        engine = WholeNetworkEngine(
            encoder,
            head,
            self.store,
            PREPROCESS,
            norm="episode",
            order="first" if order == "first" else "second",
            inner_lr=INNER_LR,
            inner_steps=n_steps,
            images_per_chunk=None if in_flight is None else in_flight * per_task,
            checkpoint=checkpoint,
        )
        named = named_weights(encoder, head)
        optimizer = torch.optim.Adam(named.values(), lr=1e-3)

        def step() -> Mapping[str, Tensor]:
            optimizer.zero_grad()
            loss = engine.step(self.episodes).loss.mean()
            optimizer.step()
            return {"loss": loss} | {name: w.grad for name, w in named.items() if w.grad is not None}

        return step

    def plain(self, order: str = "second", dtype: torch.dtype = torch.float32) -> Step:
        """A step of the plain loop on copies of the same network."""
        weights = {
            name: w.detach().clone(memory_format=torch.contiguous_format).to(dtype)
            for name, w in named_weights(*self.network()).items()
        }
        data = Data(self.store.images, PREPROCESS.mean, PREPROCESS.std)
        take = PlainMaml(weights, data, InnerLoop(INNER_LR, N_STEPS), second_order=order == "second")
        e = self.episodes
        tasks = Tasks(e.support, e.support_labels, e.query, e.query_labels)
        return lambda: take(tasks)

    def side(self, name: str) -> Step:
        """The step whose memory is measured; see `SIDE`."""
        kind, *numbers = name.removeprefix(SIDE).split()
        if kind == "plain":
            return self.plain()
        in_flight, n_steps = map(int, numbers)
        return self.ours(in_flight=in_flight, n_steps=n_steps, checkpoint=kind == "checkpointed")


def named_weights(encoder: Conv4, head: LinearHead) -> dict[str, Tensor]:
    """As the peer names them; it has no bias before batch statistics, whose gradient is nothing but rounding."""
    named: dict[str, Tensor] = {"head weight": head.weight, "head bias": head.bias}
    for i, conv in enumerate(encoder.convs()):
        named |= {f"weight {i}": conv.weight, f"gamma {i}": conv.norm.weight, f"beta {i}": conv.norm.bias}
    return named


def rows(quick: bool) -> Sequence[Measurable]:
    timed = [
        Row(
            f"MAML step, {order} order, Conv-4 @ {pixels}, {N_TASKS} tasks",
            lambda pixels=pixels, order=order: _case(pixels, order, quick),
        )
        for pixels in (PIXELS[:1] if quick else PIXELS)
        for order in ("second", "first")
    ]
    peak = f"peak memory of a MAML step, second order, Conv-4 @ {PIXELS[-1]}"
    compared = [
        MemoryRow(f"{peak}, {kind}, {n} in flight", (f"{SIDE}plain",), f"{SIDE}{kind} {n} {N_STEPS}", N_TASKS)
        for kind in ("kept", "checkpointed")
        for n in (N_TASKS, 1)
    ]
    one = f"{SIDE}kept 1 {N_STEPS}"
    growth = [
        MemoryGrowthRow(
            f"{peak}, {4 * N_TASKS} tasks, 1 in flight",
            Target(0.05, 0.01, at_most=True),
            (one, N_TASKS, f"{N_TASKS} tasks"),
            (one, 4 * N_TASKS, f"{4 * N_TASKS} tasks"),
        ),
        *(
            MemoryGrowthRow(
                f"{peak}, {4 * N_STEPS} inner steps, {kind}",
                target,
                (f"{SIDE}{kind} 1 {N_STEPS}", N_TASKS, f"{N_STEPS} steps"),
                (f"{SIDE}{kind} 1 {4 * N_STEPS}", N_TASKS, f"{4 * N_STEPS} steps"),
            )
            for kind, target in (("kept", None), ("checkpointed", Target(0.1, 0.02, at_most=True)))
        ),
    ]
    return [*timed, *compared, *growth]


def _case(pixels: int, order: str, quick: bool) -> Case:
    problem = Problem(quick=quick, pixels=pixels)
    exact = problem.plain(order, torch.float64)()
    # A rectifier and a pooling a layer, in each inner step and in the query's pass; second order passes them twice.
    n_passes = (N_STEPS + 1) * (2 if order == "second" else 1)
    bound = convolution_bound(9 * problem.width, N_LAYERS * n_passes)
    expected = {name: behind_kinks(value, bound, 2 * N_LAYERS * n_passes) for name, value in exact.items()}
    return Case(
        ours=Contender("ours", problem.ours(order)),
        peers=(Contender(PLAIN, problem.plain(order)),),
        against=(Against((PLAIN,), Target(3, 4)),),
        expected=expected | {"loss": Expected(exact["loss"], bound)},
        why_not_native=native_backend()[1],
    )
