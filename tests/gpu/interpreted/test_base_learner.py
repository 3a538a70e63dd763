"""The base-learner's Triton kernels, interpreted: against the float64 loop, and what the framework asks of operators."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mtl_fast.kernels import triton
from mtl_fast.kernels.triton import base_learner as kernels
from mtl_fast.kernels.triton import base_learner_backward, base_learner_config
from mtl_fast.kernels.triton.launch import observed
from mtl_fast.ops.backend import why
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
from tests.gpu.altered import altered

LR = 0.1
SIZES = {
    "ones": Size(1, 1, 1, 1, 1, 1),
    "two_way": Size(3, 2, 5, 4, 7, 3),
    "primes": Size(2, 5, 13, 11, 37, 4),
    "rows_fill_the_block": Size(1, 4, 16, 65, 32, 3),
    "one_row_more": Size(1, 9, 17, 3, 33, 2),
    "per_task_head": Size(3, 5, 10, 7, 13, 3, True),
    "more_than_a_piece_of_classes": Size(1, 37, 41, 5, 19, 2),
    "most_rows_and_classes": Size(1, 64, 128, 5, 19, 2),
    "no_steps": Size(2, 3, 4, 5, 6, 0),
}
by_size = pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
by_order = pytest.mark.parametrize("order", ORDERS)
by_mask = pytest.mark.parametrize("masked", [False, True], ids=["full", "masked"])
SMALL = SIZES["two_way"]


def problem(size: Size, dtype: torch.dtype = torch.float32, **options: Any) -> Problem:
    """Embeddings of norm about 3, as a trained encoder gives them; NaN and a wrong label where masked out."""
    p = make(size, **options)
    scale = 3 / size.n_features**0.5
    p = p._replace(support=p.support * scale, query=p.query * scale).to(dtype)
    if p.mask is None:
        return p
    support = torch.where(p.mask.unsqueeze(2), p.support, math.nan)
    return p._replace(support=support, labels=torch.where(p.mask, p.labels, -7))


def surrounded(p: Problem) -> Problem:
    """The same in the middle of larger buffers full of NaN: whoever reads beyond a tensor's end is seen."""

    def inside(t: Tensor) -> Tensor:
        outside = math.nan if t.is_floating_point() else 1
        buffer = torch.full((t.numel() + 256,), outside, dtype=t.dtype)
        view = buffer[128 : 128 + t.numel()].view(t.shape)
        view.copy_(t)
        return view

    return Problem(*(None if t is None else inside(t) for t in p))


def bound(size: Size) -> float:
    """The rounding of the steps, and of a gradient's sums over the queries and over the tasks of a shared head."""
    sums = torch.finfo(torch.float32).eps * math.sqrt(size.m * size.n_tasks)
    # `tolerance` takes rows of norm √D: here the step size stands for the norm of 3.
    return tolerance(size, LR * 9 / size.n_features, torch.float32) + sums


def options_of(size: Size, order: str = "second") -> dict[str, Any]:
    return {"inner_lr": LR, "n_steps": size.n_steps, "order": order, "form": "dual", "backend": "triton"}


@by_size
@by_mask
@by_order
def test_values_and_gradients_are_those_of_the_float64_loop(size: Size, masked: bool, order: str) -> None:
    p = problem(size, masked=masked)
    exact = p.to(torch.float64).with_graph()
    p = surrounded(p)
    p = p._replace(**{name: getattr(p, name).requires_grad_() for name in NAMES})
    expected = plain(exact, inner_lr=LR, n_steps=size.n_steps, order=order)
    actual = fit(p, **options_of(size, order))
    assert_near(actual, expected, bound(size))
    found = gradients(actual, p)
    for name, a, e in zip(NAMES, found, gradients(expected, exact), strict=True):
        assert_near(a, e, bound(size), name)
    if order == "first":
        assert found[0].count_nonzero() == 0
    if p.mask is not None:
        assert found[0][~p.mask].count_nonzero() == 0


@by_order
@pytest.mark.parametrize("size", [SMALL, SIZES["per_task_head"]], ids=["shared", "per_task"])
def test_fitted_heads_and_their_gradients_are_the_definition_s(size: Size, order: str) -> None:
    p = problem(size, masked=True, seed=3)
    results = []
    for q, backend in ((p.with_graph(), "triton"), (p.to(torch.float64).with_graph(), "torch")):
        g = torch.Generator().manual_seed(1)
        fitted = heads(q, **(options_of(size, order) | {"backend": backend}))
        cotangents = [torch.randn(h.shape, generator=g, dtype=torch.float64).to(h.dtype) for h in fitted]
        leaves = (q.support, q.weight, q.bias)
        results.append([*fitted, *torch.autograd.grad(fitted, leaves, cotangents, allow_unused=True)])
    for actual, expected in zip(*results, strict=True):
        assert (actual is None) == (expected is None)
        if actual is not None:
            assert_near(actual, expected, bound(size))


