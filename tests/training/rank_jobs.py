"""What ranks do in the tests of training: phases on the tiny splits in float64, and kills at named points."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from mtl_fast import cli
from mtl_fast.data.residency import kept_on_host
from mtl_fast.engine import ALONE, Ranks
from mtl_fast.engine import ranks as ranks_module
from mtl_fast.training import meta_train as meta_train_module
from mtl_fast.training import phase as phase_module
from mtl_fast.training import pretrain as pretrain_module
from mtl_fast.training.ranks import command_ranks
from tests.training import tiny
from tests.training.forks import die, die_at

TIMEOUT = 60.0  # seconds; a rank that a busy machine keeps waiting is none that is gone
SHORT = 3.0  # the same where one is
CONFIG = tiny.with_meta(n_tasks=30, validate_every=16)  # a checkpoint each 8 updates of 3-update rounds


@contextmanager
def in_float64() -> Iterator[None]:
    """Networks, heads and images of training in float64: equality to rounding is claimed there."""
    doubled: list[tuple[Any, str]] = [
        (meta_train_module, "new_head"),
        (meta_train_module, "build_encoder"),
        (pretrain_module, "LinearHead"),
        (pretrain_module, "build_encoder"),
        (pretrain_module, "augmented"),
    ]
    originals = [getattr(module, name) for module, name in doubled]

    def double(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *given, **named: function(*given, **named).double()

    for (module, name), original in zip(doubled, originals, strict=True):
        setattr(module, name, double(original))
    try:
        yield
    finally:
        for (module, name), original in zip(doubled, originals, strict=True):
            setattr(module, name, original)


def phase(
    name: str, folder: Path, pretrained: str, resume: bool, ranks: Ranks, precision: str = "fp32"
) -> Any:
    """A phase on the tiny splits."""
    if name == "pretrain":
        config = replace(tiny.CONFIG, precision=precision)
        return pretrain_module.Pretraining(config, folder, resume=resume, ranks=ranks, **tiny.splits())
    if name == "maml":
        return meta_train_module.MetaTraining(
            tiny.MAML, None, folder, resume=resume, ranks=ranks, **tiny.splits()
        )
    model = tiny.load_model(Path(pretrained))
    model.encoder.double()
    config = replace(CONFIG, precision=precision)
    return meta_train_module.MetaTraining(config, model, folder, resume=resume, ranks=ranks, **tiny.splits())


def one_process(name: str, folder: Path, pretrained: str = "", resume: bool = False) -> None:
    """A phase without ranks."""
    with in_float64():
        phase(name, folder, pretrained, resume, ALONE).run()


def train(
    folder: Path,
    name: str,
    output: str,
    pretrained: str = "",
    resume: bool = False,
    point: str = "",
    guilty: int = 1,
    precision: str = "fp32",
    on_host: bool = False,
) -> int:
    """A phase; the rank `guilty` comes to its point. Images may be kept in host memory, as if they did not fit."""
    if on_host:
        torch.Tensor.pin_memory = torch.Tensor.clone
        phase_module.placed = lambda store, device, free: kept_on_host(store, torch.device("cpu"))
    rank = int(os.environ["RANK"])

    def run() -> None:
        with in_float64(), command_ranks("cpu", SHORT if point else TIMEOUT) as ranks:
            made = phase(name, Path(output), pretrained, resume, ranks, precision)
            if point and rank == guilty:
                arrange(point, made)
            made.run()

    cli.parse = lambda _: SimpleNamespace(run=run)
    return cli.main([])


def arrange(point: str, made: Any) -> None:
    """Points of `forks.die_at`, and at update N: ``exchange N``, a kill in its exchange; ``interrupt N``, Ctrl-C; ``nan N``
    and ``drift N``, a weight that goes wrong. ``full N``: no memory for more than N images. ``validation``: a kill in the
    first one."""
    where, _, count = point.partition(" ")
    if where == "exchange":
        tiny.at_update(made, int(count), _die_in_the_next_exchange)
    elif where == "validation":
        meta_train_module.evaluate = lambda *_, **__: die()
    elif where == "interrupt":
        tiny.at_update(made, int(count), tiny.ctrl_c)
    elif where == "nan":
        tiny.at_update(made, int(count), lambda: made.head.bias.data.fill_(torch.nan))
    elif where == "full":
        _fill_memory(made, int(count))
    elif where == "drift":
        tiny.at_update(made, int(count), lambda: made.head.bias.data.add_(1e-12))
    else:
        die_at(point)


def _fill_memory(made: Any, limit: int) -> None:
    embed = made.encoder.embed

    def full(images: torch.Tensor, **options: Any) -> Any:
        if len(images) > limit and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return embed(images, **options)

    made.encoder.embed = full


def _die_in_the_next_exchange() -> None:
    """The others are in it or come to it; this rank's part of the sum never does."""
    ranks_module.Ranks.sum_ = die  # type: ignore[method-assign,assignment]


def command(folder: Path, arguments: list[str]) -> int:
    """The `mtl-fast` command."""
    return cli.main(arguments)


def main() -> int:
    """Under torchrun: the `mtl-fast` command, where rank 1 comes to the point that the environment names."""
    point = os.environ.get("TEST_POINT", "")
    if point and os.environ["RANK"] == "1":
        die_at(point)
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
