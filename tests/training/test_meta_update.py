"""The meta-update: rates that are halved, and a step that nothing non-finite gets through."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mtl_fast.config import MetaConfig
from mtl_fast.training import meta_update
from mtl_fast.training.meta_update import LossScale, guarded_step, keep_on_device, set_rates
from tests.training import tiny


def test_both_rates_are_halved_down_to_the_floor() -> None:
    meta = MetaConfig(lr=1e-3, head_lr=4e-4, decay_every=7, lr_floor=1e-4)
    optimizer = meta_update.adam(meta, [nn.Parameter(torch.zeros(2))], [nn.Parameter(torch.zeros(3))])
    # start/2, start/4, …, each at least the floor
    for update, moved, head in (
        (0, 1e-3, 4e-4),
        (6, 1e-3, 4e-4),
        (7, 5e-4, 2e-4),
        (13, 5e-4, 2e-4),
        (14, 2.5e-4, 1e-4),
        (21, 1.25e-4, 1e-4),
        (28, 1e-4, 1e-4),
        (70_000, 1e-4, 1e-4),
    ):
        set_rates(optimizer, meta, update)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([moved, head], rel=1e-12)
    low = MetaConfig(lr=5e-5, head_lr=0.0, lr_floor=1e-4, decay_every=1)
    optimizer = meta_update.adam(low, [nn.Parameter(torch.zeros(2))], [nn.Parameter(torch.zeros(3))])
    set_rates(optimizer, low, 9)
    assert [group["lr"] for group in optimizer.param_groups] == [5e-5, 0.0]


def test_the_first_halving_may_come_earlier() -> None:
    """MTL's PyTorch recipe: after 900 updates, then every 1000, without a floor."""
    meta = MetaConfig(lr=1e-4, head_lr=1e-3, decay_every=1000, decay_first=900, lr_floor=0.0)
    optimizer = meta_update.adam(meta, [nn.Parameter(torch.zeros(2))], [nn.Parameter(torch.zeros(3))])
    for update, n_halvings in ((0, 0), (899, 0), (900, 1), (1899, 1), (1900, 2), (9_999, 10)):
        set_rates(optimizer, meta, update)
        expected = [1e-4 * 0.5**n_halvings, 1e-3 * 0.5**n_halvings]
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(expected, rel=1e-12), update


def test_hard_updates_count_in_the_schedule_of_rates(pretrained: Path, tmp_path: Path) -> None:
    config = tiny.with_meta(decay_every=3, lr=8e-3, head_lr=4e-3, lr_floor=1.5e-3)
    run = tiny.meta_training(tmp_path, pretrained, config)
    rates = []
    step = run.optimizer.step
    run.optimizer.step = lambda: rates.append([g["lr"] for g in run.optimizer.param_groups]) or step()  # type: ignore[func-returns-value,method-assign,assignment]
    run.run()
    assert rates == [[8e-3, 4e-3]] * 3 + [[4e-3, 2e-3]] * 3 + [[2e-3, 1.5e-3]] * 3 + [[1.5e-3, 1.5e-3]]


# Fused as on a GPU; elsewhere it is a step between copies.
FUSED = pytest.mark.parametrize("fused", [False, True], ids=["copied", "fused"])


def quadratic(seed: int, fused: bool = False) -> tuple[list[nn.Parameter], torch.optim.Adam]:
    g = torch.Generator().manual_seed(seed)
    parameters = [nn.Parameter(torch.randn(shape, generator=g)) for shape in ((3, 5), (7,), ())]
    return parameters, torch.optim.Adam(parameters, lr=0.01, fused=fused)


def give_gradients(parameters: list[nn.Parameter], step: int) -> None:
    g = torch.Generator().manual_seed(100 + step)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=g)


