"""The ``.pth`` files of MTL's PyTorch code and of LibFewShot."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..config import Config, DataConfig, EncoderConfig, preset
from ..errors import InputError
from .foreign_files import read_pth, state_of
from .ledger import Entry, Imported, Ledger, Source

# How these programs bring images into their networks and fit their heads; the size is that of the network's pooling.
_RECIPES: dict[str, Config] = {
    "pytorch": preset("pytorch"),
    "libfewshot": replace(
        preset("pytorch"),
        data=DataConfig(
            mean=(120.39586422, 115.59361427, 104.54012653), std=(70.68188272, 68.27635443, 72.54505529)
        ),
    ),
}
# The sides of images, and of their central square where that is all that the network sees.
_SIZES = {("pytorch", "resnet25"): (92, 80), ("libfewshot", "resnet25"): (80, None)}
_PRETRAINING = ("pre_fc.", "classifier.")


@dataclass(frozen=True)
class _Layer:
    """Names of one convolution and its norm there, of the convolution here, and its shape."""

    conv: str
    norm: str
    ours: str
    shape: tuple[int, int, int, int]
    has_bias: bool = False


def import_state_dict(paths: Sequence[Path], source: Source | None = None) -> Imported:
    """A ResNet-25 or a ResNet-12 of either program, with scale and shift and head where the file has them.

    Args:
        paths: of one file.
        source: whose it is; None: the authors' has its tensors under ``params``, others are LibFewShot's.

    Raises:
        InputError: as of `import_weights`.
    """
    if len(paths) > 1:
        raise InputError(f"{paths[1]}: is a second file; a .pth is imported alone")
    path = paths[0]
    found, states, beside = _states(path, read_pth(path))
    source = source or found
    ledger = Ledger(str(path), states)
    prefix = next((p for p in ("encoder.", "emb_func.") if any(k.startswith(p) for k in states)), "")
    name, widths, layers = _network(ledger, prefix)
    config = _RECIPES[source]
    has_phi = f"{layers[0].conv}.mtl_weight" in ledger
    side, centre = _SIZES.get((source, name), (84, None))
    config = replace(
        config,
        encoder=EncoderConfig(
            name,
            widths=widths,
            shortcut_scale_shift=has_phi,
            dropout=0.0 if name == "resnet25" else 0.1,
        ),
        data=replace(config.data, image_size=side, centre_crop=centre),
        meta=replace(
            config.meta,
            learn="scale_shift" if has_phi else "head",
            shift="biased" if name == "resnet25" else "every",
        ),
    )
    pretraining = any(key.startswith(_PRETRAINING) for key in states)
    has_head = "base_learner.fc1_w" in ledger and not pretraining
    is_meta = has_head or _moved(states)
    imported = Imported(source, config, entries=beside, is_meta=is_meta)
    for layer in layers:
        _take_layer(ledger, layer, imported.tensors, has_phi=has_phi and is_meta)
    if has_head:
        n_way = ledger.width("base_learner.fc1_b", 0)
        imported.take_head(
            ledger.take("base_learner.fc1_w", "head.weight", (n_way, widths[-1])),
            ledger.take("base_learner.fc1_b", "head.bias", (n_way,)),
        )
        _leave_twins(ledger)
    ledger.leave(
        lambda key: key.endswith("num_batches_tracked"), "running averages here have a fixed momentum"
    )
    ledger.leave(lambda key: key.startswith(_PRETRAINING), "the classifier of pre-training")
    if not is_meta:
        ledger.leave(lambda key: ".mtl_" in key, "the identity: pre-training does not move scale and shift")
    if pretraining:
        ledger.leave(lambda key: key.startswith("base_learner."), "a head that pre-training does not train")
    ledger.close()
    imported.entries = ledger.entries + imported.entries
    return imported


def _states(path: Path, content: Any) -> tuple[Source, dict[str, Tensor], list[Entry]]:
    """Whose file it is, its state_dict, and the account of what lies beside it."""
    if isinstance(content, dict) and content.keys() == {"params"}:
        return "pytorch", state_of(path, content["params"]), []
    beside = []
    if isinstance(content, dict) and "model" in content and not isinstance(content["model"], Tensor):
        beside = [
            Entry(str(key), (), "", "left out: the state of a training run")
            for key in content
            if key != "model"
        ]
        unknown = [e.source for e in beside if e.source not in ("epoch", "optimizer", "lr_scheduler")]
        if unknown:
            raise InputError(f"{path}: {unknown[0]!r} is unknown beside a LibFewShot 'model'")
        content = content["model"]
    return "libfewshot", state_of(path, content), beside


def _network(
    ledger: Ledger, prefix: str
) -> tuple[Literal["resnet12", "resnet25"], tuple[int, ...], list[_Layer]]:
    """Which network it is, its widths, and all of its convolutions.

    Raises:
        InputError: neither of the two.
    """
    if f"{prefix}layer4.0.conv3.weight" in ledger:
        widths = tuple(ledger.width(f"{prefix}layer{i}.0.conv3.weight", 0) for i in range(1, 5))
        return "resnet12", widths, list(_resnet12(prefix, widths))
    if f"{prefix}layer3.3.conv2.weight" in ledger:
        widths = tuple(ledger.width(f"{prefix}layer{i}.0.conv2.weight", 0) for i in range(1, 4))
        return "resnet25", widths, list(_resnet25(prefix, widths))
    raise InputError(
        f"{ledger.name}: holds neither a ResNet-25 (layer3.3.conv2.weight) nor a ResNet-12 (layer4.0.conv3.weight); "
        f"it begins with {next(iter(ledger.tensors))!r}"
    )


def _resnet12(prefix: str, widths: Sequence[int]) -> Iterator[_Layer]:
    n_in = 3
    for i, width in enumerate(widths):
        theirs, ours = f"{prefix}layer{i + 1}.0", f"encoder.layers.{i}"
        yield _Layer(
            f"{theirs}.downsample.0", f"{theirs}.downsample.1", f"{ours}.shortcut", (width, n_in, 1, 1)
        )
        for j in range(3):
            shape = (width, n_in if j == 0 else width, 3, 3)
            yield _Layer(f"{theirs}.conv{j + 1}", f"{theirs}.bn{j + 1}", f"{ours}.convs.{j}", shape)
        n_in = width


def _resnet25(prefix: str, widths: Sequence[int]) -> Iterator[_Layer]:
    n_in = widths[0] // 2
    yield _Layer(f"{prefix}conv1", f"{prefix}bn1", "encoder.stem", (n_in, 3, 3, 3), has_bias=True)
    for i, width in enumerate(widths):
        for b in range(4):
            theirs, ours = f"{prefix}layer{i + 1}.{b}", f"encoder.stages.{i}.{b}"
            if b == 0:
                yield _Layer(
                    f"{theirs}.downsample.0",
                    f"{theirs}.downsample.1",
                    f"{ours}.shortcut",
                    (width, n_in, 1, 1),
                )
            for j in range(2):
                shape = (width, n_in if b == j == 0 else width, 3, 3)
                yield _Layer(f"{theirs}.conv{j + 1}", f"{theirs}.bn{j + 1}", f"{ours}.convs.{j}", shape)
        n_in = width


def _take_layer(ledger: Ledger, layer: _Layer, out: dict[str, Tensor], *, has_phi: bool) -> None:
    vector = layer.shape[:1]
    wanted: list[tuple[str, str, tuple[int, ...]]] = [
        (f"{layer.conv}.weight", f"{layer.ours}.weight", layer.shape)
    ]
    if layer.has_bias:
        wanted.append((f"{layer.conv}.bias", f"{layer.ours}.bias", vector))
    if has_phi:
        wanted.append((f"{layer.conv}.mtl_weight", f"{layer.ours}.scale", (*layer.shape[:2], 1, 1)))
        if layer.has_bias:
            wanted.append((f"{layer.conv}.mtl_bias", f"{layer.ours}.shift", vector))
    for key in ("weight", "bias", "running_mean", "running_var"):
        wanted.append((f"{layer.norm}.{key}", f"{layer.ours}.norm.{key}", vector))
    for key, target, shape in wanted:
        out[target] = ledger.take(key, target, shape)


def _moved(states: dict[str, Tensor]) -> bool:
    """Whether a scale is not 1 or a shift not 0."""
    start = {"mtl_weight": 1.0, "mtl_bias": 0.0}
    return any(bool((t != start[k]).any()) for key, t in states.items() if (k := key.split(".")[-1]) in start)


def _leave_twins(ledger: Ledger) -> None:
    """The head is registered twice there; the second names must hold the same numbers.

    Raises:
        InputError: they do not.
    """
    for name in ("vars", "var"):
        for i, key in enumerate(("base_learner.fc1_w", "base_learner.fc1_b")):
            twin = f"base_learner.{name}.{i}"
            if twin in ledger and not torch.equal(ledger.tensors[twin], ledger.tensors[key]):
                raise InputError(f"{ledger.name}: {twin!r} is another head than {key!r}; which one is meant?")
            ledger.leave(twin.__eq__, f"the same as {key}")
