"""The base-learner, both forms and orders, against a loop over tasks and steps through autograd."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mtl_fast.kernels.reference.base_learner import cheaper_form, multiply_adds
from mtl_fast.ops._base_learner_operators import runs_dual
from mtl_fast.ops.base_learner import base_learner, query_logits_by_step
from tests.base_learner_cases import (
    NAMES,
    ORDERS,
    SIZES,
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

FORMS = ("dual", "primal")
by_size = pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())


@by_size
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("masked", [False, True], ids=["full", "masked"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("form", FORMS)
def test_values_and_gradients_are_those_of_a_loop_through_autograd(
    size: Size, masked: bool, order: str, form: str, dtype: torch.dtype
) -> None:
    p = make(size, masked=masked, dtype=dtype).with_graph()
    exact = p.to(torch.float64).with_graph()
    options: dict[str, Any] = {"inner_lr": 0.1, "n_steps": size.n_steps, "order": order}
    expected, actual = plain(exact, **options), fit(p, form=form, **options)
    assert actual.dtype == dtype
    bound = tolerance(size, 0.1, dtype)
    assert_near(actual, expected, bound)
    found = gradients(actual, p)
    for name, a, e in zip(NAMES, found, gradients(expected, exact), strict=True):
        assert_near(a, e, bound, name)
    if order == "first":
        assert found[0].count_nonzero() == 0


@by_size
@pytest.mark.parametrize("masked", [False, True], ids=["full", "masked"])
@pytest.mark.parametrize("order", ORDERS)
def test_dual_is_primal_to_rounding(size: Size, masked: bool, order: str) -> None:
    p = make(size, masked=masked, seed=1).with_graph()
    dual, primal = (fit(p, inner_lr=0.1, n_steps=size.n_steps, order=order, form=f) for f in FORMS)
    assert_near(dual, primal, 1e-12)
    for name, a, e in zip(NAMES, gradients(dual, p), gradients(primal, p), strict=True):
        assert_near(a, e, 1e-12, name)


@pytest.mark.parametrize("form", FORMS)
def test_a_hundred_steps_at_the_usual_size_in_float32(form: str) -> None:
    """5-way 5-shot, 640 features of norm 3: error at most twice that of the plain loop, max and RMS."""
    p64 = make(Size(4, 5, 25, 15, 640, 100), seed=2)
    p64 = p64._replace(
        support=p64.support * 3 / 640**0.5, query=p64.query * 3 / 640**0.5, weight=p64.weight * 0.02
    )
    p32 = p64.to(torch.float32)
    p64 = p32.to(torch.float64)
    options: dict[str, Any] = {"inner_lr": 0.05, "n_steps": 100, "order": "first"}
    exact = plain(p64, **options)
    torch_error = plain(p32, **options).double() - exact
    error = fit(p32, form=form, **options).double() - exact
    ulp = torch.finfo(torch.float32).eps * exact.abs().max()
    assert error.abs().max() <= 2 * torch_error.abs().max() + ulp
    assert error.norm() <= 2 * torch_error.norm() + ulp
    assert_near(fit(p64, form=form, **options), exact, 1e-12)


@pytest.mark.parametrize("masked", [False, True], ids=["full", "masked"])
@pytest.mark.parametrize("form", FORMS)
def test_first_and_second_derivatives_by_finite_differences(form: str, masked: bool) -> None:
    p = make(Size(2, 3, 4, 2, 3, 3), masked=masked, seed=4).with_graph()

    def logits(*leaves: Tensor) -> Tensor:
        values = dict(zip(NAMES, leaves, strict=True))
        return fit(p._replace(**values), inner_lr=0.3, n_steps=3, order="second", form=form)

    assert torch.autograd.gradcheck(logits, p.leaves)
    assert torch.autograd.gradgradcheck(logits, p.leaves)


@pytest.mark.parametrize("form", FORMS)
def test_first_order_is_the_initial_head_minus_constants(form: str) -> None:
    p = make(Size(2, 3, 4, 2, 3, 3), seed=4).with_graph()
    w, b = heads(p, inner_lr=0.3, n_steps=3, order="first", form=form)
    cotangents = torch.randn_like(w), torch.randn_like(b)
    found = torch.autograd.grad((w, b), (p.weight, p.bias, p.support), cotangents, allow_unused=True)
    torch.testing.assert_close(found[0], cotangents[0].sum(0))
    torch.testing.assert_close(found[1], cotangents[1].sum(0))
    assert found[2] is None


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("form", FORMS)
def test_the_value_is_the_same_to_the_bit_with_and_without_a_graph(form: str, order: str) -> None:
    p = make(Size(3, 5, 10, 6, 16, 9), masked=True, dtype=torch.float32)
    before = [leaf.clone() for leaf in p.leaves]
    options: dict[str, Any] = {"inner_lr": 0.2, "n_steps": 9, "form": form}
    with torch.no_grad():
        bare = fit(p.with_graph(), order=order, **options)
    assert torch.equal(bare, fit(p.with_graph(), order="second", **options))
    fit(p, order=order, **options)
    assert all(torch.equal(leaf, old) for leaf, old in zip(p.leaves, before, strict=True)), "input written to"


@pytest.mark.parametrize("garbage", [math.nan, math.inf, 1e30], ids=["nan", "inf", "huge"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("form", FORMS)
def test_garbage_in_masked_rows_changes_no_bit(form: str, order: str, garbage: float) -> None:
    clean = make(Size(3, 4, 9, 5, 7, 6), masked=True, seed=6)
    assert clean.mask is not None
    assert not clean.mask.all()
    dirty = clean._replace(
        support=torch.where(clean.mask[..., None], clean.support, garbage),
        labels=torch.where(clean.mask, clean.labels, -7),
    )
    results = []
    for p in (clean.with_graph(), dirty.with_graph()):
        logits = fit(p, inner_lr=0.2, n_steps=6, order=order, form=form)
        results.append([logits, *gradients(logits, p)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert results[1][1][~clean.mask].count_nonzero() == 0


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("form", FORMS)
def test_a_batch_of_unequal_shots_is_each_task_alone(form: str, order: str) -> None:
    shots = (12, 12, 7, 5, 1)
    size = Size(len(shots), 3, 12, 5, 33, 6)
    p = make(size, seed=7)
    options: dict[str, Any] = {"inner_lr": 0.2, "n_steps": 6, "order": order, "form": form}
    together = fit(p._replace(mask=torch.arange(12) < torch.tensor(shots)[:, None]), **options)
    for task, n in enumerate(shots):
        one = slice(task, task + 1)
        alone = p._replace(support=p.support[one, :n], labels=p.labels[one, :n], query=p.query[one])
        assert_near(together[one], fit(alone, **options), tolerance(size, 0.2))


@pytest.mark.parametrize("form", FORMS)
def test_a_task_without_valid_rows_keeps_the_initial_head(form: str) -> None:
    p = make(Size(2, 3, 4, 5, 6, 5))
    mask = torch.tensor([[True] * 4, [False] * 4])
    w, b = heads(p._replace(mask=mask), inner_lr=0.2, n_steps=5, form=form)
    assert torch.equal(w[1], p.weight)
    assert torch.equal(b[1], p.bias)
    assert not torch.equal(w[0], p.weight)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("order", ORDERS)
def test_no_steps_give_the_initial_head(form: str, order: str) -> None:
    p = make(Size(2, 3, 4, 5, 6, 0)).with_graph()
    logits = fit(p, inner_lr=0.1, n_steps=0, order=order, form=form)
    torch.testing.assert_close(logits, p.query @ p.weight.T + p.bias)
    support_gradient, *others = gradients(logits, p)
    assert support_gradient.count_nonzero() == 0
    assert all(g.count_nonzero() > 0 for g in others)


@pytest.mark.parametrize(
    "shape", [(0, 4, 5), (2, 0, 5), (2, 4, 0)], ids=["no_tasks", "no_rows", "no_queries"]
)
@pytest.mark.parametrize("form", ["auto", *FORMS])
def test_empty_dimensions(shape: tuple[int, int, int], form: str) -> None:
    t, n, m = shape
    p = make(Size(t or 1, 3, n or 1, m or 1, 6, 2))
    p = p._replace(support=p.support[:t, :n], labels=p.labels[:t, :n], query=p.query[:t, :m])
    logits = fit(p, inner_lr=0.1, n_steps=2, form=form)
    assert logits.shape == (t, m, 3)
    if n == 0:  # nothing to fit: the initial head
        torch.testing.assert_close(logits, p.query @ p.weight.T + p.bias)


@pytest.mark.parametrize("masked", [False, True], ids=["full", "masked"])
@pytest.mark.parametrize("n_steps", [0, 1, 6])
def test_logits_by_step_are_those_of_that_many_steps(n_steps: int, masked: bool) -> None:
    size = Size(3, 5, 10, 7, 33, n_steps)
    p = make(size, masked=masked, seed=9).with_graph()
    steps = query_logits_by_step(
        p.support, p.labels, p.query, p.weight, p.bias, inner_lr=0.2, n_steps=n_steps, support_mask=p.mask
    )
    assert steps.shape == (n_steps + 1, 3, 7, 5)
    assert not steps.requires_grad
    for t, logits in enumerate(steps):
        assert_near(logits, fit(p, inner_lr=0.2, n_steps=t).detach(), tolerance(size, 0.2), f"step {t}")


@pytest.mark.parametrize(
    ("n", "d", "c", "n_steps", "form"),
    [
        (5, 640, 5, 100, "dual"),
        (25, 640, 5, 1, "primal"),  # one step does not pay for the Gram matrix
        (500, 64, 5, 100, "primal"),
        (1, 2, 1, 2, "dual"),  # by hand: 2 + 4 + 2 = 8 on both sides, ties go to dual
        (2, 4, 3, 2, "dual"),  # by hand: dual 4·4 + 2·24 + 2·12 = 88 ≤ primal 2·48 = 96
        (4, 4, 3, 2, "primal"),  # by hand: dual 16·4 + 2·48 + 2·48 = 256 > primal 2·96 = 192
    ],
)
def test_auto_takes_the_form_with_fewer_operations_in_torch(
    n: int, d: int, c: int, n_steps: int, form: str
) -> None:
    assert cheaper_form(n, d, c, n_steps) == form
    p = make(Size(1, c, min(n, 40), 3, d, n_steps), dtype=torch.float32)
    taken = cheaper_form(min(n, 40), d, c, n_steps)
    options: dict[str, Any] = {"inner_lr": 0.01, "n_steps": n_steps, "order": "first", "backend": "torch"}
    assert torch.equal(fit(p, form="auto", **options), fit(p, form=taken, **options))


@pytest.mark.parametrize(
    ("n", "n_steps", "form", "fastest"),
    [
        (25, 1, "auto", True),
        (25, 100, "auto", True),
        (75, 1, "auto", False),
        (75, 2, "auto", False),
        (75, 5, "auto", True),
        (75, 1, "dual", True),
        (25, 1, "primal", False),
    ],
)
def test_one_call_is_taken_unless_many_have_far_less_to_multiply(
    n: int, n_steps: int, form: str, fastest: bool
) -> None:
    """One step need not know a Gram matrix; that of 25 rows costs less than the calls that it saves."""
    support, weight = torch.empty(2, n, 640), torch.empty(5, 640)
    taken, why = runs_dual(support, weight, n_steps=n_steps, form=form, by_step=False)
    assert taken == fastest, why
    if form == "auto" and not taken:
        dual, primal = multiply_adds(n, 640, 5, n_steps)
        assert f"{dual / primal:.1f} times the multiply-adds" in why


def test_half_precision_is_computed_in_float32_also_under_autocast() -> None:
    p = make(Size(2, 5, 10, 6, 64, 50), dtype=torch.bfloat16)
    wide = p.to(torch.float32)
    options: dict[str, Any] = {"inner_lr": 0.05, "n_steps": 50}
    expected = fit(wide, **options)
    assert torch.equal(fit(p, **options), expected.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fit(wide, **options), expected)
    mixed = p._replace(weight=p.weight.float(), bias=p.bias.float())
    assert torch.equal(fit(mixed, **options), expected)
    for problem, dtype in ((p, torch.bfloat16), (mixed, torch.float32)):
        fitted = heads(problem, **options)
        assert [head.dtype for head in fitted] == [dtype, dtype]


# In-place baddbmm has no batching rule of its own: vmap falls back to a loop, with the right values.
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("form", FORMS)
def test_function_transforms_and_compile(form: str, order: str) -> None:
    size = Size(3, 4, 6, 5, 8, 4, True)
    p = make(size, masked=True, seed=10)
    options: dict[str, Any] = {"inner_lr": 0.1, "n_steps": 4, "order": order, "form": form}
    expected = fit(p, **options)

    def one(
        support: Tensor, labels: Tensor, query: Tensor, weight: Tensor, bias: Tensor, mask: Tensor
    ) -> Tensor:
        arguments = [x[None] for x in (support, labels, query, weight, bias)]
        return base_learner(*arguments, support_mask=mask[None], **options)[0]

    assert_near(torch.func.vmap(one)(*p), expected, tolerance(size, 0.1))
    with torch.no_grad():
        assert_near(torch.func.vmap(one)(*p), expected, tolerance(size, 0.1))
        # Only the labels are mapped: nothing that is updated in place may be smaller than what it takes in.
        fixed = [x[0] for x in p]
        mapped = torch.func.vmap(lambda y: one(fixed[0], y, *fixed[2:]))(p.labels)
        assert_near(mapped[0], expected[0], tolerance(size, 0.1))
    by_func = torch.func.grad(lambda w: fit(p._replace(weight=w), **options).square().sum())(p.weight)
    q = p.with_graph()
    by_autograd = torch.autograd.grad(fit(q, **options).square().sum(), q.weight)[0]
    assert_near(by_func, by_autograd, tolerance(size, 0.1))
    compiled = torch.compile(lambda problem: fit(problem, **options), backend="eager", fullgraph=True)
    assert_near(compiled(p), expected, tolerance(size, 0.1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_numbers_of_numpy_equal_to_the_bit(dtype: torch.dtype) -> None:
    p = make(Size(2, 3, 4, 5, 6, 2), dtype=dtype)
    found = fit(p, inner_lr=np.float64(0.1), n_steps=np.int64(2))
    assert torch.equal(found, fit(p, inner_lr=0.1, n_steps=2))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"support": torch.zeros(4, 6)}, ValueError, r"support: .*\[4, 6\]"),
        ({"support": torch.zeros(2, 4, 6).long()}, TypeError, "support: .*int64"),
        ({"labels": torch.zeros(2, 3).long()}, ValueError, r"support_labels: .*\[2, 4\].*\[2, 3\]"),
        ({"labels": torch.zeros(2, 4)}, TypeError, "support_labels: .*int64.*float32"),
        ({"labels": torch.full((2, 4), 3)}, ValueError, r"support_labels: must lie in 0\.\.2"),
        ({"labels": torch.full((2, 4), -1)}, ValueError, r"support_labels: must lie in 0\.\.2"),
        ({"query": torch.zeros(2, 5, 7)}, ValueError, r"query: .*\[2, 4, 6\].*\[2, 5, 7\]"),
        ({"query": torch.zeros(3, 5, 6)}, ValueError, r"query: .*\[2, 4, 6\].*\[3, 5, 6\]"),
        ({"weight": torch.zeros(3, 5)}, ValueError, r"weight: .*\[2, 4, 6\].*\[3, 5\]"),
        ({"weight": torch.zeros(3, 3, 6)}, ValueError, r"weight: .*\[2, 4, 6\].*\[3, 3, 6\]"),
        ({"weight": torch.zeros(0, 6)}, ValueError, r"weight: .*C ≥ 1.*\[0, 6\]"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias: .*\[3\].*\[3, 6\].*\[4\]"),
        ({"mask": torch.ones(2, 3).bool()}, ValueError, r"support_mask: .*\[2, 4\].*\[2, 3\]"),
        ({"mask": torch.ones(2, 4)}, TypeError, "support_mask: .*bool.*float32"),
        ({"bias": torch.zeros(3, device="meta")}, ValueError, "bias: is on meta, support is on cpu"),
        ({"query": torch.zeros(2, 5, 6, device="meta")}, ValueError, "query: is on meta"),
        ({"inner_lr": math.nan}, ValueError, "inner_lr: .*nan"),
        ({"inner_lr": -0.1}, ValueError, "inner_lr: .*-0.1"),
        (
            {"inner_lr": torch.tensor(0.1, requires_grad=True)},
            TypeError,
            "inner_lr: expected a number; a learned step size is not differentiated",
        ),
        ({"n_steps": -1}, ValueError, "n_steps: .*-1"),
        ({"n_steps": 2.0}, TypeError, "n_steps: .*float"),
        ({"n_steps": True}, TypeError, "n_steps: .*bool"),
        ({"order": "third"}, ValueError, "order: .*'third'"),
        ({"form": "both"}, ValueError, "form: .*'both'"),
        ({"backend": "none"}, ValueError, "base_learner: .*'none'"),
    ],
)
def test_a_broken_contract_names_the_argument(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    p = make(Size(2, 3, 4, 5, 6, 2), dtype=torch.float32)
    options: dict[str, Any] = {"inner_lr": 0.1, "n_steps": 2}
    for name, value in change.items():
        if name in Problem._fields:
            p = p._replace(**{name: value})
        else:
            options[name] = value
    with pytest.raises(error, match=message):
        fit(p, **options)
