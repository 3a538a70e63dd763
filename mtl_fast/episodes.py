"""Few-shot tasks as index tensors: `Episodes`, the sampler that draws them, and the pool of hard classes.

Random numbers are drawn on the CPU, one row a task: `sample(4)` and then `sample(6)` give the tasks of
`sample(10)`. They are float64 keys, and the largest ones choose: nothing here reads a value back from the
device, and one seed gives the same tasks on every device.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from mtl_fast.data.residency import moved
from mtl_fast.data.store import ClassIndex
from mtl_fast.errors import InputError

_KEYS_AT_ONCE = 2**22  # random numbers that a sampler holds at a time


@dataclass(frozen=True, eq=False)
class Episodes:
    """T tasks of n_way classes; images are rows of a store, in the order of their classes.

    Queries must be: accuracies of classes go by their places, which `class_accuracy` of the engine checks on the CPU.

    Args:
        classes: int64 [T, n_way], the store's labels, distinct in each task.
        support, query: int64 [T, n_way*n_shot] and [T, n_way*n_query], rows of the store, none in both.
        support_labels, query_labels: int64, shaped alike, 0..n_way-1: the column of `classes`.

    Raises:
        ValueError: shapes that do not fit.
    """

    classes: Tensor
    support: Tensor
    query: Tensor
    support_labels: Tensor
    query_labels: Tensor

    def __post_init__(self) -> None:
        for name in ("support", "query"):
            rows, labels = getattr(self, name), getattr(self, f"{name}_labels")
            if rows.ndim != 2 or len(rows) != self.n_tasks or rows.shape[1] % self.n_way:
                shapes = f"{list(rows.shape)} for classes {list(self.classes.shape)}"
                raise ValueError(f"{name}: expected [T, n_way * images of a class], got {shapes}")
            if labels.shape != rows.shape:
                raise ValueError(
                    f"{name}_labels: {list(labels.shape)} differs from {name} {list(rows.shape)}"
                )

    @classmethod
    def from_rows(cls, classes: Tensor, rows: Tensor, n_shot: int) -> Episodes:
        """Tasks of `classes` [T, n_way] and their `rows` [T, n_way, n_shot + n_query], support first."""
        labels = torch.arange(classes.shape[1], device=classes.device)[None, :, None].expand(rows.shape)
        support, query = (part.flatten(1) for part in (rows[..., :n_shot], rows[..., n_shot:]))
        support_labels, query_labels = (
            part.flatten(1) for part in (labels[..., :n_shot], labels[..., n_shot:])
        )
        return cls(classes, support, query, support_labels, query_labels)

    @property
    def n_tasks(self) -> int:
        return self.classes.shape[0]

    @property
    def n_way(self) -> int:
        return self.classes.shape[1]

    @property
    def n_shot(self) -> int:
        return self.support.shape[1] // self.n_way

    @property
    def n_query(self) -> int:
        return self.query.shape[1] // self.n_way

    def rows(self) -> Tensor:
        """int64 [T, n_way, n_shot + n_query]: the rows of each class, support first."""
        # Stable: a support set in the order of its classes stays as it is.
        support = self.support.gather(1, self.support_labels.argsort(dim=1, stable=True))
        support, query = (part.unflatten(1, (self.n_way, -1)) for part in (support, self.query))
        return torch.cat([support, query], dim=2)

    def __getitem__(self, tasks: slice) -> Episodes:
        """The tasks of a slice."""
        return Episodes(*(tensor[tasks] for tensor in self._tensors()))

    def chunks(self, n: int) -> Iterator[Episodes]:
        """The tasks in order, `n` at a time, fewer in the last."""
        if n < 1:
            raise ValueError(f"chunks: n is {n}; a chunk holds at least one task")
        return (self[start : start + n] for start in range(0, self.n_tasks, n))

    def in_order(self) -> tuple[Tensor, Episodes]:
        """The rows of all images, query and then support, [B], and the same tasks as rows of those images."""
        rows = torch.cat([self.query.flatten(), self.support.flatten()])
        place = torch.arange(len(rows), device=rows.device)
        query, support = place.split([self.query.numel(), self.support.numel()])
        return rows, replace(
            self, query=query.view(self.query.shape), support=support.view(self.support.shape)
        )

    def to(self, device: torch.device | str) -> Episodes:
        return Episodes(*(moved(tensor, torch.device(device)) for tensor in self._tensors()))

    def _tensors(self) -> tuple[Tensor, ...]:
        return self.classes, self.support, self.query, self.support_labels, self.query_labels


class EpisodeSampler:
    """Random tasks: n_way distinct classes, and of each n_shot + n_query distinct images, all equally likely.

    Args:
        store: where classes and images come from.
        n_way, n_shot, n_query: classes of a task, support and query images of a class.
        generator: a CPU generator that nobody else draws from.
        device: where the tasks are made; None is the store's device.

    Raises:
        InputError: fewer classes than n_way, or a class with fewer than n_shot + n_query images.
    """

    def __init__(
        self,
        store: ClassIndex,
        n_way: int,
        n_shot: int,
        n_query: int,
        generator: torch.Generator,
        device: torch.device | str | None = None,
    ) -> None:
        for name, value in (("n_way", n_way), ("n_shot", n_shot), ("n_query", n_query)):
            if value < 1:
                raise InputError(f"{name} is {value}; it must be at least 1")
        _check_enough(store, n_way, n_shot, n_query)
        self.store = store
        self.n_way, self.n_shot, self.n_query = n_way, n_shot, n_query
        self.n_classes = store.n_classes
        self.device = store.device if device is None else torch.device(device)
        self._generator = generator
        self._class_index = store.class_index.to(self.device)
        self._is_image = self._class_index >= 0

    def sample(self, n_tasks: int) -> Episodes:
        """`n_tasks` random tasks, on the sampler's device."""
        at_once = max(1, _KEYS_AT_ONCE // (self.n_classes + self._n_image_keys))
        drawn = [self._draw(min(at_once, n_tasks - start)) for start in range(0, max(1, n_tasks), at_once)]
        classes, rows = (torch.cat(column) for column in zip(*drawn, strict=True))
        return Episodes.from_rows(classes, rows, self.n_shot)

    def _draw(self, n_tasks: int) -> tuple[Tensor, Tensor]:
        """Classes [n_tasks, n_way] and rows [n_tasks, n_way, n_shot + n_query] of random tasks."""
        keys = _keys(self._generator, n_tasks, self.n_classes + self._n_image_keys, self.device)
        class_keys, image_keys = keys.split([self.n_classes, self._n_image_keys], dim=1)
        classes = class_keys.topk(self.n_way, dim=1).indices
        return classes, self._new_rows(classes, image_keys)

    def sample_classes(self, classes: Tensor) -> Episodes:
        """Tasks of the given `classes` int64 [T, n_way] (distinct in each task), with random images.

        Raises:
            ValueError: classes of another shape or dtype; on the CPU also a class that the store does not have, or one
                twice in a task.
        """
        _check_classes(classes, self.n_way, self.n_classes)
        keys = _keys(self._generator, len(classes), self._n_image_keys, self.device)
        classes = moved(classes, self.device)
        return Episodes.from_rows(classes, self._new_rows(classes, keys), self.n_shot)

    @property
    def _n_image_keys(self) -> int:
        return self.n_way * self._class_index.shape[1]

    def _new_rows(self, classes: Tensor, keys: Tensor) -> Tensor:
        """[T, n_way], [T, n_way * max_count] -> [T, n_way, n_shot + n_query]: random images of each class."""
        keys = keys.unflatten(1, (self.n_way, -1)).where(self._is_image[classes], -1.0)
        chosen = keys.topk(self.n_shot + self.n_query, dim=2).indices
        return self._class_index[classes].gather(2, chosen)


class HardTaskPool:
    """The classes that tasks failed on, and hard tasks made of them.

    `add` takes the class of lowest accuracy of each task, ties broken at random; `sample` draws tasks whose
    classes come from the pool, its distinct classes equally likely; `clear` empties it. A pool of fewer than
    n_way classes is filled with random other classes, with new images. Source: arXiv 1812.02391, section 4;
    `per_task` and `size` are ours.

    Args:
        sampler: draws the random tasks; its store and task shape are the pool's. Its stream is left alone.
        mode: ``resample`` takes new images of the failed classes; ``reuse`` the very images of the task that
            failed on the class, of one such task at random where there are several, split anew.
        generator: the CPU generator of ties and hard tasks, another than the sampler's.
        per_task: how many classes of a task join, those of lowest accuracy.
        size: most classes that hard tasks are made of: those that failed most often since the pool was last empty,
            and of equally many failures the latest; None: all that failed.
    """

    def __init__(
        self,
        sampler: EpisodeSampler,
        mode: Literal["resample", "reuse"],
        generator: torch.Generator,
        *,
        per_task: int = 1,
        size: int | None = None,
    ) -> None:
        if mode not in ("resample", "reuse"):
            raise InputError(f"hard-task mode {mode!r} is unknown; choose resample or reuse")
        if generator is sampler._generator:
            raise ValueError("generator: hard tasks need a generator of their own, not the sampler's")
        if not 1 <= per_task <= sampler.n_way:
            raise InputError(f"hard classes per task: {per_task} is outside 1..{sampler.n_way} (n_way)")
        if size is not None and size < 1:
            raise InputError(f"hard pool size: {size} is too small; it must be at least 1")
        self.mode = mode
        self.per_task, self.size = per_task, size
        self._sampler = sampler
        self._generator = generator
        self._n_images = sampler.n_shot + sampler.n_query
        self.clear()

    @property
    def classes(self) -> Tensor:
        """int64, the distinct labels that hard tasks are made of, ascending. Reads the device: for logs and tests."""
        return self._members().nonzero()[:, 0]

    def _members(self) -> Tensor:
        """bool [n_classes]: which classes hard tasks are made of."""
        n_classes, n_failed = self._sampler.n_classes, len(self._failed)
        counts = torch.zeros(n_classes, dtype=torch.float64, device=self._sampler.device)
        counts.index_add_(0, self._failed, torch.ones_like(self._failed, dtype=torch.float64))
        if self.size is None or self.size >= n_classes:
            return counts > 0
        # Of equally many failures the latest: a share of one for its place.
        place = torch.arange(1, n_failed + 1, dtype=torch.float64, device=counts.device) / (n_failed + 1)
        rank = counts + torch.zeros_like(counts).scatter_reduce_(0, self._failed, place, "amax")
        return (rank > 0) & (rank >= rank.topk(self.size).values[-1])

    def clear(self) -> None:
        """Empties the pool."""
        device = self._sampler.device
        self._failed = torch.empty(
            0, dtype=torch.int64, device=device
        )  # [K], the failed classes of each task added
        self._rows = torch.empty(
            0, self._n_images, dtype=torch.int64, device=device
        )  # and its images in that task

    def add(self, episodes: Episodes, class_accuracy: Tensor) -> Tensor:
        """The `per_task` classes of lowest accuracy of each task join; `class_accuracy` is [T, n_way], as `classes`.

        Returns:
            int64 [T · per_task], their labels, task after task, the lowest first.
        """
        sampler = self._sampler
        shape = (episodes.n_way, episodes.n_shot, episodes.n_query)
        if shape != (sampler.n_way, sampler.n_shot, sampler.n_query):
            wanted = (sampler.n_way, sampler.n_shot, sampler.n_query)
            raise ValueError(f"episodes: (n_way, n_shot, n_query) is {shape}, the sampler's {wanted}")
        if class_accuracy.shape != episodes.classes.shape:
            shapes = f"{list(class_accuracy.shape)} for classes {list(episodes.classes.shape)}"
            raise ValueError(f"class_accuracy: expected [T, n_way], got {shapes}")
        episodes, accuracy = episodes.to(sampler.device), moved(class_accuracy, sampler.device)
        keys = _keys(self._generator, episodes.n_tasks, sampler.n_way, sampler.device)
        # In a random order first: sorting by accuracy then leaves equal ones in it.
        shuffled = keys.argsort(dim=1, descending=True)
        ranked = accuracy.gather(1, shuffled).argsort(dim=1, stable=True)
        column = shuffled.gather(1, ranked)[:, : self.per_task]
        failed = episodes.classes.gather(1, column).flatten()
        rows = episodes.rows().take_along_dim(column[:, :, None], dim=1).flatten(0, 1)
        self._failed = torch.cat([self._failed, failed])
        self._rows = torch.cat([self._rows, rows])
        return failed

    def sample(self, n_tasks: int) -> Episodes:
        """`n_tasks` hard tasks; the pool stays as it is. From an empty pool the tasks are random ones."""
        sampler, n_failed = self._sampler, len(self._failed)
        n_way, n_images = sampler.n_way, self._n_images
        reused = self.mode == "reuse" and n_failed > 0
        widths = [sampler.n_classes, n_way, sampler._n_image_keys] + [n_failed, n_way * n_images] * reused
        keys = _keys(self._generator, n_tasks, sum(widths), sampler.device)
        class_keys, order_keys, image_keys, *reuse_keys = keys.split(widths, dim=1)

        member = self._members()
        # Members first, whatever their keys; then shuffled: a class's column decides its row of the head.
        classes = (class_keys + member).topk(n_way, dim=1).indices
        classes = classes.gather(1, order_keys.argsort(dim=1))
        rows = sampler._new_rows(classes, image_keys)
        if reused:
            failure_keys, split_keys = reuse_keys
            # [T, n_way, K]: a random failure of each class; classes share the keys, but never a failure.
            own = self._failed == classes[:, :, None]
            failure = failure_keys[:, None, :].where(own, -1.0).argmax(dim=2)
            split = split_keys.unflatten(1, (n_way, n_images)).argsort(dim=2)
            rows = self._rows[failure].gather(2, split).where(member[classes][:, :, None], rows)
        return Episodes.from_rows(classes, rows, sampler.n_shot)

    def state_dict(self) -> dict[str, Tensor]:
        """The pool's content; the generator's state is its owner's to keep."""
        return {"classes": self._failed.clone(), "rows": self._rows.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Goes back to `state`.

        Raises:
            ValueError: `state` does not fit the sampler's store or task shape; nothing is changed then.
        """
        if set(state) != {"classes", "rows"}:
            raise ValueError(
                f"hard-task pool: the state has entries {sorted(state)}, expected classes and rows"
            )
        failed, rows = state["classes"], state["rows"]
        if failed.ndim != 1 or rows.shape != (len(failed), self._n_images):
            shapes = f"classes {list(failed.shape)}, rows {list(rows.shape)}"
            raise ValueError(
                f"hard-task pool: the state has {shapes}, expected [K] and [K, {self._n_images}]"
            )
        for name, tensor, limit in (
            ("classes", failed, self._sampler.n_classes),
            ("rows", rows, self._sampler.store.n_images),
        ):
            if tensor.dtype != torch.int64 or bool(((tensor < 0) | (tensor >= limit)).any()):
                raise ValueError(
                    f"hard-task pool: {name} of the state are not int64 in 0..{limit - 1} of this store"
                )
        self._failed = failed.to(self._sampler.device, copy=True)
        self._rows = rows.to(self._sampler.device, copy=True)


def _keys(generator: torch.Generator, n_tasks: int, n_keys: int, device: torch.device) -> Tensor:
    """float64 [n_tasks, n_keys] in [0, 1): drawn on the CPU, task after task, and moved to `device`."""
    if n_tasks < 0:
        raise ValueError(f"n_tasks is {n_tasks}; it must not be negative")
    return moved(torch.rand(n_tasks, n_keys, generator=generator, dtype=torch.float64), device)


def _check_classes(classes: Tensor, n_way: int, n_classes: int) -> None:
    if classes.ndim != 2 or classes.shape[1] != n_way or classes.dtype != torch.int64:
        raise ValueError(f"classes: expected int64 [T, {n_way}], got {classes.dtype} {list(classes.shape)}")
    if classes.device.type != "cpu":
        return  # nothing is read back
    ordered = classes.sort(dim=1).values
    wrong = ((ordered < 0) | (ordered >= n_classes)).any(dim=1) | (ordered.diff(dim=1) == 0).any(dim=1)
    if bool(wrong.any()):
        task = int(wrong.nonzero()[0, 0])
        raise ValueError(
            f"classes: task {task} has {classes[task].tolist()}; expected distinct ones of 0..{n_classes - 1}"
        )


def _check_enough(store: ClassIndex, n_way: int, n_shot: int, n_query: int) -> None:
    if store.n_classes < n_way:
        raise InputError(
            f"{store.name}: {store.n_classes} classes, fewer than n_way = {n_way}; lower n_way or add classes"
        )
    needed = n_shot + n_query
    short = (store.class_counts < needed).nonzero()[:, 0].tolist()
    if short:
        count = int(store.class_counts[short[0]])
        others = f" (and {len(short) - 1} more classes)" if len(short) > 1 else ""
        raise InputError(
            f"{store.name}: class {store.class_names[short[0]]!r} has {count} images{others}, fewer than "
            f"n_shot + n_query = {n_shot} + {n_query} = {needed}; lower them or add images"
        )
