"""Where "update θ" and "update [Θ;θ]" get their inner loop from: the best of a grid on validation episodes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch
from torch import Tensor

from ..data.store import ImageStore
from ..engine.evaluate import Adapt, embed_episodes, fit_and_score
from ..engine.inner_loops import evaluate_all_weights
from ..engine.inputs import Preprocess
from ..engine.scores import Evaluation
from ..episodes import Episodes
from ..nn import Encoder, LinearHead
from .parts import TimedParts

INNER_GRID = tuple(itertools.product((0.002, 0.005, 0.01, 0.02, 0.05, 0.1), (10, 20, 50, 100, 200)))
ALL_RATES, ALL_STEPS = (0.003, 0.01, 0.03, 0.1), (5, 10, 20, 50)


def best_inner_loop(
    encoder: Encoder,
    head: LinearHead,
    store: ImageStore,
    episodes: Episodes,
    preprocess: Preprocess,
    pieces: TimedParts,
    *,
    adapt: Adapt,
    mirror_support: bool = False,
) -> tuple[float, int]:
    """Step size and number of steps with the best mean accuracy: of `INNER_GRID`, or of `ALL_RATES` and `ALL_STEPS`.

    Args:
        encoder, head, store, episodes, preprocess, mirror_support: as of `engine.evaluate`.
        pieces: where finished parts of the search are kept and found: with all weights a piece a step size, which
            takes minutes.
        adapt: the head alone, or all weights.
    """

    def search_head() -> dict[str, Tensor]:
        embedded = embed_episodes(encoder, store, episodes, preprocess, mirror_support=mirror_support)
        return _means(fit_and_score(embedded, head, inner_lr=lr, inner_steps=n) for lr, n in INNER_GRID)

    def search_all(lr: float) -> dict[str, Tensor]:
        return _means(
            evaluate_all_weights(
                encoder,
                head,
                store,
                episodes,
                preprocess,
                inner_lr=lr,
                n_steps=ALL_STEPS,
                mirror_support=mirror_support,
            )
        )

    if adapt == "head":
        return _best(INNER_GRID, {"search": search_head}, pieces)
    searches = {f"search-{lr:g}": partial(search_all, lr) for lr in ALL_RATES}
    return _best(tuple(itertools.product(ALL_RATES, ALL_STEPS)), searches, pieces)


def _means(found: Iterable[Evaluation]) -> dict[str, Tensor]:
    return {"accuracy": torch.stack([evaluation.accuracy.mean() for evaluation in found]).cpu()}


def _best(
    grid: tuple[tuple[float, int], ...],
    searches: Mapping[str, Callable[[], dict[str, Tensor]]],
    pieces: TimedParts,
) -> tuple[float, int]:
    """Of the grid, whose accuracies the searches give one after the other; the first of equal ones."""
    found = [pieces.get(name, search)["accuracy"] for name, search in searches.items()]
    accuracies = torch.cat(found).tolist()
    return grid[accuracies.index(max(accuracies))]
