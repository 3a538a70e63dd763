"""Data sets in memory: the image store, its readers, and the embedded set."""

from __future__ import annotations

from mtl_fast.data.store import ImageStore

__all__ = ["ImageStore"]
