"""Evaluation, ResNet-12 at 32 pixels, 600 and 10,000 tasks of 5-way 1-shot with 15 queries from 96 classes of 30 images.

Ours embeds each distinct image once; the others embed every task's images. What they need for all tasks is
extrapolated from a few: each task costs them the same. The targets are shares of the images that they embed for each
that ours does; against our own encoder, nothing else makes the difference.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mtl_fast.data.store import ImageStore
from mtl_fast.engine import (
    EmbeddedEpisodes,
    distinct_images,
    embed_episodes,
    embed_rows,
    fit_and_predict,
)
from mtl_fast.episodes import Episodes, EpisodeSampler
from mtl_fast.nn import LinearHead

from .accuracy import EPS, Expected, convolution_bound
from .encoder import folded_network
from .harness import Against, Case, Contender, Line, Measurable, Row, Settings, Target
from .networks import (
    FULL,
    N_CONVS_DEEP,
    PREPROCESS,
    SLIM,
    layers_of,
    native_backend,
    random_store,
    trained_resnet12,
)
from .peers.evaluate import evaluate_batched, evaluate_plainly
from .peers.meta_step import Data, InnerLoop
from .step import tasks_of

INNER = InnerLoop(lr=0.05, n_steps=100)
N_WAY, N_SHOT, N_QUERY, PIXELS = 5, 1, 15, 32
PLAIN = "per task, NCHW"
BATCHED = ("batched, NCHW", "batched, channels-last", "batched, channels-last, compiled")
OUR_ENCODER = "our encoder, every task's images"
CHUNKS = (1, 2, 4)  # tasks whose images the batched peers may embed at a time: each takes its fastest
SHARES = Target(0.8, 0.95)  # of the images embedded plainly ÷ distinct images


@dataclass(frozen=True)
class Problem:
    """The tasks of an evaluation, and those of them, spread evenly, that the plain sides are timed with."""

    store: ImageStore
    episodes: Episodes
    n_sampled: int

    @classmethod
    def make(cls, n_tasks: int, *, quick: bool) -> Problem:
        store = random_store(PIXELS, *((8, 20) if quick else (96, 30)))
        sampler = EpisodeSampler(store, N_WAY, N_SHOT, N_QUERY, torch.Generator().manual_seed(0))
        return cls(store, sampler.sample(n_tasks), 3 if quick else 8)

    @property
    def every(self) -> slice:
        """The sampled tasks; their number divides that of all."""
        return slice(None, None, self.episodes.n_tasks // self.n_sampled)

    @property
    def factor(self) -> float:
        """Images embedded plainly for each distinct one."""
        n_plainly = self.episodes.support.numel() + self.episodes.query.numel()
        return n_plainly / len(distinct_images(self.episodes, self.store.n_images).rows)


def rows(quick: bool) -> Sequence[Measurable]:
    return [EvaluationRow(n_tasks) for n_tasks in ((30,) if quick else (600, 10_000))]


@dataclass(frozen=True)
class EvaluationRow:
    """Plain sides over ours, and what share that is of the images saved."""

    n_tasks: int

    @property
    def name(self) -> str:
        return f"evaluation, {self.n_tasks:,} tasks, ResNet-12 @ {PIXELS}"

    def measure(self, settings: Settings) -> Iterable[Line]:
        problem = Problem.make(self.n_tasks, quick=settings.quick)
        row = Row(self.name, lambda: evaluation_case(problem, quick=settings.quick))
        for line in row.measure(settings):
            if line.spread is not None:
                reached = f"{line.spread.middle / problem.factor:.2f} of {problem.factor:.1f}"
                line = replace(
                    line, note=f"{reached} images embedded plainly for a distinct one; {line.note}"
                )
            yield line


def evaluation_case(problem: Problem, *, quick: bool, ours: Callable[[], Tensor] | None = None) -> Case:
    """The case of a row; `ours` replaces what is measured."""
    widths = SLIM if quick else FULL
    encoder = trained_resnet12(widths, PIXELS)
    head = LinearHead(widths[-1], N_WAY, generator=torch.Generator().manual_seed(1)).requires_grad_(False)
    sampled = problem.episodes[problem.every]
    tasks, data = tasks_of(sampled), Data(problem.store.images, PREPROCESS.mean, PREPROCESS.std)
    share = problem.n_sampled / problem.episodes.n_tasks

    def embedded_once() -> Tensor:
        embedded = embed_episodes(encoder, problem.store, problem.episodes, PREPROCESS)
        return fit_and_predict(embedded, head, inner_lr=INNER.lr, inner_steps=INNER.n_steps)[problem.every]

    def embedded_each() -> Tensor:
        rows = torch.cat([sampled.support.flatten(), sampled.query.flatten()])
        features = embed_rows(encoder, problem.store, rows, PREPROCESS)
        places = torch.arange(len(rows)).split([sampled.support.numel(), sampled.query.numel()])
        support, query = places[0].view_as(sampled.support), places[1].view_as(sampled.query)
        embedded = EmbeddedEpisodes(sampled, features, support, query)
        return fit_and_predict(embedded, head, inner_lr=INNER.lr, inner_steps=INNER.n_steps)

    def plain(dtype: torch.dtype) -> Callable[[], Tensor]:
        weights = (layers_of(encoder, dtype), head.weight.to(dtype), head.bias.to(dtype))
        return lambda: evaluate_plainly(*weights, data, tasks, INNER)

    def batched(name: str, images_per_chunk: int) -> Callable[[], Tensor]:
        memory_format = torch.contiguous_format if "NCHW" in name else torch.channels_last
        embed = folded_network(layers_of(encoder), memory_format, compiled="compiled" in name)
        arguments = (embed, memory_format, head.weight, head.bias, data, tasks, INNER)
        return lambda: evaluate_batched(*arguments, images_per_chunk=images_per_chunk)

    exact = plain(torch.float64)()
    names = BATCHED[:2] if quick else BATCHED  # compiling takes longer than all of a quick run
    per_task = N_WAY * (N_SHOT + N_QUERY)
    chunks = [n * per_task for n in CHUNKS if sampled.n_tasks % n == 0]
    peers = {PLAIN: plain(torch.float32)}
    peers |= {name: _fastest([batched(name, chunk) for chunk in chunks]) for name in names}
    peers[OUR_ENCODER] = embedded_each
    target = Target(SHARES.must * problem.factor, SHARES.aim * problem.factor)
    # Logits are bilinear in support and query features, each with the encoder's rounding; the fit adds its own.
    bound = (
        2 * convolution_bound(9 * widths[-1], N_CONVS_DEEP) + 4 * EPS * (widths[-1] * INNER.n_steps) ** 0.5
    )
    return Case(
        ours=Contender("ours", _logits(ours or embedded_once)),
        peers=tuple(Contender(name, _logits(run), share) for name, run in peers.items()),
        against=(Against((PLAIN, *names), target), Against((OUR_ENCODER,), target)),
        expected={"logits": Expected(exact, bound)},
        note=f"plain sides extrapolated from {problem.n_sampled} tasks",
        why_not_native=native_backend()[1],
    )


def _fastest(ways: Sequence[Callable[[], Tensor]]) -> Callable[[], Tensor]:
    """By the second call of each."""

    def second_call(run: Callable[[], Tensor]) -> float:
        run()
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    return min(ways, key=second_call)


def _logits(run: Callable[[], Tensor]) -> Callable[[], Mapping[str, Tensor]]:
    return lambda: {"logits": run()}
