"""The base-learner's native backend: against the float64 definition, its limits, and what the framework asks of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from mtl_fast.ops._library import native_runs
from mtl_fast.ops.backend import ENVIRONMENT_VARIABLE, why
from mtl_fast.ops.base_learner import query_logits_by_step
from tests.base_learner_cases import (
    NAMES,
    ORDERS,
    Problem,
    Size,
    assert_near,
    fit,
    gradients,
    heads,
    make,
    plain,
    tolerance,
)

BUILT, WHY = native_runs()
pytestmark = pytest.mark.skipif(not BUILT, reason=WHY)

LR = 0.1
SIZES = {
    "ones": Size(1, 1, 1, 1, 1, 1),
    "two_way": Size(3, 2, 5, 4, 7, 3),
    "primes": Size(3, 5, 13, 11, 17, 7),
    "one_feature": Size(2, 3, 7, 5, 1, 4),
    "rows_fill_the_lanes": Size(2, 4, 16, 33, 16, 5),
    "most_rows": Size(2, 5, 128, 37, 33, 5),
    "most_classes": Size(2, 64, 127, 65, 67, 3),
    "per_task_head": Size(3, 5, 10, 7, 13, 5, True),
    "no_steps": Size(2, 3, 4, 5, 6, 0),
    "usual": Size(16, 5, 25, 75, 640, 20),
    "hundred_steps": Size(3, 5, 5, 15, 640, 100),
}
by_size = pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
by_order = pytest.mark.parametrize("order", ORDERS)
by_mask = pytest.mark.parametrize("masked", [False, True], ids=["full", "masked"])


def problem(size: Size, **options: Any) -> Problem:
    """In float32, with embeddings of norm about 3, as a trained encoder gives them; NaN where masked out."""
    p = make(size, **options)
    scale = 3 / size.n_features**0.5
    p = p._replace(support=p.support * scale, query=p.query * scale).to(torch.float32)
    if p.mask is None:
        return p
    support = torch.where(p.mask.unsqueeze(2), p.support, math.nan)
    return p._replace(support=support, labels=torch.where(p.mask, p.labels, -7))


def bound(size: Size) -> float:
    """The rounding of the steps, and of a gradient's sums over the queries and over the tasks of a shared head."""
    sums = torch.finfo(torch.float32).eps * math.sqrt(size.m * size.n_tasks)
    # `tolerance` takes rows of norm √D: here the step size stands for the norm of 3.
    return tolerance(size, LR * 9 / size.n_features, torch.float32) + sums


@by_size
@by_mask
@by_order
def test_values_and_gradients_are_those_of_the_float64_loop(size: Size, masked: bool, order: str) -> None:
    p = problem(size, masked=masked).with_graph()
    exact = p.to(torch.float64).with_graph()
    options: dict[str, Any] = {"inner_lr": LR, "n_steps": size.n_steps, "order": order}
    expected, actual = plain(exact, **options), fit(p, form="dual", backend="native", **options)
    assert_near(actual, expected, bound(size))
    found = gradients(actual, p)
    for name, a, e in zip(NAMES, found, gradients(expected, exact), strict=True):
        assert_near(a, e, bound(size), name)
    if order == "first":
        assert found[0].count_nonzero() == 0
    if p.mask is not None:
        assert found[0][~p.mask].count_nonzero() == 0


@by_order
def test_error_at_the_usual_size_is_at_most_twice_that_of_the_torch_backend(order: str) -> None:
    p = problem(SIZES["usual"], seed=2).with_graph()
    exact = p.to(torch.float64).with_graph()
    options: dict[str, Any] = {"inner_lr": 0.05, "n_steps": 100, "order": order, "form": "dual"}
    results = []
    for q, backend in ((p, "native"), (p, "torch"), (exact, "torch")):
        logits = fit(q, backend=backend, **options)
        results.append([logits, *gradients(logits, q)])
    for name, native, torch_, e in zip(("logits", *NAMES), *results, strict=True):
        ulp = torch.finfo(torch.float32).eps * e.abs().max()
        error, torch_error = (native.double() - e).abs(), (torch_.double() - e).abs()
        assert error.max() <= 2 * torch_error.max() + ulp, name
        assert error.square().mean().sqrt() <= 2 * torch_error.square().mean().sqrt() + ulp, name


