"""Weights of MTL's authors (TensorFlow and PyTorch) and of LibFewShot → a model file of this package."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from ..errors import InputError
from .foreign_files import is_npy
from .import_state_dict import import_state_dict
from .import_tensorflow import import_tensorflow
from .ledger import Entry, Imported
from .models import build_encoder, learnable, network_size, save_model


def import_weights(
    files: Sequence[str | Path],
    output: str | Path,
    *,
    format: Literal["auto", "tensorflow", "pytorch", "libfewshot"] = "auto",
    image_size: int | None = None,
) -> Imported:
    """Writes a model file made of foreign weights; returns the account of it.

    Args:
        files: one ``.pth``, or the ``.npy`` dictionaries of TensorFlow in any order: the weights and, of a
            meta-trained model, its scale and shift and its head.
        output: the model file to write.
        format: whose it is; ``auto`` looks inside.
        image_size: of the images the model is for; None: what its program uses.

    Raises:
        InputError: a file is damaged or asks for code to run; a tensor is unknown, missing or of another shape; the
            output exists.
    """
    output, paths = Path(output), [Path(file) for file in files]
    if output.exists():
        raise InputError(f"{output}: exists already; give another --output")
    if not paths:
        raise InputError("no file to import; give a .pth, or TensorFlow's .npy files")
    if format == "auto":
        imported = import_tensorflow(paths) if is_npy(paths[0]) else import_state_dict(paths)
    elif format == "tensorflow":
        imported = import_tensorflow(paths)
    else:
        imported = import_state_dict(paths, format)
    config = imported.config
    if image_size is not None:
        config = replace(config, data=replace(config.data, image_size=image_size, centre_crop=None))
    size = config.data.image_size
    assert size is not None
    _complete(imported, network_size(config, size))
    save_model(
        output,
        "meta" if imported.is_meta else "pretrained",
        config,
        imported.tensors,
        image_size=size,
        stored_statistics=imported.stored_statistics,
        imported={"format": imported.source, "files": [path.name for path in paths]},
    )
    return imported


def _complete(imported: Imported, image_size: int) -> None:
    """Adds what the source does not have at its initial value; every tensor then fits the network."""
    config = imported.config
    encoder = build_encoder(config.encoder, image_size=image_size)
    if imported.is_meta:
        learnable(encoder, config)
    whys = {
        "running_mean": "0: the source has no running statistics",
        "running_var": "1: the source has no running statistics",
        "shift": "0: the source has none",
        "bias": "0: the source has none",
    }
    for key, value in encoder.state_dict().items():
        name = f"encoder.{key}"
        if name not in imported.tensors:
            imported.tensors[name] = value.detach().contiguous()
            imported.entries.append(Entry("", tuple(value.shape), name, whys[key.rpartition(".")[2]]))
    if imported.is_meta and "head.weight" not in imported.tensors:
        for name, shape in (
            ("weight", (config.episodes.n_way, encoder.feature_dim)),
            ("bias", (config.episodes.n_way,)),
        ):
            imported.tensors[f"head.{name}"] = torch.zeros(shape)
            imported.entries.append(Entry("", shape, f"head.{name}", "0: the source has no head"))
