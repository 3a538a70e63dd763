"""A whole meta-training step can be a CUDA graph: its trace asks for nothing and is the same every time."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mtl_fast.kernels.native import build
from tests.training.trace_meta_step import CASES

HERE = Path(__file__).parent
TORCH = Path(torch.__file__).parent


def stand_in(folder: Path) -> str:
    """What a PyTorch without CUDA needs to trace backward passes of CUDA tensors; nothing for one that has it."""
    if torch.version.cuda is not None:
        return ""
    try:
        compiler = build.Tools.found().compiler
    except build.NoCompilerError as error:
        pytest.skip(str(error))
    library, lib = folder / "cuda_stand_in.so", TORCH / "lib"
    flags = ["-std=c++20", "-shared", "-fPIC", f"-I{TORCH / 'include'}", "-o", str(library)]
    links = [f"-L{lib}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{lib}"]
    source = str(HERE / "cuda_stand_in.cpp")
    subprocess.run([*shlex.split(compiler), *flags, source, *links], check=True, timeout=200)
    return str(library)


@pytest.fixture(scope="module")
def traces(pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    library = stand_in(tmp_path_factory.mktemp("stand-in"))
    done = subprocess.run(
        [sys.executable, "-m", "tests.training.trace_meta_step", str(pretrained), library],
        capture_output=True,
        text=True,
        cwd=HERE.parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return {trace["case"]: trace for trace in found}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", CASES)
def test_a_step_with_its_optimiser_traces_as_one_graph(case: str, traces: dict[str, dict[str, Any]]) -> None:
    trace = traces[case]
    assert trace["calls"] > 300
    assert trace["same graph"]
    assert trace["same buffers"]
    # Parameters, Adam's moments and counters, sums and flags, running averages, the loss's scale.
    assert trace["not written"] == []
    # A tensor of the host would be copied over in each step, and could not be in a graph.
    assert trace["devices"] == ["cuda:0"]
    assert trace["data-dependent"] == []
    assert trace["parameters"] == ["torch.float32"]
    precision = {"bf16": "torch.bfloat16", "fp16": "torch.float16"}
    assert trace["convolutions"] == [precision.get(CASES[case].get("precision", ""), "torch.float32")]
