"""`mtl-fast build`: what it says of a library, of a machine that cannot build one, and of errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mtl_fast.cli import main
from mtl_fast.kernels.native import build


def test_build_says_what_was_built_and_what_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    built = tmp_path / "library.so"
    asked: list[dict[str, bool]] = []

    def build_for_this_processor(**options: bool) -> Path:
        asked.append(options)
        return built

    monkeypatch.setattr(build, "build_for_this_processor", build_for_this_processor)
    monkeypatch.setenv("MTL_FAST_BACKEND", "torch")
    assert main(["build"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"native kernels: {built} (")
    assert second == "ss_conv runs on torch: asked for by MTL_FAST_BACKEND=torch"
    assert main(["build", "--sanitize", "--quiet", "--verbose"]) == 0
    assert capsys.readouterr().out == f"{built}\n"
    assert asked == [{"sanitize": False, "verbose": False}, {"sanitize": True, "verbose": True}]


@pytest.fixture
def some_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that has kernels, whatever the tests run on."""
    monkeypatch.setattr(build, "runnable_variants", lambda: build.VARIANTS["x86_64"])


@pytest.mark.usefixtures("some_processor")
def test_without_a_compiler_there_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MTL_FAST_BUILD_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert main(["build"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("mtl-fast: error: no C++ compiler: CXX='no-such-compiler' is no program")
    assert err.count("\n") == 1
    assert main(["build", "--optional"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("native kernels are not built: no C++ compiler: CXX='no-such-compiler'")
    assert err == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("some_processor")
def test_an_error_in_a_source_is_one_where_a_compiler_is_optional(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(*_: Any, **__: Any) -> None:
        raise build.BuildError("the compiler failed")

    monkeypatch.setattr(build, "build", failing)
    assert main(["build", "--optional"]) == 2
    assert capsys.readouterr().err == "mtl-fast: error: the compiler failed\n"


@pytest.mark.usefixtures("some_processor")
def test_a_folder_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MTL_FAST_BUILD_DIR", str(tmp_path / "file"))
    monkeypatch.setattr(build.Tools, "found", lambda: build.Tools("c++", "", "ninja"))
    assert main(["build"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"mtl-fast: error: cannot build in {tmp_path / 'file'}: ")
    assert err.endswith("; MTL_FAST_BUILD_DIR names another folder\n")


def test_a_processor_without_kernels_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build, "runnable_variants", lambda: [])
    assert main(["build", "--optional"]) == 0
    assert f"no native kernels for this processor ({build.processor()})" in capsys.readouterr().out


def test_help_says_what_each_option_means(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["build", "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for option in ("--sanitize", "--optional", "--verbose", "--quiet"):
        assert option in text
