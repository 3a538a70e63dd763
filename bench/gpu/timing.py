"""Times on a GPU: of the kernel, of launching it, on the wall, and replayed as a graph; percentiles of samples."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import quantiles

import torch

Call = Callable[[], object]
N_WARM_UP, N_SAMPLES, N_IN_GRAPH = 5, 50, 20
# Written before each sample of a kernel, so that nothing of its operands is left in L2 (126 MB on a B200).
FLUSHED_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Percentiles:
    """Seconds: 20th, 50th and 80th percentile."""

    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, samples: list[float]) -> Percentiles:
        tenths = quantiles(samples, n=10, method="inclusive")
        return cls(tenths[1], tenths[4], tenths[7])

    def __str__(self) -> str:
        return " / ".join(f"{1e6 * value:.1f}" for value in (self.p20, self.p50, self.p80))


@dataclass(frozen=True)
class Times:
    """All that is measured of one call.

    Attributes:
        kernel: between two events on the device, L2 cold.
        launcher: on the host, from the call to its return, nothing waited for.
        wall: on the host, from the call to the end of its work.
        graph: of one call in a replayed graph of `N_IN_GRAPH`; None where it cannot be captured.
        peak: bytes of memory at the most, beyond what was there before.
    """

    kernel: Percentiles
    launcher: Percentiles
    wall: Percentiles
    graph: Percentiles | None
    peak: int


def measured(call: Call, n_samples: int = N_SAMPLES) -> Times:
    """Of a call that works on the current CUDA device."""
    for _ in range(N_WARM_UP):
        call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    flushed = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device="cuda")
    return Times(
        kernel=sampled(lambda: _between_events(call, flushed.zero_), n_samples),
        launcher=sampled(lambda: _on_the_host(call, wait=False), n_samples),
        wall=sampled(lambda: _on_the_host(call, wait=True), n_samples),
        graph=_replayed(call, n_samples),
        peak=peak,
    )


def sampled(sample: Callable[[], float], n_samples: int) -> Percentiles:
    """Percentiles of so many samples."""
    return Percentiles.of([sample() for _ in range(n_samples)])


def _between_events(call: Call, before: Call | None = None) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if before is not None:
        before()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _on_the_host(call: Call, *, wait: bool) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if wait:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _replayed(call: Call, n_samples: int) -> Percentiles | None:
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            call()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(N_IN_GRAPH):
                call()
    except RuntimeError:
        # What reads back or synchronises cannot be captured: a property of the call, reported as such.
        torch.cuda.synchronize()
        return None
    return sampled(lambda: _between_events(graph.replay) / N_IN_GRAPH, n_samples)
