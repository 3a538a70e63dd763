"""The runner moves whole buffers there and back, aliases included; every test of the interpreter runs on a device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mtl_fast.kernels.triton.launch import Launch
from tests.gpu.device.runner import run_on

pytestmark = pytest.mark.proof
GPU = Path(__file__).resolve().parents[1]


class Kernel:
    """Adds 1 to `p_x`, whose buffer `p_all` shares, and writes the sum of that buffer."""

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*, p_x: torch.Tensor, p_all: torch.Tensor, p_out: torch.Tensor, n: int, **_: Any) -> None:
            p_x += n
            p_out.fill_(float(p_all.nansum()))

        return run


def test_buffers_go_there_and_back() -> None:
    buffer = torch.full((20,), float("nan"))
    x = buffer.as_strided((2, 3), (4, 1), 5).zero_()
    out = torch.empty(1)
    arguments: dict[str, Any] = {"p_x": x, "p_all": buffer, "p_out": out, "n": 1}
    run_on(Launch(Kernel(), (1,), arguments, {}, 1, 1), torch.device("cpu"))
    assert torch.equal(x, torch.ones(2, 3))
    assert out.item() == 6, "a view sees what was written through another one"
    assert int(buffer.isnan().sum()) == 14


def test_every_test_of_the_interpreter_runs_on_a_device_too() -> None:
    names = {path.name for path in (GPU / "interpreted").glob("test_*.py")} - {"test_launches.py"}
    missing = [name for name in sorted(names) if not (GPU / "device" / name).is_file()]
    assert not missing, f"tests/gpu/device lacks {', '.join(missing)}"
