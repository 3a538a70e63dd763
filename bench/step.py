"""The meta-training step, ResNet-12 at 32 pixels, 2 tasks of 5-way 5-shot with 15 queries, first order, 20 steps.

Ours is `EpisodicEngine.step` and a step of Adam, from the uint8 store to moved parameters; so are the peers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from mtl_fast.engine import EpisodicEngine
from mtl_fast.episodes import Episodes, EpisodeSampler, HardTaskPool
from mtl_fast.nn import LinearHead, ResNet12

from .accuracy import Expected, behind_kinks, convolution_bound
from .harness import Against, Case, Contender, Line, Measurable, Row, Settings, Target, duration
from .memory import OURS, MemoryGrowthRow, MemoryRow
from .networks import (
    FULL,
    N_CONVS_DEEP,
    N_KINKS_DEEP,
    PREPROCESS,
    SLIM,
    direct_flops,
    layers_of,
    native_backend,
    random_store,
    trained_resnet12,
)
from .peers.meta_step import (
    BatchedStep,
    Data,
    FoldedLayer,
    FrozenLayer,
    InnerLoop,
    MetaStep,
    PlainStep,
    Tasks,
    VmappedStep,
)

INNER = InnerLoop(lr=0.05, n_steps=20)
PIXELS = 32
PLAIN, VMAPPED = "per task, NCHW", "vmap over tasks"
BATCHED = ("batched, NCHW", "batched, channels-last", "batched, channels-last, compiled")
# The steps that take the layers as they are.
UNFOLDED: dict[str, type[MetaStep[FrozenLayer]]] = {PLAIN: PlainStep, VMAPPED: VmappedStep}
Step = Callable[[], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Shape:
    """Of a step's tasks, its network and its inner loop."""

    n_way: int = 5
    n_shot: int = 5
    n_query: int = 15
    widths: tuple[int, ...] = FULL
    inner: InnerLoop = INNER

    @classmethod
    def of(cls, *, quick: bool) -> Shape:
        """That of the rows here."""
        return cls(n_query=2, widths=SLIM) if quick else cls()


class Problem:
    """The tasks of a step, and every way of taking it from the same start, given the network."""

    def __init__(self, shape: Shape, *, n_tasks: int, pixels: int = PIXELS) -> None:
        self.shape, self.pixels = shape, pixels
        self.store = random_store(pixels, n_classes=max(8, shape.n_way))
        generator = torch.Generator().manual_seed(0)
        self.sampler = EpisodeSampler(self.store, shape.n_way, shape.n_shot, shape.n_query, generator)
        self.episodes = self.sampler.sample(n_tasks)

    def network(self) -> ResNet12:
        return trained_resnet12(self.shape.widths, self.pixels)

    def ours(self, encoder: ResNet12, *, images_per_chunk: int | None = None) -> Step:
        """A step that trains Φ of `encoder` itself."""
        head = self.head()
        engine = EpisodicEngine(
            encoder,
            head,
            self.store,
            PREPROCESS,
            order="first",
            inner_lr=self.shape.inner.lr,
            inner_steps=self.shape.inner.n_steps,
            images_per_chunk=images_per_chunk,
        )
        named = {"head weight": head.weight, "head bias": head.bias}
        for i, conv in enumerate(encoder.convs()):
            if conv.scale is not None and conv.shift is not None:
                named |= {f"scale {i}": conv.scale, f"shift {i}": conv.shift}
        optimizer = torch.optim.Adam(named.values(), lr=1e-3)

        def step() -> Mapping[str, Tensor]:
            optimizer.zero_grad()
            loss = engine.step(self.episodes).loss.mean()
            optimizer.step()
            return {"loss": loss} | {name: p.grad for name, p in named.items() if p.grad is not None}

        return step

    def side(self, name: str) -> Step:
        """The step whose memory is measured: ours with two tasks in flight, or a peer's."""
        if name != OURS:
            return self.peer(name, self.network())
        per_task = self.episodes.support.shape[1] + self.episodes.query.shape[1]
        return self.ours(self.network(), images_per_chunk=2 * per_task)

    def peer(self, name: str, encoder: ResNet12, dtype: torch.dtype = torch.float32) -> Step:
        """A step of the peer `name` on copies of all that `encoder` holds."""
        layers, head = layers_of(encoder, dtype), self.head().to(dtype)
        data = Data(self.store.images, PREPROCESS.mean, PREPROCESS.std)
        take: MetaStep
        if name in UNFOLDED:
            take = UNFOLDED[name](layers, head.weight, head.bias, data, self.shape.inner)
        else:
            memory_format = torch.contiguous_format if "NCHW" in name else torch.channels_last
            folded = [FoldedLayer.of(layer, memory_format) for layer in layers]
            take = BatchedStep(
                folded, head.weight, head.bias, data, self.shape.inner, compiled="compiled" in name
            )
        tasks = tasks_of(self.episodes)
        return lambda: take(tasks)

    def expected(self, encoder: ResNet12) -> dict[str, Expected]:
        """What a step must return: the plain one's outputs in float64."""
        exact = self.peer(PLAIN, encoder, torch.float64)()
        bound = convolution_bound(9 * self.shape.widths[-1], N_CONVS_DEEP)
        gradients = {name: behind_kinks(value, bound, N_KINKS_DEEP) for name, value in exact.items()}
        return gradients | {"loss": Expected(exact["loss"], bound)}

    def head(self) -> LinearHead:
        """Where each contender's head starts."""
        return LinearHead(self.shape.widths[-1], self.shape.n_way, generator=torch.Generator().manual_seed(1))