@by_size
@by_mask
@by_order
def test_fitted_heads_and_their_gradients_are_the_definition_s(size: Size, masked: bool, order: str) -> None:
    p = problem(size, masked=masked, seed=3).with_graph()
    exact = p.to(torch.float64).with_graph()
    options: dict[str, Any] = {"inner_lr": LR, "n_steps": size.n_steps, "order": order, "form": "dual"}
    results = []
    for q, backend in ((p, "native"), (exact, "torch")):
        g = torch.Generator().manual_seed(1)
        fitted = heads(q, backend=backend, **options)
        cotangents = [torch.randn(h.shape, generator=g, dtype=torch.float64).to(h.dtype) for h in fitted]
        leaves = (q.support, q.weight, q.bias)
        found = torch.autograd.grad(fitted, leaves, cotangents, allow_unused=True)
        results.append([*fitted, *found])
    for actual, expected in zip(*results, strict=True):
        assert (actual is None) == (expected is None)
        if actual is not None:
            assert_near(actual, expected, bound(size))


@pytest.mark.parametrize("wanted", [(name,) for name in NAMES] + [("query", "weight"), ("support", "bias")])
@by_order
def test_each_gradient_alone_is_the_same_to_the_bit(order: str, wanted: tuple[str, ...]) -> None:
    p = problem(SIZES["primes"], masked=True)
    options: dict[str, Any] = {
        "inner_lr": LR,
        "n_steps": 4,
        "order": order,
        "form": "dual",
        "backend": "native",
    }
    whole = p.with_graph()
    every = dict(zip(NAMES, gradients(fit(whole, **options), whole), strict=True))
    part = p._replace(**{name: getattr(p, name).clone().requires_grad_() for name in wanted})
    logits = fit(part, **options)
    if wanted == ("support",) and order == "first":
        assert not logits.requires_grad
        return
    logits.backward(
        torch.randn(logits.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).float()
    )
    for name in wanted:
        found = getattr(part, name).grad
        assert torch.equal(torch.zeros_like(every[name]) if found is None else found, every[name]), name


@by_order
def test_the_value_is_the_same_to_the_bit_with_and_without_a_graph(order: str) -> None:
    p = problem(SIZES["primes"], masked=True)
    options: dict[str, Any] = {
        "inner_lr": LR,
        "n_steps": 9,
        "order": order,
        "form": "dual",
        "backend": "native",
    }
    bare = fit(p, **options)
    assert not bare.requires_grad
    assert torch.equal(fit(p.with_graph(), **options), bare)


