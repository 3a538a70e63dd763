"""Launches and compulsory bytes of a whole meta-training step, counted: ours, and the plain program's run eagerly.

`python -m bench.gpu.launches PIXELS … --widths CHANNELS …` prints ours as JSON.

Both run on tensors that hold nothing (`FakeTensorMode`), with a dispatch mode that counts. Our operators run their
launchers, whose launches are counted as such. Every other operator of PyTorch counts as one launch, fewer than it
may take: views and empty tensors as none, a convolution's backward pass as one for each gradient asked for.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._C import DispatchKey
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.networks import PREPROCESS, layers_of, random_store
from bench.peers.meta_step import Data, InnerLoop, PlainStep, Tasks
from mtl_fast.config import MetaConfig
from mtl_fast.engine import EpisodicEngine
from mtl_fast.engine.capture import CapturedStep, Replay, Step
from mtl_fast.engine.spans import Spans
from mtl_fast.episodes import Episodes, EpisodeSampler
from mtl_fast.kernels.triton import interpreted
from mtl_fast.kernels.triton.launch import Launch, observed
from mtl_fast.nn import LinearHead, ResNet12
from mtl_fast.ops import routes
from mtl_fast.ops.backend import ENVIRONMENT_VARIABLE
from mtl_fast.training.meta_update import adam, guarded_step

N_TASKS, N_WAY, N_SHOT, N_QUERY = 2, 5, 5, 15
INNER = InnerLoop(lr=0.05, n_steps=100)
GRAPH = "CUDA graph"  # the name that a captured step's one launch is counted under
# They allocate, mark what a tensor is, give it another form, or ask the host (for a dtype, for the optimiser's count of
# its steps).
FREE = (
    "empty",
    "new_empty",
    "empty_like",
    "empty_strided",
    "new_empty_strided",
    "_unsafe_view",
    "lift_fresh",
    "detach_",
    "promote_types",
    "_local_scalar_dense",
)
# They read as much of their first operand as they write.
GATHERS = ("index", "index_select", "gather")


@dataclass
class Count:
    """What was launched.

    Attributes:
        kernels: launches of ours by kernel.
        operators: those of PyTorch by operator.
        n_bytes: read and written, each tensor of a launch once.
        parts: launches of both kinds by the part of the step.
    """

    kernels: Counter[str] = field(default_factory=Counter)
    operators: Counter[str] = field(default_factory=Counter)
    n_bytes: int = 0
    parts: Counter[str] = field(default_factory=Counter)

    @property
    def launches(self) -> int:
        return self.kernels.total() + self.operators.total()


# The span that is open, of `Spans.PARTS`.
_span: ContextVar[str] = ContextVar("span", default="")


class _Noted(Spans):
    """Spans that tell the counter which is open, instead of measuring."""

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        token = _span.set(name)
        try:
            yield
        finally:
            _span.reset(token)


def _part() -> str:
    """What a launch now would be a part of."""
    span = _span.get()
    if span == "encoder":
        # Inside a backward pass autograd numbers its tasks.
        return "encoder, forward" if torch._C._current_graph_task_id() == -1 else "encoder, backward"
    return {"data": "images", "inner loop": "base-learner and loss"}.get(span, "update")


class Counting(TorchDispatchMode):
    """Within it everything that runs on fake tensors is counted, in `count`."""

    def __init__(self) -> None:
        super().__init__()
        self.count = Count()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "mtl_fast" and func._schema.name.split("::")[1].startswith("triton_"):
            # The launcher itself, instead of the operator's fake: what it does is seen by this mode too.
            with self, observed(then=self._note):
                return func._op_dk(DispatchKey.CPU, *args, **kwargs)
        outputs = func(*args, **kwargs)
        made = [t for t in tree_leaves(outputs) if isinstance(t, Tensor)]
        launches = launches_of(func, args)
        # What has no elements is not launched for.
        if launches and (not made or any(t.numel() for t in made)):
            name = func._schema.name.split("::")[1]
            self.count.operators[name] += launches
            self.count.parts[_part()] += launches
            self.count.n_bytes += bytes_of(name, (args, kwargs), outputs)
        return outputs

    def _note(self, launch: Launch) -> None:
        self.count.kernels[launch.name] += 1
        self.count.parts[_part()] += 1
        self.count.n_bytes += launch.work.read + launch.work.written


def launches_of(func: Any, args: tuple[Any, ...]) -> int:
    """How many kernels an operator of PyTorch takes at least."""
    namespace, name = func._schema.name.split("::")
    if namespace != "aten":
        return 0  # such as asking for a device
    is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
    if is_view or name in FREE:
        return 0
    return sum(args[-1]) if name == "convolution_backward" else 1


def bytes_of(name: str, inputs: Any, outputs: Any) -> int:
    """Read and written by an operator; what is written in place counts twice."""
    read = [t for t in tree_leaves(inputs) if isinstance(t, Tensor)]
    written = [t for t in tree_leaves(outputs) if isinstance(t, Tensor)]
    if name in GATHERS:
        read = read[1:] + written
    return sum(map(_bytes, read)) + sum(map(_bytes, written))


def _bytes(tensor: Tensor) -> int:
    """Of the elements in memory: an expanded dimension is there once."""
    n = tensor.element_size()
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        n *= size if stride else min(size, 1)
    return n


def plain(widths: tuple[int, ...], pixels: int) -> Count:
    """A step of the plain program: a task at a time, float32, Φ multiplied on in Python."""
    real, head = layers_of(_encoder(widths)), LinearHead(widths[-1], N_WAY)
    with _fake(pixels) as (to_fake, store, episodes):
        layers = [
            type(layer)(**{k: to_fake(v) if isinstance(v, Tensor) else v for k, v in vars(layer).items()})
            for layer in real
        ]
        data = Data(store.images, PREPROCESS.mean, PREPROCESS.std)
        step = PlainStep(layers, to_fake(head.weight), to_fake(head.bias), data, INNER)
        for group in step.optimizer.param_groups:
            group["foreach"] = True  # what PyTorch does by itself for parameters of a GPU
        tasks = Tasks(**{name: getattr(episodes, name) for name in Tasks.__dataclass_fields__})
        return _counted(lambda: step(tasks))


def ours(
    widths: tuple[int, ...],
    pixels: int,
    dtype: torch.dtype = torch.float16,
    *,
    route: routes.Route | None = None,
    replayed: bool = False,
) -> Count:
    """A step of `EpisodicEngine` with the `triton` backend, activations in `dtype`, and the training loop's update.

    That is Adam by one fused launch a group, which the check of all gradients can keep from stepping.

    bfloat16 would launch the same; the interpreter, in whose name kernels take tensors of the CPU, refuses it.

    Args:
        widths, pixels: of the encoder, and of its square images.
        dtype: of images and activations.
        route: of all layers; None is that of the rule.
        replayed: what a captured step is called with: a graph is one launch, whatever is in it, beside the copies
            of the step's tensors. Its bytes are those of the copies alone.

    Raises:
        RuntimeError: TRITON_INTERPRET is not set: only then kernels take tensors of the CPU, as the fake ones are.
    """
    if not interpreted():
        raise RuntimeError("counting our launches needs TRITON_INTERPRET=1 before Triton is imported")

    def by_rule(shape: routes.LayerShape, _: torch.device) -> routes.Route:
        return routes.default(shape).route

    encoder, head = _encoder(widths), LinearHead(widths[-1], N_WAY)
    with (
        _fake(pixels) as (to_fake, store, episodes),
        mock.patch.dict(os.environ, {ENVIRONMENT_VARIABLE: "triton"}),
        mock.patch.object(routes, "route", by_rule) if route is None else routes.forced(route),
        # On a GPU rows are not read back to be checked.
        mock.patch.object(import_module("mtl_fast.ops.images"), "_check_window"),
    ):
        for module in (*encoder.modules(), head):
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(to_fake(parameter), parameter.requires_grad)
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else to_fake(buffer)
        engine = EpisodicEngine(
            encoder,
            head,
            store,
            PREPROCESS,
            order="first",
            inner_lr=INNER.lr,
            inner_steps=INNER.n_steps,
            encoder_dtype=dtype,
            spans=_Noted(),
        )
        optimizer = adam(MetaConfig(), list(encoder.scale_shift_parameters()), list(head.parameters()))
        for group in optimizer.param_groups:
            group |= {"fused": True, "lr": store.images.new_full((), group["lr"], dtype=torch.float32)}

        def step(*tensors: Tensor) -> tuple[Tensor, ...]:
            optimizer.zero_grad()
            output = engine.step(Episodes(*tensors))
            guarded_step(optimizer, output.loss.isfinite().all())
            return tuple(output)

        tensors = tuple(vars(episodes).values())
        if not replayed:
            return _counted(lambda: step(*tensors))
        captured = CapturedStep(step, _Recorded(), n_warm_up=0)
        count = _counted(lambda: captured(*tensors))
        count.kernels[GRAPH] += 1
        count.parts = Counter()
        return count


class _Recorded:
    """Runs a step as it is recorded; its replay does nothing, so that what comes beside it is counted."""

    def warm_up(self, step: Step, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return step(*tensors)

    def record(self, step: Step, tensors: tuple[Tensor, ...]) -> tuple[Replay, tuple[Tensor, ...]]:
        outputs = step(*tensors)
        return (lambda: None), outputs


# What is counted of ours: as the rule routes layers, all in our kernels, and a captured step.
WAYS: Mapping[str, Mapping[str, Any]] = {
    "ours": {},
    "ours, every layer in our kernels": {"route": "triton"},
    "ours, captured": {"replayed": True},
}
Counts = dict[str, dict[int, Count]]


def ours_elsewhere(widths: Sequence[int], sizes: Sequence[int]) -> Counts:
    """`ours` by way and size, counted in a process of its own, where kernels are interpreted.

    Raises:
        RuntimeError: that process failed; the message is its last line.
    """
    done = subprocess.run(
        [sys.executable, "-m", __spec__.name, *map(str, sizes), "--widths", *map(str, widths)],
        cwd=Path(__file__).resolve().parents[2],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return {
        way: {
            int(size): Count(**{k: Counter(v) if isinstance(v, dict) else v for k, v in fields.items()})
            for size, fields in by_size.items()
        }
        for way, by_size in json.loads(done.stdout.splitlines()[-1]).items()
    }


def _counted(step: Callable[[], object]) -> Count:
    """Of the second step: the first one packs weights and makes the optimiser's state."""
    step()
    with Counting() as counting:
        step()
    return counting.count


