"""The pages: each is reached from the start, and the reference has every public name, once."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import mtl_fast
from mtl_fast import engine, nn, ops

DOCS = Path(__file__).resolve().parents[1] / "docs"
# These hold what the README shows.
SHOWN = {"results", "ablation"}
PAGES = [
    path for path in sorted(DOCS.rglob("*")) if path.suffix in (".md", ".rst") and not SHOWN & {*path.parts}
]
DIRECTIVE = re.compile(r"^\.\. auto(?:function|class|exception|data):: (\S+)$", re.MULTILINE)


def test_every_page_is_in_the_table_of_contents() -> None:
    index = (DOCS / "index.md").read_text("utf-8")
    trees = "\n".join(re.findall(r"```\{toctree\}\n(.*?)```", index, re.DOTALL))
    listed = [line.strip() for line in trees.splitlines() if line.strip() and not line.startswith(":")]
    pages = [str(path.relative_to(DOCS).with_suffix("")) for path in PAGES]
    assert sorted([*listed, "index"]) == sorted(pages)


def test_the_reference_has_every_public_name_once() -> None:
    named = [name for page in PAGES for name in DIRECTIVE.findall(page.read_text("utf-8"))]
    assert len(set(named)) == len(named)
    found = []
    for name in named:
        module, _, attribute = name.rpartition(".")
        found.append(getattr(importlib.import_module(module), attribute))
    public = {
        f"{package.__name__}.{name}": getattr(package, name)
        for package in (mtl_fast, ops, nn, engine)
        for name in package.__all__
    }
    missing = [name for name, value in public.items() if not any(value is other for other in found)]
    assert not missing


def test_the_latest_changes_are_of_this_version() -> None:
    changes = (DOCS.parent / "CHANGELOG.md").read_text("utf-8")
    first = re.search(r"^## (\S+?),", changes, re.MULTILINE)
    assert first is not None
    assert first[1] == mtl_fast.__version__
