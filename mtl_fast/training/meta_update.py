"""The meta-update: Adam, its rates, and a step that nothing non-finite gets through."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..config import MetaConfig


def adam(
    meta: MetaConfig, moved: list[torch.nn.Parameter], head: list[torch.nn.Parameter]
) -> torch.optim.Adam:
    """Adam with a rate for what `meta.learn` names and one for the head, on the device of the parameters."""
    groups: list[dict[str, Any]] = [{"params": head, "start_lr": meta.head_lr}]
    if moved:
        groups.insert(0, {"params": moved, "start_lr": meta.lr})
    # On a GPU a group's parameters are moved in one launch, which leaves all as it was where it is told to.
    optimizer = torch.optim.Adam(groups, fused=True if head[0].device.type == "cuda" else None)
    keep_on_device(optimizer)
    return optimizer


def keep_on_device(optimizer: torch.optim.Optimizer) -> None:
    """On a GPU, rates and counters are the device's, so that a captured step reads them anew; on a CPU, the host's.

    To be called again after a state was loaded, which may be another device's.
    """
    for group in optimizer.param_groups:
        device = group["params"][0].device
        group["capturable"] = device.type == "cuda"
        # What was saved on a GPU goes on with a CPU's own step; what was saved unfused stays so, to the bit.
        if not group["capturable"]:
            group["fused"] = None
        rate = float(group["lr"])
        group["lr"] = torch.tensor(rate, device=device) if group["capturable"] else rate
        for p in group["params"]:
            if "step" in optimizer.state[p]:
                optimizer.state[p]["step"] = optimizer.state[p]["step"].to(device)


def set_rates(optimizer: torch.optim.Optimizer, meta: MetaConfig, update: int) -> None:
    """Both rates, halved after `decay_first` updates and then every `decay_every`, down to the floor.

    A rate below the floor stays.
    """
    first = meta.decay_every if meta.decay_first is None else meta.decay_first
    n_halvings = max(0, (update - first) // meta.decay_every + 1)
    for group in optimizer.param_groups:
        start = group["start_lr"]
        rate = max(start * 0.5**n_halvings, min(meta.lr_floor, start))
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


@torch.no_grad()
def guarded_step(optimizer: torch.optim.Optimizer, finite: Tensor, scale: Tensor | None = None) -> Tensor:
    """A step that leaves parameters and state as they were where a loss or a gradient is not finite.

    Args:
        optimizer: one whose state begins at zeros and is changed in place, such as Adam.
        finite: bool scalar, whether the losses are; nothing is read back.
        scale: what the gradients were multiplied by; None is 1.

    Returns:
        bool scalar: whether the gradients are finite as well and the step was taken.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    gradients = [p.grad for p in parameters if p.grad is not None]
    if all(group.get("fused") for group in optimizer.param_groups):
        return _fused_step(optimizer, parameters, finite, scale)
    finite = torch.stack([finite, *(gradient.isfinite().all() for gradient in gradients)]).all()

    def tensors() -> Iterator[Tensor]:
        for p in parameters:
            yield p
            yield from (value for value in optimizer.state[p].values() if isinstance(value, Tensor))

    before = {id(tensor): tensor.clone() for tensor in tensors()}
    for gradient in gradients:  # else the moments would take the NaN up
        gradient.copy_(torch.where(finite, gradient if scale is None else gradient / scale, 0))
    optimizer.step()
    for tensor in tensors():
        if tensor.device == finite.device:  # counters may be the host's, which must not wait for a GPU
            old = before.get(id(tensor))  # None: the first step made it, from zeros
            tensor.copy_(torch.where(finite, tensor, 0 if old is None else old))
    return finite


def _fused_step(
    optimizer: torch.optim.Optimizer, parameters: list[Tensor], finite: Tensor, scale: Tensor | None
) -> Tensor:
    """`guarded_step` of a fused optimiser, some launches whatever the number of parameters."""
    for p in parameters:
        # As the kernel requires; a dimension of one element may have any stride.
        if p.grad is not None and p.grad.stride() != p.stride():
            p.grad = torch.empty_like(p).copy_(p.grad)
    gradients = [p.grad for p in parameters if p.grad is not None]
    wrong = finite.logical_not().float()
    inverse = torch.ones_like(wrong) if scale is None else scale.reciprocal()
    torch._amp_foreach_non_finite_check_and_unscale_(gradients, wrong, inverse)
    # Where `GradScaler` tells a fused optimiser not to step.
    optimizer.found_inf = wrong  # type: ignore[attr-defined]  # of fused optimisers
    try:
        optimizer.step()
    finally:
        del optimizer.found_inf  # type: ignore[attr-defined]
    return wrong == 0


class LossScale:
    """What float16 gradients are multiplied by: halved where they overflow, doubled after 2000 good steps.

    The rule and the numbers of `torch.amp.GradScaler`, as tensor operations: nothing is read back.

    Args:
        device: of the losses.

    Attributes:
        scale: float32 scalar.
        n_good: int32 scalar, steps since the scale changed.
    """

    FIRST, INTERVAL = 2.0**16, 2000
    # Thirty-two halvings in a row are no overflow of the scale's making.
    LEAST = 2.0**-16

    def __init__(self, device: torch.device) -> None:
        self.scale = torch.full((), self.FIRST, device=device)
        self.n_good = torch.zeros((), dtype=torch.int32, device=device)

    def update(self, stepped: Tensor) -> None:
        """Says whether the last step's gradients were finite."""
        n_good = torch.where(stepped, self.n_good + 1, 0)
        grown = n_good == self.INTERVAL
        factor = torch.where(stepped, torch.where(grown, 2.0, 1.0), 0.5)
        self.scale.mul_(factor)
        self.n_good.copy_(torch.where(grown, 0, n_good))

    def is_useful(self) -> Tensor:
        """bool scalar: False where gradients overflow whatever the scale."""
        return self.scale >= self.LEAST

    def state_dict(self) -> dict[str, Tensor]:
        """The state, which `load_state_dict` goes back to."""
        return {"scale": self.scale, "n_good": self.n_good}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state_dict`; the tensors stay where they are."""
        self.scale.copy_(state["scale"])
        self.n_good.copy_(state["n_good"])
