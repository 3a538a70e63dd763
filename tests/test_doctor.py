"""`mtl-fast doctor`: what it finds, what it advises, and that a wrong kernel is seen."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mtl_fast import doctor
from mtl_fast.cli import main
from mtl_fast.kernels import native, triton
from mtl_fast.kernels.native import build
from mtl_fast.kernels.reference import ss_conv as reference
from mtl_fast.ops import backend, routes
from mtl_fast.ops.backend import ENVIRONMENT_VARIABLE, OPERATIONS
from mtl_fast.training import models


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    speed = doctor._speed
    monkeypatch.setattr(doctor, "_speed", lambda: speed(seconds=0.0))


def report(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    status = main(["doctor", *arguments])
    return status, capsys.readouterr().out


def line(text: str, name: str) -> str:
    """The report's line of that name, with the advice below it."""
    lines = text.splitlines()
    at = next(i for i, found in enumerate(lines) if found[6:28].strip() == name)
    return "\n".join(lines[at : at + 2 if "→" in "".join(lines[at + 1 : at + 2]) else at + 1])


def test_a_sound_machine_is_ok(capsys: pytest.CaptureFixture[str]) -> None:
    status, text = report(capsys)
    assert status == 0
    assert " 0 wrong (!!)" in text
    seen = (
        "torch",
        "vectors",
        "threads",
        "decoded images",
        "this folder",
        "compiler",
        "library",
        *OPERATIONS,
    )
    for name in (*seen, "same bits twice"):
        assert line(text, name)
    assert "76.01% expected" in line(text, "shipped model")
    assert "tasks/s" in line(text, "meta-training")


def test_without_self_test_nothing_is_computed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_self_test", lambda: pytest.fail("computed"))
    status, text = report(capsys, "--no-self-test")
    assert status == 0
    assert "Self-test" not in text


def test_missing_kernels_and_compiler_are_advised_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_found() -> build.Tools:
        raise build.NoCompilerError("no C++ compiler")

    monkeypatch.setattr(build.Tools, "found", none_found)
    monkeypatch.setattr(native, "load", lambda: (False, "nothing was built"))
    status, text = report(capsys, "--no-self-test")
    assert status == 0, "all works, more slowly"
    assert "install g++ and ninja" in line(text, "compiler")
    assert line(text, "library").startswith("  --")
    assert "mtl-fast build" in line(text, "library")
    assert "not native: nothing was built" in line(text, "ss_conv")


def test_a_compiler_that_says_nothing_of_itself_or_is_no_command_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tools = build.Tools("quiet", "", "ninja")
    monkeypatch.setattr(build.Tools, "found", lambda: tools)
    assert next(doctor._kernels()).value == "quiet ()"
    monkeypatch.undo()
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("CXX", '"g++')
    found = next(doctor._kernels())
    assert (found.name, found.state) == ("compiler", "could be better")


def test_a_package_that_must_be_there_is_wrong_an_optional_one_is_not() -> None:
    assert doctor._installed("no-such-package", None).state == "wrong"
    optional = doctor._installed("no-such-package", "nothing")
    assert (optional.state, optional.advice) == ("could be better", "pip install no-such-package")


def test_a_backend_that_nobody_has_is_wrong(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "nativ")
    status, text = report(capsys, "--no-self-test")
    assert status == 1
    assert "'nativ' is unknown" in line(text, "ss_conv")
    assert f"unset {ENVIRONMENT_VARIABLE}" in line(text, "ss_conv")


@pytest.mark.parametrize("asked", ["nativ", "triton"])
def test_a_self_test_that_the_backend_cannot_run_is_wrong_and_the_summary_still_comes(
    asked: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, asked)
    status, text = report(capsys)
    assert status == 1
    for name in ("convolution", "inner loop", "same bits twice", "shipped model", "meta-training"):
        assert line(text, name).startswith("  !!")
        assert f"{ENVIRONMENT_VARIABLE}='{asked}'" in line(text, name)
        assert f"unset {ENVIRONMENT_VARIABLE}" in line(text, name)
    assert text.splitlines()[-1].endswith("wrong (!!)")


@pytest.mark.skipif(not native.load()[0], reason="no native kernels")
def test_kernels_of_float32_alone_are_compared_with_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "native")
    for check in (doctor._convolution_is_right, doctor._inner_loop_is_right):
        error, bound = check()
        assert error <= bound


