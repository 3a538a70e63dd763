"""Choice of the backend: order, precedence, refusals, and the reason in words."""

from __future__ import annotations

from typing import Any

import pytest

from mtl_fast.errors import InputError
from mtl_fast.ops import backend
from mtl_fast.ops.backend import ENVIRONMENT_VARIABLE, OPERATIONS, choose, register, why


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    """No environment variable, `torch` alone; what a test registers is gone after it."""
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    torch_alone = {op: {"torch": backend._REGISTRY[op]["torch"]} for op in OPERATIONS}
    monkeypatch.setattr(backend, "_REGISTRY", torch_alone)


def small_only(size: int = 0, **_: Any) -> tuple[bool, str]:
    return size < 10, f"size {size} against a limit of 10"


@pytest.mark.parametrize("op", OPERATIONS)
def test_torch_is_always_there(op: str) -> None:
    assert choose(op, size=10**9).backend == "torch"
    assert why(op) == "torch: plain PyTorch runs everywhere"


def test_auto_takes_the_last_registered_that_can_and_says_why_not_the_others() -> None:
    register("images", "slow", small_only)
    register("images", "fast", lambda **_: (False, "never"))
    assert choose("images", size=5).backend == "slow"
    assert why("images", size=5) == "slow: not fast: never; size 5 against a limit of 10"
    large = "torch: not fast: never; not slow: size 11 against a limit of 10; plain PyTorch runs everywhere"
    assert why("images", size=11) == large
    assert choose("ss_conv", size=5).backend == "torch", "registered for one operation only"


def test_the_keyword_wins_over_the_environment_which_wins_over_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    register("images", "a", small_only)
    register("images", "b", small_only)
    assert choose("images").backend == "b"
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "a")
    assert choose("images").backend == "a"
    assert why("images") == f"a: asked for by {ENVIRONMENT_VARIABLE}=a"
    assert choose("images", "torch").backend == "torch"
    assert why("images", "torch") == "torch: asked for by backend=torch"
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "auto")
    assert choose("images").backend == "b"


def test_a_backend_asked_for_by_name_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    register("images", "fast", small_only)
    with pytest.raises(RuntimeError, match=r"images: backend='fast' cannot run this call: size 12 against"):
        choose("images", "fast", size=12)
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "fast")
    with pytest.raises(RuntimeError, match=f"{ENVIRONMENT_VARIABLE}='fast' cannot run this call: size 12"):
        choose("images", size=12)


def test_unknown_names_are_errors_that_list_the_known(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"unknown operation 'pool'; operations: ss_conv, .*images"):
        choose("pool")
    with pytest.raises(ValueError, match="unknown operation 'pool'"):
        register("pool", "fast", small_only)
    with pytest.raises(ValueError, match=r"images: backend='fast' is unknown; it has: auto, torch"):
        choose("images", "fast")
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "fast")
    with pytest.raises(ValueError, match=f"images: {ENVIRONMENT_VARIABLE}='fast' is unknown"):
        choose("images")


def test_a_wrong_name_in_the_environment_is_a_wrong_input(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line tells it in one line."""
    register("images", "fast", small_only)
    for name in ("fast", "faster"):
        monkeypatch.setenv(ENVIRONMENT_VARIABLE, name)
        with pytest.raises(InputError, match=f"images: {ENVIRONMENT_VARIABLE}='{name}'"):
            choose("images", size=12)


def test_the_environment_names_a_backend_for_the_operations_that_have_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    register("ss_conv", "fast", small_only)
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "fast")
    assert choose("ss_conv", size=5).backend == "fast"
    assert why("images") == f"torch: images has no fast backend, which {ENVIRONMENT_VARIABLE}=fast asks for"
    with pytest.raises(ValueError, match="images: backend='fast' is unknown"):
        choose("images", "fast")


def test_no_backend_at_all_says_why_each_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_REGISTRY", {"images": {"only": small_only}})
    with pytest.raises(
        RuntimeError, match=r"images: no backend can run this call: not only: size 10 against"
    ):
        choose("images", size=10)
