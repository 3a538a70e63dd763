"""What the progress line tells of a run's speed, and the trace of some updates for a viewer."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import torch

from ..engine.memory import in_words
from ..engine.spans import Spans

N_TRACED = 5  # updates in a trace; one before them is left out, for it also builds caches


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that tensors took on a GPU, or that the process had resident; 0 where nobody tells."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Pace:
    """Items a second, peak memory and the parts' shares of the time, read now and then.

    Args:
        spans: where the parts are measured.
        device: whose memory counts.
        unit: what is counted, such as ``tasks``.
        least_seconds: between two readings; a text asked for earlier is the last one.
        clock: seconds that never run backwards.
    """

    def __init__(
        self,
        spans: Spans,
        device: torch.device,
        unit: str,
        *,
        least_seconds: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._spans, self._device, self._unit = spans, device, unit
        self._least_seconds, self._clock = least_seconds, clock
        self._text = ""
        self._n_items = 0
        self.restart()

    def restart(self) -> None:
        """What was before (a validation, say) does not count."""
        self._began, self._n_items = self._clock(), 0
        self._spans.clear()

    def count(self, n_items: int) -> str:
        """Counts items and returns ``12.3 tasks/s, 1.2 GiB, encoder 80 %, …``; nothing waits for the device."""
        self._n_items += n_items
        elapsed = self._clock() - self._began
        if elapsed >= self._least_seconds:
            shares = [f"{name} {100 * share:.0f} %" for name, share in self._spans.shares().items()]
            rate = f"{self._n_items / elapsed:.3g} {self._unit}/s"
            self._text = ", ".join([rate, f"{in_words(peak_memory(self._device))} peak", *shares])
            self.restart()
        return self._text


class StepTrace:
    """Profiles the first updates of a run and writes a trace that Perfetto and Chrome open; a context manager.

    Args:
        path: of the trace, ``….json``; None profiles nothing.
        device: of the run.
        spans: become ranges of the trace.
    """

    def __init__(self, path: Path | None, device: torch.device, spans: Spans) -> None:
        self._path, self._spans = path, spans
        self._profile: torch.profiler.profile | None = None
        if path is not None:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if device.type == "cuda":
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self._profile = torch.profiler.profile(
                activities=activities,
                schedule=torch.profiler.schedule(wait=0, warmup=1, active=N_TRACED, repeat=1),
                on_trace_ready=self._write,
            )

    def step(self) -> None:
        """An update is over."""
        if self._profile is not None:
            self._profile.step()

    def _write(self, profile: torch.profiler.profile) -> None:
        profile.export_chrome_trace(str(self._path))
        self._spans.record = False

    def __enter__(self) -> StepTrace:
        if self._profile is not None:
            self._spans.record = True
            self._profile.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._profile is not None:
            self._profile.stop()
