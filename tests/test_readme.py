"""README and docs tell the truth: their snippets run, their commands parse, numbers are those of the results file."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.run import parse_args as parse_torchrun

from mtl_fast.cli import MetaTrain, parse
from mtl_fast.training.meta_checks import check_rounds

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def blocks(page: Path, language: str) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def commands(name: str) -> list[str]:
    """The lines of all pages that run this command, with what stands before it (variables, srun) taken off."""
    lines = "".join(text for page in PAGES for text in blocks(page, "sh")).replace("\\\n", " ").splitlines()
    found = (
        re.match(rf"(?:[A-Z_]+=\S+ |srun (?:--\S+ +)*)*({name} .*)", line.partition("#")[0]) for line in lines
    )
    return [match[1].strip() for match in found if match]


def run_snippets(page: Path) -> dict[str, object]:
    names: dict[str, object] = {}
    for snippet in blocks(page, "python"):
        exec(compile(snippet, page.name, "exec"), names)
    return names


def test_python_snippets_run_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(blocks(PAGES[0], "python")) >= 3
    names = run_snippets(PAGES[0])
    assert names["logits"].shape == (16, 75, 5)  # type: ignore[attr-defined]
    assert names["out"].class_accuracy.shape == (2, 5)  # type: ignore[attr-defined]


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: page.name)
def test_python_snippets_of_the_docs_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_snippets(page)


def check(arguments: list[str]) -> None:
    """The command exists with its options, and its numbers of tasks go together."""
    command = parse(arguments)
    if isinstance(command, MetaTrain):
        check_rounds(command.meta)


@pytest.mark.parametrize("line", commands("mtl-fast"))
def test_commands_exist_with_their_options(line: str) -> None:
    check(shlex.split(line)[1:])


@pytest.mark.parametrize("line", commands("torchrun"))
def test_commands_of_torchrun_exist_with_their_options(line: str) -> None:
    arguments = parse_torchrun(shlex.split(line)[1:])
    assert (arguments.module, arguments.training_script) == (True, "mtl_fast")
    check(arguments.training_script_args)


@pytest.mark.parametrize("line", commands("make"))
def test_make_targets_exist(line: str) -> None:
    assert re.search(rf"^{line.split()[1]}:", MAKEFILE, flags=re.MULTILINE)


def test_links_and_pictures_exist() -> None:
    targets = [
        (page, target)
        for page in PAGES
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8"))
    ]
    assert len(targets) > 5
    missing = [(page.name, t) for page, t in targets if "://" not in t and not (page.parent / t).exists()]
    assert not missing


def test_readme_shows_the_published_results() -> None:
    script = ROOT / "tools" / "update_readme.py"
    done = subprocess.run(
        [sys.executable, str(script), "--check"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_table_in_words_and_numbers_is_that_of_the_results_file() -> None:
    results = json.loads((ROOT / "docs" / "results" / "results.json").read_text(encoding="utf-8"))
    chosen = [row for row in results["rows"] if row["chosen"]]
    assert len(chosen) == 10  # five rows, two task shapes
    for row in chosen:
        line = next(line for line in README.splitlines() if line.startswith(f"| {row['label']} "))
        assert f"{100 * row['mean']:.1f} ± {100 * row['interval95']:.1f}" in line


def test_glyphs_is_neither_too_easy_nor_too_hard() -> None:
    results = json.loads((ROOT / "docs" / "results" / "results.json").read_text(encoding="utf-8"))
    one_shot = [row for row in results["rows"] if row["row"] == "update-head" and row["n_shot"] == 1]
    assert [0.45 < mean < 0.85 for row in one_shot for mean in row["seed_means"]] == [True] * 3
