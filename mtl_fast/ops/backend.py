"""Which backend runs an operation, and the reason in words.

A backend registers an operation with a predicate ``facts -> (can, why)``. `auto` asks the registered
backends in order of speed; a backend asked for by name that cannot run raises with its reason. The
keyword ``backend=`` wins over the environment variable ``MTL_FAST_BACKEND``, which wins over ``auto``.
The variable names a backend for all operations: those that do not have it at all run on `torch`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..errors import InputError

OPERATIONS = (
    "ss_conv",
    "ss_block",
    "task_conv",
    "effective_weights",
    "base_learner",
    "episode_norm",
    "images",
)
ENVIRONMENT_VARIABLE = "MTL_FAST_BACKEND"

Predicate = Callable[..., tuple[bool, str]]


class CannotRun(InputError, RuntimeError):
    """A backend asked for by name cannot run this call; where the environment asks, that is the user's to mend."""


class Elsewhere(str):
    """A refusal that goes without saying where nobody asked for the backend: it is for another device."""


@dataclass(frozen=True)
class Choice:
    """The backend that runs and why, as `why` prints it."""

    backend: str
    reason: str

    def __str__(self) -> str:
        return f"{self.backend}: {self.reason}"


def _always(**_: Any) -> tuple[bool, str]:
    return True, "plain PyTorch runs everywhere"


# Fastest first; `torch` is the definition of every operation and always last.
_REGISTRY: dict[str, dict[str, Predicate]] = {op: {"torch": _always} for op in OPERATIONS}


# What `why` adds of a call that the backend of an operation runs; nothing that a call itself has to ask.
_EXPLAINED: dict[tuple[str, str], Callable[..., str]] = {}


def register(
    op: str, backend: str, predicate: Predicate, explained: Callable[..., str] | None = None
) -> None:
    """Adds `backend` for `op`, ahead of the slower ones registered before it.

    Args:
        explained: ``facts -> text``, empty or what `why` adds where this backend runs.
    """
    if op not in _REGISTRY:
        raise ValueError(f"unknown operation {op!r}; operations: {', '.join(OPERATIONS)}")
    _REGISTRY[op] = {backend: predicate, **_REGISTRY[op]}
    if explained is not None:
        _EXPLAINED[op, backend] = explained


def choose(op: str, requested: str = "auto", **facts: Any) -> Choice:
    """The backend that will run `op`.

    Args:
        op: name of an operation, one of `OPERATIONS`.
        requested: ``auto`` or a backend's name (the call's ``backend=``).
        facts: what predicates look at: tensors, flags, sizes.

    Raises:
        ValueError: unknown operation or (an InputError) backend.
        RuntimeError: a backend asked for by name cannot run this call (a CannotRun); the message is its reason.
    """
    if op not in _REGISTRY:
        raise ValueError(f"unknown operation {op!r}; operations: {', '.join(OPERATIONS)}")
    source = "backend="
    if requested == "auto":
        requested = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
        source = ENVIRONMENT_VARIABLE + "="
    candidates = _REGISTRY[op]
    if requested != "auto":
        if requested not in candidates:
            if source != "backend=" and any(requested in backends for backends in _REGISTRY.values()):
                # The variable is meant for all operations, and a backend need not have each of them.
                return Choice("torch", f"{op} has no {requested} backend, which {source}{requested} asks for")
            raise InputError(f"{op}: {source}{requested!r} is unknown; it has: auto, {', '.join(candidates)}")
        can, reason = candidates[requested](**facts)
        if not can:
            raise CannotRun(f"{op}: {source}{requested!r} cannot run this call: {reason}")
        return Choice(requested, f"asked for by {source}{requested}")
    refusals: list[str] = []
    for name, predicate in candidates.items():
        can, reason = predicate(**facts)
        if can:
            return Choice(name, "; ".join([*refusals, reason]))
        if not isinstance(reason, Elsewhere):
            refusals.append(f"not {name}: {reason}")
    raise RuntimeError(f"{op}: no backend can run this call: {'; '.join(refusals)}")


def why(op: str, backend: str = "auto", **facts: Any) -> str:
    """The backend that `op` would take for these facts and the reason, in one line.

    Of convolutions on a GPU, given `x` and their operands, it tells each layer's route too: our kernel or cuDNN's.

    >>> why("ss_conv")
    'torch: plain PyTorch runs everywhere'
    """
    choice = choose(op, backend, **facts)
    explained = _EXPLAINED.get((op, choice.backend))
    more = explained(**facts) if explained else ""
    return f"{choice}; {more}" if more else str(choice)