@by_mask
@by_order
def test_one_two_and_five_threads_give_the_same_bits(order: str, masked: bool, threads: None) -> None:
    results = []
    for n_threads in (1, 2, 5):
        torch.set_num_threads(n_threads)
        p = problem(SIZES["usual"], masked=masked).with_graph()
        logits = fit(p, inner_lr=LR, n_steps=20, order=order, form="dual", backend="native")
        results.append([logits, *gradients(logits, p)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@by_order
def test_a_task_s_result_does_not_depend_on_the_others_to_the_bit(order: str) -> None:
    size = Size(5, 5, 25, 75, 64, 10, True)
    p = problem(size, masked=True).with_graph()
    options: dict[str, Any] = {
        "inner_lr": LR,
        "n_steps": 10,
        "order": order,
        "form": "dual",
        "backend": "native",
    }
    together = fit(p, **options)
    alone = [fit(Problem(*(x[i : i + 1] for x in p)), **options) for i in range(size.n_tasks)]
    assert torch.equal(together, torch.cat(alone))


def test_a_row_that_is_not_a_number_spoils_its_task_only() -> None:
    p = problem(Size(3, 5, 10, 7, 33, 5))
    p.support[1, 4, 20] = math.nan
    logits = fit(p, inner_lr=LR, n_steps=5, backend="native", form="dual")
    assert logits[1].isnan().all()
    assert logits[[0, 2]].isfinite().all()


def test_large_logits_saturate_as_in_the_definition() -> None:
    p = problem(SIZES["primes"])
    p = p._replace(weight=p.weight * 100, bias=p.bias * 100)
    options: dict[str, Any] = {"inner_lr": LR, "n_steps": 7, "form": "dual"}
    expected = fit(p.to(torch.float64), backend="torch", **options)
    assert_near(fit(p, backend="native", **options), expected, bound(SIZES["primes"]))


def test_operands_need_not_be_contiguous() -> None:
    p = problem(SIZES["per_task_head"], masked=True)
    options: dict[str, Any] = {"inner_lr": LR, "n_steps": 3, "form": "dual", "backend": "native"}
    strided = Problem(*(torch.stack([x, x], -1)[..., 0] for x in p))
    assert not any(x.is_contiguous() for x in strided)
    results = []
    for q in (p.with_graph(), strided._replace(**{n: getattr(strided, n).requires_grad_() for n in NAMES})):
        logits = fit(q, **options)
        results.append([logits, *gradients(logits, q)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    # A gradient that is expanded from one number.
    q = p.with_graph()
    fit(q, **options).sum().backward()
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in q.leaves)


@by_order
def test_derivatives_of_the_gradients_are_the_definition_s(order: str) -> None:
    p = problem(SIZES["two_way"], masked=True)
    results = []
    for q, backend in ((p.with_graph(), "native"), (p.to(torch.float64).with_graph(), "torch")):
        logits = fit(q, inner_lr=LR, n_steps=3, order=order, form="dual", backend=backend)
        cotangent = torch.linspace(-1, 1, logits.numel()).view_as(logits).to(logits.dtype).requires_grad_()
        leaves = (q.query, q.weight, q.bias) if order == "first" else q.leaves
        first = torch.autograd.grad(logits, leaves, cotangent, create_graph=True)
        total = sum(g.square().sum() for g in first)
        second = torch.autograd.grad(total, (*leaves, cotangent), allow_unused=True)
        results.append([*first, *second])
    for actual, expected in zip(*results, strict=True):
        assert (actual is None) == (expected is None)
        if actual is not None:
            assert_near(actual, expected, bound(SIZES["two_way"]))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"n": 129}, "at most 128 support rows and 64 classes a task, here 129 and 5"),
        ({"n_way": 65}, "at most 128 support rows and 64 classes a task, here 6 and 65"),
        (
            {"n": 40, "n_steps": 1},
            "1 steps on 40 rows of 8 features take 7.5 times the multiply-adds of the primal form",
        ),
        ({"form": "primal"}, "the primal form is asked for"),
        ({"dtype": torch.float64}, "float32"),
    ],
    ids=["rows", "classes", "primal_is_cheaper", "primal", "float64"],
)
def test_beyond_its_limits_torch_runs_and_says_why(change: dict[str, Any], reason: str) -> None:
    size = Size(2, change.get("n_way", 5), change.get("n", 6), 3, 8, change.get("n_steps", 50))
    p = make(size, dtype=change.get("dtype", torch.float32))
    options: dict[str, Any] = {"inner_lr": LR, "n_steps": size.n_steps, "form": change.get("form", "auto")}
    facts = {"support": p.support, "weight": p.weight, "n_steps": size.n_steps, "form": options["form"]}
    said = why("base_learner", **facts)
    assert said.startswith("torch: not native: ")
    assert reason in said
    assert torch.equal(fit(p, **options), fit(p, backend="torch", **options))
    for call in (fit, heads):
        with pytest.raises(
            RuntimeError, match="base_learner: backend='native' cannot run this call"
        ) as raised:
            call(p, backend="native", **options)
        assert reason in str(raised.value)


def test_logits_after_every_step_are_the_reference_s() -> None:
    p = problem(SIZES["primes"])
    arguments = (p.support, p.labels, p.query, p.weight, p.bias)
    steps = query_logits_by_step(*arguments, inner_lr=LR, n_steps=3)
    assert_near(
        steps[3], fit(p, inner_lr=LR, n_steps=3, form="dual", backend="native"), bound(SIZES["primes"])
    )
    with pytest.raises(RuntimeError, match="after every step are computed by the reference"):
        query_logits_by_step(*arguments, inner_lr=LR, n_steps=3, backend="native")


