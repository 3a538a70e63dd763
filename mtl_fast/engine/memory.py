"""How many images a step may have in flight: what an image needs, and what is free."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..nn.encoder import Encoder

# Of the free memory: the rest is for other programs, for what allocators lose, and for evaluation.
SHARE = 0.5
# Of the largest tensor of a layer, beside what backward keeps: a layer's input, output and both gradients.
N_TRANSIENTS = 4


def free_memory(device: torch.device, root: Path = Path("/")) -> int | None:
    """Bytes that a step could take now; None where the system does not tell.

    Args:
        device: on a GPU, what the driver says is free and what PyTorch holds unused; on a CPU, what Linux says is
            available, within the limit of the process's control group.
        root: of the file system, for tests.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    lines = _read(root / "proc/meminfo").splitlines()
    available = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    group = root / "sys/fs/cgroup"
    limit, used = (_read(group / name).strip() for name in ("memory.max", "memory.current"))
    if limit.isdecimal() and used.isdecimal():
        available.append(max(0, int(limit) - int(used)))
    return min(available, default=None)


def _read(path: Path) -> str:
    try:
        return path.read_text("ascii")
    except OSError:
        return ""


class _LargestMaps(TorchDispatchMode):
    """Notes the bytes of the largest maps [n_images, C, H, W] that an operator returns."""

    def __init__(self, n_images: int) -> None:
        super().__init__()
        self.n_images, self.n_bytes = n_images, 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor) and tensor.ndim == 4 and len(tensor) == self.n_images:
                self.n_bytes = max(self.n_bytes, tensor.nbytes)
        return out


def bytes_per_image(encoder: Encoder, image_size: int, dtype: torch.dtype, *, n_groups: int = 0) -> int:
    """Memory that one more image takes in a step of `encoder`, measured on two small batches.

    What backward keeps is counted tensor by tensor; what comes and goes as a multiple of the largest tensor.

    Args:
        encoder: in evaluation mode; only what requires a gradient makes backward keep anything.
        image_size: height and width.
        dtype: of the images.
        n_groups: as in `Encoder.embed`; 1 is batch statistics.
    """
    device = next(encoder.parameters()).device

    def needed(n_images: int) -> int:
        kept: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        largest = _LargestMaps(n_images)
        x = torch.zeros(n_images, 3, image_size, image_size, dtype=dtype, device=device)
        x = x.contiguous(memory_format=torch.channels_last)
        with largest, torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            features = encoder.embed(x, n_groups=n_groups).features
        # The graph lives until here: no address was given out twice.
        del features
        return sum(kept.values()) + N_TRANSIENTS * largest.n_bytes

    few, many = 2, 6
    return max(1, -(-(needed(many) - needed(few)) // (many - few)))


def images_in_flight(n_images: int, smallest: int, per_image: int, free: int | None) -> int:
    """The default of `images_per_chunk`: all images of an update where they fit, else a power of two.

    Coarse on purpose: the little that free memory moves from day to day must not move the rounding.

    Args:
        n_images: of an update.
        smallest: images that cannot be taken apart.
        per_image: bytes, from `bytes_per_image`.
        free: bytes, from `free_memory`; None takes all images together.
    """
    fitting = n_images if free is None else int(SHARE * free) // per_image
    if fitting >= n_images:
        return n_images
    return max(smallest, 1 << max(0, fitting.bit_length() - 1))


def in_words(n_bytes: float) -> str:
    """``850 MiB`` or ``5.2 GiB``."""
    mebibytes = n_bytes / 2**20
    return f"{mebibytes:.3g} MiB" if mebibytes < 1000 else f"{mebibytes / 1024:.3g} GiB"