def _encoder(widths: tuple[int, ...]) -> ResNet12:
    encoder = ResNet12(widths, dropout=0.0).to(memory_format=torch.channels_last).eval()
    encoder.enable_scale_shift("kernel")
    return encoder


@contextmanager
def _fake(pixels: int) -> Iterator[tuple[Callable[[Tensor], Tensor], Any, Any]]:
    """What makes a tensor fake, a store and a batch of tasks that are; all of the CPU, holding nothing."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def to_fake(tensor: Tensor) -> Tensor:
        return mode.from_tensor(tensor.detach())

    real = random_store(pixels)
    sampled = EpisodeSampler(real, N_WAY, N_SHOT, N_QUERY, torch.Generator().manual_seed(0)).sample(N_TASKS)
    store, episodes = copy.copy(real), copy.copy(sampled)
    object.__setattr__(store, "images", to_fake(real.images))
    for name, value in vars(sampled).items():
        object.__setattr__(episodes, name, to_fake(value))
    # In deterministic mode every new tensor would be filled first.
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        with mode:
            yield to_fake, store, episodes
    finally:
        torch.use_deterministic_algorithms(deterministic)


def main() -> None:
    """Prints `ours` in every way and size, as JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.launches", description=main.__doc__)
    parser.add_argument("sizes", type=int, nargs="+")
    parser.add_argument("--widths", type=int, nargs=4, required=True)
    given = parser.parse_args()
    counts = {
        way: {size: vars(ours(tuple(given.widths), size, **how)) for size in given.sizes}
        for way, how in WAYS.items()
    }
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
