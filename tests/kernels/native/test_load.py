"""Loading the native kernels: the library that fits or a reason, never a crash, and only when it is asked for."""

from __future__ import annotations

import _ctypes
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mtl_fast.kernels import native
from mtl_fast.kernels.native import build

ROOT = Path(__file__).resolve().parents[3]
LOAD = "from mtl_fast.kernels import native; print(native.load())"


def printed(code: str, **environment: str) -> str:
    """What a program prints that knows none of the caller's MTL_FAST_ variables; it must succeed."""
    others = {name: value for name, value in os.environ.items() if not name.startswith("MTL_FAST_")}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=ROOT,
        env=others | environment,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a library for this processor would be found, with `tmp_path` as the user's folder."""
    variants = build.runnable_variants()
    if not variants:
        pytest.skip(f"no variant for {build.processor()}")
    return tmp_path / f"{build.library_prefix(variants[0])}0.so"


def test_without_a_library_everything_runs_on_torch_and_says_why(tmp_path: Path) -> None:
    code = (
        "import torch\nfrom mtl_fast import base_learner, why\n"
        "labels = torch.arange(5).expand(2, 5)\n"
        "arguments = torch.ones(2, 5, 8), labels, torch.ones(2, 3, 8), torch.zeros(5, 8), torch.zeros(5)\n"
        "print(tuple(base_learner(*arguments, inner_lr=0.1, n_steps=2).shape), why('ss_conv'))"
    )
    if not build.runnable_variants():
        pytest.skip("another reason comes first")
    assert printed(code, MTL_FAST_BUILD_DIR=str(tmp_path)) == (
        "(2, 3, 5) torch: not native: no native library was built for these sources and this torch; "
        "run `mtl-fast build`; plain PyTorch runs everywhere"
    )


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
def test_a_library_cut_short_is_a_reason_not_a_crash(share: float, path: Path) -> None:
    whole = Path(_ctypes.__file__).read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    expected = (False, f"{path} is damaged; delete it and run `mtl-fast build`")
    assert printed(LOAD, MTL_FAST_BUILD_DIR=str(path.parent)) == str(expected)


def test_what_the_linker_refuses_is_a_reason(path: Path) -> None:
    # A whole ELF file, but a program.
    shutil.copy("/bin/true", path)
    assert printed(LOAD, MTL_FAST_BUILD_DIR=str(path.parent)).startswith(f"(False, '{path} does not load: ")


@pytest.mark.parametrize("name", ["libmtl_fast_avx2-0123456789abcdef-0.so", "library.so"])
def test_a_library_named_by_hand_must_fit_the_sources(name: str, path: Path) -> None:
    refused = printed(LOAD, MTL_FAST_LIBRARY=f"/nowhere/{name}")
    assert "is of other sources, another torch or another processor" in refused
    assert "does not load: " in printed(LOAD, MTL_FAST_LIBRARY=f"/nowhere/{path.name}")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="every aarch64 processor has vectors")
def test_a_processor_without_kernels_is_a_reason() -> None:
    expected = (False, "there are no native kernels for this processor (x86_64, DEFAULT)")
    assert printed(LOAD, ATEN_CPU_CAPABILITY="default") == str(expected)


def test_a_call_on_the_torch_backend_does_not_look_for_a_library() -> None:
    code = (
        "import torch\nfrom mtl_fast.kernels import native\nnative._load_once = None\n"
        "from mtl_fast import base_learner, why\n"
        "arguments = torch.ones(1, 2, 8), torch.arange(2)[None], torch.ones(1, 3, 8)\n"
        "base_learner(*arguments, torch.zeros(2, 8), torch.zeros(2), inner_lr=0.1, n_steps=2)\n"
        "print(why('ss_conv'))"
    )
    assert printed(code, MTL_FAST_BACKEND="torch") == "torch: asked for by MTL_FAST_BACKEND=torch"


def test_importing_the_operations_loads_no_library_and_no_compiler() -> None:
    code = (
        "import sys, torch, mtl_fast.ops\n"
        "mapped = [line for line in open('/proc/self/maps') if 'libmtl_fast' in line]\n"
        "print(mapped, [name for name in ('torch._dynamo', 'torch.utils.cpp_extension') if name in sys.modules])"
    )
    assert printed(code) == "[] []"


def test_one_openmp_runtime_is_loaded() -> None:
    runs, reason = native.load()
    if not runs:
        pytest.skip(reason)
    maps = Path("/proc/self/maps").read_text()
    assert reason.removeprefix("native kernels, ") in maps
    # Files, not names: torch's own copy and the system's would be two runtimes with a pool of threads each.
    runtimes = set(re.findall(r"/\S*lib(?:gomp|omp|iomp5)\S*\.so\S*", maps))
    assert len(runtimes) == 1, runtimes
