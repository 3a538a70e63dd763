"""The runner moves whole buffers there and back, aliases included; the plugin takes every test of the interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mtl_fast.kernels.triton.launch import Launch
from tests.gpu.device.runner import run_on

pytestmark = pytest.mark.proof
ROOT = Path(__file__).resolve().parents[3]


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


@pytest.mark.timeout(320)
def test_the_interpreters_tests_are_collected_for_the_device() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:benchmark", "-p", "tests.gpu.device.plugin"]
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [*command, "--collect-only", "tests/gpu/interpreted"],
        cwd=ROOT,
        env=variables,
        stdout=subprocess.PIPE,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout
    collected = {line.partition("::")[0] for line in done.stdout.splitlines() if "::" in line}
    assert collected == {str(path.relative_to(ROOT)) for path in ROOT.glob("tests/gpu/interpreted/test_*.py")}
