"""Where a step's time goes: named spans, measured without making the host wait for the device."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

# What a progress line tells of; "update" is the whole of which they are parts.
PARTS = ("data", "encoder", "inner loop", "optimiser")
WHOLE = "update"


class Spans:
    """Seconds spent in named parts of the updates; spans of one name may repeat, but not nest.

    On the CPU the seconds add up from `clear` to `clear`. On a GPU a span is a pair of events, recorded anew in
    each step and also inside a captured graph, and `shares` speaks of the last step that the device has finished.

    Args:
        device: where the work is done.

    Attributes:
        record: whether spans also are ranges of a running profiler.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.record = False
        self._on_gpu = torch.device(device).type == "cuda"
        self._seconds: dict[str, float] = {}
        self._events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {}
        self._used: dict[str, int] = {}  # pairs of the last step in which the span's code ran
        self._open: dict[str, int] = {}  # pairs of this step so far

    def begin(self) -> None:
        """A step begins."""
        self._open.clear()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Measures what happens inside."""
        with torch.profiler.record_function(name) if self.record else nullcontext():
            if self._on_gpu:
                start, end = self._next_events(name)
                start.record()
                try:
                    yield
                except BaseException:
                    # An event that nobody recorded has no time; out of memory is tried once more with fewer images.
                    self._open[name] = self._used[name] = self._open[name] - 1
                    raise
                end.record()
            else:
                began = time.perf_counter()
                yield
                self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - began

    def clear(self) -> None:
        """Forgets the seconds so far."""
        self._seconds.clear()

    def shares(self) -> dict[str, float]:
        """Each part's share of the updates' time; empty while there is nothing to tell. Never waits."""
        seconds = self._measured() if self._on_gpu else self._seconds
        whole = seconds.get(WHOLE, 0.0)
        return {name: seconds[name] / whole for name in PARTS if name in seconds} if whole > 0 else {}

    def _next_events(self, name: str) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        pairs, i = self._events.setdefault(name, []), self._open.get(name, 0)
        if i == len(pairs):
            # External: in a capture they become nodes of the graph that can be read outside it.
            pairs.append(
                (
                    torch.cuda.Event(enable_timing=True, external=True),
                    torch.cuda.Event(enable_timing=True, external=True),
                )
            )
        self._open[name] = self._used[name] = i + 1
        return pairs[i]

    def _measured(self) -> dict[str, float]:
        """The last step's seconds by name; empty while the device is still busy with it."""
        pairs = {name: self._events[name][:n] for name, n in self._used.items()}
        if not all(end.query() for ends in pairs.values() for _, end in ends):
            return {}
        return {
            name: sum(start.elapsed_time(end) for start, end in found) / 1e3 for name, found in pairs.items()
        }
