"""Pickle files of strangers: an unpickler that makes what data need by itself, and refuses the rest by name.

A pickle is a program that may call whatever it can name. Here a name leads to one of the functions below or to an
error. Not even numpy's own functions are admitted: with a forged dtype they read any bytes as object pointers.
Arrays are rebuilt by hand instead, from bytes, a shape and a plain dtype.
"""

from __future__ import annotations

import contextlib
import math
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mtl_fast.errors import InputError

_KINDS = "biufSU"  # plain numbers and text
# What unpickling a damaged file raises, beside `pickle.UnpicklingError`.
_DAMAGE = (
    pickle.UnpicklingError,
    EOFError,
    AttributeError,
    TypeError,
    ValueError,
    LookupError,
    MemoryError,
    OverflowError,
    RecursionError,
)


class _Refused(Exception):
    """The pickle names something that is not admitted."""


def load_pickle(path: Path, file: BinaryIO | None = None) -> Any:
    """Containers, numbers, text and plain numpy arrays from a pickle of any protocol, Python 2's included.

    Args:
        path: the file.
        file: the same, open where the pickle begins; None opens it.

    Returns:
        dicts, lists, tuples, sets, numbers, text, bytes and numpy arrays. Keys of dicts are text, whether they were
        stored as bytes or as text; text in values stays what it was stored as (`as_text` helps).

    Raises:
        InputError: the file cannot be read, is cut short or damaged, or names anything else, which is named.
    """
    try:
        with contextlib.nullcontext(file) if file is not None else open(path, "rb") as opened:
            return _plain(_Unpickler(opened, encoding="bytes").load(), 0, {})
    except _Refused as error:
        raise InputError(
            f"{path}: refused: this pickle asks for {error}, which data do not need; do not trust its source"
        ) from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except _DAMAGE as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        size = f"{path.stat().st_size:,} bytes"
        raise InputError(f"{path} ({size}): cut short or damaged ({reason}); get it again") from None


def as_text(value: Any) -> str:
    """Text of what Python 2 or 3 stored as text, bytes or a number."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


class _Array:
    """Takes the state of a pickled array and becomes one, if it is plain."""

    def __init__(self) -> None:
        self.array: np.ndarray | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        shape, dtype, fortran, data = state[-4:]  # a version may stand before them
        if isinstance(data, list):
            _check(isinstance(dtype, _Dtype) and dtype.is_object, "a list as an array's data")
            self.array = _object_array(data, shape)
            return
        self.array = _from_bytes(data, dtype, shape, "F" if fortran else "C")


class _Dtype:
    """Takes the state of a pickled dtype and keeps its byte order; fields, subtypes and flags are refused."""

    def __init__(self, name: str | bytes, align: object = False, copy: object = False) -> None:
        name = as_text(name)
        self.is_object = name in ("O", "O8", "O4", "object")
        self.dtype = np.dtype(name)
        _check(self.is_object or self.dtype.kind in _KINDS, f"the dtype {name!r}")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        order, subtype, names, fields = state[1:5]
        _check(subtype is None and names is None and fields is None, "a dtype with fields")
        if not self.is_object:
            if self.dtype.kind in "SU" and isinstance(state[5], int) and state[5] > 0:
                characters = state[5] // (4 if self.dtype.kind == "U" else 1)
                self.dtype = np.dtype(f"{self.dtype.kind}{characters}")
            order = as_text(order)
            _check(order in ("<", ">", "=", "|"), f"the byte order {order!r}")
            self.dtype = np.dtype(order + self.dtype.str[1:])


def _check(holds: bool, what: str) -> None:
    if not holds:
        raise _Refused(what)


def _from_bytes(data: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    _check(isinstance(dtype, _Dtype) and not dtype.is_object, "an array of objects from bytes")
    if not isinstance(data, (bytes, bytearray)) or math.prod(shape) * dtype.dtype.itemsize != len(data):
        raise ValueError(f"an array of shape {shape} and {dtype.dtype} does not fit its data")
    return np.frombuffer(data, dtype.dtype).reshape(shape, order="F" if order == "F" else "C")


def _object_array(items: Sequence[Any], shape: Any) -> np.ndarray:
    array = np.empty(len(items), object)
    for i, item in enumerate(items):  # one by one: numpy would unpack items that are sequences
        array[i] = item
    return array.reshape(shape)


def _scalar(dtype: Any, data: Any) -> Any:
    return _from_bytes(data, dtype, (1,), "C")[0]


def _frombuffer(data: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    made = _Array()
    made.array = _from_bytes(data, dtype, shape, order)
    return made


def _encode(text: str, encoding: str | bytes = "latin1") -> bytes:
    _check(as_text(encoding) in ("latin1", "latin-1", "utf-8", "ascii"), f"the encoding {encoding!r}")
    return text.encode(as_text(encoding))


_MAKERS: dict[str, Callable[..., Any]] = {
    "_reconstruct": lambda kind, shape, code: _Array(),
    "scalar": _scalar,
    "_frombuffer": _frombuffer,
    "dtype": _Dtype,
    "ndarray": lambda *_: _Array(),
    "encode": _encode,
    "dict": lambda *items: dict(*items),
    "OrderedDict": lambda *items: dict(*items),
    "defaultdict": lambda *_: {},
    "list": lambda *items: list(*items),
    "tuple": lambda *items: tuple(*items),
    "set": lambda *items: set(*items),
    "frozenset": lambda *items: frozenset(*items),
    "bytes": lambda: b"",
}
_ADMITTED = {
    **{f"numpy.{core}.multiarray": ("_reconstruct", "scalar") for core in ("core", "_core")},
    **{f"numpy.{core}.numeric": ("_frombuffer",) for core in ("core", "_core")},
    "numpy": ("dtype", "ndarray"),
    "_codecs": ("encode",),
    "collections": ("OrderedDict", "defaultdict"),
    **dict.fromkeys(("builtins", "__builtin__"), ("dict", "list", "tuple", "set", "frozenset", "bytes")),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        if name not in _ADMITTED.get(module, ()):
            raise _Refused(f"{module}.{name}")
        maker = _MAKERS[name]
        # One of its own for each use: a pickle may set attributes of whatever it holds.
        return lambda *arguments: maker(*arguments)


_DEEPEST = 20  # containers within containers


def _plain(value: Any, depth: int, seen: dict[int, Any]) -> Any:
    """`value` with its arrays made and the keys of its dicts as text; `seen`: what was made of each container."""
    if value is None or isinstance(value, (int, float, complex, str, bytes, bytearray, np.generic)):
        return value
    if id(value) not in seen:
        if depth > _DEEPEST:
            raise ValueError(f"containers lie more than {_DEEPEST} deep")
        seen[id(value)] = _plain_container(value, depth + 1, seen)
    return seen[id(value)]


def _plain_container(value: Any, depth: int, seen: dict[int, Any]) -> Any:
    if isinstance(value, _Array):
        if value.array is None:
            raise ValueError("an array without data")
        if value.array.dtype.kind != "O":
            return value.array
        items = [_plain(item, depth, seen) for item in value.array.reshape(-1)]
        return _object_array(items, value.array.shape)
    if isinstance(value, dict):
        return {_plain_key(key): _plain(item, depth, seen) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return type(value)(_plain(item, depth, seen) for item in value)
    raise _Refused(f"an object of type {type(value).__name__}")


def _plain_key(key: Any) -> Any:
    _check(isinstance(key, (str, bytes, int, float, np.generic)), f"a key of type {type(key).__name__}")
    return as_text(key) if isinstance(key, bytes) else key
