"""Pickles as Python 2 wrote them, in which most of these data sets lie on disk."""

from __future__ import annotations

import io
import pickle
import struct
from pathlib import Path
from typing import Any, ClassVar


class _Pickler(pickle._Pickler):  # type: ignore[name-defined,misc]
    """Text and bytes become Python 2's str; numpy's functions lie where numpy 1 had them."""

    def save_str(self, text: str | bytes) -> None:
        data = text if isinstance(text, bytes) else text.encode("ascii")
        if len(data) < 256:
            self.write(pickle.SHORT_BINSTRING + bytes([len(data)]) + data)
        else:
            self.write(pickle.BINSTRING + struct.pack("<i", len(data)) + data)
        self.memoize(text)

    def save_global(self, thing: Any, name: str | None = None) -> None:
        module = thing.__module__.replace("numpy._core", "numpy.core")
        if module == thing.__module__:
            super().save_global(thing, name)
            return
        self.write(f"c{module}\n{thing.__name__}\n".encode())
        self.memoize(thing)

    dispatch: ClassVar = {**pickle._Pickler.dispatch, str: save_str, bytes: save_str}  # type: ignore[attr-defined]


def dumps(value: Any) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=2).dump(value)
    return buffer.getvalue()


def dump(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(dumps(value))
    return path
