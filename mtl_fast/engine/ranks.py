"""Many processes, one result: each rank takes its share of tasks or images, and sums make the rest common.

Every rank draws the same tasks and holds the same weights. An update is one exchange, the sum over ranks of the
gradients and of what the ranks found out (losses, accuracies, statistics), each rank's at its own place among
zeros: adding zeros changes no bit, so this sum gathers them, in the order of the tasks.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import InputError
from .watch import Watch

_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_GRACE = 60.0  # seconds by which the backend's own time limit, which names nobody, comes after the watch's

T = TypeVar("T")


class CommonEnd(Exception):
    """An end that all ranks come to together, so that one of them may tell it and none misses another."""


class SharedInputError(InputError, CommonEnd):
    """A wrong input that all ranks know of."""


@dataclass(frozen=True, eq=False)
class Ranks:
    """This process among `size` equal ones; the default is a process on its own, whose every exchange is a no-op.

    Attributes:
        rank: 0 is the one that writes files and tells.
        size: number of processes.
        device: where this process computes; None on its own: the caller decides.
        backend: ``none``, ``gloo`` or ``nccl``, what carries tensors of `device`.
        watch: tells which rank is gone; None on its own.
    """

    rank: int = 0
    size: int = 1
    device: torch.device | None = None
    backend: str = "none"
    watch: Watch | None = None

    @property
    def alone(self) -> bool:
        """Whether nobody else was started with this process."""
        return self.watch is None

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes."""
        return self.rank == 0

    def say(self, text: str) -> None:
        """Prints a result: the first rank does."""
        if self.first:
            print(text, flush=True)

    def share(self, n: int, by: int = 1) -> slice:
        """This rank's part of n things, perhaps empty: neighbours, in the order of the ranks.

        Args:
            n: number of things.
            by: size of the groups that stay together; ranks get equally many groups to within one.
        """
        n_groups = -(-n // by)
        each, longer = divmod(n_groups, self.size)
        start = self.rank * each + min(self.rank, longer)
        stop = start + each + (self.rank < longer)
        return slice(min(start * by, n), min(stop * by, n))

    def spread(self, own: Tensor, n: int, by: int = 1) -> Tensor:
        """This rank's rows [k, …] of `share(n, by)` at their place in zeros [n, …], for `sum_`."""
        if self.alone:
            return own
        whole = own.new_zeros(n, *own.shape[1:])
        whole[self.share(n, by)] = own
        return whole

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replaces each tensor by its sum over the ranks; one exchange a dtype, in that dtype.

        Args:
            tensors: alike in number, shapes and dtypes on every rank, on one device.
        """
        if self.alone:
            return
        import torch.distributed as dist

        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            by_dtype.setdefault(tensor.dtype, []).append(tensor)
        with torch.no_grad():
            for bucket in by_dtype.values():
                flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
                with self._exchange():
                    dist.all_reduce(flat)
                for tensor, part in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
                    tensor.copy_(part.view(tensor.shape))

    @contextmanager
    def summing(self, parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        """What is added to the parameters' `.grad` inside is the sum over ranks afterwards.

        Gives a list: tensors put there are summed in the same exchange. A parameter that a rank's share did not
        reach counts with a gradient of zeros.
        """
        along: list[Tensor] = []
        if self.alone:
            yield along
            return
        earlier = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        yield along
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        self.sum_([*gradients, *along])
        for parameter, gradient, before in zip(parameters, gradients, earlier, strict=True):
            parameter.grad = gradient if before is None else before.add_(gradient)

    def gather(self, own: Tensor) -> Tensor:
        """[…] → [size, …], the ranks' tensors in order; the gradient of each goes back to its rank."""
        gathered: Tensor = _Gather.apply(own, self)
        return gathered

    def any(self, flag: bool) -> bool:
        """Whether any rank says so."""
        if self.alone:
            return flag
        flags = torch.tensor(int(flag))
        self.sum_([flags])
        return bool(flags)

    def gather_objects(self, own: T) -> list[T]:
        """What each rank gives, in order; anything that pickles."""
        if self.alone:
            return [own]
        import torch.distributed as dist

        every: list[Any] = [None] * self.size
        with self._exchange():
            dist.all_gather_object(every, own)
        return every

    def from_first(self, own: T) -> T:
        """What rank 0 gives; the others' is dropped."""
        if self.alone:
            return own
        import torch.distributed as dist

        given: list[Any] = [own]
        with self._exchange():
            dist.broadcast_object_list(given, src=0)
        value: T = given[0]
        return value

    @contextmanager
    def together(self) -> Iterator[None]:
        """A wrong input that any rank meets inside is raised on all of them. No exchange goes inside.

        Raises:
            SharedInputError: some rank met one; its number stands before it unless all met the same.
        """
        if self.alone:
            yield
            return
        met: str | None = None
        try:
            yield
        except InputError as error:
            met = str(error)
        every = self.gather_objects(met)
        rank, message = next(((r, m) for r, m in enumerate(every) if m is not None), (0, None))
        if message is not None:
            alike = all(m == message for m in every)
            raise SharedInputError(message if alike else f"rank {rank}: {message}")

    @contextmanager
    def _exchange(self) -> Iterator[None]:
        assert self.watch is not None
        self.watch.entered += 1
        try:
            yield
        except RuntimeError as error:  # what all backends raise when a connection breaks or time runs out
            self.watch.find_out(error)


#: One process by itself.
ALONE = Ranks()


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        whole = ranks.spread(own[None], ranks.size).clone()
        ranks.sum_([whole])
        return whole

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        # Every rank's loss depends on every row.
        summed = gradient.clone()
        ctx.ranks.sum_([summed])
        return summed[ctx.ranks.rank], None


def launched() -> bool:
    """Whether this process was started as one of several, by `torchrun`."""
    return all(os.environ.get(name) for name in _VARIABLES)


@contextmanager
def join(device: torch.device, timeout: float = 600.0) -> Iterator[Ranks]:
    """Joins the processes that `torchrun` started, or goes alone where it did not.

    Tensors on the CPU go through gloo, those on a GPU through NCCL; the first exchange of each makes its
    connections.

    Args:
        device: ``cpu``, or ``cuda`` without an index: then each process takes the GPU of its LOCAL_RANK.
        timeout: seconds after which a rank that does not come to an exchange ends the run.

    Raises:
        InputError: more processes on a machine than it has GPUs; a GPU named for several ranks.
    """
    if not launched():
        yield ALONE
        return
    import torch.distributed as dist

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = own_device(device, rank, size)
    limit = timedelta(seconds=timeout + _GRACE)
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=limit))
    except dist.DistError as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise InputError(f"rank {rank} cannot reach the launcher at {where}: {error}") from error
    watch = Watch(dist.PrefixStore("watch", store.clone()), rank, size, timeout)
    watch.start()
    gpus = "nccl" if dist.is_nccl_available() else "gloo"
    ranks = Ranks(rank, size, device, gpus if device.type == "cuda" else "gloo", watch)
    backends = f"cpu:gloo,cuda:{gpus}" if device.type == "cuda" else "gloo"
    group = dist.PrefixStore("group", store)
    end: CommonEnd | None = None
    try:
        with ranks._exchange():
            dist.init_process_group(backends, store=group, rank=rank, world_size=size, timeout=limit)
        try:
            yield ranks
        except CommonEnd as common:
            end = common
        ranks.any(False)  # nobody leaves before all have arrived: rank 0 may hold the store
    except InputError as error:
        watch.fail()
        raise InputError(f"rank {rank}: {error}") from error
    except BaseException:
        watch.fail()
        print(f"mtl-fast: error: rank {rank} of {size} failed", file=sys.stderr, flush=True)
        raise
    watch.stop()
    dist.destroy_process_group()
    if end is not None:
        raise end


def own_device(device: torch.device, rank: int, size: int) -> torch.device:
    """The GPU of this process's LOCAL_RANK, made current, where `device` is any GPU; else `device`.

    Raises:
        InputError: as `join`.
    """
    if device.type != "cuda":
        return device
    if str(device) != "cuda":  # with an index
        if size == 1:
            return device
        raise InputError(
            f"device {str(device)!r} is one GPU for {size} ranks; give --device auto or cuda, and each takes one"
        )
    local, n_devices = int(os.environ.get("LOCAL_RANK", rank)), torch.cuda.device_count()
    if local >= n_devices:
        raise InputError(
            f"rank {rank} is process {local + 1} of its machine, which has {n_devices} GPUs; start torchrun with "
            f"--nproc-per-node {n_devices}, or give --device cpu"
        )
    own = torch.device("cuda", local)
    torch.cuda.set_device(own)
    return own
