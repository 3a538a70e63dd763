"""A model of this package → files that other programs read: a state_dict, an ordinary torch network, ONNX."""

from __future__ import annotations

import importlib.util
import io
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..nn.folded import Standardise, folded
from .models import Model, load_model, weights_of
from .run import make_folder, write_bytes

Format = Literal["state-dict", "torch", "onnx"]
Run = Callable[[Tensor], Tensor]


def export_weights(checkpoint: str | Path, output: str | Path, *, format: Format) -> str:
    """Writes a model for use without this package; returns in words what was written.

    - ``state-dict``: every tensor under its name, for `torch.load(output, weights_only=True)`: ``encoder.…`` with
      weight, bias, scale (Φ_S1), shift (Φ_S2) and norm of each convolution, and ``head.…`` after meta-training.
    - ``torch``: `torch.export.load(output).module()` maps images [N, 3, H, W], float32 of 0…255 in RGB, N ≥ 1 of the
      model's size, to features [N, D]. Mean and standard deviation, scale, shift and stored norms are inside.
    - ``onnx``: the same with input ``images`` and output ``features``; compared with ours where onnxruntime is.

    Args:
        checkpoint: model file or run folder.
        output: the file to write.
        format: one of these.

    Raises:
        InputError: no such model; the output exists or cannot be written; norms of each task's own statistics, which
            do not fold; packages that ONNX needs are missing.
    """
    output = Path(output)
    if output.exists():
        raise InputError(f"{output}: exists already; give another --output")
    if format == "onnx":
        _require_onnx()
    model = load_model(checkpoint)
    payload, said = _state_dict(model) if format == "state-dict" else _network(model, format)
    make_folder(output.parent)
    write_bytes(output, payload)
    return f"{output} ({len(payload):,} bytes): {said}"


def _state_dict(model: Model) -> tuple[bytes, str]:
    tensors, buffer = weights_of(model.encoder, model.head), io.BytesIO()
    torch.save(tensors, buffer)
    return buffer.getvalue(), f"{len(tensors)} tensors"


def _network(model: Model, format: Literal["torch", "onnx"]) -> tuple[bytes, str]:
    if model.norm == "episode":
        raise InputError(
            f"{model.path}: its norms use each task's own statistics (norm 'episode'), which do not fold into "
            "convolutions; give --format state-dict"
        )
    data, size = model.config.data, model.network_size
    network = folded(model.encoder, data.mean, data.std)
    payload, run = (_torch_program if format == "torch" else _onnx_program)(network, size)
    compared = (
        "not compared with ours: onnxruntime is not installed" if run is None else _difference(model, run)
    )
    return payload, f"images [N, 3, {size}, {size}] → features [N, {model.encoder.feature_dim}], {compared}"


def _difference(model: Model, run: Run) -> str:
    """How far the exported network is from ours, on two images of noise."""
    size = model.network_size
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (2, 3, size, size), generator=generator).to(torch.float32)
    data = model.config.data
    with torch.no_grad():
        ours = model.encoder(Standardise(data.mean, data.std)(images))
        error = (run(images) - ours).abs().max() / ours.abs().max()
    return f"{float(error):.1e} from ours relative to the largest feature"


def _exported(network: nn.Module, image_size: int) -> torch.export.ExportedProgram:
    images = torch.zeros(2, 3, image_size, image_size)
    return torch.export.export(network, (images,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))


def _torch_program(network: nn.Module, image_size: int) -> tuple[bytes, Run]:
    buffer = io.BytesIO()
    torch.export.save(_exported(network, image_size), buffer)
    buffer.seek(0)
    # What is compared is what was written.
    return buffer.getvalue(), torch.export.load(buffer).module()


def _require_onnx() -> None:
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"--format onnx needs {' and '.join(missing)}, not installed here; pip install 'mtl-fast[onnx]', or "
            "pip install onnx onnxscript onnxruntime"
        )


def _onnx_program(network: nn.Module, image_size: int) -> tuple[bytes, Run | None]:
    # The exporter speaks of packages that it does not need and of what it uses itself.
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                _exported(network, image_size),
                input_names=["images"],
                output_names=["features"],
                dynamo=True,
                verbose=False,
            )
    finally:
        log.setLevel(level)
    assert program is not None
    payload = program.model_proto.SerializeToString()
    if importlib.util.find_spec("onnxruntime") is None:
        return payload, None
    import onnxruntime

    session = onnxruntime.InferenceSession(payload, providers=["CPUExecutionProvider"])
    return payload, lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
