"""What the commands do with many processes: one of them speaks, and all have to agree on what they compute."""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..config import Config
from ..data.store import ImageStore
from ..engine.memory import free_memory
from ..engine.ranks import CommonEnd, Ranks, SharedInputError, join, launched
from ..errors import InputError
from ..files import utf8
from ..nn import Encoder
from ..random_streams import RandomStreams
from .checkpoint import first_difference
from .models import device_of, fingerprint, weights_of
from .run import Interrupted

_SAMPLED = 256  # images of a split that its digest reads


@contextmanager
def command_ranks(device: str, timeout: float) -> Iterator[Ranks]:
    """The processes of one command; what all of them would say, the first says and the others leave silently.

    Args:
        device: as in `Config`.
        timeout: seconds that a rank may keep the others waiting.

    Raises:
        InputError: see `engine.ranks.join`; a timeout that is no time; what the command met.
        SystemExit: on every other rank, with the status that the first one ends with.
    """
    if not 0 < timeout < math.inf:
        raise InputError(f"--rank-timeout is {timeout:g}; it must be positive and finite, in seconds")
    first = True
    try:
        with join(device_of(Config(device=device)), timeout) as ranks:
            first = ranks.first
            yield ranks
    except CommonEnd as end:
        if first:
            raise
        sys.exit(130 if isinstance(end, Interrupted) else 2)


def refuse_ranks(command: str) -> None:
    """Stops a command that is for one process.

    Raises:
        InputError: `torchrun` started it.
        SystemExit: it did, and this is not the first rank, which tells it.
    """
    if launched():
        if os.environ["RANK"] != "0":
            sys.exit(2)
        raise InputError(
            f"mtl-fast {command} runs in one process; start it without torchrun, which is for pretrain, meta-train "
            "and evaluate"
        )


def common_free_memory(ranks: Ranks) -> int | None:
    """Bytes that every rank's GPU has free, so that all keep their images in the same place and draw tasks alike.

    None where there is nothing to agree on: one process, or CPUs.
    """
    if ranks.alone or ranks.device is None or ranks.device.type == "cpu":
        return None
    known = [free for free in ranks.gather_objects(free_memory(ranks.device)) if free is not None]
    return min(known, default=None)


def require_same(ranks: Ranks, what: str, own: Mapping[str, Any]) -> None:
    """Compares plain facts over the ranks.

    Raises:
        SharedInputError: a rank differs from rank 0; it, the first fact that differs and both values are named.
    """
    first, *others = ranks.gather_objects(own)
    for rank, facts in enumerate(others, start=1):
        if difference := first_difference(facts, first):
            raise SharedInputError(f"{what} of rank {rank} (there) and rank 0 (here) differ: {difference}")


def require_same_start(
    ranks: Ranks, config: Config, stores: Mapping[str, ImageStore], inputs: Mapping[str, Any]
) -> None:
    """All ranks have the same settings, data, pre-trained encoder and versions; otherwise they would drift apart.

    Raises:
        SharedInputError: as `require_same`.
    """
    if ranks.alone:
        return
    from mtl_fast import __version__

    facts = {"mtl_fast": __version__, "torch": torch.__version__, "config": json.loads(config.to_json())}
    data = {split: store_digest(store) for split, store in stores.items()}
    require_same(ranks, "the start", facts | {"inputs": dict(inputs), "data": data})


def require_same_state(
    ranks: Ranks, update: int, encoder: Encoder, head: nn.Module, streams: RandomStreams
) -> None:
    """All ranks hold the same bits after the same number of updates: the exchanges have kept them together.

    Raises:
        SharedInputError: as `require_same`.
    """
    if ranks.alone:
        return
    facts = {
        "update": update,
        "streams": fingerprint(streams.state_dict()),
        "weights": fingerprint(weights_of(encoder, head)),
    }
    require_same(ranks, "the state", facts)


def store_digest(store: ImageStore) -> str:
    """SHA-256 of a split's class names, labels and evenly spaced images: cheap, and another order shows."""
    digest = hashlib.sha256(utf8("\0".join(store.class_names)))
    rows = torch.arange(0, store.n_images, -(-store.n_images // _SAMPLED), device=store.images.device)
    for tensor in (store.labels, store.images[rows]):
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
