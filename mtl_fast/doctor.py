"""`mtl-fast doctor`: what is installed, what runs on what and why, a self-test of seconds, and what to do."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from . import __version__
from .errors import InputError
from .kernels import native
from .ops.backend import ENVIRONMENT_VARIABLE, OPERATIONS, why

State = Literal["ok", "could be better", "wrong"]
MARKS: dict[State, str] = {"ok": "ok", "could be better": "--", "wrong": "!!"}
OPTIONAL = {
    "triton": "GPU kernels",
    "tensorboard": "logs in TensorBoard's format",
    "ninja": "compiling the CPU kernels",
}

LEAST_FREE = 2**30  # bytes; a run's checkpoints and a small data set's images
SHIPPED_ACCURACY = 0.7601  # of the model that comes with the package, on the first 100 test tasks of seed 0


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        name: what was looked at.
        value: what was found.
        state: ``ok``; ``could be better``: all works, something is slower or missing; ``wrong``.
        advice: what to do, unless all is well.
    """

    name: str
    value: str
    state: State = "ok"
    advice: str = ""


def doctor(*, self_test: bool = True) -> int:
    """Prints the report; returns 1 if anything is wrong, else 0."""
    findings: list[Finding] = []
    for title, section in _sections(self_test):
        print(f"\n{title}" if findings else title)
        for finding in section:
            findings.append(finding)
            print(f"  {MARKS[finding.state]}  {finding.name:<22} {finding.value}", flush=True)
            if finding.advice:
                print(f"{'':29}{'→'} {finding.advice}")
    counts = {state: sum(f.state == state for f in findings) for state in MARKS}
    print(
        f"\n{counts['ok']} ok, {counts['could be better']} could be better (--), {counts['wrong']} wrong (!!)"
    )
    return int(counts["wrong"] > 0)


def _sections(self_test: bool) -> Iterator[tuple[str, Iterator[Finding]]]:
    yield "Versions", _versions()
    yield "Machine", _machine()
    yield "Folders", _folders()
    yield "CPU kernels", _kernels()
    where = "on a GPU" if torch.cuda.is_available() else "float32 on the CPU"
    yield f"Which backend runs each operation ({where})", _backends()
    for card in _cards():
        yield f"Convolutions of ResNet-12 on {card} (84×84, bfloat16): ours or cuDNN's", _routes(card)
    if self_test:
        yield "Self-test", _self_test()


def _versions() -> Iterator[Finding]:
    yield Finding("mtl_fast", __version__)
    yield Finding("Python", platform.python_version())
    yield Finding("torch", torch.__version__)
    for package in ("numpy", "safetensors", "matplotlib"):
        yield _installed(package, None)
    for package, purpose in OPTIONAL.items():
        yield _installed(package, purpose)