@by_order
def test_half_types_are_computed_in_float32(order: str) -> None:
    size = SIZES["primes"]
    half = problem(size, torch.float16)
    half = half._replace(weight=half.weight.float(), bias=half.bias.float())
    wide = half.to(torch.float32).with_graph()
    p = half.with_graph()
    actual, expected = fit(p, **options_of(size, order)), fit(wide, **options_of(size, order))
    assert torch.equal(actual, expected)
    for a, e, leaf in zip(gradients(actual, p), gradients(expected, wide), p.leaves, strict=True):
        assert a.dtype == leaf.dtype
        assert torch.equal(a, e.to(leaf.dtype))
    logits = fit(half._replace(weight=half.weight.half(), bias=half.bias.half()), **options_of(size, order))
    assert logits.dtype == torch.float16


@pytest.mark.parametrize("wanted", [(name,) for name in NAMES] + [("query", "weight")])
@by_order
def test_each_gradient_alone_is_the_same_to_the_bit(order: str, wanted: tuple[str, ...]) -> None:
    p = problem(SMALL, masked=True)
    whole = p.with_graph()
    every = dict(zip(NAMES, gradients(fit(whole, **options_of(SMALL, order)), whole), strict=True))
    part = p._replace(**{name: getattr(p, name).clone().requires_grad_() for name in wanted})
    logits = fit(part, **options_of(SMALL, order))
    assert torch.equal(logits, fit(p, **options_of(SMALL, order)))
    if wanted == ("support",) and order == "first":
        assert not logits.requires_grad
        return
    g = torch.Generator().manual_seed(5)
    logits.backward(torch.randn(logits.shape, generator=g, dtype=torch.float64).float())
    for name in wanted:
        found = getattr(part, name).grad
        assert torch.equal(torch.zeros_like(every[name]) if found is None else found, every[name]), name


