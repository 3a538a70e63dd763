"""Networks from settings, and model files: what a finished phase leaves for the next one."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import __version__
from ..config import Config, EncoderConfig
from ..data import is_glyphs, load_split
from ..data.store import ImageStore
from ..engine.base import NormMode
from ..engine.inputs import Preprocess
from ..errors import InputError
from ..nn import Conv4, Encoder, LinearHead, ResNet12, ResNet25, ScaleShiftConv2d
from ..random_streams import RandomStreams
from . import checkpoint

SMALLEST_IMAGE = 16  # four poolings leave one pixel
# The small model that the package ships for Glyphs; `make shipped-model` makes it.
SHIPPED = Path(__file__).resolve().parents[1] / "models" / "glyphs.safetensors"


def build_encoder(
    config: EncoderConfig, *, image_size: int, generator: torch.Generator | None = None
) -> Encoder:
    """The encoder of these settings, its convolutions drawn from `generator`.

    Args:
        config: the network.
        image_size: height and width of the images (Conv-4's feature width depends on it).
        generator: random stream of the initial weights.

    Raises:
        InputError: images too small for four halvings of the map.
    """
    # ResNet-25 halves by padded strides, which a single pixel survives.
    if image_size < SMALLEST_IMAGE and config.name != "resnet25":
        raise InputError(
            f"images of {image_size}×{image_size} pixels are too small for {config.name}, which halves its map four "
            f"times; set --data.image-size (of import: --image-size) to at least {SMALLEST_IMAGE}"
        )
    encoder: Encoder
    if config.name == "conv4":
        encoder = Conv4(config.widths[0], image_size=image_size)
    elif config.name == "resnet25":
        encoder = ResNet25(config.widths, dropout=config.dropout)
    elif config.form == "tensorflow":
        encoder = ResNet12.tensorflow(
            config.widths, dropout=config.dropout, shortcut_scale_shift=config.shortcut_scale_shift
        )
    else:
        encoder = ResNet12(
            config.widths, dropout=config.dropout, shortcut_scale_shift=config.shortcut_scale_shift
        )
    for conv in encoder.convs():
        conv.reset_parameters(generator)
    return encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # torch's stub lacks it


def learnable(encoder: Encoder, config: Config) -> list[nn.Parameter]:
    """Freezes the encoder and opens what `config.meta.learn` names; returns those parameters.

    Where the inner loop adapts all weights, all have a start to learn, γ and β of the norms too.
    """
    meta = config.meta
    encoder.eval()
    encoder.freeze()
    if meta.learn == "scale_shift":
        encoder.enable_scale_shift(meta.granularity, last_block_only=meta.last_block_only, shift=meta.shift)
    elif config.inner.adapt == "all":
        encoder.requires_grad_(True)
    for conv in encoder.convs(encoder.blocks()[-1] if meta.last_block_only else None):
        if meta.learn == "weights":
            conv.weight.requires_grad_(True)
            if conv.bias is not None:
                conv.bias.requires_grad_(True)
        if meta.train_affine and conv.norm is not None:
            conv.norm.requires_grad_(True)
    return [p for p in encoder.parameters() if p.requires_grad]


def device_of(config: Config) -> torch.device:
    """The device that `config.device` names; a GPU named by its number becomes the current one.

    Streams, events and captured graphs are made on the current GPU.

    Raises:
        InputError: it is unknown or not here.
    """
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"device {name!r} is unknown; use auto, cpu, cuda or cuda:N") from None
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise InputError(f"device {name!r} is none that this package runs on; use auto, cpu, cuda or cuda:N")
    if not torch.cuda.is_available():
        raise InputError(f"device {name!r}: this PyTorch sees no CUDA device; use --device cpu")
    if (device.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"device {name!r}: this machine has {torch.cuda.device_count()} CUDA devices, numbered from 0"
        )
    if device.index is not None:
        torch.cuda.set_device(device)
    return device


_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def encoder_dtype(config: Config) -> torch.dtype | None:
    """Of images and activations in training; None is the parameters'."""
    return _DTYPES[config.precision]


def square_size(train: ImageStore, val: ImageStore) -> int:
    """Height and width of the images of both splits, in pixels.

    Raises:
        InputError: they are not square, or not alike.
    """
    height, width = train.image_size
    for store in (train, val):
        if store.image_size != (height, height):
            h, w = store.image_size
            other = f", those of {train.name} {width}×{height}" if store is not train else ""
            raise InputError(
                f"{store.name}: images are {w}×{h} pixels{other}; a network takes squares of one size; set "
                f"--data.image-size, such as {min(height, width, h, w)}"
            )
    return height


def network_size(config: Config, image_size: int) -> int:
    """Height and width of what the network takes, of images of `image_size`.

    Raises:
        InputError: the central square is larger than the images.
    """
    size = config.data.centre_crop
    if size is not None and size > image_size:
        raise InputError(
            f"data.centre_crop is {size}, more than the images' {image_size}×{image_size} pixels; lower it, or raise "
            "--data.image-size"
        )
    return size or image_size


def facts_of(store: ImageStore) -> dict[str, Any]:
    """What a resumed run compares: a data set that has grown is another one."""
    return {"classes": store.n_classes, "images": store.n_images, "image_size": list(store.image_size)}


def preprocess_of(config: Config) -> Preprocess:
    """The normalisation of these settings."""
    return Preprocess(config.data.mean, config.data.std, config.data.centre_crop)


@dataclass
class Model:
    """A finished phase: network, head's start (after meta-training) and the settings it was made with.

    `image_size` is that of its data, of which `config.data.centre_crop` may take the centre.
    """

    config: Config
    encoder: Encoder
    head: LinearHead | None
    image_size: int
    meta: dict[str, Any]
    path: Path

    @property
    def network_size(self) -> int:
        """Height and width of what the network takes."""
        return network_size(self.config, self.image_size)

    @property
    def stored_statistics(self) -> bool:
        """Whether its norms have running statistics; weights imported from a program that saves none have not."""
        return bool(self.meta.get("stored_statistics", True))

    @property
    def is_imported(self) -> bool:
        """Whether it is another program's: its settings then name no images of its training."""
        return "imported" in self.meta

    @property
    def norm(self) -> NormMode:
        """Statistics of the norms at test; a pre-trained network has its stored ones, if any."""
        return "frozen" if self.head is None and self.stored_statistics else self.config.meta.norm


def weights_of(encoder: Encoder, head: nn.Module | None = None) -> dict[str, Tensor]:
    """All tensors of a model under `encoder.` and `head.`, detached copies on the CPU."""
    modules: dict[str, nn.Module] = {"encoder": encoder} | ({} if head is None else {"head": head})
    return {
        f"{name}.{key}": value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, module in modules.items()
        for key, value in module.state_dict().items()
    }


def load_weights(tensors: dict[str, Tensor], encoder: Encoder, head: nn.Module | None = None) -> None:
    """The inverse of `weights_of`, for modules of the same architecture.

    Raises:
        InputError: they are of another one; the first tensor that does not fit is named.
    """
    modules: dict[str, nn.Module] = {"encoder": encoder} | ({} if head is None else {"head": head})
    found = {k: list(v.shape) for k, v in tensors.items() if k.partition(".")[0] in modules}
    wanted = {f"{n}.{k}": list(v.shape) for n, m in modules.items() for k, v in m.state_dict().items()}
    difference = checkpoint.first_difference({"weights": found}, {"weights": wanted})
    if difference:
        raise InputError(f"the checkpoint is of another architecture: {difference}; use its settings")
    for name, module in modules.items():
        module.load_state_dict(checkpoint.part(tensors, name))


def fingerprint(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of names and bits, to tell one set of weights from another."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(
            name.encode()
            + tensors[name].detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()


def architecture(config: Config, image_size: int) -> dict[str, Any]:
    """What must be equal for weights to fit."""
    encoder = dataclasses.asdict(config.encoder)
    # These two say how it is trained, not what it is.
    del encoder["dropout"], encoder["shortcut_scale_shift"]
    return {"encoder": encoder, "image_size": image_size}


def save_model(
    path: Path, kind: str, config: Config, tensors: dict[str, Tensor], *, image_size: int, **facts: Any
) -> None:
    """Writes a model file: `tensors` as of `weights_of`, with the settings and `facts` in its header."""
    meta = {
        "kind": kind,
        "architecture": architecture(config, image_size),
        "config": dataclasses.asdict(config),
        "image_size": image_size,
        "provenance": checkpoint.provenance(),
        **facts,
    }
    checkpoint.save(path, tensors, meta)


def load_model(path: str | Path, *, device: torch.device | str = "cpu", kind: str | None = None) -> Model:
    """Reads a model file.

    Args:
        path: the file, or the folder of the run that wrote it.
        device: where to put it.
        kind: ``pretrained`` or ``meta``; None takes either.

    Raises:
        InputError: missing, damaged, of another kind, or with settings that this version does not know.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "model.safetensors"
    tensors, meta = checkpoint.load(path)
    found = meta.get("kind")
    if found not in ("pretrained", "meta"):
        raise InputError(f"{path}: is no model file (kind {found!r}); give a run's model.safetensors")
    if kind is not None and found != kind:
        phase = {"pretrained": "mtl-fast pretrain", "meta": "mtl-fast meta-train"}[kind]
        raise InputError(f"{path}: holds a {found} model where a {kind} one is needed; `{phase}` makes it")
    try:
        config = Config.from_dict(meta["config"])
    except InputError as error:
        made = meta.get("provenance", {}).get("mtl_fast", "unknown")
        raise InputError(
            f"{path}: {error}; mtl_fast {made} wrote it, this is {__version__}; update mtl_fast"
        ) from None
    encoder = build_encoder(config.encoder, image_size=network_size(config, meta["image_size"]))
    head = None
    if found == "meta":
        learnable(encoder, config)
        n_way, feature_dim = tensors["head.weight"].shape
        head = LinearHead(feature_dim, n_way, init="zeros").to(device)
    load_weights(tensors, encoder, head)
    _unpack(tensors, encoder)
    encoder.eval()
    encoder.freeze()
    return Model(config, encoder.to(device), head, meta["image_size"], meta, path)


@torch.no_grad()
def _unpack(tensors: Mapping[str, Tensor], encoder: Encoder) -> None:
    """W ← Q ⊙ Φ_S1 and Φ_S1 ← 1 where a file holds a weight as steps Q in eight bits, as `tools/ship_model.py` writes.

    What was learned is then in the weights, and a Φ that starts anew starts from it.
    """
    for name, module in encoder.named_modules():
        if isinstance(module, ScaleShiftConv2d) and tensors[f"encoder.{name}.weight"].dtype == torch.int8:
            assert module.scale is not None
            module.weight.mul_(module.scale)
            module.scale.fill_(1)


def split_for(model: Model, data: str | None, split: str) -> ImageStore:
    """A split that `model` can be tested on, its images of the size that the model was trained on.

    Args:
        model: the model.
        data: where the images come from, brought to that size and read as those of training, with their crops to boxes
            and channel order, as far as its format knows these (what it does not is said on the error stream); None:
            the data that the model was trained on.
        split: which split.

    Raises:
        InputError: the data are missing or damaged, or those of training have another size now; none are named for
            imported weights, whose file does not know theirs.
    """
    config = model.config.data
    if data is None and model.is_imported:
        raise InputError(f"{model.path}: was imported, and does not know its images; name them with --data")
    size = config.image_size or (None if data is None else model.image_size)
    reading = config.reading if data is None else _known_reading(model, data)
    try:
        store = load_split(data or config.source, split, size, **reading)
    except InputError:
        gone = not is_glyphs(config.source) and not os.path.exists(os.path.expanduser(config.source))
        if data is None and gone:
            raise InputError(
                f"{model.path}: was trained on {config.source}, where nothing is from here; name its images with --data"
            ) from None
        raise
    if store.image_size != (model.image_size, model.image_size):
        height, width = store.image_size
        raise InputError(
            f"{store.name}: images are {width}×{height} pixels, {model.path} was trained on "
            f"{model.image_size}×{model.image_size}; name the data with --data, and they are resized"
        )
    return store


def _known_reading(model: Model, data: str) -> dict[str, Any]:
    """How `model`'s images are read, as far as the format of `data` knows the options; says what becomes of them."""
    asked = dict(model.config.data.reading)
    if not asked:
        return asked
    from ..data.reading import tell
    from ..data.recognise import recognise

    format = None if is_glyphs(data) else recognise(data)
    if "crop_to_box" in asked and (format is None or not format.has_boxes):
        del asked["crop_to_box"]
        tell(f"{data}: has no boxes; {model.path} was trained on crops to boxes, and sees whole images here")
    if order := asked.get("channel_order"):
        if format is not None and format.channel_order is not None:
            tell(f"{data}: is read as {order.upper()}, as {model.path} was trained")
        else:
            del asked["channel_order"]
            tell(f"{data}: tells its channel order; the {order.upper()} of {model.path} is not applied")
    return asked


def new_head(config: Config, encoder: Encoder, streams: RandomStreams) -> LinearHead:
    """The base-learner before meta-training."""
    return LinearHead(
        encoder.feature_dim,
        config.episodes.n_way,
        init=config.meta.head_init,
        generator=streams.stream("initial"),
    )