def _installed(package: str, purpose: str | None) -> Finding:
    """`purpose` is what an optional package is for; None: it must be there."""
    try:
        return Finding(package, importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        advice = f"pip install {package}"
        if purpose is None:
            return Finding(package, "not installed", "wrong", advice)
        return Finding(package, f"not installed; it is for {purpose}", "could be better", advice)


def _machine() -> Iterator[Finding]:
    cores, threads = _cores(), torch.get_num_threads()
    yield Finding("system", f"{platform.system()} {platform.machine()}")
    yield Finding("vectors", torch.backends.cpu.get_cpu_capability())
    if threads > cores:
        yield Finding(
            "threads",
            f"{threads} on {cores} cores",
            "could be better",
            f"more threads than cores wait for each other: OMP_NUM_THREADS={cores}",
        )
    else:
        yield Finding("threads", f"{threads} of {cores} cores")
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(i)
            size = f"{device.total_memory / 2**30:.0f} GiB, compute capability {device.major}.{device.minor}"
            yield Finding(f"cuda:{i}", f"{device.name}, {size}")
        yield _triton()
    elif torch.version.cuda is None:
        yield Finding("GPU", "none: this torch was built without CUDA")
    else:
        yield Finding(
            "GPU",
            f"none found, though torch was built for CUDA {torch.version.cuda}",
            "could be better",
            "where there is a GPU, look at its driver: nvidia-smi",
        )


def _cards() -> list[torch.device]:
    """The GPUs that our kernels run on."""
    from .kernels import triton

    can, _ = triton.load()
    return [torch.device("cuda", i) for i in range(torch.cuda.device_count() if can else 0)]


def _routes(card: torch.device) -> Iterator[Finding]:
    """The route of each layer and where it comes from: the table that `mtl-fast tune` made of this card, or a rule."""
    from .ops import routes
    from .tune import layers_of

    path = routes.table_file(card)
    if path.exists():
        yield Finding("measured", str(path))
    else:
        yield Finding(
            "measured", "nothing, with these versions on this card", "could be better", "mtl-fast tune"
        )
    for layer in layers_of((64, 128, 256, 512), (84,), ("bf16",)):
        choice = routes.choose(layer, card)
        name = f"{layer.n_in}→{layer.n_out}@{layer.height}, {layer.taps}×{layer.taps}"
        yield Finding(name, f"{choice.route}: {choice.reason}")


def _triton() -> Finding:
    """What GPU kernels need; without it a GPU computes with plain PyTorch."""
    from .kernels import triton

    can, reason = triton.load()
    if can:
        return Finding("GPU kernels", reason)
    return Finding("GPU kernels", reason, "could be better", "pip install triton")


def _folders() -> Iterator[Finding]:
    from .data.cache import ENVIRONMENT_VARIABLE as CACHE_VARIABLE
    from .data.cache import cache_folder

    yield _folder("decoded images", cache_folder(), f"{CACHE_VARIABLE} names another folder")
    yield _folder("this folder", Path.cwd(), "give commands an --output elsewhere")


def _folder(name: str, folder: Path, advice: str) -> Finding:
    """Whether it, or where it will be made, can be written and has room."""
    # Unlike `Path.exists`, this is false of what lies in a closed folder.
    nearest = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    if not os.access(nearest, os.W_OK):
        return Finding(name, f"{folder} cannot be written", "could be better", advice)
    free = shutil.disk_usage(nearest).free
    value = f"{folder} ({free / 2**30:.1f} GiB free)"
    if free < LEAST_FREE:
        return Finding(name, value, "could be better", f"free some space, or {advice}")
    return Finding(name, value)


def _cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _kernels() -> Iterator[Finding]:
    from .kernels.native import build

    try:
        tools = build.Tools.found()
        version = tools.version.partition("\n")[0]
        yield Finding("compiler", f"{tools.compiler} ({version})")
    except build.NoCompilerError as error:
        yield Finding(
            "compiler",
            str(error),
            "could be better",
            "a wheel with the kernels needs none; else install g++ and ninja",
        )
    folder = build.user_folder()
    yield _folder("folder", folder, "MTL_FAST_BUILD_DIR names another folder")
    chosen = os.environ.get(ENVIRONMENT_VARIABLE)
    if chosen:
        yield Finding(
            ENVIRONMENT_VARIABLE,
            chosen,
            "could be better",
            f"unset {ENVIRONMENT_VARIABLE}: auto takes the fastest",
        )
    loaded, reason = native.load()
    if loaded:
        yield Finding("library", reason)
    else:
        yield Finding("library", reason, "could be better", "mtl-fast build")


def _backends() -> Iterator[Finding]:
    for op in OPERATIONS:
        try:
            backend, _, reason = why(op).partition(": ")
        except (RuntimeError, ValueError) as error:
            yield Finding(op, str(error), "wrong", f"unset {ENVIRONMENT_VARIABLE}")
            continue
        # The plain definition is meant for what no faster backend has.
        slower = "not native:" in reason
        advice = "see the library above" if slower else ""
        yield Finding(op, f"{backend}: {reason}", "could be better" if slower else "ok", advice)


def _self_test() -> Iterator[Finding]:
    for name, check in (
        ("convolution", _convolution_is_right),
        ("inner loop", _inner_loop_is_right),
        ("same bits twice", _bits_repeat),
    ):
        yield _finished(name, functools.partial(_checked, name, check))
    yield _finished("shipped model", _shipped_model)
    yield _finished("meta-training", _speed)


def _finished(name: str, test: Callable[[], Finding]) -> Finding:
    """What a test found; one that cannot run is wrong, and the others still do."""
    try:
        return test()
    except (RuntimeError, ValueError) as error:
        advice = (
            f"unset {ENVIRONMENT_VARIABLE}" if os.environ.get(ENVIRONMENT_VARIABLE) else "please report this"
        )
        return Finding(name, " ".join(str(error).split()), "wrong", advice)


def _shipped_model() -> Finding:
    """All of it together: the model that comes with the package on tasks of the embedded characters."""
    from .config import EvaluationConfig
    from .training.evaluate import evaluate_model
    from .training.models import SHIPPED, load_model

    try:
        load_model(SHIPPED)
    except InputError as error:
        return Finding("shipped model", str(error), "wrong", "install mtl-fast again")
    score = evaluate_model(SHIPPED, evaluation=EvaluationConfig(n_tasks=100), device="cpu")
    found = score.interval.mean
    value = f"{found:.2%} of 7,500 answers right, {SHIPPED_ACCURACY:.2%} expected"
    # Processors round differently: an answer in a thousand may change.
    if abs(found - SHIPPED_ACCURACY) <= 0.001:
        return Finding("shipped model", value)
    return Finding(
        "shipped model", value, "wrong", f"please report this; {ENVIRONMENT_VARIABLE}=torch may avoid it"
    )


def _checked(name: str, check: Callable[[], tuple[float, float]]) -> Finding:
    """Of a check that gives the largest relative error and its bound."""
    error, bound = check()
    value = f"largest error {error:.1e}, bound {bound:.0e}" if bound else f"largest difference {error:g}"
    if error <= bound:
        return Finding(name, value)
    return Finding(name, value, "wrong", f"please report this; {ENVIRONMENT_VARIABLE}=torch avoids it")


def _convolution_is_right() -> tuple[float, float]:
    """Value and gradients of a scale-and-shift convolution against float64."""
    from .ops import ConvOperands, Epilogue, FrozenFilters, ss_conv

    g = torch.Generator().manual_seed(0)
    x, weight, bias, cotangent = (
        torch.randn(shape, generator=g, dtype=torch.float64)
        for shape in ((4, 32, 21, 21), (48, 32, 3, 3), (48,), (4, 48, 10, 10))
    )
    scale = 1 + 0.1 * torch.randn(48, 32, 1, 1, generator=g, dtype=torch.float64)

    def run(dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in (x, scale, bias)]
        filters = FrozenFilters(weight.to(dtype), padding=1)
        conv = ConvOperands(filters, leaves[1], leaves[2])
        # Without an activation: rounding must not decide which side of a kink a value lies on.
        y = ss_conv(leaves[0], conv, epilogue=Epilogue("none"), backend=_backend_for(dtype))[:, :, ::2, ::2][
            :, :, :10, :10
        ]
        return [y.detach(), *torch.autograd.grad(y, leaves, cotangent.to(dtype))]

    pairs = zip(run(torch.float32), run(torch.float64), strict=True)
    return max(float((a - e).abs().max() / e.abs().max()) for a, e in pairs), 1e-4


def _backend_for(dtype: torch.dtype) -> str:
    """What is compared with comes from the definition, also where the environment asks for another backend."""
    return "torch" if dtype == torch.float64 else "auto"


def _inner_loop_is_right() -> tuple[float, float]:
    """Adapted logits of eight tasks against float64."""
    from .ops import base_learner

    g = torch.Generator().manual_seed(0)
    support, query = (torch.randn(8, n, 64, generator=g, dtype=torch.float64) / 8 for n in (25, 75))
    labels = torch.arange(5).repeat_interleave(5).expand(8, -1)

    def run(dtype: torch.dtype) -> torch.Tensor:
        zeros = torch.zeros(5, 64, dtype=dtype), torch.zeros(5, dtype=dtype)
        settings: dict[str, Any] = {"inner_lr": 0.5, "n_steps": 50, "order": "first"}
        return base_learner(
            support.to(dtype), labels, query.to(dtype), *zeros, **settings, backend=_backend_for(dtype)
        )

    exact = run(torch.float64)
    return float((run(torch.float32) - exact).abs().max() / exact.abs().max()), 1e-4


def _bits_repeat() -> tuple[float, float]:
    """Gradients of one meta-step, taken twice."""
    step = _meta_step()
    first, second = step(), step()
    return max(float((a - b).abs().max()) for a, b in zip(first, second, strict=True)), 0.0


def _meta_step() -> Callable[[], list[torch.Tensor]]:
    """A meta-training step of a slim ResNet-12 at 32 pixels on noise: 2 tasks, 5-way 1-shot, 15 queries."""
    from .data.store import ImageStore
    from .engine import EpisodicEngine, Preprocess
    from .episodes import EpisodeSampler
    from .nn import LinearHead, ResNet12

    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (8 * 20, 32, 32, 3), generator=g, dtype=torch.uint8)
    store = ImageStore(images, torch.arange(8).repeat_interleave(20), tuple(map(str, range(8))))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = ResNet12((16, 32, 64, 128)).eval()
    encoder.enable_scale_shift("kernel")
    head = LinearHead(encoder.feature_dim, 5, generator=g)
    parameters = [*encoder.scale_shift_parameters(), *head.parameters()]
    engine = EpisodicEngine(encoder, head, store, Preprocess((127.5,) * 3, (64.0,) * 3), inner_lr=0.01)
    episodes = EpisodeSampler(store, 5, 1, 15, g).sample(2)

    def step() -> list[torch.Tensor]:
        for parameter in parameters:
            parameter.grad = None
        engine.step(episodes)
        return [p.grad for p in parameters if p.grad is not None]

    return step


def _speed(seconds: float = 3.0) -> Finding:
    """Tasks a second of the same step."""
    step = _meta_step()
    step()
    n, start = 0, time.perf_counter()
    while (passed := time.perf_counter() - start) < seconds:
        step()
        n += 1
    threads = torch.get_num_threads()
    return Finding(
        "meta-training",
        f"{2 * n / passed:.0f} tasks/s (slim ResNet-12 @ 32, 5-way 1-shot, 15 queries, second order, "
        f"{threads} {'thread' if threads == 1 else 'threads'})",
    )
