"""Launches and compulsory bytes of a whole meta-training step, counted: ours, and the plain program's run eagerly.

Both run on tensors that hold nothing (`FakeTensorMode`), with a dispatch mode that counts. Our operators run their
launchers, whose launches are counted as such. Every other operator of PyTorch counts as one launch, fewer than it
may take: views and empty tensors as none, a convolution's backward pass as one for each gradient asked for.
"""

from __future__ import annotations

import copy
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
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
from mtl_fast.engine import EpisodicEngine
from mtl_fast.episodes import EpisodeSampler
from mtl_fast.kernels.triton import interpreted
from mtl_fast.kernels.triton.launch import Launch, observed
from mtl_fast.nn import LinearHead, ResNet12
from mtl_fast.ops import routes
from mtl_fast.ops.backend import ENVIRONMENT_VARIABLE

N_TASKS, N_WAY, N_SHOT, N_QUERY = 2, 5, 5, 15
INNER = InnerLoop(lr=0.05, n_steps=100)
# They allocate, give a tensor another form, or ask the host (for a dtype, for the optimiser's count of its steps).
FREE = (
    "empty",
    "new_empty",
    "empty_like",
    "empty_strided",
    "new_empty_strided",
    "_unsafe_view",
    "lift_fresh",
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
    """

    kernels: Counter[str] = field(default_factory=Counter)
    operators: Counter[str] = field(default_factory=Counter)
    n_bytes: int = 0

    @property
    def launches(self) -> int:
        return self.kernels.total() + self.operators.total()


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
            self.count.n_bytes += bytes_of(name, (args, kwargs), outputs)
        return outputs

    def _note(self, launch: Launch) -> None:
        self.count.kernels[launch.name] += 1
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
        _as_on_gpu(step.optimizer)
        tasks = Tasks(**{name: getattr(episodes, name) for name in Tasks.__dataclass_fields__})
        return _counted(lambda: step(tasks))


def ours(widths: tuple[int, ...], pixels: int, dtype: torch.dtype = torch.float16) -> Count:
    """A step of `EpisodicEngine` with the `triton` backend, activations in `dtype`, and the same optimiser.

    bfloat16 would launch the same; the interpreter, in whose name kernels take tensors of the CPU, refuses it.

    Raises:
        RuntimeError: TRITON_INTERPRET is not set: only then kernels take tensors of the CPU, as the fake ones are.
    """
    if not interpreted():
        raise RuntimeError("counting our launches needs TRITON_INTERPRET=1 before Triton is imported")

    def by_rule(shape: routes.LayerShape, _: torch.device) -> routes.Route:
        return routes.default(shape)

    encoder, head = _encoder(widths), LinearHead(widths[-1], N_WAY)
    with (
        _fake(pixels) as (to_fake, store, episodes),
        mock.patch.dict(os.environ, {ENVIRONMENT_VARIABLE: "triton"}),
        mock.patch.object(routes, "route", by_rule),
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
        )
        parameters = [*encoder.scale_shift_parameters(), *head.parameters()]
        optimizer = torch.optim.Adam(parameters, lr=1e-3)
        _as_on_gpu(optimizer)

        def step() -> None:
            optimizer.zero_grad()
            engine.step(episodes)
            optimizer.step()

        return _counted(step)


def _counted(step: Callable[[], object]) -> Count:
    """Of the second step: the first one packs weights and makes the optimiser's state."""
    step()
    with Counting() as counting:
        step()
    return counting.count


def _as_on_gpu(optimizer: torch.optim.Optimizer) -> None:
    """Many tensors at a time, without readbacks: what PyTorch does by itself for parameters of a GPU."""
    for group in optimizer.param_groups:
        group["foreach"] = True


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
