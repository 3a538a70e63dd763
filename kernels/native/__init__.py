"""C++ kernels for CPUs: implementations of operators whose schema, fake and autograd are in `mtl_fast.ops`.

Importing this loads and compiles nothing; `load` finds a library that `setup.py` or `mtl-fast build` made.
"""

from __future__ import annotations

import functools
import os
import struct
from pathlib import Path

import torch


def load() -> tuple[bool, str]:
    """Loads the library for this processor, once a process: (whether it is there, which one or why not).

    It is looked for where ``MTL_FAST_LIBRARY`` says, or else in the user's folder and then in the installed
    package, the widest vectors first. Nothing that is wrong with a library raises.
    """
    return _load_once()


# torch.compile takes the answer as it is instead of tracing how it was found. (The public name for this,
# torch.compiler.assume_constant_result, sets the same attribute but imports the whole compiler.)
load._dynamo_marked_constant = True  # type: ignore[attr-defined]  # no attribute that stubs know


@functools.cache
def _load_once() -> tuple[bool, str]:
    from .build import SOURCE_FOLDER, find, library_prefix, processor, runnable_variants, user_folder

    variants = runnable_variants()
    if not variants:
        return False, f"there are no native kernels for this processor ({processor()})"
    named = os.environ.get("MTL_FAST_LIBRARY")
    if named:
        prefixes = tuple(library_prefix(v, sanitize=s) for v in variants for s in (False, True))
        if not Path(named).name.startswith(prefixes):
            return False, f"MTL_FAST_LIBRARY={named} is of other sources, another torch or another processor"
        return _loaded(Path(named))
    found = [find(folder, variant) for variant in variants for folder in (user_folder(), SOURCE_FOLDER)]
    refusals = []
    for path in found:
        if path is not None:
            can, reason = _loaded(path)
            if can:
                return True, reason
            refusals.append(reason)
    return False, "; ".join(refusals) or (
        "no native library was built for these sources and this torch; run `mtl-fast build`"
    )


def _loaded(path: Path) -> tuple[bool, str]:
    try:
        if not _is_whole(path):
            return False, f"{path} is damaged; delete it and run `mtl-fast build`"
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        # Torch's own message is no more than the path; the linker's is what it came from.
        return False, f"{path} does not load: {str(error.__cause__ or error).splitlines()[0]}"
    return True, f"native kernels, {path.name}"


def _is_whole(path: Path) -> bool:
    """Whether a file is an ELF library down to its end; the dynamic linker dies of a bus error on half a one."""
    with open(path, "rb") as file:
        header = file.read(64)
    if len(header) < 64 or header[:5] != b"\x7fELF\x02":
        return False
    # The table of sections is the last thing in the file: where it starts, the size of an entry, their number.
    (start,) = struct.unpack_from("<Q", header, 40)
    size, count = struct.unpack_from("<HH", header, 58)
    return path.stat().st_size >= start + size * count
