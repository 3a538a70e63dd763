"""A test taken piece by piece, so that it can be stopped, shared among processes and gone on with, to the same bits.

Pieces do not depend on who computes them: images are embedded in blocks of the list of all distinct images of all
tasks, heads are fitted a hundred tasks at a time from the first task on.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..data.features import FeatureStore
from ..data.store import ImageStore
from ..engine.evaluate import (
    EmbeddedEpisodes,
    accuracy_by_step,
    distinct_images,
    embed_rows,
    embedded_parts,
    fit_and_score,
)
from ..engine.inner_loops import evaluate_all_weights
from ..engine.ranks import ALONE, Ranks
from ..episodes import Episodes
from ..errors import InputError
from ..nn import Encoder
from .models import preprocess_of
from .parts import Parts, Shard
from .subject import Subject

TASKS_PER_PART = 100  # heads that are fitted together, too
IMAGES_PER_PART = 1024  # some whole chunks of `embed_rows`


class Scoring:
    """Scores a shard's tasks, each piece through `parts`.

    Args:
        subject: what is tested.
        episodes: all tasks of the test, not the shard's only.
        parts: where pieces are kept and found.
        shard: whose tasks.
        by_step: accuracy after each step of the inner loop, too.
        ranks: processes that share out the tasks, without a shard and without keeping pieces.
    """

    def __init__(
        self,
        subject: Subject,
        episodes: Episodes,
        parts: Parts,
        shard: Shard,
        *,
        by_step: bool = False,
        ranks: Ranks = ALONE,
    ) -> None:
        self.subject, self.episodes, self.parts = subject, episodes, parts
        self.shard, self.by_step, self.ranks = shard, by_step, ranks
        self.preprocess = preprocess_of(subject.config)

    def run(self) -> dict[str, Tensor]:
        """`task_accuracy` [n] of the shard's tasks and, if asked for, `accuracy_by_step` [n, n_steps + 1]; on the CPU.

        Raises:
            InputError: the shard has no tasks, or a piece does not fit or cannot be written.
        """
        n_parts = -(-self.episodes.n_tasks // TASKS_PER_PART)
        share = self.shard.share(n_parts)
        if not share:
            raise InputError(
                f"--shard {self.shard}: has no tasks, for {self.episodes.n_tasks} are scored in {n_parts} parts of "
                f"{TASKS_PER_PART}; take at most {n_parts} shards"
            )
        starts = [part * TASKS_PER_PART for part in share]
        if not self.ranks.alone:
            return self._on_ranks(starts)
        return _joined(
            self.parts.get(f"tasks-{start:07d}", partial(self._score, start))
            for start in _progress(starts, "tasks", TASKS_PER_PART)
        )

    def _on_ranks(self, starts: list[int]) -> dict[str, Tensor]:
        """Each rank's share of the parts, then those of all in the order of the tasks."""
        if self._embeds_once:
            self._embedded  # noqa: B018 - an exchange: also a rank without a part takes part in it
        own = {start: self._score(start) for start in starts[self.ranks.share(len(starts))]}
        every = {start: piece for found in self.ranks.gather_objects(own) for start, piece in found.items()}
        return _joined(every[start] for start in starts)

    def _score(self, start: int) -> dict[str, Tensor]:
        tasks = slice(start, start + TASKS_PER_PART)
        encoder, store = self.subject.encoder, self.subject.store
        if self._embeds_once:
            return self._scores(self._embedded[tasks])
        assert encoder is not None
        assert isinstance(store, ImageStore)
        if self.subject.config.inner.adapt == "all":
            return self._all_weights(encoder, store, self.episodes[tasks])
        parts = embedded_parts(
            encoder,
            store,
            self.episodes[tasks],
            self.preprocess,
            norm=self.subject.norm,
            mirror_support=self.subject.config.evaluation.mirror_support,
        )
        return _joined(self._scores(embedded) for embedded in parts)

    @property
    def _embeds_once(self) -> bool:
        """Whether an image has the same features in each task."""
        return self.subject.norm != "episode" and self.subject.config.inner.adapt == "head"

    def _all_weights(self, encoder: Encoder, store: ImageStore, episodes: Episodes) -> dict[str, Tensor]:
        config = self.subject.config
        n_steps = config.inner.test_steps
        found = evaluate_all_weights(
            encoder,
            self.subject.head,
            store,
            episodes,
            self.preprocess,
            inner_lr=config.inner.lr_at_test,
            n_steps=range(n_steps + 1) if self.by_step else [n_steps],
            norm=self.subject.norm,
            mirror_support=config.evaluation.mirror_support,
        )
        scores = {"task_accuracy": found[-1].accuracy.cpu()}
        if self.by_step:
            scores["accuracy_by_step"] = torch.stack([after.accuracy for after in found], dim=1).cpu()
        return scores

    def _scores(self, embedded: EmbeddedEpisodes) -> dict[str, Tensor]:
        inner, head = self.subject.config.inner, self.subject.head
        steps: dict[str, Any] = {"inner_lr": inner.lr_at_test, "inner_steps": inner.test_steps}
        found = {"task_accuracy": fit_and_score(embedded, head, **steps).accuracy}
        if self.by_step:
            found["accuracy_by_step"] = accuracy_by_step(embedded, head, **steps)
        return {name: tensor.cpu() for name, tensor in found.items()}

    @cached_property
    def _embedded(self) -> EmbeddedEpisodes:
        """All tasks with their features; not looked at where every piece of scores is there already."""
        encoder, store = self.subject.encoder, self.subject.store
        mirror = self.subject.config.evaluation.mirror_support
        if isinstance(store, FeatureStore):
            return EmbeddedEpisodes.of_store(
                self.episodes, store.features, store.mirrored if mirror else None
            )
        assert encoder is not None
        rows, mirrored, support, query = distinct_images(self.episodes, store.n_images, mirror_support=mirror)

        if not self.ranks.alone:
            features = embed_rows(encoder, store, rows, self.preprocess, mirrored=mirrored, ranks=self.ranks)
            return EmbeddedEpisodes(self.episodes, features, support, query)

        def embed(start: int) -> dict[str, Tensor]:
            block = slice(start, start + IMAGES_PER_PART)
            flip = None if mirrored is None else mirrored[block]
            features = embed_rows(encoder, store, rows[block], self.preprocess, mirrored=flip)
            return {"features": features.cpu()}

        starts = list(range(0, len(rows), IMAGES_PER_PART))
        # Each shard begins elsewhere, and goes round: what the others have done by then, it reads.
        first = self.shard.share(len(starts)).start
        blocks = {
            start: self.parts.get(f"features-{start:09d}", partial(embed, start))["features"]
            for start in _progress(starts[first:] + starts[:first], "images", IMAGES_PER_PART)
        }
        features = torch.cat([blocks[start] for start in starts]).to(store.device)
        return EmbeddedEpisodes(self.episodes, features, support, query)


def _joined(pieces: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    kept = list(pieces)
    return {name: torch.cat([piece[name] for piece in kept]) for name in kept[0]}


def _progress(starts: list[int], unit: str, size: int) -> Iterable[int]:
    """A bar on a terminal, where there is something to wait for."""
    return tqdm(
        starts,
        desc=f"{unit}, {size} at a time",
        unit="part",
        leave=False,
        disable=None if len(starts) > 1 else True,
    )
