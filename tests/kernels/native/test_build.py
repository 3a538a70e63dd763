"""Building the native kernels: keys, what is compiled anew, missing compilers, builds at the same time, variants."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.utils.cpp_extension import include_paths

from mtl_fast.kernels.native import build as shipped

# An operator of a namespace of its own: what is built here can be loaded beside the real library.
SOURCE = """
#include <ATen/core/Tensor.h>
#include <ATen/ops/full_like.h>
#include <torch/library.h>
#include "answer.h"
at::Tensor answer(const at::Tensor& x) { return at::full_like(x, kAnswer); }
TORCH_LIBRARY(mtl_fast_test, m) { m.def("answer(Tensor x) -> Tensor", &answer); }
"""


def header(answer: int) -> str:
    return f"constexpr float kAnswer = {answer};\n"


def why_not() -> str:
    """Why nothing can be compiled here; empty if it can."""
    try:
        shipped.Tools.found()
    except shipped.NoCompilerError as error:
        return str(error)
    return "" if shipped.runnable_variants() else f"no variant for {shipped.processor()}"


needs_compiler = pytest.mark.skipif(bool(why_not()), reason=why_not() or "compiles")


@pytest.fixture
def small(tmp_path: Path) -> ModuleType:
    """`build` by itself, as `setup.py` loads it, for one small source in a folder whose name needs quoting."""
    folder = tmp_path / "sources of $one"
    folder.mkdir()
    (folder / "answer.cpp").write_text(SOURCE)
    (folder / "answer.h").write_text(header(42))
    shutil.copy(shipped.SOURCE_FOLDER / "build.py", folder)
    spec = importlib.util.spec_from_file_location(f"build_in_{tmp_path.name}", folder / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def not_compiled(small: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`small` whose compiler is replaced: the library is the header's text."""

    def compiled(*_: object) -> Path:
        return Path(shutil.copy(small.SOURCE_FOLDER / "answer.h", tmp_path / "library.so"))

    monkeypatch.setattr(small, "_compile", compiled)
    return small


