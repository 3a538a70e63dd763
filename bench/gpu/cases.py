"""What is timed on a GPU: every configuration by itself, operations beside PyTorch's best, and a whole step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bench.networks import PREPROCESS, layers_of
from bench.peers.meta_step import BatchedStep, Data, FoldedLayer, InnerLoop, PlainStep, Tasks
from bench.step import Problem, Shape
from mtl_fast.config import MetaConfig
from mtl_fast.engine import EpisodicEngine
from mtl_fast.engine.capture import capture
from mtl_fast.kernels.triton.launch import Launch
from mtl_fast.ops.routes import LayerShape
from mtl_fast.training.meta_update import adam, guarded_step
from mtl_fast.tune import layers_of as layer_shapes
from mtl_fast.tune import training_step

from .timing import Call

OURS, PLAIN, BATCHED = "ours", "plain PyTorch", "PyTorch batched, channels-last, compiled"
COMPILED = {"torch.compile": "default", "torch.compile, max-autotune": "max-autotune-no-cudagraphs"}
N_IMAGES = 160


@dataclass(frozen=True)
class Contest:
    """Contenders for the same work, by name; the first is ours. They are built when their turn comes."""

    name: str
    contenders: Mapping[str, Callable[[], Call]]


def materialised(launch: Launch, device: torch.device) -> Launch:
    """The launch with tensors that there are: noise, and zeros where whole numbers point at something."""

    def real(value: Tensor | float | None) -> Tensor | float | None:
        if not isinstance(value, Tensor):
            return value
        made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
        return made.normal_(std=0.1) if made.is_floating_point() else made.zero_()

    return replace(launch, arguments={name: real(value) for name, value in launch.arguments.items()})


def convolutions(device: torch.device, n_images: int = N_IMAGES) -> Iterator[Contest]:
    """A training step of every layer of ResNet-12 at 84 and 32 pixels, in bfloat16."""
    for shape in layer_shapes((64, 128, 256, 512), (84, 32), ("bf16",)):
        yield Contest(f"ss_conv forward and backward, {shape}", _contenders(shape, device, n_images))


def _contenders(shape: LayerShape, device: torch.device, n_images: int) -> dict[str, Callable[[], Call]]:
    def torch_step() -> Call:
        return training_step(shape, n_images, device, backend="torch")

    def compiled(mode: str) -> Callable[[], Call]:
        return lambda: torch.compile(torch_step(), mode=mode, dynamic=False)

    return {
        OURS: lambda: training_step(shape, n_images, device),
        "PyTorch channels-last": torch_step,
        **{name: compiled(mode) for name, mode in COMPILED.items()},
    }


def whole_step(device: torch.device, pixels: int, shape: Shape, dtype: torch.dtype) -> Contest:
    """Meta-training steps with Adam from the same start: ours captured and eager, and two in plain PyTorch.

    Ours ends as in the training loop, which lets no gradient through that is not finite; the others' are not looked at.
    """
    problem = Problem(shape, n_tasks=2, pixels=pixels)
    store = copy.copy(problem.store)
    object.__setattr__(store, "images", problem.store.images.to(device))
    episodes = replace(
        problem.episodes, **{name: value.to(device) for name, value in vars(problem.episodes).items()}
    )

    def ours(captured: bool) -> Call:
        encoder, head = problem.network().to(device), problem.head().to(device)
        engine = EpisodicEngine(
            encoder,
            head,
            store,
            PREPROCESS,
            order="first",
            inner_lr=shape.inner.lr,
            inner_steps=shape.inner.n_steps,
            encoder_dtype=dtype,
        )
        optimizer = adam(MetaConfig(), list(encoder.scale_shift_parameters()), list(head.parameters()))

        def step() -> tuple[Tensor, ...]:
            optimizer.zero_grad()
            loss = engine.step(episodes).loss
            guarded_step(optimizer, loss.isfinite().all())
            return (loss,)

        return capture(step, device) if captured else step

    def theirs(batched: bool) -> Call:
        layers = [
            type(layer)(**{n: v.to(device) if isinstance(v, Tensor) else v for n, v in vars(layer).items()})
            for layer in layers_of(problem.network())
        ]
        head = problem.head().to(device)
        data = Data(store.images, PREPROCESS.mean, PREPROCESS.std)
        tasks = Tasks(**{name: getattr(episodes, name) for name in Tasks.__dataclass_fields__})
        if batched:
            folded = [FoldedLayer.of(layer, torch.channels_last) for layer in layers]
            taken = BatchedStep(folded, head.weight, head.bias, data, shape.inner, compiled=True)
        else:
            taken = PlainStep(layers, head.weight, head.bias, data, shape.inner)

        def step() -> object:
            with torch.autocast(device.type, dtype):
                return taken(tasks)

        return step

    contenders = {
        f"{OURS}, captured": lambda: ours(captured=True),
        f"{OURS}, eager": lambda: ours(captured=False),
        BATCHED: lambda: theirs(batched=True),
        PLAIN: lambda: theirs(batched=False),
    }
    return Contest(f"meta-training step, ResNet-12 at {pixels}", contenders)


STEP = Shape(inner=InnerLoop(lr=0.05, n_steps=100))
