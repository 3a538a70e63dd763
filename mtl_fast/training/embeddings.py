"""Features of a split in a file: saved once, tested any number of times, without images and without the network.

The file is safetensors. Two tensors are enough, so another library's features can be tested too:

    features   floating [N, D], finite
    labels     integer [N], any numbers; equal ones are one class

All else is optional: `mirrored` [N, D], features of the mirror images, for mirrored support; `head.weight` [C, D] and
`head.bias` [C], the meta-learned start of the heads; and in the header a string `class_names`, a JSON list, the name of
each label 0..C-1. What `mtl-fast embed` writes is a checkpoint: class names, settings, fingerprints of data and model
and the preprocessing are in its header, under a SHA-256 of everything.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from ..config import Config
from ..data.features import FeatureStore
from ..engine.evaluate import embed_rows
from ..errors import InputError
from ..nn import LinearHead
from . import checkpoint as checkpoints
from .models import device_of, fingerprint, load_model, preprocess_of, split_for, weights_of

KIND = "embeddings"


@dataclass(frozen=True)
class Embeddings:
    """What a file of features holds.

    Attributes:
        store: the features.
        head: the start of the heads, or None.
        config: settings of the model that made them; the defaults for features from elsewhere.
        meta: the header of a file that `mtl-fast embed` wrote; else empty.
    """

    store: FeatureStore
    head: LinearHead | None
    config: Config
    meta: dict[str, Any]


def embed_split(
    checkpoint: str | Path,
    output: Path,
    *,
    data: str | None = None,
    split: str = "test",
    mirror: bool = False,
    device: str = "auto",
) -> FeatureStore:
    """Embeds every image of a split once and writes the file.

    Args:
        checkpoint: a model file, or a run's folder.
        output: the file; it must not exist.
        data: another source than the one trained on, read as `evaluate_model` does.
        split: which one.
        mirror: embed the mirror images too.
        device: where to run.

    Raises:
        InputError: no such model or data, a model whose norm needs whole tasks, an output that exists or cannot be
            written.
    """
    if output.exists():
        raise InputError(f"{output}: exists already; remove it or give another --output")
    target = device_of(dataclasses.replace(Config(), device=device))
    model = load_model(checkpoint, device=target)
    if model.norm == "episode":
        raise InputError(
            f"{model.path}: its norm takes the statistics of each task, so an image has no features of its own; "
            "evaluate it with --checkpoint"
        )
    if model.head is not None and model.config.inner.adapt == "all":
        raise InputError(
            f"{model.path}: its inner loop adapts all weights, so an image has other features in each task; evaluate "
            "it with --checkpoint"
        )
    images = split_for(model, data, split).to(target)
    rows, preprocess = torch.arange(images.n_images, device=target), preprocess_of(model.config)
    features = embed_rows(model.encoder, images, rows, preprocess)
    mirrored = None
    if mirror:
        flip = torch.ones_like(rows, dtype=torch.bool)
        mirrored = embed_rows(model.encoder, images, rows, preprocess, mirrored=flip)
    store = FeatureStore(features, images.labels, images.class_names, mirrored, images.name)
    meta = {
        "split": split,
        "data": {
            "name": images.name,
            "fingerprint": fingerprint({"images": images.images, "labels": images.labels}),
        },
        "model": {
            "file": str(checkpoint),
            "fingerprint": fingerprint(weights_of(model.encoder, model.head)),
        },
        "preprocessing": {
            "mean": model.config.data.mean,
            "std": model.config.data.std,
            "image_size": model.image_size,
        },
        "config": dataclasses.asdict(model.config),
    }
    save_embeddings(output, store, model.head, **meta)
    return store


def save_embeddings(path: Path, store: FeatureStore, head: LinearHead | None = None, **facts: Any) -> None:
    """Writes features, labels and, where there are any, mirrored features and head; `facts` go into the header."""
    tensors = {"features": store.features, "labels": store.labels}
    if store.mirrored is not None:
        tensors["mirrored"] = store.mirrored
    if head is not None:
        tensors |= checkpoints.nest("head", head.state_dict())
    meta = {"kind": KIND, "name": store.name, "class_names": store.class_names, **facts}
    checkpoints.save(path, tensors, meta | {"provenance": checkpoints.provenance()})


def load_embeddings(path: str | Path, *, device: torch.device | str = "cpu") -> Embeddings:
    """Reads a file of features, ours or another library's.

    Raises:
        InputError: it is missing, damaged, or does not hold what the head of this module says; one line.
    """
    path = Path(path)
    tensors, meta, ours = _read(path)
    for name in ("features", "labels"):
        if name not in tensors:
            raise InputError(
                f"{path}: holds no tensor {name!r}, only {', '.join(sorted(tensors)) or 'none'}; a file of embeddings "
                "has features [N, D] and labels [N]"
            )
    try:
        return Embeddings(
            _store(path, tensors, meta).to(device),
            _head(tensors),
            Config.from_dict(meta["config"]) if "config" in meta else Config(),
            meta if ours else {},
        )
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: {error}") from error


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any], bool]:
    """Tensors, header, and whether this package wrote them."""
    if not path.is_file():
        raise InputError(f"{path}: no such file of embeddings; `mtl-fast embed` makes one")
    try:
        path.open("rb").close()  # the library calls a file without permission one that does not exist
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        with safetensors.safe_open(path, "pt") as file:
            header = file.metadata() or {}
            if header.get("format") != checkpoints.FORMAT:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    except (safetensors.SafetensorError, OSError, RuntimeError) as error:
        # RuntimeError: torch maps a file that was replaced by a shorter one since its header was read.
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: cannot be read as safetensors ({reason}); make it again") from error
    if header.get("format") == checkpoints.FORMAT:
        tensors, meta = checkpoints.load(path)
        if meta.get("kind") != KIND:
            raise InputError(
                f"{path}: holds no embeddings (kind {meta.get('kind')!r}); `mtl-fast embed` makes them"
            )
        return tensors, meta, True
    try:
        names = json.loads(header.get("class_names", "null"))
    except ValueError:
        names = header["class_names"]
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise InputError(f"{path}: class_names in its header are no JSON list of strings")
    return tensors, {} if names is None else {"class_names": names}, False


def _store(path: Path, tensors: dict[str, Tensor], meta: dict[str, Any]) -> FeatureStore:
    labels = tensors["labels"]
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool or labels.ndim != 1:
        raise ValueError(f"labels: expected integers [N], got {labels.dtype} {list(labels.shape)}")
    values, labels = labels.to(torch.int64).unique(return_inverse=True)
    names = meta.get("class_names", [str(value) for value in values.tolist()])
    if "class_names" in meta:
        if len(values) and not 0 <= int(values[0]) <= int(values[-1]) < len(names):
            raise ValueError(
                f"labels: {int(values[0])}..{int(values[-1])} do not fit 0..{len(names) - 1} of {len(names)} class names"
            )
        names = [names[value] for value in values.tolist()]
    found = {}
    for name in ("features", "mirrored"):
        if name in tensors:
            if not tensors[name].is_floating_point():
                raise TypeError(f"{name}: expected a floating dtype, got {tensors[name].dtype}")
            found[name] = tensors[name].to(torch.float32)
    return FeatureStore(
        found["features"], labels, tuple(names), found.get("mirrored"), meta.get("name", str(path))
    )


def _head(tensors: dict[str, Tensor]) -> LinearHead | None:
    if "head.weight" not in tensors:
        return None
    weight, bias = tensors["head.weight"], tensors.get("head.bias", torch.zeros(0))
    width = tensors["features"].shape[1]
    if weight.ndim != 2 or weight.shape[1] != width or bias.shape != weight.shape[:1]:
        raise ValueError(
            f"head: expected weight [C, {width}] and bias [C], got {list(weight.shape)} and {list(bias.shape)}"
        )
    head = LinearHead(width, len(weight), init="zeros")
    head.load_state_dict({"weight": weight, "bias": bias})
    return head
