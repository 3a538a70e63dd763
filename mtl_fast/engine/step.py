"""One meta-training step: a batch of episodes → query losses, class accuracies, gradients of Φ and θ."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from ..episodes import Episodes
from ..nn.encoder import Embeddings, Encoder, Statistics
from ..nn.scale_shift import interleave
from ..ops.base_learner import base_learner
from .base import Engine, NormMode, StepOutput, Weights, images_of_splits


def _warn_of_what_cancels(encoder: Encoder, norm: NormMode) -> None:
    """Says which part of Φ batch statistics take out again."""
    normed = [conv for conv in encoder.convs() if conv.norm is not None and conv.shift is not None]
    if not normed:
        return
    filters = any(c.scale is not None and c.scale.shape[1] == 1 < c.weight.shape[1] for c in normed)
    warnings.warn(
        f"norm {norm!r}: batch statistics follow {len(normed)} of the convolutions with scale and shift; "
        "there the shift has no effect on the training loss"
        + (", nor has the size of a filter's scale (only its sign)" if filters else "")
        + "; norm 'frozen' keeps them effective",
        UserWarning,
        stacklevel=4,
    )


@dataclass
class EpisodicEngine(Engine):
    """The inner loop of MTL: the head alone is fitted, on features that the encoder gives once.

    A task that does not fit `images_per_chunk` alone is embedded twice: without a graph, then piece by piece against
    the gradient of its embeddings. A piece is that many images, or with batch statistics a whole split, which is
    then the least that can be given. `running` averages take the query split first.

    Attributes:
        backend: of the base-learner.
        encoder_dtype: of images and activations; None is the head's. Φ, the effective weights as they are
            computed, batch statistics, Gram matrix, logits and gradients keep the parameters' dtype. The other
            attributes are `Engine`'s.
    """

    backend: str = "auto"
    encoder_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.norm != "frozen" and self.ranks.first:
            _warn_of_what_cancels(self.encoder, self.norm)

    def _refresh(self) -> Weights:
        with self.spans("encoder"):
            return self.encoder.refresh(fold=self.norm == "frozen", dtype=self.encoder_dtype)

    def query_logits(self, episodes: Episodes, weights: Weights | None = None) -> Tensor:
        weights = self._refresh() if weights is None else weights
        embedded = [
            self._embed(rows, episodes.n_tasks, weights, graph) for rows, graph in self._rows(episodes)
        ]
        if self.norm == "running":
            self.encoder.update_running(interleave(*(e.statistics for e in embedded)))
        return self._logits(episodes, [e.features for e in embedded])

    def smallest_chunk(self, n_support: int, n_query: int) -> int:
        """The least `images_per_chunk` for tasks of so many images: batch statistics take whole splits."""
        return 1 if self.norm == "frozen" else max(n_support, n_query)

    @property
    def _n_passes(self) -> int:
        return 2

    def _take(self, part: Episodes, weights: Weights, n_tasks: int) -> tuple[StepOutput, Statistics]:
        in_pieces = self.images_per_chunk is not None and sum(images_of_splits(part)) > self.images_per_chunk
        embed = self._embed_in_pieces if in_pieces else self._embed
        rows = self._rows(part)
        embedded = [embed(r, part.n_tasks, weights, graph) for r, graph in rows]
        trains = any(p.requires_grad for p in self.encoder.parameters())
        # The graph is cut here: the inner loop's backward gives the gradient of the features.
        leaves = [
            e.features.detach().requires_grad_(graph and trains)
            for e, (_, graph) in zip(embedded, rows, strict=True)
        ]
        with self.spans("inner loop"):
            output = self._scored(self._logits(part, leaves), part, n_tasks)
        for (r, _), whole, leaf in zip(rows, embedded, leaves, strict=True):
            if leaf.grad is None:
                continue
            if not in_pieces:
                self._back(whole.features, leaf.grad)
                continue
            pieces = self._pieces(r)
            gradients = leaf.grad.split([len(piece) for piece in pieces])
            for piece, gradient in zip(pieces, gradients, strict=True):
                self._back(self._embed(piece, part.n_tasks, weights, graph=True).features, gradient)
        if self.norm != "running":
            return output, []
        return output, interleave(*(e.statistics for e in embedded))

    def _back(self, features: Tensor, gradient: Tensor) -> None:
        """From the gradient of the features to that of the encoder's parameters."""
        if features.requires_grad:
            with self.spans("encoder"):
                features.backward(gradient)

    def _logits(self, part: Episodes, features: list[Tensor]) -> Tensor:
        """[T·n, D] features in the order of `_rows` → query logits [T, n_query, n_way]."""
        if len(features) == 1:
            support, query = features[0].split([part.support.numel(), part.query.numel()])
        else:
            query, support = features
        return base_learner(
            support.unflatten(0, (part.n_tasks, -1)),
            part.support_labels,
            query.unflatten(0, (part.n_tasks, -1)),
            self.head.weight,
            self.head.bias,
            inner_lr=self.inner_lr,
            n_steps=self.inner_steps,
            order=self.order,
            backend=self.backend,
        )

    def _rows(self, part: Episodes) -> list[tuple[Tensor, bool]]:
        """Rows that are embedded together, and whether with a graph: query and support, or both in one."""
        query, support = part.query.flatten(), part.support.flatten()
        if self.norm == "frozen" and self.order == "second":
            return [(torch.cat([support, query]), True)]
        # First order needs no derivative of the support features, hence no graph for them.
        return [(query, True), (support, self.order == "second")]

    def _embed(self, rows: Tensor, n_tasks: int, weights: Weights, graph: bool) -> Embeddings:
        """Rows [B] of the store, of `n_tasks` tasks, → features [B, D] in the head's dtype, and statistics."""
        dtype = self.head.weight.dtype
        with self.spans("data"):
            images = self.preprocess(self.store, rows, self.encoder_dtype or dtype)
        with self.spans("encoder"), torch.set_grad_enabled(graph and torch.is_grad_enabled()):
            n_groups = 0 if self.norm == "frozen" else n_tasks
            features, statistics = self.encoder.embed(images, n_groups=n_groups, weights=weights)
            return Embeddings(features.to(dtype), statistics)

    def _embed_in_pieces(self, rows: Tensor, n_tasks: int, weights: Weights, graph: bool) -> Embeddings:
        """`_embed` of rows that may not be in flight together, without a graph whatever `graph` says."""
        parts = [self._embed(piece, n_tasks, weights, graph=False) for piece in self._pieces(rows)]
        return Embeddings(torch.cat([p.features for p in parts]), parts[0].statistics)

    def _pieces(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Rows that may be in flight together; batch statistics are those of a whole split."""
        assert self.images_per_chunk is not None
        return rows.split(self.images_per_chunk) if self.norm == "frozen" else (rows,)