def tasks_of(episodes: Episodes) -> Tasks:
    return Tasks(episodes.support, episodes.support_labels, episodes.query, episodes.query_labels)


def rows(quick: bool) -> Sequence[Measurable]:
    return [
        Row(f"meta-training step, first order, ResNet-12 @ {PIXELS}, 2 tasks", lambda: _case(quick)),
        MemoryRow(
            "peak memory of a meta-training step, first order, 2 tasks",
            (PLAIN,) if quick else (PLAIN, *BATCHED),
        ),
        MemoryGrowthRow(
            "peak memory of a meta-training step, first order, 64 tasks", Target(0.05, 0.01, at_most=True)
        ),
        HardTaskRow(
            "pool and sampling of hard tasks, resample, round of 15 updates", Target(0.03, 0.01, at_most=True)
        ),
    ]


@dataclass(frozen=True)
class HardTaskRow:
    """Time in the pool and in the sampling of hard tasks, as a share of a round's steps, 2 tasks each.

    A round is that of the paper's recipe: 20 random tasks join the pool, then 10 hard ones are drawn.
    """

    name: str
    target: Target
    n_random: int = 10  # updates
    n_hard: int = 5

    def measure(self, settings: Settings) -> Iterable[Line]:
        problem = Problem(Shape.of(quick=settings.quick), n_tasks=2)
        step = problem.ours(problem.network())
        pool = HardTaskPool(problem.sampler, "resample", torch.Generator().manual_seed(1))
        accuracy = torch.rand(2, problem.shape.n_way, generator=torch.Generator().manual_seed(2))
        drawn = [problem.sampler.sample(2) for _ in range(self.n_random)]
        step()  # caches
        in_pool, in_steps = [], []
        for _ in range(settings.rounds):
            start = time.perf_counter()
            for episodes in drawn:
                pool.add(episodes, accuracy)
            for _ in range(self.n_hard):
                pool.sample(2)
            pool.clear()
            between = time.perf_counter()
            step()
            in_pool.append(between - start)
            in_steps.append((time.perf_counter() - between) * (self.n_random + self.n_hard))
        steps = f"{self.n_random + self.n_hard} steps"
        shares = tuple(pool / whole for pool, whole in zip(in_pool, in_steps, strict=True))
        return [
            Line(
                self.name,
                ours=duration(median(in_pool)),
                against=steps,
                peers=(steps,),
                peer=duration(median(in_steps)),
                values=shares,
                best=min(in_pool) / min(in_steps),
                target=self.target,
                unit="%",
                note=native_backend()[1],
                details={"seconds": {"ours": in_pool, steps: in_steps}},
            )
        ]


def _case(quick: bool) -> Case:
    problem = Problem(Shape.of(quick=quick), n_tasks=2)
    encoder = problem.network()
    peers = tuple(Contender(name, problem.peer(name, encoder)) for name in (*UNFOLDED, *BATCHED))
    n_support, n_query = problem.episodes.support.numel(), problem.episodes.query.numel()
    return Case(
        ours=Contender("ours", problem.ours(encoder)),
        peers=peers,
        against=(Against((PLAIN,), Target(4, 6)), Against((VMAPPED,)), Against(BATCHED, Target(2, 3))),
        expected=problem.expected(encoder),
        # Backward of the queries: the images' gradients and the weights', as much again each.
        flops=direct_flops(problem.shape.widths, PIXELS) * (n_support + 3 * n_query),
        why_not_native=native_backend()[1],
    )
