"""An unpickler that makes what the caller admits by name and refuses the rest.

A pickle is a program that may call whatever it can name. Here a name leads to an object of the caller's choice or to an
error. numpy's own functions are not to be admitted: with a forged dtype they read any bytes as pointers to objects.
`NUMPY` rebuilds plain arrays from bytes, a shape and a plain dtype instead.
"""

from __future__ import annotations

import codecs
import math
import pickle
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np

_PLAIN_KINDS = "biuf"
# What a damaged pickle raises beside `pickle.UnpicklingError`.
_DAMAGE = (
    EOFError,
    AttributeError,
    TypeError,
    ValueError,
    LookupError,
    MemoryError,
    OverflowError,
    RecursionError,
)


def load(file: BinaryIO, allowed: Mapping[str, object]) -> Any:
    """What a pickle of any protocol holds, Python 2's too.

    Args:
        file: open at the pickle's first byte.
        allowed: ``module.name``, as the pickle says it → the object to take for it.

    Returns:
        Containers, numbers, text (that of Python 2 as bytes), arrays and what `allowed` makes.

    Raises:
        pickle.UnpicklingError: another name, which is named, or a damaged pickle.
    """

    class Restricted(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if f"{module}.{name}" not in allowed:
                raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not admitted")
            return allowed[f"{module}.{name}"]

    try:
        return _finished(Restricted(file, encoding="bytes").load())
    except _DAMAGE as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise pickle.UnpicklingError(f"it is cut short or damaged ({reason})") from None


class _Dtype:
    """A plain number's dtype, or that of objects; takes the state of a pickled dtype."""

    def __init__(self, name: str | bytes, align: object = False, copy: object = False) -> None:
        self.dtype = np.dtype(name.decode("ascii") if isinstance(name, bytes) else name)
        if self.dtype.kind not in _PLAIN_KINDS + "O":
            raise pickle.UnpicklingError(f"it holds an array of {self.dtype}")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        order, subtype, names, fields = state[1:5]
        if not (subtype is None and names is None and fields is None):
            raise pickle.UnpicklingError("it holds an array of records")
        if self.dtype.kind != "O":
            order = order.decode("ascii") if isinstance(order, bytes) else order
            if order not in ("<", ">", "=", "|"):
                raise pickle.UnpicklingError(f"it holds numbers of byte order {order!r}")
            self.dtype = np.dtype(order + self.dtype.str[1:])


class _Array:
    """Takes the state of a pickled array and makes it, where it is plain."""

    def __init__(self, *_: object) -> None:
        self.value: Any = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        shape, made, fortran, data = state[-4:]  # before them a version
        if made.dtype.kind != "O":
            self.value = _from_bytes(data, made, shape, "F" if fortran else "C")
        elif shape == () and isinstance(data, list) and len(data) == 1:
            self.value = data[0]  # how numpy saves an object, such as a dictionary
        else:
            raise pickle.UnpicklingError("it holds an array of objects")


def _from_bytes(data: bytes, made: _Dtype, shape: tuple[int, ...], order: str = "C") -> np.ndarray:
    if made.dtype.kind == "O":
        raise pickle.UnpicklingError("it makes objects of bytes")
    if len(data) != math.prod(shape) * made.dtype.itemsize:
        raise pickle.UnpicklingError(f"{len(data)} bytes are no array {list(shape)} of {made.dtype}")
    return np.frombuffer(data, made.dtype).reshape(shape, order="F" if order == "F" else "C")


def _latin1(text: str, encoding: str) -> bytes:
    """How Python 3 writes bytes in the old protocols."""
    if codecs.lookup(encoding).name != "iso8859-1":
        raise pickle.UnpicklingError(f"it encodes text as {encoding}")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    """How the old protocols write none."""
    return b""


def _finished(node: Any) -> Any:
    """The tree with arrays in the place of what they were made with."""
    if isinstance(node, _Array):
        return _finished(node.value)
    if isinstance(node, dict):
        return {key: _finished(value) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return type(node)(_finished(item) for item in node)
    return node


# numpy's names of every version, made harmless.
NUMPY: dict[str, object] = {
    "_codecs.encode": _latin1,
    "__builtin__.bytes": _no_bytes,
    "numpy.dtype": _Dtype,
    "numpy.ndarray": _Array,
    **{
        f"numpy.{core}.{name}": made
        for core in ("core", "_core")
        for name, made in (("multiarray._reconstruct", _Array), ("numeric._frombuffer", _from_bytes))
    },
}
