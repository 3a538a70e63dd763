"""The native kernels at shapes that Hypothesis draws, against the float64 definitions, each to its derived tolerance."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtl_fast.kernels.contracts import Epilogue
from tests.base_learner_cases import NAMES, ORDERS, Size, assert_near, fit, gradients, plain
from tests.native_cases import assert_native_agrees, needs_native
from tests.ops.test_base_learner_native import LR, bound, problem
from tests.ops.test_ss_conv_native import case, residual_of

pytestmark = needs_native

# The same examples every time; a failure prints what it failed on.
DRAWN = settings(max_examples=60, deadline=None, derandomize=True)
CHANNELS, SIDES = st.integers(1, 40), st.integers(1, 14)


@DRAWN
@given(
    size=st.tuples(st.integers(1, 4), CHANNELS, CHANNELS, SIDES, SIDES, st.sampled_from([1, 3])),
    granularity=st.sampled_from(["kernel", "filter"]),
    activation=st.sampled_from(["none", "before_residual", "after_residual"]),
    pool=st.booleans(),
    with_residual=st.booleans(),
    seed=st.integers(0, 99),
)
def test_convolutions(
    size: tuple[int, ...], granularity: str, activation: Any, pool: bool, with_residual: bool, seed: int
) -> None:
    x, conv = case(size, granularity, seed)
    if pool and min(x.shape[2:]) < 2:
        return
    residual = residual_of(x, conv, seed + 1) if with_residual else None
    assert_native_agrees(x, conv, Epilogue(activation, 0.1, pool=pool), residual, seed=seed + 2)


@DRAWN
@given(
    n_tasks=st.integers(1, 4),
    n_way=st.integers(1, 9),
    rows=st.integers(1, 33),
    n_query=st.integers(1, 12),
    width=st.integers(1, 70),
    n_steps=st.integers(0, 8),
    per_task=st.booleans(),
    masked=st.booleans(),
    order=st.sampled_from(ORDERS),
)
def test_base_learners(
    n_tasks: int,
    n_way: int,
    rows: int,
    n_query: int,
    width: int,
    n_steps: int,
    per_task: bool,
    masked: bool,
    order: Any,
) -> None:
    size = Size(n_tasks, n_way, rows, n_query, width, n_steps, per_task)
    p = problem(size, masked=masked).with_graph()
    exact = p.to(torch.float64).with_graph()
    options: dict[str, Any] = {"inner_lr": LR, "n_steps": n_steps, "order": order}
    expected, actual = plain(exact, **options), fit(p, form="dual", backend="native", **options)
    assert_near(actual, expected, bound(size))
    for name, a, e in zip(NAMES, gradients(actual, p), gradients(expected, exact), strict=True):
        assert_near(a, e, bound(size), name)
