"""The README tells the truth: its snippets run, its commands parse, its numbers are those of the results file."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from mtl_fast.cli import parse

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    lines = "".join(blocks("sh")).splitlines()
    return [line.partition("#")[0].strip() for line in lines]


def test_python_snippets_run_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    snippets = blocks("python")
    assert len(snippets) >= 3
    names: dict[str, object] = {}
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), names)
    assert names["logits"].shape == (16, 75, 5)  # type: ignore[attr-defined]
    assert names["out"].class_accuracy.shape == (2, 5)  # type: ignore[attr-defined]


@pytest.mark.parametrize("line", [line for line in commands() if line.startswith("mtl-fast")])
def test_commands_exist_with_their_options(line: str) -> None:
    parse(shlex.split(line)[1:])


@pytest.mark.parametrize("line", [line for line in commands() if line.startswith("make")])
def test_make_targets_exist(line: str) -> None:
    assert re.search(rf"^{line.split()[1]}:", MAKEFILE, flags=re.MULTILINE)


def test_links_and_pictures_exist() -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    assert len(targets) > 5
    missing = [t for t in targets if "://" not in t and not (ROOT / t).exists()]
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
