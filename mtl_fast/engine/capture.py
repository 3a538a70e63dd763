"""A whole step as a CUDA graph: recorded once for each shape of its tensors, then replayed."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

Step = Callable[..., tuple[Tensor, ...]]
Replay = Callable[[], None]
N_WARM_UP = 3  # libraries choose algorithms and optimisers make their state in the first steps


class Recorder(Protocol):
    """How a step is run before it is recorded, and how it is recorded."""

    def warm_up(self, step: Step, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Runs the step for good, where a recording will not mind it."""

    def record(self, step: Step, tensors: tuple[Tensor, ...]) -> tuple[Replay, tuple[Tensor, ...]]:
        """Records the step without running it: what replays it, and the tensors that then hold its outputs."""


class CudaGraphs:
    """Recording as CUDA graphs, all in one pool of memory: they never run at the same time."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, step: Step, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            outputs = step(*tensors)
        current.wait_stream(self._stream)
        for tensor in (*tensors, *outputs):
            # Memory of one stream that another one uses must not be given out again too early.
            tensor.record_stream(self._stream)
            tensor.record_stream(current)
        return outputs

    def record(self, step: Step, tensors: tuple[Tensor, ...]) -> tuple[Replay, tuple[Tensor, ...]]:
        graph = torch.cuda.CUDAGraph()
        # Other threads (a gatherer of images) go on allocating meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            outputs = step(*tensors)
        return graph.replay, outputs


class _Recording(NamedTuple):
    """Where a recorded step reads, what runs it, and where it writes."""

    inputs: tuple[Tensor, ...]
    replay: Replay
    outputs: tuple[Tensor, ...]


class CapturedStep:
    """Calls a step; from the call after `n_warm_up` of the same shapes on, by replaying its recording.

    Args:
        step: tensors → tensors. Whatever else it reads or writes must stay where it is: parameters, optimiser
            state and sums are changed in place, gradients are made anew inside. It asks the device for nothing.
        recorder: how it is recorded.
        n_warm_up: calls of each shape that run as they are; they are steps like all others.
    """

    def __init__(self, step: Step, recorder: Recorder, n_warm_up: int = N_WARM_UP) -> None:
        self._step, self._recorder, self._n_warm_up = step, recorder, n_warm_up
        self._n_calls: dict[tuple[object, ...], int] = {}
        self._recordings: dict[tuple[object, ...], _Recording] = {}

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The step's outputs; the caller's own, no later call changes them."""
        key = tuple((tensor.shape, tensor.dtype) for tensor in tensors)
        if key not in self._recordings:
            n_calls = self._n_calls[key] = self._n_calls.get(key, 0) + 1
            if n_calls <= self._n_warm_up:
                return self._recorder.warm_up(self._step, tensors)
            inputs = tuple(tensor.clone() for tensor in tensors)
            self._recordings[key] = _Recording(inputs, *self._recorder.record(self._step, inputs))
        recording = self._recordings[key]
        for static, tensor in zip(recording.inputs, tensors, strict=True):
            static.copy_(tensor)
        recording.replay()
        return tuple(output.clone() for output in recording.outputs)


def capture(step: Step, device: torch.device, n_warm_up: int = N_WARM_UP) -> Step:
    """The same step, captured once for each shape where the device is a GPU; elsewhere the step itself.

    Args:
        step: as of `CapturedStep`: forward, backward and the optimiser's step together.
        device: of all its tensors.
        n_warm_up: calls of each shape before it is captured.
    """
    return CapturedStep(step, CudaGraphs(), n_warm_up) if device.type == "cuda" else step
