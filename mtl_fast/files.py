"""Where the user's cache lies, text as bytes, and files replaced in one step: a kill leaves the old one or the new one."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable
from pathlib import Path


def user_cache(name: str) -> Path:
    """The package's folder of that name in the user's cache; not made."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mtl_fast" / name


def utf8(text: str) -> bytes:
    """A text in UTF-8; a byte of a file's name that is no text becomes its escape, such as ``\\udcff``.

    In JSON that is what it is read back from.
    """
    return text.encode("utf-8", "backslashreplace")


def replace_file(path: Path, parts: Iterable[bytes | memoryview], *, shared: bool = False) -> None:
    """Writes a temporary file beside it, fsync, rename, fsync of the folder.

    Args:
        path: the file; its folder exists.
        parts: its content, one after the other.
        shared: processes that know nothing of each other may write it at once: the temporary file then has a name of
            its own. Otherwise it has one fixed name, so that what a killed run left is overwritten by the next.

    Raises:
        OSError: it cannot be written (full or read-only disk); the old file is as it was, and no part of the new one stays.
    """
    partial = path.with_name(
        f".{path.name}.{uuid.uuid4().hex}.partial" if shared else f".{path.name}.partial"
    )
    try:
        with open(partial, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        _sync_folder(path.parent)
    except OSError:
        _remove(partial)
        raise


def _remove(partial: Path) -> None:
    try:
        partial.unlink(missing_ok=True)
    except OSError:  # such as on a disk that became read-only: the first error is the one to tell
        return


def _sync_folder(folder: Path) -> None:
    """Makes a rename last through a power cut; only POSIX can open a folder."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
