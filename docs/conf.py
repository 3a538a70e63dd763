"""Settings of the pages that `make docs` builds with Sphinx: Markdown pages, and a reference from the docstrings."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import mtl_fast

project = "mtl_fast"
release = mtl_fast.__version__
copyright = "the mtl_fast authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"mtl_fast {release}"
# Fragments of other pages, and files that the README shows.
exclude_patterns = ["results", "ablation"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
# In docstrings `x` is code, as in Markdown.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
nitpicky = False


def equations_as_they_stand(
    app: object, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    """Turns what is indented by four under a paragraph into a literal block: equations are laid out by hand."""
    out: list[str] = []
    section = ""
    for i, line in enumerate(lines):
        if re.fullmatch(r"[A-Z][a-z]+:", line):
            section = line
        elif line and not line.startswith(" "):
            section = ""
        before = lines[i - 1] if i else ""
        if line.startswith("    ") and not before.strip() and not section and out:
            out += ["::", ""] if _starts_block(lines, i) else []
        out.append(line)
    lines[:] = out


def _starts_block(lines: list[str], at: int) -> bool:
    """Whether the last line of text before `at` is not indented."""
    text = [line for line in lines[:at] if line.strip()]
    return bool(text) and not text[-1].startswith(" ")


def setup(app: Any) -> None:
    """Called by Sphinx; runs before napoleon, which reads the sections."""
    app.connect("autodoc-process-docstring", equations_as_they_stand, priority=100)
