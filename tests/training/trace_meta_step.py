"""Traces whole meta-training steps on a GPU that need not exist; a program, for it must start before PyTorch.

    python -m tests.training.trace_meta_step PRETRAINED STAND_IN

A step with its optimiser goes through `make_fx` twice under `FakeTensorMode`, all its tensors on ``cuda:0``. A line
of JSON for each case tells what the graphs do; `test_meta_train_capture` judges it.
"""

from __future__ import annotations

import copy
import ctypes
import json
import sys
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

CASES: dict[str, dict[str, Any]] = {
    "frozen, second order": {},
    "frozen, first order, bf16, in pieces": {"order": "first", "precision": "bf16", "images_per_chunk": 8},
    "running, first order, fp16, all weights": {
        "norm": "running",
        "order": "first",
        "precision": "fp16",
        "learn": "weights",
    },
}
# Readbacks by whatever name, and what has the length of its result from the values.
# PyTorch's and, where Triton is installed, ours.
CONVOLUTIONS = (
    "aten.convolution.default",
    "mtl_fast.triton_ss_conv.default",
    "mtl_fast.triton_ss_block.default",
)
DATA_DEPENDENT = ("item", "_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")


# Kernels of a GPU that change their operands and return nothing; PyTorch has no fakes of them.
IN_PLACE = ("_amp_foreach_non_finite_check_and_unscale_", "_fused_adam_.tensor_lr")


def main(pretrained: str, stand_in: str) -> None:
    if stand_in:
        ctypes.CDLL(stand_in, mode=ctypes.RTLD_GLOBAL)
    for name in IN_PLACE:
        fake_nothing(name)
    for name, case in CASES.items():
        print(json.dumps({"case": name} | traced(Path(pretrained), **case)), flush=True)


def fake_nothing(name: str) -> None:
    """Says that an operator of PyTorch does nothing to fake tensors."""
    import torch

    torch.library.register_fake(f"aten::{name}", lambda *_, **__: None)


def traced(
    pretrained: Path, *, order: str = "second", precision: str = "fp32", **meta: Any
) -> dict[str, Any]:
    """What two traces of a step have in common, and what they do."""
    from dataclasses import replace

    import torch
    from torch import Tensor, nn
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.utils._pytree import tree_leaves

    from mtl_fast.training.meta_update import LossScale, adam
    from tests.training import tiny

    # In deterministic mode every new tensor would be filled first, which no real run does.
    assert not torch.are_deterministic_algorithms_enabled()
    config = tiny.with_meta(**meta)
    config = replace(config, precision=precision, inner=replace(config.inner, order=order, train_steps=2))
    with TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        run = tiny.meta_training(Path(folder), pretrained, config)
    episodes, _ = run.next_episodes()
    mode, device = FakeTensorMode(), torch.device("cuda:0")

    def on_gpu(tensor: Tensor) -> Tensor:
        return FakeTensor(mode, tensor.detach().to("meta"), device)

    moved = [p for group in run.optimizer.param_groups[:-1] for p in group["params"]]
    replaced: dict[int, nn.Parameter] = {}
    for module in (*run.encoder.modules(), run.head):
        for key, p in module._parameters.items():
            if p is not None:
                replaced[id(p)] = module._parameters[key] = nn.Parameter(on_gpu(p), p.requires_grad)
        for key, buffer in module._buffers.items():
            module._buffers[key] = on_gpu(buffer)
    run.engine.store = copy.copy(run.train)
    object.__setattr__(run.engine.store, "images", on_gpu(run.train.images))
    run.sums, run.all_finite = on_gpu(run.sums), on_gpu(run.all_finite)
    tensors = [on_gpu(tensor) for tensor in vars(episodes).values()]
    with mode:
        run.optimizer = adam(config.meta, [replaced[id(p)] for p in moved], list(run.head.parameters()))
        if run.loss_scale is not None:
            run.loss_scale = LossScale(device)
            run.engine.loss_scale = run.loss_scale.scale
        run._train_on(*tensors)  # the optimiser makes its state
        graphs = [make_fx(run._train_on)(*tensors) for _ in range(2)]

    def storages(graph: Any) -> dict[str, int]:
        nodes = (node.target for node in graph.graph.nodes if node.op == "get_attr")
        return {name: getattr(graph, name).untyped_storage()._cdata for name in nodes}

    buffers = [storages(graph) for graph in graphs]
    calls = [node for node in graphs[0].graph.nodes if node.op == "call_function"]
    written = set()
    for node in calls:
        schema = getattr(node.target, "_schema", None)
        if schema is None:
            continue
        for argument, given in zip(schema.arguments, node.args, strict=False):
            for one in (given if isinstance(given, list | tuple) else [given]) if argument.is_write else ():
                if getattr(one, "op", "") == "get_attr":
                    written.add(buffers[0][one.target])
    state = {
        **{f"encoder.{name}": p for name, p in run.encoder.named_parameters() if p.requires_grad},
        **{f"head.{name}": p for name, p in run.head.named_parameters()},
        **{
            f"optimizer.{i}.{key}": value
            for i, entry in enumerate(run.optimizer.state.values())
            for key, value in entry.items()
        },
        "sums": run.sums,
        "all_finite": run.all_finite,
    }
    if run.meta.norm == "running":
        state |= dict(run.encoder.named_buffers(prefix="encoder"))
    if run.loss_scale is not None:
        state |= run.loss_scale.state_dict()
    values = [node.meta["val"] for node in graphs[0].graph.nodes if isinstance(node.meta.get("val"), Tensor)]
    constants = [getattr(graphs[0], name) for name in buffers[0]]
    names = [str(node.target).removeprefix("aten.").split(".")[0] for node in calls]
    return {
        "calls": len(calls),
        "same graph": graphs[0].code == graphs[1].code,
        "same buffers": buffers[0] == buffers[1],
        "not written": [n for n, t in state.items() if t.untyped_storage()._cdata not in written],
        "devices": sorted({str(tensor.device) for tensor in (*values, *constants)}),
        "data-dependent": [name for name in names if name in DATA_DEPENDENT],
        "parameters": sorted(
            {str(t.dtype) for name, t in state.items() if name[:4] in ("enco", "head", "opti")}
        ),
        "convolutions": sorted(
            {
                str(next(t for t in tree_leaves(node.meta["val"]) if isinstance(t, Tensor)).dtype)
                for node in calls
                if str(node.target) in CONVOLUTIONS
            }
        ),
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