def test_the_key_follows_sources_headers_flags_and_torch(
    small: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = small.VARIANTS["x86_64"]
    folder = small.SOURCE_FOLDER
    prefixes = [small.library_prefix(v, sanitize=s) for v in (first, second) for s in (False, True)]

    def changed() -> None:
        prefixes.append(small.library_prefix(first))

    (folder / "answer.h").write_text(header(43))
    changed()
    (folder / "answer.cpp").write_text(SOURCE + "// more\n")
    changed()
    (folder / "answer.cpp").rename(folder / "reply.cpp")
    changed()
    monkeypatch.setattr(small, "FLAGS", (*small.FLAGS, "-g"))
    changed()
    monkeypatch.setattr(torch, "__version__", "0.0.0")
    changed()
    keys = {prefix.split("-")[1] for prefix in prefixes}
    assert len(keys) == len(prefixes)
    assert small.library_prefix(first) == prefixes[-1]


@needs_compiler
@pytest.mark.slow
def test_only_what_changed_is_compiled(
    small: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (variant,) = small.runnable_variants()[:1]
    folder = small.SOURCE_FOLDER

    def compiled() -> list[str]:
        capfd.readouterr()
        (path,) = small.build(tmp_path / "built", [variant], verbose=True)
        assert path == small.find(tmp_path / "built", variant)
        return sorted(re.findall(r"/(\w+\.cpp)'? -o ", capfd.readouterr().out))

    (folder / "other.cpp").write_text("int other() { return 1; }\n")
    assert compiled() == ["answer.cpp", "other.cpp"]
    assert compiled() == []
    (folder / "other.cpp").write_text("int other() { return 2; }\n")
    assert compiled() == ["other.cpp"]
    (folder / "answer.h").write_text(header(43))
    assert compiled() == ["answer.cpp"]
    torch.ops.load_library(str(small.find(tmp_path / "built", variant)))
    assert torch.equal(torch.ops.mtl_fast_test.answer(torch.zeros(3)), torch.full((3,), 43.0))


@needs_compiler
def test_sources_that_change_while_compiled_are_compiled_again(
    not_compiled: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled, seen = not_compiled._compile, []

    def compile_then_edit(*arguments: object) -> Path:
        library: Path = compiled(*arguments)
        seen.append(library.read_text())
        (not_compiled.SOURCE_FOLDER / "answer.h").write_text(header(43))
        return library

    monkeypatch.setattr(not_compiled, "_compile", compile_then_edit)
    (path,) = not_compiled.build(tmp_path / "built", not_compiled.runnable_variants()[:1])
    assert seen == [header(42), header(43)]
    assert path.read_text() == header(43)
    assert list(path.parent.glob("*.so")) == [path]


@needs_compiler
def test_another_compiler_is_another_library_and_the_last_one_built_is_found(
    not_compiled: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (variant,) = not_compiled.runnable_variants()[:1]
    default = not_compiled.Tools.found().compiler
    paths = []
    for words in (default, f"{default} -DOTHER", default):
        monkeypatch.setenv("CXX", words)
        paths += not_compiled.build(tmp_path, [variant])
        assert not_compiled.find(tmp_path, variant) == paths[-1]
    assert paths[0] == paths[2] != paths[1]


@needs_compiler
def test_old_object_files_are_swept_away(not_compiled: ModuleType, tmp_path: Path) -> None:
    (variant,) = not_compiled.runnable_variants()[:1]
    for age in range(not_compiled.LIBRARIES_KEPT + 3):
        folder = tmp_path / f"objects-{variant.name}-{age}"
        folder.mkdir()
        os.utime(folder, ns=(age, age))
    not_compiled.build(tmp_path, [variant])
    kept = [path.name for path in tmp_path.glob("objects-*")]
    assert len(kept) == not_compiled.LIBRARIES_KEPT
    assert f"objects-{variant.name}-0" not in kept


@needs_compiler
def test_old_libraries_are_swept_away(not_compiled: ModuleType, tmp_path: Path) -> None:
    (variant,) = not_compiled.runnable_variants()[:1]
    for answer in range(not_compiled.LIBRARIES_KEPT + 3):
        (not_compiled.SOURCE_FOLDER / "answer.h").write_text(header(answer))
        (path,) = not_compiled.build(tmp_path / "built", [variant])
    kept = list((tmp_path / "built").glob("*.so"))
    assert len(kept) == not_compiled.LIBRARIES_KEPT
    assert path in kept


@needs_compiler
def test_an_error_in_a_source_is_shown_and_leaves_no_library(small: ModuleType, tmp_path: Path) -> None:
    (small.SOURCE_FOLDER / "answer.cpp").write_text("int answer() { return nonsense; }\n")
    with pytest.raises(small.BuildError, match="nonsense") as caught:
        small.build(tmp_path / "built", small.runnable_variants()[:1])
    assert not isinstance(caught.value, small.NoCompilerError)
    assert not list((tmp_path / "built").glob("*.so"))


def test_a_copy_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left on device")

    (tmp_path / "library.so").touch()
    (tmp_path / "built").mkdir()
    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(OSError, match="no space"):
        shipped._install(tmp_path / "library.so", tmp_path / "built" / "name.so")
    assert not list((tmp_path / "built").iterdir())


@needs_compiler
@pytest.mark.slow
def test_two_builds_at_the_same_time_compile_once(small: ModuleType, tmp_path: Path) -> None:
    built = tmp_path / "built"
    code = (
        f"import sys; sys.path.insert(0, {str(small.SOURCE_FOLDER)!r})\n"
        "import pathlib, build\n"
        f"build.build(pathlib.Path({str(built)!r}), build.runnable_variants()[:1], verbose=True)"
    )
    both = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    texts = [process.communicate(timeout=100)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sum(text.count(" -o answer.o") for text in texts) == 1
    assert len(list(built.glob("*.so"))) == 1


@pytest.mark.parametrize("missing", ["compiler", "named compiler", "ninja", "Linux"])
def test_what_is_missing_is_named(missing: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "platform", "darwin" if missing == "Linux" else "linux")
    monkeypatch.setenv("CXX", {"named compiler": "no-such-compiler -O3", "ninja": "true"}.get(missing, ""))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    if missing != "ninja":
        monkeypatch.setenv("PATH", str(tmp_path))
    else:
        found = shutil.which("true")
        monkeypatch.setattr(shutil, "which", lambda name, **_: found if name == "true" else None)
    says = {
        "compiler": r"none of c\+\+, g\+\+, clang\+\+ is on the path",
        "named compiler": "CXX='no-such-compiler -O3' is no program",
        "ninja": "pip install ninja",
        "Linux": "on Linux only, this is darwin",
    }[missing]
    with pytest.raises(shipped.NoCompilerError, match=says) as caught:
        shipped.build(tmp_path / "built", [])
    assert "torch backend" in str(caught.value)
    assert not (tmp_path / "built").exists()


@pytest.mark.parametrize(
    ("named", "says"),
    [
        (" ", "CXX=' ' is no program"),
        ('"g++', "CXX='\"g++' is no program"),
        ("{folder}/broken -O3", "broken -O3' does not start (Exec format error)"),
    ],
    ids=["blank", "open quotation", "no program in it"],
)
def test_a_compiler_that_is_no_command_is_named(
    named: str, says: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    broken.write_bytes(b"\0")
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("CXX", named.format(folder=tmp_path))
    with pytest.raises(shipped.NoCompilerError, match=re.escape(says)) as caught:
        shipped.Tools.found()
    assert "torch backend" in str(caught.value)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_neon_compiles_but_is_not_run(tmp_path: Path) -> None:
    """Object files only, and not optimised: there is no aarch64 torch to link against, so none is run.

    The x86 widths are built in the wheel's test.
    """
    compiler = shutil.which("aarch64-linux-gnu-g++")
    if compiler is None:
        pytest.skip("no aarch64-linux-gnu-g++ (Debian: g++-aarch64-linux-gnu)")
    (variant,) = shipped.VARIANTS["aarch64"]
    flags = [*shipped.FLAGS, *variant.flags, *(f"-isystem{path}" for path in include_paths()), "-O0"]
    sources = sorted(shipped.SOURCE_FOLDER.glob("*.cpp"))
    assert sources
    for source in sources:
        compiled = tmp_path / f"{source.stem}.o"
        subprocess.run([compiler, *flags, "-c", str(source), "-o", str(compiled)], check=True, timeout=300)
        # The machine in the ELF header: 183 is aarch64.
        assert struct.unpack_from("<H", compiled.read_bytes(), 18) == (183,)
