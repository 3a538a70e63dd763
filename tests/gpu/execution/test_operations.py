"""The checks that operations have to pass on a GPU, passed by their PTX: bfloat16 and TF32, which no interpreter has."""

from __future__ import annotations

import pytest
import torch

from mtl_fast.ops import (
    _base_learner_triton,
    _effective_weights_triton,
    _episode_norm_triton,
    _images_triton,
    _ss_layers_triton,
)
from tests.gpu.checks import PRECISIONS, every_check, run_check
from tests.gpu.ptx.launcher import emulated

pytestmark = pytest.mark.proof
BACKENDS = (
    _base_learner_triton,
    _effective_weights_triton,
    _episode_norm_triton,
    _images_triton,
    _ss_layers_triton,
)
# One case of each operation; `make gpu-check` has the others too.
CASES = {
    "ss_conv": ("prime kernel", "prime filter"),
    "ss_block": ("common kernel",),
    "effective_weights": ("folded",),
    "base_learner": ("second",),
    "episode_norm": ("common masked",),
    "images": ("cropped and flipped",),
}
CHOSEN = {
    name: (operation, case, precision, route)
    for name, (operation, case, precision, route) in every_check(PRECISIONS).items()
    if case in CASES[operation] and (precision == "bf16" or name == "ss_conv prime kernel tf32 triton")
}


@pytest.mark.parametrize("name", CHOSEN)
def test_operation(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for backend in BACKENDS:
        monkeypatch.setattr(backend, "triton_runs", lambda *_: (True, "emulated"))
    with emulated("sm_80") as launches:
        run_check(*CHOSEN[name], torch.device("cpu"))
    assert launches
