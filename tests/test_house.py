"""The house stands: floors, mirrors, sizes, an import that starts nothing, and what a wheel holds."""

from __future__ import annotations

import ast
import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from mtl_fast.kernels.native import build
from mtl_fast.ops.backend import OPERATIONS

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "mtl_fast"
NATIVE = ROOT / "kernels" / "native"
# A prefix's floor; 0 is what every floor above the kernels may use.
FLOORS = {
    "mtl_fast": 0,
    "mtl_fast.errors": 0,
    "mtl_fast.files": 0,
    "mtl_fast.random_streams": 0,
    "mtl_fast.text_table": 0,
    "mtl_fast.kernels": 1,
    "mtl_fast.ops": 2,
    "mtl_fast.nn": 3,
    "mtl_fast.data": 3,
    "mtl_fast.episodes": 3,
    "mtl_fast.config": 4,
    "mtl_fast.engine": 4,
    "mtl_fast.training": 5,
    "mtl_fast.classifier": 5,
    "mtl_fast.cli": 5,
    "mtl_fast.cli_tools": 5,
    "mtl_fast.doctor": 5,
    "mtl_fast.recipe_table": 5,
    "mtl_fast.tune": 5,
    "mtl_fast.__main__": 5,
}
LONGEST_FILE = 400
# Under `kernels`: what all kernels share, and parts of operations under names of their own.
SHARED = {"ahead", "build", "inspection", "launch", "machine_code", "shipped"}
PARTS = {"block_end", "encoder_layers", "epilogue", "epilogue_backward", "partial_sums", "scale_gradient"}


