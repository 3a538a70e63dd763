"""What ranks do in the tests of `engine.ranks`, and one process for comparison: float64, saved to files."""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtl_fast.data.store import ImageStore
from mtl_fast.engine import Engine, Ranks, evaluate, join
from mtl_fast.episodes import EpisodeSampler, HardTaskPool
from mtl_fast.errors import InputError
from mtl_fast.kernels.contracts import ChannelNorm
from mtl_fast.nn.encoder import BatchShare
from mtl_fast.ops import episode_norm
from tests.engine import cases
from tests.training import tiny

CPU = torch.device("cpu")
TIMEOUT = 3.0  # seconds, of the ranks that are to find something out
STEPS = [
    (*case, *n)
    for case in [
        *itertools.product(["head"], cases.NORMS, cases.ORDERS),
        *itertools.product(["all"], cases.NORMS, ["second"]),
    ]
    for n in ((2, None), (5, 31))
]
N_BATCH = 7  # images of a pre-training batch


def store() -> ImageStore:
    return tiny.a_store("ranks", 3, n_classes=6, n_images=9)


def updates(
    ranks: Ranks, adapt: str, norm: str, order: str, n_tasks: int, images_per_chunk: int | None
) -> dict[str, Any]:
    """An update on random tasks, the pool, and one on hard tasks; everything that has to be common afterwards."""
    images = store()
    options: dict[str, Any] = {"norm": norm, "order": order, "images_per_chunk": images_per_chunk}
    engine: Engine
    if adapt == "all":
        engine = cases.whole_engine(images, **options, ranks=ranks)
    else:
        engine = cases.make_engine(images, **options, backend="torch", ranks=ranks)
    engine.encoder.backend = "torch"
    streams = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    sampler = EpisodeSampler(images, 3, 2, 3, streams[0])
    pool = HardTaskPool(sampler, "resample", streams[1])
    optimizer = torch.optim.SGD([p for _, p in cases.parameters(engine)], lr=0.1)
    found: dict[str, Any] = {}
    for name, source in (("random", sampler), ("hard", pool)):
        episodes = source.sample(n_tasks)
        # What was there before is kept: gradients add up, as they do in one process.
        for _, parameter in cases.parameters(engine):
            parameter.grad = torch.ones_like(parameter)
        output = engine.step(episodes)
        found |= {f"{name} rows": episodes.rows(), f"{name} loss": output.loss}
        found[f"{name} class accuracy"] = output.class_accuracy
        found |= {f"{name} gradient of {n}": p.grad.clone() for n, p in cases.parameters(engine)}
        optimizer.step()
        if name == "random":
            pool.add(episodes, output.class_accuracy)
            found |= {f"pool {key}": value for key, value in pool.state_dict().items()}
    found |= {key: value.clone() for key, value in engine.encoder.state_dict().items()}
    return found


def evaluations(ranks: Ranks) -> dict[str, Tensor]:
    """Tests of 8 tasks in chunks and batches that do not divide."""
    images = store()
    found = {}
    for adapt, norm in itertools.product(("head", "all"), cases.NORMS):
        make: Callable[..., Engine] = cases.whole_engine if adapt == "all" else cases.make_engine
        engine = make(images, norm=norm)
        result = evaluate(
            engine.encoder,
            engine.head,
            images,
            cases.tasks(images, 8),
            cases.PREPROCESS,
            inner_lr=0.1,
            inner_steps=4,
            norm=engine.norm,
            adapt="all" if adapt == "all" else "head",
            tasks_per_batch=3,
            images_per_chunk=31,
            ranks=ranks,
        )
        found |= {f"{adapt} {norm} {name}": value for name, value in result._asdict().items()}
    return found


