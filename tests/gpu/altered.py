"""Copies of kernel files with a fault in them, for the checks that have to see it."""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def altered(module: Any, old: str, new: str) -> Iterator[Any]:
    """A copy of a kernel file in which `new` stands for `old`, which occurs once; the file itself stays as it is."""
    path = Path(module.__file__)
    text = path.read_text("utf-8")
    assert text.count(old) == 1, f"{old!r} occurs {text.count(old)} times in {path.name}"
    # In the same package, for its relative imports; a file, for Triton reads the source of its kernels.
    name = f"{module.__name__}_altered"
    with tempfile.TemporaryDirectory() as folder:
        copy_path = Path(folder) / path.name
        copy_path.write_text(text.replace(old, new), encoding="utf-8")
        spec = importlib.util.spec_from_file_location(name, copy_path)
        assert spec is not None
        assert spec.loader is not None
        copy = importlib.util.module_from_spec(spec)
        sys.modules[name] = copy
        try:
            spec.loader.exec_module(copy)
            yield copy
        finally:
            del sys.modules[name]
