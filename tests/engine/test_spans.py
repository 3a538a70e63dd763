"""Where time goes: shares of named parts, added up on a CPU."""

from __future__ import annotations

import time

import pytest
import torch

from mtl_fast.data.store import ImageStore
from mtl_fast.engine.spans import WHOLE, Spans
from tests.engine.cases import make_encoder, make_engine, tasks


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that has passed; a test moves it."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_shares_are_of_the_whole_and_add_up_until_cleared(clock: list[float]) -> None:
    spans = Spans()
    assert spans.shares() == {}
    for _ in range(2):
        spans.begin()
        with spans(WHOLE):
            for name, seconds in (("data", 1.0), ("encoder", 3.0), ("encoder", 2.0), ("optimiser", 1.0)):
                with spans(name):
                    clock[0] += seconds
            clock[0] += 3.0
    assert spans.shares() == pytest.approx({"data": 0.1, "encoder": 0.5, "optimiser": 0.1})
    spans.clear()
    assert spans.shares() == {}


def test_a_step_tells_of_its_parts(small_store: ImageStore) -> None:
    engine = make_engine(small_store, make_encoder("conv4"))
    with engine.spans(WHOLE):
        engine.step(tasks(small_store, 2))
    shares = engine.spans.shares()
    assert list(shares) == ["data", "encoder", "inner loop"]
    assert all(share > 0 for share in shares.values())
    # What is left is Python between the parts.
    assert 0.5 < sum(shares.values()) <= 1


def test_spans_are_ranges_of_a_profile_when_asked() -> None:
    spans = Spans()
    for spans.record in (False, True):
        with (
            torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile,
            spans("data"),
        ):
            torch.ones(2).sum()
        assert ("data" in {event.name for event in profile.events()}) == spans.record


class Event:
    """A GPU's event: a time that is known once the device is there."""

    now, reached = 0.0, 0.0

    def __init__(self, **options: bool) -> None:
        assert options == {"enable_timing": True, "external": True}

    def record(self) -> None:
        self.time = Event.now

    def query(self) -> bool:
        return self.time <= Event.reached

    def elapsed_time(self, end: Event) -> float:
        return end.time - self.time


def test_on_a_gpu_the_last_step_counts_and_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    spans = Spans("cuda")

    def step(encoder: float, *, replayed: bool = False) -> None:
        spans.begin()
        with spans(WHOLE):
            with spans("data"):
                Event.now += 1
            for _ in range(0 if replayed else 2):
                with spans("encoder"):
                    Event.now += encoder
            Event.now += 1

    step(4)
    assert spans.shares() == {}, "the device is not there yet"
    Event.reached = Event.now
    assert spans.shares() == pytest.approx({"data": 0.1, "encoder": 0.8})
    step(1)
    Event.reached = Event.now
    assert spans.shares() == pytest.approx({"data": 0.25, "encoder": 0.5})
    # A replayed graph records the encoder's events itself; here nobody does, so they stay as they were.
    step(1, replayed=True)
    Event.reached = Event.now
    assert set(spans.shares()) == {"data", "encoder"}


def test_what_ended_in_an_error_counts_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as a step without memory for its images, which is then made with fewer."""
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(Event, "now", 0.0)
    monkeypatch.setattr(Event, "reached", 100.0)
    spans = Spans("cuda")
    spans.begin()
    with spans(WHOLE):
        with pytest.raises(MemoryError), spans("encoder"):
            raise MemoryError
        with spans("encoder"):
            Event.now += 3.0
        Event.now += 1.0
    assert spans.shares() == pytest.approx({"encoder": 0.75})