def sources() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for path in sorted(PACKAGE.glob("**/*.py")) + sorted((ROOT / "kernels").glob("**/*.py")):
        base = PACKAGE.parent if path.is_relative_to(PACKAGE) else ROOT
        parts = path.relative_to(base).with_suffix("").parts
        parts = parts if parts[0] == "mtl_fast" else ("mtl_fast", *parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def floor(module: str) -> int:
    """The floor of the longest known prefix of a dotted name."""
    parts = module.split(".")
    if len(parts) > 1 and ".".join(parts[:2]) not in FLOORS:
        raise LookupError(f"{module} has no floor; name it in FLOORS")
    return FLOORS[".".join(parts[:2])]


def imports(name: str, text: str, is_package: bool, known: set[str]) -> set[str]:
    """The modules of this package that the source of module `name` imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = name.split(".")[: len(name.split(".")) - node.level + is_package]
                base = ".".join([*parents, base]).rstrip(".")
            for alias in node.names:
                deeper = f"{base}.{alias.name}"
                found.add(deeper if deeper in known else base)
    return {module for module in found if module.split(".")[0] in ("mtl_fast", "kernels")}


def upward(name: str, text: str, is_package: bool, known: set[str]) -> list[str]:
    """What is wrong with the imports of one module, a line each."""
    wrong = []
    for target in sorted(imports(name, text, is_package, known)):
        if target.split(".")[0] == "kernels":
            wrong.append(f"{name} imports {target}: say mtl_fast.{target}")
        elif floor(name) == 1 and floor(target) != 1:
            wrong.append(f"{name} imports {target}: kernels know nothing of the package")
        # The top package re-exports names for users; inside, nothing but it leans on them.
        elif name != "mtl_fast" and floor(target) > floor(name):
            wrong.append(f"{name} (floor {floor(name)}) imports {target} (floor {floor(target)})")
    return wrong


def test_floors_hold() -> None:
    modules = sources()
    known = set(modules)
    wrong = [
        line
        for name, path in modules.items()
        for line in upward(name, path.read_text("utf-8"), path.name == "__init__.py", known)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("mtl_fast.kernels.reference.x", "from mtl_fast.errors import InputError"),
        ("mtl_fast.ops.x", "def f():\n    from mtl_fast.nn import y"),
        ("mtl_fast.engine.x", "from ..training import y"),
        ("mtl_fast.data.x", "import mtl_fast.engine.step"),
        ("mtl_fast.ops.x", "from kernels.reference import ss_conv"),
        ("mtl_fast.ops.x", "from .. import engine"),
    ],
    ids=["kernels-up", "inside-function", "relative", "plain", "top-level-kernels", "parent"],
)
def test_the_check_of_floors_sees(name: str, text: str) -> None:
    assert upward(name, text, False, {"mtl_fast.engine", "mtl_fast.training"})


def test_every_operation_has_its_files() -> None:
    missing = [
        path
        for op in OPERATIONS
        for path in (
            f"mtl_fast/ops/{op}.py",
            f"kernels/reference/{op}.py",
            f"tests/ops/test_{op}.py",
            f"bench/ops/bench_{op}.py",
        )
        if not (ROOT / path).is_file()
    ]
    assert not missing, f"missing: {', '.join(missing)}"


def test_every_file_in_ops_is_tested() -> None:
    names = [path.stem for path in (PACKAGE / "ops").glob("*.py") if not path.stem.startswith("_")]
    missing = [name for name in names if not (ROOT / "tests" / "ops" / f"test_{name}.py").is_file()]
    assert not missing, f"no tests/ops/test_<name>.py for: {', '.join(missing)}"


def test_every_kernel_file_has_its_operation() -> None:
    kernels = [path for path in (ROOT / "kernels").glob("*/*") if path.suffix in (".py", ".cpp", ".cu")]
    assert kernels
    # A part of an operation that is an operator of its own is `<operation>_<part>`.
    strangers = [
        path.name
        for path in kernels
        if not path.stem.startswith("_")
        and path.stem not in SHARED | PARTS
        and not any(f"{path.stem}_".startswith(f"{op}_") for op in OPERATIONS)
    ]
    assert not strangers, f"kernel files without an operation: {', '.join(strangers)}"


def test_files_are_short() -> None:
    folders = ("mtl_fast", "kernels", "bench", "examples", "tests", "tools")
    suffixes = (".py", ".cpp", ".h")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in suffixes]
    long = {
        str(path.relative_to(ROOT)): n
        for path in files
        if (n := len(path.read_text("utf-8").splitlines())) >= LONGEST_FILE
    }
    assert not long, f"{LONGEST_FILE} lines or more: {long}"


def test_the_link_stands_and_imports() -> None:
    link = PACKAGE / "kernels"
    assert link.is_symlink()
    assert os.readlink(link) == "../kernels"
    import mtl_fast.kernels.reference as reference

    assert Path(str(reference.__file__)).resolve().is_relative_to(ROOT / "kernels")


LEAN = """
import os, sys
import torch  # whatever torch itself starts is not ours
before = set(sys.modules)
environment = dict(os.environ)
events = []
def hook(event, arguments):
    if event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect"):
        events.append((event, arguments))
    if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
        events.append((event, arguments))
sys.addaudithook(hook)
threads = torch.get_num_threads()
state = torch.get_rng_state()
import mtl_fast, mtl_fast.ops, mtl_fast.kernels.reference
new = set(sys.modules) - before
heavy = ("triton", "matplotlib", "tensorboard", "PIL", "tqdm", "tyro", "setuptools")
heavy = {name for name in new if name.split(".")[0] in heavy}
heavy |= {name for name in new if name.startswith(("torch.utils.cpp_extension", "torch.utils.tensorboard", "torch._dynamo"))}
assert not heavy, sorted(heavy)
assert not events, events
assert dict(os.environ) == environment
assert not torch.cuda.is_initialized()
assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), state)
assert torch.is_grad_enabled() and torch.get_default_dtype() == torch.float32
print("lean")
"""


def test_importing_starts_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-B", "-W", "error", "-c", LEAN],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert (done.returncode, done.stdout) == (0, "lean\n"), done.stderr


def build_wheel(folder: Path, **environment: str) -> Path:
    """The wheel of a copy of this checkout: building writes build/ and egg-info beside setup.py."""
    source = folder / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("mtl_fast", "kernels", "bench", "examples", "tests"):
        ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps"]
    variables = {**os.environ, **environment}
    subprocess.run(
        [*command, "--wheel-dir", str(folder), str(source)], check=True, timeout=500, env=variables
    )
    (wheel,) = folder.glob("*.whl")
    return wheel


def printed_in(folder: Path, code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.slow
def test_wheel_holds_the_package_and_nothing_else(tmp_path: Path) -> None:
    pytest.importorskip("wheel")
    wheel = build_wheel(tmp_path, MTL_FAST_NO_NATIVE="1")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"mtl_fast"}
    expected = {name.replace(".", "/") for name in sources()}
    packed = {name.removesuffix(".py").removesuffix("/__init__") for name in names if name.endswith(".py")}
    assert packed == expected
    assert "mtl_fast/py.typed" in names
    data = {
        str(path.relative_to(ROOT))
        for path in (PACKAGE / "data" / "glyphs").glob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    data |= {f"mtl_fast/models/{path.name}" for path in (PACKAGE / "models").iterdir()}
    # The native kernels' sources: `mtl-fast build` compiles them where no library came with the package.
    data |= {
        f"mtl_fast/kernels/native/{path.name}" for path in NATIVE.iterdir() if path.suffix in (".cpp", ".h")
    }
    assert data <= names, f"not in the wheel: {data - names}"
    # What was unpacked imports by itself, kernels as real files.
    code = "import mtl_fast.kernels.reference as r; print(r.__file__)"
    expected_file = tmp_path / "site/mtl_fast/kernels/reference/__init__.py"
    assert printed_in(tmp_path / "site", code) == str(expected_file)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_wheel_holds_a_library_for_every_vector_width(tmp_path: Path) -> None:
    pytest.importorskip("wheel")
    variants = build.VARIANTS.get(platform.machine(), ())
    try:
        tools = build.Tools.found()
    except build.NoCompilerError as error:
        pytest.skip(str(error))
    if not build.runnable_variants():
        pytest.skip(f"no variant for {build.processor()}")
    # What the wheel holds is looked at, and one answer of it: optimising would take minutes.
    compiler = tmp_path / "c++"
    compiler.write_text(f'#!/bin/sh\nexec {tools.compiler} "$@" -O0\n')
    compiler.chmod(0o755)
    wheel = build_wheel(tmp_path, MTL_FAST_NO_NATIVE="0", CXX=str(compiler))
    assert wheel.name.endswith(f"-py3-none-linux_{platform.machine()}.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
        libraries = [name for name in archive.namelist() if name.endswith(".so")]
        assert not [name for name in archive.namelist() if name.endswith((".o", ".ninja", ".lock"))]
        (metadata,) = [name for name in archive.namelist() if name.endswith(".dist-info/WHEEL")]
        assert "Root-Is-Purelib: false" in archive.read(metadata).decode()
    assert [Path(name).name.split("-")[0] for name in sorted(libraries)] == sorted(
        f"libmtl_fast_{variant.name}" for variant in variants
    )
    # With nothing in the user's folder, the packaged library of this processor's width is loaded, and used.
    code = "from mtl_fast import why; print(why('ss_conv'))"
    nowhere = {"MTL_FAST_BUILD_DIR": str(tmp_path / "empty"), "MTL_FAST_BACKEND": ""}
    said = printed_in(tmp_path / "site", code, **nowhere)
    assert said.startswith(f"native: native kernels, libmtl_fast_{build.runnable_variants()[0].name}-")


def test_the_table_of_environment_variables_is_complete() -> None:
    """Every one that the package or its build reads is in CONTRIBUTING.md's table, and no other."""
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    told = set(re.findall(r"^\| `(MTL_FAST_\w+)`", text, re.MULTILINE))
    files = [*sources().values(), ROOT / "setup.py"]
    read = {name for path in files for name in re.findall(r"\bMTL_FAST_[A-Z_]+\b", path.read_text("utf-8"))}
    assert told == read
