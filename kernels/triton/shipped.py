"""Every launch that is shipped, of all kernel files: what is compiled, inspected, reported and timed."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable, Iterator, Mapping
from types import ModuleType
from typing import Any

from .ahead import specialised
from .launch import Launch


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


def shipped() -> dict[str, Launch]:
    """Launches on meta tensors by readable name, the kernel file's first.

    Raises:
        ValueError: a name that two launches have.
    """
    found: dict[str, Launch] = {}
    for module in kernel_files():
        for name, launch in named_launches(module):
            if name in found:
                raise ValueError(f"two launches of {module.__name__} are shipped as {name!r}")
            found[name] = launch
    return found


def named_launches(module: ModuleType) -> Iterator[tuple[str, Launch]]:
    """One kernel file's, each name with the file's in front."""
    stem = module.__name__.rpartition(".")[2]
    for name, launch in module.shipped():
        yield name if name.split("/")[0] == stem else f"{stem}/{name}", launch


def distinct(launches: Mapping[str, Launch]) -> dict[str, list[str]]:
    """The names of those that compile to different code, each with the names of all that share its code."""
    alike: dict[Any, list[str]] = {}
    for name, launch in launches.items():
        alike.setdefault(_compiled_as(launch), []).append(name)
    return {names[0]: names for names in alike.values()}


def _compiled_as(launch: Launch) -> tuple[Any, ...]:
    """What the compiler is given."""
    signature, constants, attributes = specialised(launch)
    return (
        launch.kernel,
        _items(signature),
        _items(constants),
        tuple(attributes),
        launch.num_warps,
        launch.num_stages,
    )


def _items(values: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    return tuple((name, repr(value)) for name, value in values.items())