def test_auto_takes_native_and_the_environment_turns_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem(SIZES["usual"])
    options: dict[str, Any] = {"inner_lr": LR, "n_steps": 20}
    facts = {"support": p.support, "weight": p.weight, "n_steps": 20}
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    assert why("base_learner", **facts).startswith("native: ")
    assert torch.equal(fit(p, **options), fit(p, backend="native", **options))
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "torch")
    assert why("base_learner", **facts).startswith("torch: ")
    assert torch.equal(fit(p, **options), fit(p, backend="torch", **options))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_computed_in_float32(dtype: torch.dtype) -> None:
    half = problem(SIZES["primes"]).to(dtype)
    options: dict[str, Any] = {"inner_lr": LR, "n_steps": 7, "form": "dual", "backend": "native"}
    p, wide = half.with_graph(), half.to(torch.float32).with_graph()
    actual, expected = fit(p, **options), fit(wide, **options)
    assert torch.equal(actual, expected.to(dtype))
    assert all(h.dtype == dtype for h in heads(p, **options))
    for a, e in zip(gradients(actual, p), gradients(expected, wide), strict=True):
        assert a.dtype == dtype
        # The cotangent is rounded to the half type too.
        assert_near(a, e, 4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("label", [-1, 5])
def test_labels_out_of_range_are_the_definition_s_error(label: int) -> None:
    p = problem(SIZES["primes"])
    p.labels[1, 2] = label
    said = []
    for backend in ("native", "torch"):
        with pytest.raises(ValueError, match="support_labels: must lie in 0") as raised:
            fit(p, inner_lr=LR, n_steps=2, form="dual", backend=backend)
        said.append(str(raised.value).split(": ")[:2])
    assert said[0] == said[1] == ["support_labels", "must lie in 0..4 (weight has 5 rows)"]


@pytest.mark.parametrize(
    "shape", [(0, 4, 5), (2, 0, 5), (2, 4, 0)], ids=["no_tasks", "no_rows", "no_queries"]
)
def test_empty_dimensions(shape: tuple[int, int, int]) -> None:
    t, n, m = shape
    p = make(Size(t or 1, 3, n or 1, m or 1, 6, 2), dtype=torch.float32)
    p = p._replace(support=p.support[:t, :n], labels=p.labels[:t, :n], query=p.query[:t, :m]).with_graph()
    results = []
    for backend in ("native", "torch"):
        logits = fit(p, inner_lr=LR, n_steps=2, form="dual", backend=backend)
        assert logits.shape == (t, m, 3)
        results.append([logits, *gradients(logits, p)])
    for a, e in zip(*results, strict=True):
        torch.testing.assert_close(a, e)


def arguments(size: Size, masked: bool, with_query: bool, second_order: bool) -> tuple[Any, ...]:
    p = problem(size, masked=masked)
    query = p.query if with_query else None
    return p.support, p.labels, query, p.weight, p.bias, p.mask, LR, size.n_steps, second_order


@by_mask
@pytest.mark.parametrize("with_query", [True, False], ids=["logits", "heads"])
@pytest.mark.parametrize("second_order", [True, False], ids=ORDERS[::-1])
@pytest.mark.parametrize("size", [SIZES["two_way"], SIZES["per_task_head"]], ids=["shared", "per_task"])
def test_opcheck(size: Size, second_order: bool, with_query: bool, masked: bool) -> None:
    inputs = arguments(size, masked, with_query, second_order)
    # NaN does not equal itself in the check.
    inputs = tuple(x.nan_to_num() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)
    torch.library.opcheck(torch.ops.mtl_fast.base_learner.default, inputs)
    logits, weight, bias, kernel, trajectory = torch.ops.mtl_fast.base_learner(*inputs)
    reached = (torch.ones_like(logits), None, None) if with_query else (None, weight, bias)
    wanted = [second_order, with_query, True]
    backward = (*reached, *inputs[:6], weight, kernel, trajectory, *inputs[6:], wanted)
    torch.library.opcheck(torch.ops.mtl_fast.base_learner_backward.default, backward)


# The compiler makes an instance of each autograd function that it traces.
@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")
@by_order
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_a_compiled_call_without_graph_breaks_gives_the_same_bits(compiler: str, order: str) -> None:
    p = problem(SIZES["two_way"], masked=True)
    options: dict[str, Any] = {"inner_lr": LR, "n_steps": 3, "order": order, "form": "dual"}
    eager, traced = p.with_graph(), p.with_graph()
    torch.compiler.reset()
    compiled = torch.compile(lambda q: fit(q, **options), backend=compiler, fullgraph=True)
    expected, actual = fit(eager, **options), compiled(traced)
    assert torch.equal(actual, expected)
    for a, e in zip(gradients(actual, traced), gradients(expected, eager), strict=True):
        assert torch.equal(a, e)


def test_function_transforms_go_to_torch() -> None:
    p = problem(SIZES["two_way"])
    options: dict[str, Any] = {"inner_lr": LR, "n_steps": 3, "form": "dual"}
    by_func = torch.func.grad(lambda w: fit(p._replace(weight=w), **options).square().sum())(p.weight)
    q = p.with_graph()
    fit(q, **options).square().sum().backward()
    assert q.weight.grad is not None
    assert_near(by_func, q.weight.grad, bound(SIZES["two_way"]))
