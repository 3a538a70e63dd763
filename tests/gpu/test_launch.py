"""Where a launch runs, and which chip it is configured for; no GPU is asked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")
from mtl_fast.kernels.triton.launch import BASE, Launch, chip_of, configured_for
from mtl_fast.kernels.triton.ss_conv_product import configuration

pytestmark = pytest.mark.proof


class Kernel:
    """Notes which device was the current one when it was launched."""

    def __init__(self, current: list[torch.device]) -> None:
        self.current = current
        self.launched_on: list[torch.device] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(**_: Any) -> None:
            self.launched_on += self.current

        return run


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """With `torch.cuda.device` that only notes what it was given."""
    current: list[torch.device] = []

    @contextmanager
    def device(of: torch.device) -> Iterator[None]:
        current.append(of)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    return Kernel(current)


def test_a_launch_runs_on_its_tensors_device(kernel: Kernel) -> None:
    with FakeTensorMode():
        second = torch.empty(3, device="cuda:1")
    Launch(kernel, (1,), {"p_none": None, "n": 3, "p_x": second}, {}, 4, 1).run()
    assert kernel.launched_on == [torch.device("cuda", 1)]
    assert not kernel.current


def test_a_launch_of_the_cpu_asks_for_no_device(kernel: Kernel) -> None:
    Launch(kernel, (1,), {"p_x": torch.empty(3)}, {}, 4, 1).run()
    assert kernel.launched_on == []


def test_a_launch_is_configured_for_its_tensors_chip(monkeypatch: pytest.MonkeyPatch) -> None:
    # Numbers that no machine has, for what is known of a device is remembered.
    chips = {torch.device("cuda", 90): (8, 6), torch.device("cuda", 91): (12, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", chips.__getitem__)
    assert [chip_of(device) for device in chips] == [86, 120]
    assert chip_of(torch.device("meta")) == chip_of(torch.device("cpu")) == BASE
    with configured_for(90):
        assert [chip_of(device) for device in (*chips, torch.device("meta"))] == [90, 90, 90]
    assert chip_of(torch.device("meta")) == BASE


def test_the_assembler_is_told_how_many_programs_share_the_registers() -> None:
    launch = Launch(Kernel([]), (1,), {"p_x": torch.empty(3)}, {}, 4, 2)
    assert "ptx_options" not in launch.options
    assert replace(launch, programs=2).options == launch.options | {"ptx_options": "--minnctapersm 2"}


@pytest.mark.parametrize(
    ("told", "n_in", "itemsize", "side", "programs", "warps"),
    [
        ((86, 89), 160, 4, 3, 1, 8),
        ((), 160, 4, 1, None, 8),
        ((), 160, 2, 3, None, 8),
        ((120,), 64, 2, 3, 1, 4),
        ((120,), 160, 2, 1, 2, 4),
        ((), 16, 2, 3, None, 4),
    ],
)
def test_small_shared_memory_leaves_registers_to_few_programs(
    told: tuple[int, ...], n_in: int, itemsize: int, side: int, programs: int | None, warps: int
) -> None:
    """Steps of 36, 24 and 12 KB leave room for one program or two, those of 6 KB for as many as registers do."""
    n_out = 160 if warps == 8 else 64
    by_chip = {
        chip: configuration(20000, n_in, n_out, itemsize, chip, side=side)
        for chip in (80, 86, 89, 90, 100, 120)
    }
    assert {chip for chip, c in by_chip.items() if c.programs is not None} == set(told)
    assert {c.programs for chip, c in by_chip.items() if chip in told} <= {programs}
    assert {c.num_warps for c in by_chip.values()} == {warps}
    assert len({replace(c, programs=None) for c in by_chip.values()}) == 1


@pytest.mark.parametrize(("chip", "programs"), [(80, None), (90, None), (100, 1)])
def test_two_images_products_leave_registers_to_one_program_of_sm_100(
    chip: int, programs: int | None
) -> None:
    both = configuration(20000, 64, 128, 2, chip, side=3, has_other=True)
    assert both.programs == programs
    assert configuration(20000, 64, 128, 2, chip, side=3).programs is None


@pytest.mark.parametrize(
    ("n_in", "side", "stages"), [(64, 1, 1), (128, 1, 2), (192, 1, 3), (640, 1, 3), (64, 3, 3)]
)
def test_no_more_steps_are_under_way_than_there_are(n_in: int, side: int, stages: int) -> None:
    assert configuration(20000, n_in, 128, 2, 80, side=side).num_stages == stages
