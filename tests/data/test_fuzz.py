"""Readers meet files with bytes changed at random: each loads, or ends in one line; nothing else ever happens.

`MTL_FAST_FUZZ=2000 python -m pytest tests/data/test_fuzz.py` looks longer than `make test` does.
"""

from __future__ import annotations

import os
import random
import warnings
from pathlib import Path

import pytest

from mtl_fast.data import load_split
from mtl_fast.errors import InputError
from tests.data.copies import COPIES

ROUNDS = int(os.environ.get("MTL_FAST_FUZZ", "12"))


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Some bytes changed, a part cut out, doubled or put elsewhere, or the end missing."""
    out = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        if not out:
            break
        at = rng.randrange(len(out))
        # Most of the meaning is near the ends: headers, opcodes, directories.
        at = rng.choice((at, at % 256, len(out) - 1 - at % min(256, len(out))))
        at = min(at, len(out) - 1)
        part = out[at : at + rng.randint(1, 40)]
        match rng.randrange(6):
            case 0:
                out[at] = rng.randrange(256)
            case 1:
                out[at] ^= 1 << rng.randrange(8)
            case 2:
                del out[at : at + len(part)]
            case 3:
                out[at:at] = part
            case 4:
                out[at : at + len(part)] = bytes(rng.randrange(256) for _ in part)
            case _:
                del out[at:]
    return bytes(out)


@pytest.mark.timeout(60 + 5 * ROUNDS)
@pytest.mark.parametrize("name", COPIES)
def test_a_damaged_copy_loads_or_ends_in_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = COPIES[name](tmp_path / "copy")
    monkeypatch.setenv("MTL_FAST_CACHE_DIR", str(tmp_path / "cache"))
    files = sorted(path for path in source.rglob("*") if path.is_file()) if source.is_dir() else [source]
    rng = random.Random(name)
    for turn in range(ROUNDS):
        path = rng.choice(files)
        content = path.read_bytes()
        path.write_bytes(damaged(content, rng))
        said = ""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                for split in ("train", "test"):
                    store = load_split(source, split)
                    assert store.images.ndim == 4
                    assert int(store.labels.max()) < store.n_classes
        except InputError as error:
            said = str(error)
        except Exception as error:
            raise AssertionError(f"turn {turn}, {path.name}: {error!r}") from error
        finally:
            path.write_bytes(content)
        assert "\n" not in said, (turn, path.name)