def test_a_folder_in_a_closed_one_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def closed(path: object) -> bool:
        if str(path).startswith(str(tmp_path / "closed") + "/"):
            raise PermissionError(13, "Permission denied", str(path))
        return True

    monkeypatch.setattr(Path, "exists", closed)
    monkeypatch.setattr(doctor.os, "access", lambda *_: False)
    found = doctor._folder("x", tmp_path / "closed" / "inside", "go elsewhere")
    assert (found.state, found.advice) == ("could be better", "go elsewhere")


def test_more_threads_than_cores_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_cores", lambda: 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    found = next(f for f in doctor._machine() if f.name == "threads")
    assert found.state == "could be better"
    assert "OMP_NUM_THREADS=1" in found.advice


def test_a_wrong_convolution_is_seen(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = reference.ss_conv
    monkeypatch.setattr(backend, "_REGISTRY", {op: {"torch": backend._always} for op in OPERATIONS})

    def wrong(x: torch.Tensor, *arguments: object, **options: object) -> torch.Tensor:
        y = right(x, *arguments, **options)
        return y * 1.01 if x.dtype == torch.float32 else y

    monkeypatch.setattr(reference, "ss_conv", wrong)
    status, text = report(capsys)
    assert status == 1
    assert line(text, "convolution").startswith("  !!")
    assert "report this" in line(text, "convolution")


def test_a_shipped_model_that_is_missing_or_answers_otherwise_is_wrong(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(doctor, "SHIPPED_ACCURACY", doctor.SHIPPED_ACCURACY + 0.01)
    found = doctor._shipped_model()
    assert (found.state, "report this" in found.advice) == ("wrong", True)
    monkeypatch.setattr(models, "SHIPPED", tmp_path / "gone.safetensors")
    found = doctor._shipped_model()
    assert (found.state, found.advice) == ("wrong", "install mtl-fast again")
    assert "gone.safetensors does not exist" in found.value


def test_folders_that_are_full_or_read_only_are_advised_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=doctor.LEAST_FREE - 1))
    found = doctor._folder("x", tmp_path / "not" / "made", "go elsewhere")
    assert found.state == "could be better"
    assert "not/made (1.0 GiB free)" in found.value
    assert found.advice == "free some space, or go elsewhere"
    monkeypatch.setattr(doctor.os, "access", lambda *_: False)
    found = doctor._folder("x", tmp_path, "go elsewhere")
    assert (found.state, found.advice) == ("could be better", "go elsewhere")


def test_a_gpu_is_told_with_its_memory_and_what_its_kernels_need(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(name="a GPU", total_memory=80 * 2**30, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(triton, "load", lambda: (False, "Triton is not installed"))
    *_, device, kernels = doctor._machine()
    assert (device.name, device.value) == ("cuda:0", "a GPU, 80 GiB, compute capability 9.0")
    assert (kernels.state, kernels.advice) == ("could be better", "pip install triton")


def test_routes_of_a_gpu_are_told_with_where_they_come_from(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert doctor._cards() == [] or torch.cuda.is_available()
    monkeypatch.setenv(routes.ENVIRONMENT_VARIABLE, str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    (card,) = doctor._cards()
    unmeasured, *by_default = doctor._routes(card)
    assert (unmeasured.state, unmeasured.advice) == ("could be better", "mtl-fast tune")
    # Twelve: three layers of four blocks.
    assert [found.value for found in by_default] == ["triton: by default: at most 160 channels"] * 6 + [
        "cudnn: by default: more than 160 channels"
    ] * 6
    assert [found.name for found in by_default[:3]] == ["3→64@84, 3×3", "64→64@84, 3×3", "3→64@84, 1×1"]
    path = routes.store(
        card, {routes.LayerShape(64, 64, 84, 84, 3, "bfloat16"): {"triton": 2.0, "cudnn": 1.0}}
    )
    measured, *found = doctor._routes(card)
    assert (measured.state, measured.value) == ("ok", str(path))
    assert found[1].value == "cudnn: measured by mtl-fast tune"
    assert found[2].value == by_default[2].value
    monkeypatch.setattr(triton, "load", lambda: (False, "Triton is not installed"))
    assert doctor._cards() == [], "without our kernels there is nothing to choose"


def test_bits_that_do_not_repeat_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = iter(([torch.zeros(2)], [torch.full((2,), 1e-7)]))
    monkeypatch.setattr(doctor, "_meta_step", lambda: lambda: next(steps))
    assert doctor._checked("same bits twice", doctor._bits_repeat).state == "wrong"
