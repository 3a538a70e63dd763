"""On a GPU: the interpreter's tests with every launch run on the device, and operations in every dtype there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mtl_fast.kernels.triton import interpreted
from mtl_fast.kernels.triton.launch import observed
from tests.gpu.device.runner import run_on

HERE = Path(__file__).parent
# Where kernels are interpreted they do not reach a GPU.
collect_ignore_glob = ["test_*.py"] if interpreted() else []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = "" if torch.cuda.is_available() else "torch finds no NVIDIA GPU"
    for item in items:
        if item.path.parent != HERE or item.path.name == "test_runner.py":
            continue
        item.add_marker(pytest.mark.gpu)
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def launches_on_the_device() -> Iterator[None]:
    """Launches of CPU tensors are run on the GPU."""
    device = torch.device("cuda")
    with observed(then=lambda launch: run_on(launch, device)):
        yield
