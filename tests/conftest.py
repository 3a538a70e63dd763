"""What every test starts from: one thread, uninitialised memory full of NaN, a small store."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mtl_fast.data.store import ImageStore


def pytest_configure() -> None:
    # Tests are small: on a busy machine threads cost more in waiting for each other than they save.
    torch.set_num_threads(1)
    # In deterministic mode torch.empty is filled with NaN (the largest number, for integers).
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.fixture(scope="session", autouse=True)
def data_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Decoded images are kept in a folder of the tests' own, never in the user's."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MTL_FAST_CACHE_DIR", str(folder))
        yield folder


@pytest.fixture(scope="session")
def small_store() -> ImageStore:
    """7 classes of 5 to 9 images of 16×16: a colour and a pattern a class, under noise."""
    g = torch.Generator().manual_seed(0)
    labels = torch.repeat_interleave(torch.arange(7), torch.tensor([5, 9, 6, 5, 7, 8, 6]))
    labels = labels[torch.randperm(len(labels), generator=g)]
    pattern = torch.rand(7, 16, 16, 3, generator=g)
    images = 255 * (0.6 * pattern[labels] + 0.4 * torch.rand(len(labels), 16, 16, 3, generator=g))
    return ImageStore(images.to(torch.uint8), labels, tuple("abcdefg"), name="the small store")
