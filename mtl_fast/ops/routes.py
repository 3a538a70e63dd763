"""Which convolution a layer takes on a GPU: the Triton kernel, or cuDNN's with the norm folded into its weights.

Where `mtl-fast tune` has measured this card with these kernels and libraries, its table says; elsewhere a rule does:
few channels leave cuDNN far from its peak, and fusing the epilogue wins; with many it is hard to beat (blocks 1 and 2
of ResNet-12 against 3 and 4).
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch

from ..files import replace_file, user_cache
from ..kernels import triton as kernels

Route = Literal["triton", "cudnn"]
ROUTES: tuple[Route, ...] = get_args(Route)
ENVIRONMENT_VARIABLE = "MTL_FAST_ROUTES_DIR"
# Output channels of block 2 of the wider ResNet-12: up to there fusing wins by the model of the kernels' time.
MOST_CHANNELS = 160

_forced: ContextVar[Route | None] = ContextVar("forced", default=None)


class LayerShape(NamedTuple):
    """What the speed of a convolution depends on.

    Attributes:
        n_in, n_out: I and O.
        height, width: of its input.
        taps: k.
        dtype: of its images, such as ``bfloat16``.
    """

    n_in: int
    n_out: int
    height: int
    width: int
    taps: int
    dtype: str

    @classmethod
    def of(cls, x: torch.Tensor, weight: torch.Tensor) -> LayerShape:
        """That of images [N, I, H, W] and a weight [O, I, k, k]."""
        (n_out, n_in), (height, width) = weight.shape[:2], x.shape[2:]
        return cls(n_in, n_out, height, width, weight.shape[-1], str(x.dtype).removeprefix("torch."))

    def __str__(self) -> str:
        return f"{self.n_in}→{self.n_out}@{self.height}×{self.width}, {self.taps}×{self.taps}, {self.dtype}"


Table = dict[LayerShape, Route]


class Choice(NamedTuple):
    """A route, and where it comes from."""

    route: Route
    reason: str


def choose(shape: LayerShape, device: torch.device) -> Choice:
    """The convolution of a layer on a device; on the CPU, where kernels are interpreted, always the kernel."""
    forced = _forced.get()
    if forced is not None:
        return Choice(forced, "forced")
    if device.type != "cuda":
        return Choice("triton", "interpreted")
    measured = table(device).get(shape)
    return default(shape) if measured is None else Choice(measured, "measured by mtl-fast tune")


def route(shape: LayerShape, device: torch.device) -> Route:
    """That of `choose`, without its reason."""
    return choose(shape, device).route


def default(shape: LayerShape) -> Choice:
    """The rule, for a layer that was not measured."""
    if shape.dtype == "float32" and not kernels.takes_tf32():
        return Choice("cudnn", "by default: float32 without TF32 has no tensor cores to feed")
    if shape.n_out <= MOST_CHANNELS:
        return Choice("triton", f"by default: at most {MOST_CHANNELS} channels")
    return Choice("cudnn", f"by default: more than {MOST_CHANNELS} channels")


@contextmanager
def forced(taken: Route) -> Iterator[None]:
    """Within it every layer takes this route: for measuring, and for tests."""
    token = _forced.set(taken)
    try:
        yield
    finally:
        _forced.reset(token)


def table(device: torch.device) -> Table:
    """What was measured on this card with these versions; empty where nothing was, or where there is no such card."""
    # A traced device need not be there.
    return _read(table_file(device)) if torch.cuda.is_available() else {}


def store(device: torch.device, seconds: Mapping[LayerShape, Mapping[Route, float]]) -> Path:
    """Writes the measured seconds, and with them the routes, for this card and these versions; returns the file.

    Layers that were stored before and not measured now are kept.
    """
    path = table_file(device)
    layers = [
        {
            **shape._asdict(),
            "route": min(by_route, key=lambda name: by_route[name]),
            "seconds": dict(by_route),
        }
        for shape, by_route in seconds.items()
    ]
    kept = [row for row in _rows(path) if _shape(row) not in seconds]
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(facts(device) | {"layers": kept + layers}, indent=1) + "\n"
    replace_file(path, [text.encode()], shared=True)
    _read.cache_clear()
    return path


def folder() -> Path:
    """Where tables lie: ``MTL_FAST_ROUTES_DIR``, or `mtl_fast/routes` in the user's cache folder."""
    chosen = os.environ.get(ENVIRONMENT_VARIABLE)
    return Path(chosen) if chosen else user_cache("routes")


def facts(device: torch.device) -> dict[str, str]:
    """What a table holds for: the card, the versions that compute on it, and our kernels' sources."""
    return {
        "card": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "triton": _triton_version(),
        "cudnn": str(torch.backends.cudnn.version()),
        "kernels": _sources(),
    }


def table_file(device: torch.device) -> Path:
    """The file for `facts`, one each."""
    found = facts(device)
    card = re.sub(r"\W+", "-", found["card"]).strip("-").lower()
    digest = hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()
    return folder() / f"{card}-{digest[:16]}.json"


# Asked for with every layer: the package's files are read once.
@functools.cache
def _triton_version() -> str:
    try:
        return version("triton")
    except PackageNotFoundError:
        return "none"


@functools.cache
def _sources() -> str:
    """A digest of the kernels' sources."""
    digest = hashlib.sha256()
    for path in sorted(Path(str(kernels.__file__)).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@functools.cache
def _read(path: Path) -> Table:
    return {_shape(row): row["route"] for row in _rows(path)}


def _rows(path: Path) -> list[dict[str, Any]]:
    """The layers of a table; none, with a warning, of a file that is not one."""
    if not path.exists():
        return []
    try:
        rows = json.loads(path.read_text("utf-8"))["layers"]
        if not all(row["route"] in ROUTES and _shape(row) for row in rows):
            raise ValueError("a route is neither triton nor cudnn")
    except (OSError, ValueError, KeyError, TypeError) as error:
        warnings.warn(f"{path} is no table of routes ({error}); `mtl-fast tune` writes it anew", stacklevel=2)
        return []
    return rows


def _shape(row: Mapping[str, Any]) -> LayerShape:
    return LayerShape(*(row[name] for name in LayerShape._fields))
