"""Checks of formats that hold images as one array: shapes, types, the range of labels, no class missing."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mtl_fast.data.dataset import Content
from mtl_fast.errors import InputError

_WAY_OUT = "get the file again"


def entry(values: Any, key: str, where: Path) -> Any:
    """``values[key]`` of a loaded file.

    Raises:
        InputError: it is no dict, or has no such entry.
    """
    if not isinstance(values, Mapping):
        raise InputError(f"{where}: holds {described(values)}, expected a dict with {key!r}; {_WAY_OUT}")
    if key not in values:
        there = ", ".join(sorted(map(str, values))) or "nothing"
        raise InputError(f"{where}: no entry {key!r}, only {there}; {_WAY_OUT}")
    return values[key]


def load_archive(path: Path, *keys: str) -> list[NDArray[Any]]:
    """The arrays of these names in an ``.npz`` file; none is unpickled.

    Raises:
        InputError: the file cannot be read, is cut short or damaged, or has no such array.
    """
    try:
        with open(path, "rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise InputError(f"{path}: one array, expected an archive with {', '.join(keys)}; {_WAY_OUT}")
            return [entry(archive, key, path) for key in keys]
    except InputError:
        raise
    # numpy evaluates a header with Python's own tokenizer and literals: on damaged bytes it raises whatever they do.
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{path}: cut short or damaged ({reason}); {_WAY_OUT}") from None


def image_array(value: Any, where: str | Path, size: int) -> NDArray[np.uint8]:
    """`value` if it is uint8 [N, size, size, 3].

    Raises:
        InputError: it is anything else.
    """
    fits = isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim == 4 and len(value) > 0
    if not fits or value.shape[1:] != (size, size, 3):
        raise InputError(
            f"{where}: expected images uint8 [N, {size}, {size}, 3], got {described(value)}; {_WAY_OUT}"
        )
    return value


def described(value: Any) -> str:
    """What a value is, for error messages: dtype and shape of an array, the type of anything else."""
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {list(value.shape)}"
    return f"a {type(value).__name__}"


def label_array(value: Any, n_images: int, where: str | Path) -> NDArray[np.int64]:
    """`value`, a list or an array of whole numbers, as int64 [n_images].

    Raises:
        InputError: it is anything else.
    """
    numbers = whole_numbers(value)
    if numbers is not None and len(numbers) == n_images:
        return numbers
    held = str(len(value)) if numbers is not None else f"{described(value)}, not whole numbers"
    raise InputError(
        f"{where}: expected {n_images} whole numbers as labels, one an image, got {held}; {_WAY_OUT}"
    )


def whole_numbers(value: Any) -> NDArray[np.int64] | None:
    """`value`, a list or an array of whole numbers, as int64 [n]; None if it is anything else."""
    if not isinstance(value, (list, tuple, np.ndarray)):
        return None
    try:
        array = np.asarray(value) if len(value) else np.empty(0, np.int64)
    except ValueError:  # rows of several lengths
        return None
    return array.astype(np.int64) if array.dtype.kind in "iu" and array.ndim == 1 else None


def numbered(
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
    names: Mapping[int, str],
    where: str | Path,
    super_classes: Mapping[int, str] | None = None,
) -> Content:
    """The content of a split whose classes bear these numbers on disk.

    Args:
        images: uint8 [N, H, W, 3].
        labels: int64 [N], as on disk.
        names: number on disk → name, of every class of the split.
        where: what error messages call the source.
        super_classes: number on disk → super-class.

    Raises:
        InputError: a label that no class bears, or a class without an image.
    """
    known = np.array(sorted(names), np.int64)
    strangers = labels[~np.isin(labels, known)]
    if len(strangers):
        raise InputError(
            f"{where}: label {strangers[0]} ({len(strangers)} images) is out of range; "
            f"expected {_range(known)}; {_WAY_OUT}"
        )
    check_all_present(labels, names, where)
    return Content(
        images,
        np.searchsorted(known, labels).astype(np.int64),
        tuple(names[i] for i in known.tolist()),
        None if super_classes is None else tuple(super_classes[i] for i in known.tolist()),
    )


def check_all_present(labels: NDArray[np.int64], names: Mapping[int, str], where: str | Path) -> None:
    """Raises InputError when a class has no image."""
    missing = sorted(set(names) - set(np.unique(labels).tolist()))
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(
            f"{where}: class {missing[0]} ({names[missing[0]]}){more} of {len(names)} has no image; {_WAY_OUT}"
        )


def unnamed(split: str, numbers: Collection[int]) -> dict[int, str]:
    """Names for classes of which only a number is known, different ones for each split."""
    return {number: f"{split} {number}" for number in sorted(numbers)}


def _range(numbers: Sequence[int] | NDArray[np.int64]) -> str:
    low, high = int(numbers[0]), int(numbers[-1])
    return f"{low}..{high}" if high - low + 1 == len(numbers) else f"one of {len(numbers)} in {low}..{high}"