def test_reading_in_pieces_changes_rounding_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many rows and classes do not fit into registers: the same sums, 16 rows at a time."""
    size = Size(2, 3, 19, 4, 11, 3)
    p = problem(size, masked=True).with_graph()
    whole = fit(p, **options_of(size))
    expected = [whole, *gradients(whole, p)]
    usual = base_learner_config.fit_config
    for module in (kernels, base_learner_backward):
        monkeypatch.setattr(
            module, "fit_config", lambda *size: replace(usual(*size), is_streamed=True, block_k=16)
        )
    pieces = fit(p, **options_of(size))
    for a, e in zip([pieces, *gradients(pieces, p)], expected, strict=True):
        assert_near(a, e, bound(size))


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
def test_a_label_out_of_range_makes_its_task_nan() -> None:
    p = problem(SMALL)
    p.labels[1, 2] = 2
    logits = fit(p, **options_of(SMALL))
    assert logits[1].isnan().all()
    assert logits[[0, 2]].isfinite().all()


def test_a_task_s_result_does_not_depend_on_the_others_to_the_bit() -> None:
    size = SIZES["per_task_head"]
    p = problem(size, masked=True)
    together = fit(p, **options_of(size))
    alone = [fit(Problem(*(x[i : i + 1] for x in p)), **options_of(size)) for i in range(size.n_tasks)]
    assert torch.equal(together, torch.cat(alone))


def test_operands_need_not_be_contiguous() -> None:
    p = problem(SMALL, masked=True)
    strided = Problem(*(torch.stack([x, x], -1)[..., 0] for x in p))
    assert torch.equal(fit(strided, **options_of(SMALL)), fit(p, **options_of(SMALL)))
    q = p.with_graph()
    fit(q, **options_of(SMALL)).sum().backward()
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in q.leaves)


@pytest.mark.parametrize(
    "shape", [(0, 4, 5), (2, 0, 5), (2, 4, 0)], ids=["no_tasks", "no_rows", "no_queries"]
)
@by_order
def test_empty_dimensions(shape: tuple[int, int, int], order: str) -> None:
    t, n, m = shape
    p = make(Size(t or 1, 3, n or 1, m or 1, 6, 2), dtype=torch.float32)
    p = p._replace(support=p.support[:t, :n], labels=p.labels[:t, :n], query=p.query[:t, :m]).with_graph()
    results = []
    for backend in ("triton", "torch"):
        logits = fit(p, inner_lr=LR, n_steps=2, form="dual", order=order, backend=backend)
        assert logits.shape == (t, m, 3)
        results.append([logits, *gradients(logits, p)])
    for a, e in zip(*results, strict=True):
        torch.testing.assert_close(a, e)


@by_order
def test_derivatives_of_the_gradients_are_the_definition_s(order: str) -> None:
    p = problem(SMALL, masked=True)
    results = []
    for q, backend in ((p.with_graph(), "triton"), (p.to(torch.float64).with_graph(), "torch")):
        logits = fit(q, **(options_of(SMALL, order) | {"backend": backend}))
        leaves = (q.query, q.weight, q.bias) if order == "first" else q.leaves
        cotangent = torch.linspace(-1, 1, logits.numel()).view_as(logits).to(logits.dtype)
        first = torch.autograd.grad(logits, leaves, cotangent, create_graph=True)
        total = sum(g.square().sum() for g in first)
        results.append([*first, *torch.autograd.grad(total, leaves, allow_unused=True)])
    for actual, expected in zip(*results, strict=True):
        assert (actual is None) == (expected is None)
        if actual is not None:
            assert_near(actual, expected, bound(SMALL))


@pytest.mark.parametrize("with_query", [True, False], ids=["logits", "heads"])
@pytest.mark.parametrize("second_order", [True, False], ids=ORDERS[::-1])
def test_opcheck(second_order: bool, with_query: bool) -> None:
    p = problem(Size(2, 2, 3, 2, 5, 2))
    inputs = (
        p.support,
        p.labels,
        p.query if with_query else None,
        p.weight,
        p.bias,
        None,
        LR,
        2,
        second_order,
    )
    # The interpreter writes through pointers, so it is not traced: schema and fakes are checked.
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.mtl_fast.triton_base_learner.default, inputs, test_utils=checks)
    logits, weight, bias, kernel, trajectory = torch.ops.mtl_fast.triton_base_learner(*inputs)
    reached = (torch.ones_like(logits), None, None) if with_query else (None, weight, bias)
    backward = (
        *reached,
        *inputs[:6],
        weight,
        kernel,
        trajectory,
        *inputs[6:],
        [second_order, with_query, True],
    )
    torch.library.opcheck(
        torch.ops.mtl_fast.triton_base_learner_backward.default, backward, test_utils=checks
    )


@by_order
def test_launches(order: str) -> None:
    """A whole batch of tasks is fitted and applied in one launch, however many steps there are."""
    p = problem(Size(16, 5, 25, 75, 64, 100))
    with observed() as launches:
        fit(p.with_graph(), inner_lr=LR, n_steps=100, order=order, backend="triton")
    assert [launch.name for launch in launches] == ["fit_kernel"]
    p = problem(SMALL).with_graph()
    logits = fit(p, **options_of(SMALL, order))
    with observed() as launches:
        torch.autograd.grad(logits, p.leaves, torch.ones_like(logits), allow_unused=True)
    assert len(launches) == (1 if order == "first" else 3)


def test_what_it_takes_and_why() -> None:
    p = problem(SMALL)
    facts: dict[str, Any] = {"support": p.support, "weight": p.weight, "others": (p.query, p.bias)}
    assert why("base_learner", n_steps=1, **facts).startswith("triton: ")
    for change, reason in (
        ({"form": "primal"}, "the primal form is asked for"),
        ({"by_step": True}, "the logits after every step are computed by the reference"),
        ({"weight": torch.zeros(65, 7)}, "at most 128 support rows and 64 classes a task, here 5 and 65"),
        ({"support": p.support.double()}, "float64"),
        ({"support": p.support.bfloat16()}, "bfloat16"),
    ):
        with pytest.raises(RuntimeError, match=r"backend='triton' cannot run this call: .*" + reason):
            why("base_learner", "triton", **(facts | change))
    with torch.autocast("cpu", torch.bfloat16):
        assert why("base_learner", **facts).startswith("triton: ")


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
def test_planted_shifted_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row beyond a task's last is let in: the comparison with the float64 loop sees it."""
    size = SIZES["primes"]
    p = problem(size)
    expected = plain(p.to(torch.float64), inner_lr=LR, n_steps=size.n_steps, order="first")
    p = surrounded(p)
    assert_near(fit(p, **options_of(size)), expected, bound(size))
    mask = "    m_n = valid_rows(p_mask, o_t, o_n, n_rows, HAS_MASK)"
    with altered(kernels, mask, mask.replace("n_rows", "n_rows + 1")) as faulty:
        monkeypatch.setattr(triton, "base_learner", faulty)
        with pytest.raises(AssertionError):
            assert_near(fit(p, **options_of(size)), expected, bound(size))
