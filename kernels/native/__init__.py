"""C++ kernels for CPUs: implementations of operators whose schema, fake and autograd are in `mtl_fast.ops`.

Importing this loads and compiles nothing; `load` finds a library that `setup.py` or `mtl-fast build` made.
"""

from __future__ import annotations

import functools
import os
import platform
from pathlib import Path

import torch


# torch.compile takes the answer as it is instead of tracing how it was found.
@torch.compiler.assume_constant_result
def load() -> tuple[bool, str]:
    """Loads the library for this processor, once a process: (whether it is there, which one or why not).

    It is looked for where ``MTL_FAST_LIBRARY`` says, in the user's folder, and in the installed package.
    """
    return _load_once()


@functools.cache
def _load_once() -> tuple[bool, str]:
    from .build import SOURCE_FOLDER, library_name, runnable_variants, user_folder

    named = os.environ.get("MTL_FAST_LIBRARY")
    if named:
        return _loaded(Path(named))
    variants = runnable_variants()
    if not variants:
        capability = torch.backends.cpu.get_cpu_capability()
        return False, f"no native kernels for this processor ({platform.machine()}, {capability})"
    for variant in variants:
        for folder in (user_folder(), SOURCE_FOLDER):
            path = folder / library_name(variant)
            if path.is_file():
                return _loaded(path)
    return False, "no native library was built for these sources and this torch; run `mtl-fast build`"


def _loaded(path: Path) -> tuple[bool, str]:
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        return False, f"{path} does not load: {str(error).splitlines()[0]}"
    return True, f"native kernels, {path.name}"