def batch(ranks: Ranks) -> dict[str, Tensor]:
    """A training forward and backward of a batch: its statistics, its dropout, its gradients."""
    found = {}
    x = torch.randn(N_BATCH, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    own = ranks.share(N_BATCH)
    for kind in ("common", "tensorflow", "conv4"):
        encoder = cases.make_encoder(kind, learn="weights").train()
        encoder.requires_grad_(True)
        encoder.backend, encoder.dropout = "torch", 0.3
        encoder.dropout_generator = torch.Generator().manual_seed(1)
        if not ranks.alone:
            encoder.share = BatchShare(own.start, N_BATCH, ranks.gather)
        with ranks.summing(list(encoder.parameters())) as along:
            features = encoder(x[own])
            weight = torch.arange(N_BATCH, dtype=torch.float64)[own, None]
            (features.sin() * weight).sum().backward()
            whole = ranks.spread(features.detach(), N_BATCH)
            along.append(whole)
        found[f"{kind} features"] = whole
        found |= {f"{kind} gradient of {name}": p.grad for name, p in encoder.named_parameters()}
        found |= {f"{kind} {name}": value.clone() for name, value in encoder.named_buffers()}
    return found


def norm_alone(ranks: Ranks) -> dict[str, Tensor]:
    """The operation itself, without γ and β."""
    z = torch.randn(N_BATCH, 4, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 5
    own = ranks.share(N_BATCH)
    mine = z[own].requires_grad_()
    gather = None if ranks.alone else ranks.gather
    out = episode_norm(mine, ChannelNorm(None, None), n_groups=1, gather=gather, backend="torch")
    (out.output * z[own].cos()).sum().backward()
    whole = [ranks.spread(t, N_BATCH) for t in (out.output.detach(), mine.grad)]
    ranks.sum_(whole)
    return {
        "norm output": whole[0],
        "norm gradient": whole[1],
        "norm mean": out.mean,
        "norm var": out.var,
        "norm count": out.n_values,
    }


def everything(ranks: Ranks) -> dict[str, dict[str, Any]]:
    found = {" ".join(map(str, case)): updates(ranks, *case) for case in STEPS}
    return found | {"evaluation": evaluations(ranks), "batch": batch(ranks), "norm": norm_alone(ranks)}


def exchanges(ranks: Ranks) -> dict[str, Any]:
    """Each exchange once, with something else from each rank."""
    mine = torch.tensor([ranks.rank + 1.0], requires_grad=True)
    gathered = ranks.gather(mine)
    (gathered[:, 0] * torch.arange(1.0, ranks.size + 1) * (ranks.rank + 1)).sum().backward()
    mixed = [
        torch.ones(2, 2),
        torch.ones(3, dtype=torch.float64),
        torch.ones((), dtype=torch.int64),
        -torch.ones(2, 2),
    ]
    ranks.sum_(mixed)
    wrong = []
    for guilty in ([], [ranks.size - 1], range(ranks.size)):
        try:
            with ranks.together():
                if ranks.rank in guilty:
                    raise InputError("no such file")
            wrong.append("")
        except InputError as error:
            wrong.append(str(error))
    return {
        "gathered": gathered.detach(),
        "gradient": mine.grad,
        "sums": mixed,
        "any": [ranks.any(ranks.rank == ranks.size - 1), ranks.any(False)],
        "objects": ranks.gather_objects({"rank": ranks.rank}),
        "from first": ranks.from_first(ranks.rank),
        "wrong": wrong,
        "backend": ranks.backend,
    }


def work(folder: Path) -> None:
    """The job of the comparisons: this rank's results go to ``rank<r>.pt``."""
    with join(CPU) as ranks:
        found = everything(ranks) | {"exchanges": exchanges(ranks)}
        torch.save(found, folder / f"rank{ranks.rank}.pt")


def fail(folder: Path, how: str) -> None:
    """One exchange that rank 1 does not come to."""
    with join(CPU, TIMEOUT) as ranks:
        ranks.any(False)
        if ranks.rank == 1:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "stopped":  # alive for the system, connections open: only its beat tells
                os.kill(os.getpid(), signal.SIGSTOP)
            if how == "hanging":
                time.sleep(3600)
            if how == "wrong input":
                raise InputError("this disk is full")
            raise RuntimeError("a fault of the program")
        ranks.any(False)


def missing(folder: Path) -> None:
    """Rank 1 ends before it joins."""
    if int(os.environ["RANK"]) != 1:
        with join(CPU, TIMEOUT):
            pass


def orphaned(folder: Path) -> None:
    """The launcher dies while the ranks are at work."""
    with join(CPU, 60.0) as ranks:
        ranks.any(False)
        if ranks.first:
            os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(60)
