"""Every launch that is shipped, of all kernel files: what is compiled, inspected, reported and timed."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

from torch import Tensor

from .ahead import CHIPS, specialised
from .launch import BASE, Launch, configured_for


def kernel_files() -> list[ModuleType]:
    """The modules of this package that ship kernels, by name; imports Triton."""
    package = importlib.import_module(__package__)
    names = sorted(f"{__package__}.{module.name}" for module in pkgutil.iter_modules(package.__path__))
    modules = (importlib.import_module(name) for name in names if name != __name__)
    # A file that merely imports the function below ships nothing.
    return [
        module
        for module in modules
        if getattr(vars(module).get("shipped"), "__module__", "") == module.__name__
    ]


def shipped(chip: str = f"sm_{BASE}") -> dict[str, Launch]:
    """Launches on meta tensors by readable name, the kernel file's first; what layers share is there once.

    Args:
        chip: one of `CHIPS`, whose configurations they have.

    Raises:
        ValueError: a name that two launches have which are not the same.
    """
    found: dict[str, Launch] = {}
    with configured_for(CHIPS[chip].capability):
        for module in kernel_files():
            for name, launch in named_launches(module):
                if name in found and _described(found[name]) != _described(launch):
                    raise ValueError(f"two launches of {module.__name__} are shipped as {name!r}")
                found.setdefault(name, launch)
    return found


def _described(launch: Launch) -> tuple[Any, ...]:
    """All that decides what a launch does, but for the values of its tensors."""
    arguments = [
        (value.shape, value.stride(), value.dtype) if isinstance(value, Tensor) else value
        for value in launch.arguments.values()
    ]
    return launch.kernel, launch.grid, arguments, launch.constants, launch.options


def named_launches(module: ModuleType) -> Iterator[tuple[str, Launch]]:
    """One kernel file's, each name with the file's in front."""
    stem = module.__name__.rpartition(".")[2]
    for name, launch in module.shipped():
        yield name if name.split("/")[0] == stem else f"{stem}/{name}", launch


def distinct(launches: Mapping[str, Launch]) -> dict[str, list[str]]:
    """The names of those that compile to different code, each with the names of all that share its code."""
    alike: dict[Any, list[str]] = {}
    for name, launch in launches.items():
        alike.setdefault(compiled_as(launch), []).append(name)
    return {names[0]: names for names in alike.values()}


def configurations(launches: Mapping[str, Launch], *, by_switch: bool = True) -> list[str]:
    """One launch for each launch configuration, whatever the numbers of channels and the sizes of maps.

    Two types of the same size (the half ones) are one configuration. Of all with the same, the one that is given most
    operands stands for it.

    Args:
        launches: by name.
        by_switch: tell the constants that switch parts of a kernel on apart, too; without, blocks, warps, stages and
            precision only.
    """
    alike: dict[Any, list[str]] = {}
    for name, launch in launches.items():
        sizes = _SHAPES if by_switch else r"(?!BLOCK_|PRECISION)"
        constants = tuple((k, repr(v)) for k, v in launch.constants.items() if not re.match(sizes, k))
        tensors = [value for value in launch.arguments.values() if isinstance(value, Tensor)]
        width = min(t.element_size() for t in tensors if t.is_floating_point())
        key = (launch.kernel, constants, width, _items(launch.options))
        alike.setdefault(key, []).append(name)
    return [max(names, key=lambda name: _n_operands(launches[name])) for names in alike.values()]


# Constants that are a layer's shape.
_SHAPES = r"N_(?!TAPS)|HEIGHT|WIDTH|STRIDE_"


def _n_operands(launch: Launch) -> int:
    return sum(isinstance(value, Tensor) for value in launch.arguments.values())


def compiled_as(launch: Launch) -> tuple[Any, ...]:
    """What the compiler is given: the kernel, and the rest as plain data."""
    signature, constants, attributes = specialised(launch)
    return (
        launch.kernel,
        _items(signature),
        _items(constants),
        tuple(attributes),
        _items(launch.options),
    )


def _items(values: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    return tuple((name, repr(value)) for name, value in values.items())
