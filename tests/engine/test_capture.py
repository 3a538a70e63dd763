"""A step that is recorded once for each shape: which calls run, record and replay, and on which tensors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mtl_fast.engine.capture import CapturedStep, capture


class Tape:
    """Records as a GPU does: the step is traced on its static tensors without running, a replay runs it there."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def warm_up(
        self, step: Callable[..., tuple[Tensor, ...]], tensors: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        self.events.append("warm-up")
        return step(*tensors)

    def record(
        self, step: Callable[..., tuple[Tensor, ...]], tensors: tuple[Tensor, ...]
    ) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
        self.events.append("record")
        outputs = tuple(torch.empty_like(tensor) for tensor in step.__self__.shapes(*tensors))  # type: ignore[attr-defined]

        def replay() -> None:
            self.events.append("replay")
            for output, value in zip(outputs, step(*tensors), strict=True):
                output.copy_(value)

        return replay, outputs


class Sum:
    """Adds its first argument to a buffer and returns it times the second."""

    def __init__(self) -> None:
        self.total = torch.zeros(())

    def shapes(self, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        return (a, b)

    def step(self, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        self.total += a.sum()
        return a * b, b + self.total


def test_every_call_is_a_step_and_only_the_later_ones_are_replayed() -> None:
    tape, captured_sum, plain = Tape(), Sum(), Sum()
    captured = CapturedStep(captured_sum.step, tape, n_warm_up=2)
    outputs = []
    for i in range(5):
        a, b = torch.full((3,), float(i)), torch.arange(3.0) + i
        outputs.append((captured(a, b), plain.step(a, b)))
        assert torch.equal(captured_sum.total, plain.total)
    assert tape.events == ["warm-up", "warm-up", "record", "replay", "replay", "replay"]
    # All at the end: no later call has changed what an earlier one returned.
    for ours, expected in outputs:
        assert all(torch.equal(x, y) for x, y in zip(ours, expected, strict=True))


def test_each_shape_has_its_own_recording() -> None:
    tape = Tape()
    captured = CapturedStep(Sum().step, tape, n_warm_up=1)
    for n in (2, 3, 2, 3, 2, 3):
        captured(torch.ones(n), torch.ones(n))
    assert tape.events == ["warm-up", "warm-up", "record", "replay", "record", "replay", "replay", "replay"]
    captured(torch.ones(2).double(), torch.ones(2))
    assert tape.events[-1] == "warm-up"


def test_the_callers_tensors_stay_his() -> None:
    captured = CapturedStep(Sum().step, Tape(), n_warm_up=0)
    a, b = torch.ones(2), torch.ones(2)
    captured(a, b)
    captured(torch.zeros(2), torch.zeros(2))
    assert a.tolist() == b.tolist() == [1.0, 1.0]


def test_elsewhere_than_on_a_gpu_it_is_the_step_itself() -> None:
    step = Sum().step
    assert capture(step, torch.device("cpu")) is step


@pytest.mark.gpu
def test_a_captured_step_gives_the_values_of_the_step() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    ours, plain = Sum(), Sum()
    ours.total, plain.total = (torch.zeros((), device="cuda") for _ in range(2))
    captured = capture(ours.step, torch.device("cuda"))
    for i in range(6):
        a, b = torch.full((3,), float(i), device="cuda"), torch.arange(3.0, device="cuda")
        for x, y in zip(captured(a, b), plain.step(a, b), strict=True):
            assert torch.equal(x, y)