def state_of(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [
        tensor.detach().clone()
        for p in parameters
        for tensor in (p, *(v for v in optimizer.state[p].values() if isinstance(v, Tensor)))
    ]


@FUSED
def test_the_guarded_step_is_adam_where_all_is_finite(fused: bool) -> None:
    (guarded, g_adam), (plain, p_adam) = quadratic(0, fused), quadratic(0, fused)
    for step in range(4):
        give_gradients(guarded, step)
        give_gradients(plain, step)
        assert bool(guarded_step(g_adam, torch.tensor(True)))
        p_adam.step()
    pairs = zip(state_of(guarded, g_adam), state_of(plain, p_adam), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@FUSED
@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize("wrong", ["loss", "nan gradient", "inf gradient"])
def test_the_guarded_step_leaves_all_as_it_was_where_something_is_not_finite(
    wrong: str, before: int, fused: bool
) -> None:
    """And the steps after it are those of a run that never had it."""
    (guarded, g_adam), (plain, p_adam) = quadratic(1, fused), quadratic(1, fused)
    for step in range(before):
        for parameters, adam in ((guarded, g_adam), (plain, p_adam)):
            give_gradients(parameters, step)
            guarded_step(adam, torch.tensor(True))
    give_gradients(guarded, 7)
    weights = [p.detach().clone() for p in guarded]
    if wrong != "loss":
        assert guarded[1].grad is not None
        guarded[1].grad[3] = math.nan if wrong == "nan gradient" else -math.inf
    assert not bool(guarded_step(g_adam, torch.tensor(wrong != "loss")))
    assert all(torch.equal(p, w) for p, w in zip(guarded, weights, strict=True))
    for parameters, adam in ((guarded, g_adam), (plain, p_adam)):
        give_gradients(parameters, 8)
        guarded_step(adam, torch.tensor(True))
    pairs = zip(state_of(guarded, g_adam), state_of(plain, p_adam), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@FUSED
def test_parameters_without_a_gradient_are_no_matter(fused: bool) -> None:
    parameters, adam = quadratic(2, fused)
    give_gradients(parameters, 0)
    parameters[2].grad = None
    before = parameters[2].detach().clone()
    assert bool(guarded_step(adam, torch.tensor(True)))
    assert torch.equal(parameters[2], before)


@FUSED
def test_gradients_of_a_scaled_loss_are_scaled_back(fused: bool) -> None:
    """By a power of two, to the bit."""
    (scaled, s_adam), (plain, p_adam) = quadratic(3, fused), quadratic(3, fused)
    scale = torch.tensor(2.0**16)
    for step in range(3):
        give_gradients(scaled, step)
        give_gradients(plain, step)
        for p in scaled:
            assert p.grad is not None
            p.grad *= scale
        assert bool(guarded_step(s_adam, torch.tensor(True), scale))
        p_adam.step()
    pairs = zip(state_of(scaled, s_adam), state_of(plain, p_adam), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_the_fused_step_takes_gradients_of_any_strides() -> None:
    """A kernel on images gives a scale's gradient the strides of channels-last, of one element in two dimensions."""
    scale = nn.Parameter(torch.ones(4, 3, 1, 1))
    adam = torch.optim.Adam([scale], lr=0.01, fused=True)
    scale.grad = torch.ones(4, 3, 1, 1).as_strided((4, 3, 1, 1), (3, 1, 3, 3))
    assert scale.grad.stride() != scale.stride()
    assert bool(guarded_step(adam, torch.tensor(True)))
    assert torch.allclose(scale, torch.full_like(scale, 0.99))
    assert scale.grad.stride() == scale.stride()


def test_the_scale_of_the_loss_follows_the_rule_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LossScale, "INTERVAL", 3)
    ours = LossScale(torch.device("cpu"))
    theirs = torch.amp.GradScaler("cpu", growth_interval=3)
    parameter = nn.Parameter(torch.zeros(()))
    sgd = torch.optim.SGD([parameter], lr=0.0)
    for good in (1, 1, 1, 0, 1, 1, 0, 0, 1, 1, 1, 1, 1, 1):
        theirs.scale(parameter * (1.0 if good else math.inf)).backward()
        theirs.step(sgd)
        theirs.update()
        sgd.zero_grad()
        ours.update(torch.tensor(bool(good)))
        assert float(ours.scale) == theirs.get_scale()
    again = LossScale(torch.device("cpu"))
    again.load_state_dict({name: tensor.clone() for name, tensor in ours.state_dict().items()})
    for scale in (ours, again):
        scale.update(torch.tensor(True))
    assert torch.equal(ours.scale, again.scale)
    assert torch.equal(ours.n_good, again.n_good)


def test_a_scale_that_only_falls_is_of_no_use() -> None:
    scale = LossScale(torch.device("cpu"))
    n_steps = 0
    while bool(scale.is_useful()):
        scale.update(torch.tensor(False))
        n_steps += 1
    assert n_steps == 33


def test_on_a_cpu_rates_and_counters_stay_the_hosts() -> None:
    parameters, adam = quadratic(4)
    give_gradients(parameters, 0)
    adam.step()
    before = state_of(parameters, adam)
    # As a state that was saved on a GPU would have them.
    adam.param_groups[0] |= {"lr": torch.tensor(0.01), "capturable": True, "fused": True}
    keep_on_device(adam)
    (group,) = adam.param_groups
    assert (type(group["lr"]), group["capturable"], group["fused"]) == (float, False, None)
    assert group["lr"] == pytest.approx(0.01)
    assert all(torch.equal(a, b) for a, b in zip(before, state_of(parameters, adam), strict=True))


def test_a_rate_that_a_captured_step_reads_is_changed_in_place() -> None:
    meta = MetaConfig(lr=1e-3, head_lr=4e-4, decay_every=7)
    optimizer = meta_update.adam(meta, [nn.Parameter(torch.zeros(2))], [nn.Parameter(torch.zeros(3))])
    rates = [torch.zeros(()), torch.zeros(())]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    set_rates(optimizer, meta, 7)
    assert [float(rate) for rate in rates] == pytest.approx([5e-4, 2e-4])
    assert all(group["lr"] is rate for group, rate in zip(optimizer.param_groups, rates, strict=True))
