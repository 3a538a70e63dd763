"""``python -m pytest -p tests.gpu.device.plugin tests/gpu/interpreted``: those tests, with every launch run on a GPU.

They stay as they are, on tensors of the CPU: kernels are compiled instead of interpreted, and a launch moves what it is
given to the device and back.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from mtl_fast.kernels import triton
from mtl_fast.kernels.triton.launch import observed
from tests.conv_cases import convolutions_take
from tests.gpu.device.runner import run_on

if triton.interpreted():
    raise pytest.UsageError("TRITON_INTERPRET is set: kernels would not reach the GPU")
# Backends then take tensors of the CPU, and the folder's conftest, which is read after this, lets its tests be collected.
triton.interpreted = lambda: True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            item.add_marker(pytest.mark.skip(reason="torch finds no NVIDIA GPU"))


@pytest.fixture(autouse=True)
def launches_on_the_device() -> Iterator[None]:
    """Launches of CPU tensors are run on the GPU, products of float32 exactly: the interpreter has no TF32."""
    device = torch.device("cuda")
    with convolutions_take("ieee"), observed(then=lambda launch: run_on(launch, device)):
        yield
