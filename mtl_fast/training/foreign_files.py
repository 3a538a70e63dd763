"""Weight files of other programs, read without running what may be inside them."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from ..data.pickles import load_pickle
from ..errors import InputError

_NPY_MAGIC = b"\x93NUMPY"
_NO_FILE_OF_TORCH = (RuntimeError, EOFError, ValueError, LookupError, AttributeError, TypeError)


def is_npy(path: Path) -> bool:
    """Whether a file begins as those of `numpy.save` do.

    Raises:
        InputError: it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return file.read(len(_NPY_MAGIC)) == _NPY_MAGIC
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def read_npy(path: Path) -> dict[str, Tensor]:
    """A dictionary of arrays, saved by `numpy.save`: float32 tensors by name.

    Raises:
        InputError: damaged, no such dictionary, or one that asks for code to run.
    """
    try:
        with open(path, "rb") as file:
            shape, dtype = _npy_header(path, file)
            if dtype.kind != "O" or shape != ():
                raise InputError(f"{path}: holds an array {list(shape)} of {dtype}, not a dictionary of them")
            content = load_pickle(path, file)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    # numpy saves a dictionary as an array that holds it.
    return _tensors(
        path, content.item() if isinstance(content, np.ndarray) and content.shape == () else content
    )


def _npy_header(path: Path, file: BinaryIO) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype of what follows; numpy reads this part without running anything."""
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        shape, _, dtype = readers[np.lib.format.read_magic(file)](file)
    except (KeyError, ValueError):
        raise InputError(f"{path}: has no header of a .npy file; get it again") from None
    return shape, dtype


def read_pth(path: Path) -> Any:
    """What `torch.save` wrote: tensors and plain containers only.

    Raises:
        InputError: damaged, or it holds more than tensors, numbers, text and containers of them.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except (pickle.UnpicklingError, *_NO_FILE_OF_TORCH) as error:
        # PyTorch's own message goes on with how to run what is inside.
        asked = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if asked:
            raise InputError(
                f"{path}: refused: it asks for {asked[1]}, which weights do not need; do not trust its source"
            ) from None
        size = f"{path.stat().st_size:,} bytes"
        raise InputError(f"{path} ({size}): is no file of torch.save, or cut short; get it again") from None


def state_of(path: Path, content: Any) -> dict[str, Tensor]:
    """A state_dict as float32 tensors (counters as they are) by name, DataParallel's ``module`` taken out of names.

    Raises:
        InputError: it is none.
    """
    if isinstance(content, dict) and content and all(isinstance(key, str) for key in content):
        renamed = {".".join(p for p in key.split(".") if p != "module"): v for key, v in content.items()}
        if len(renamed) < len(content):
            raise InputError(f"{path}: has names with and without 'module' for the same tensor")
        content = renamed
    return _tensors(path, content)


def _tensors(path: Path, content: Any) -> dict[str, Tensor]:
    if not isinstance(content, dict) or not content:
        raise InputError(f"{path}: holds {type(content).__name__}, not a dictionary of weights")
    tensors = {}
    for key, value in content.items():
        name = key.decode("latin1") if isinstance(key, bytes) else str(key)
        if isinstance(value, np.ndarray):
            if value.dtype.kind not in "biuf":
                raise InputError(f"{path}: {name!r} is an array of {value.dtype}, not of numbers")
            # Native byte order and memory of its own.
            value = torch.from_numpy(value.astype(value.dtype.newbyteorder("=")))
        if not isinstance(value, Tensor):
            raise InputError(f"{path}: {name!r} is {type(value).__name__}, not a tensor")
        if value.is_floating_point():
            value = value.detach().to(torch.float32)
            if not bool(value.isfinite().all()):
                raise InputError(f"{path}: {name!r} holds numbers that are not finite")
        tensors[name] = value
    return tensors
