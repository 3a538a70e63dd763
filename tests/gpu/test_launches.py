"""Launches of the plain program's step, counted operator by operator; ours are in `interpreted/test_launches.py`."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.gpu.launches import INNER, N_TASKS, Counting, plain

pytestmark = pytest.mark.proof


def test_views_are_no_launches_and_a_backward_pass_is_one_for_each_gradient() -> None:
    with FakeTensorMode(), Counting() as counting:
        x = torch.empty(2, 3, 8, 8, requires_grad=True)
        weight = torch.empty(4, 3, 3, 3, requires_grad=True)
        y = torch.nn.functional.conv2d(x, weight)
        torch.autograd.grad(y, (x, weight), torch.empty_like(y))
        torch.empty(0, 4).clone()
        assert y.detach().flatten(1)[:, 2:].T.shape == (142, 2)
    assert dict(counting.count.operators) == {"convolution": 1, "convolution_backward": 2}


def test_bytes_are_those_of_the_elements_there_are() -> None:
    with FakeTensorMode(), Counting() as counting:
        rows, row = torch.empty(10, 4), torch.empty(4)
        assert rows[torch.zeros(3, dtype=torch.int64)].shape == (rows + row.expand(10, 4))[:3].shape
    # zeros written; 3 rows read and written and 3 indices read; an expanded row is read once.
    assert counting.count.n_bytes == 3 * 8 + (2 * 3 * 16 + 3 * 8) + (160 + 16 + 160)
    assert counting.count.operators.total() == 3


def test_the_plain_program_launches_for_every_task_and_inner_step() -> None:
    count = plain((8, 8, 8, 8), 32)
    assert not count.kernels
    # 16 convolutions, of support and query of each task.
    assert count.operators["convolution"] == 16 * 2 * N_TASKS
    # Gradients of query images (not of the first ones), weights and biases, those with Φ; shortcuts have none.
    assert count.operators["max_pool2d_with_indices"] == 4 * 2 * N_TASKS
    assert count.operators["_log_softmax"] == (INNER.n_steps + 1) * N_TASKS
    assert "detach" not in count.operators
    assert count.launches > 10 * INNER.n_steps * N_TASKS
