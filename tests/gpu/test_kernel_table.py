"""The table of docs/gpu.md says of every file of kernels what it was executed on, and no more than its tests do."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch

from mtl_fast.kernels.triton import interpreted

pytest.importorskip("triton")
if interpreted():
    pytest.skip("in this process kernels are interpreted, not compiled", allow_module_level=True)

from mtl_fast.kernels.triton import images
from mtl_fast.kernels.triton.shipped import shipped
from tests.gpu import budgets, planted
from tools import kernel_table
from tools.kernel_table import (
    BEGIN,
    END,
    INTERPRETED,
    PAGE,
    TESTS,
    kernels_of,
    kind_of,
    noted,
    table,
    written,
)

pytestmark = pytest.mark.proof


@pytest.mark.timeout(300)
def test_the_page_shows_what_the_tests_execute() -> None:
    made = table(noted(TESTS / "execution"), shipped(), budgets.read())
    page = PAGE.read_text("utf-8")
    assert page.count(BEGIN) == page.count(END) == 1
    assert written(page) == made, "run python -m tools.kernel_table"


def test_every_file_of_kernels_is_interpreted_in_both_types() -> None:
    assert set(INTERPRETED) == set(kernels_of())
    for stem, test in INTERPRETED.items():
        text = (TESTS / "interpreted" / f"{test}.py").read_text("utf-8")
        assert "float16" in text or "DTYPES" in text, f"{stem}: {test} interprets one type only"
        assert "triton" in text, f"{stem}: {test} is of no kernel"


def line_of_images(executed: Iterable[tuple[str, str]], stored: budgets.Budgets) -> list[str]:
    _, launch = next(images.shipped())
    text = table({"images": executed}, {"it": launch}, stored)
    (line,) = (line for line in text.splitlines() if line.startswith("| `images`"))
    return [cell.strip() for cell in line.strip("|").split("|")][3:6]


def test_what_no_test_executes_is_compiled_only_and_what_nobody_compiled_is_neither() -> None:
    everywhere: budgets.Budgets = {"3.0": {"it": [7] * 6}, "4.0": {"it": [7] * 5 + [None]}}
    assert line_of_images([("sm_80", "fp16"), ("sm_80", "bf16"), ("sm_90", "bf16")], everywhere) == [
        "sm_80, sm_90: bf16; sm_80: fp16",
        "sm_86, sm_89, sm_100, sm_120",
        "3.0",
    ]
    assert line_of_images([], {}) == ["–", "sm_80, sm_86, sm_89, sm_90, sm_100, sm_120", "–"]


def test_a_kernel_file_without_an_entry_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_table, "kernels_of", lambda: {"new": ["new_kernel"]})
    with pytest.raises(KeyError, match="new"):
        table({}, {}, {})


def test_the_type_of_a_launch_is_that_of_its_images() -> None:
    assert kind_of(planted.launch()) == "bf16"
    product = planted.launch(dtype=torch.float32)
    constants = product.constants | {"PRECISION": "tf32"}
    assert kind_of(replace(product, constants=constants)) == "TF32"
    assert kind_of(replace(product, constants=constants | {"PRECISION": "ieee"})) == "fp32"
