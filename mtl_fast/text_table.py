"""Tables as text, for a terminal, for Markdown or for LaTeX."""

from __future__ import annotations

import unicodedata
from typing import Literal, get_args

Style = Literal["markdown", "plain", "latex"]

# What LaTeX reads as a command, and letters that its text fonts lack.
_LATEX = {c: f"\\{c}" for c in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "Θ": r"$\Theta$",
    "θ": r"$\theta$",
    "Φ": r"$\Phi$",
    "±": r"$\pm$",
    "×": r"$\times$",
    "−": "$-$",
    "–": "--",
}


def grid(head: list[str], body: list[list[str]], style: Style) -> str:
    """A table, its first column to the left, the others to the right.

    Args:
        head: what stands above each column.
        body: the rows, each of as many cells.
        style: ``markdown``, ``plain`` for a terminal, or ``latex``, a ``tabular`` that needs no package.

    Returns:
        Lines without a final line break.
    """
    if style not in get_args(Style):
        raise ValueError(f"style must be one of {', '.join(map(repr, get_args(Style)))}, it is {style!r}")
    if style == "latex":
        return _tabular(head, body)
    lines = [head, *body]
    if style == "markdown":
        lines = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    widths = [max(_width(line[i]) for line in lines) for i in range(len(head))]

    def padded(line: list[str]) -> list[str]:
        spaces = [" " * (width - _width(cell)) for cell, width in zip(line, widths, strict=True)]
        return [line[0] + spaces[0], *(s + cell for s, cell in zip(spaces[1:], line[1:], strict=True))]

    if style == "plain":
        rule = "  ".join("─" * width for width in widths)
        return "\n".join([("  ".join(padded(head))).rstrip(), rule, *("  ".join(padded(x)) for x in body)])
    rule = "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])])
    rows = ["| " + " | ".join(padded(line)) + " |" for line in lines]
    return "\n".join([rows[0], f"|{rule}|", *rows[1:]])


def _tabular(head: list[str], body: list[list[str]]) -> str:
    lines = [
        " & ".join("".join(_LATEX.get(c, c) for c in cell) for cell in line) + r" \\"
        for line in (head, *body)
    ]
    columns = "l" + "r" * (len(head) - 1)
    rule = r"\hline"
    return "\n".join(
        [rf"\begin{{tabular}}{{{columns}}}", rule, lines[0], rule, *lines[1:], rule, r"\end{tabular}"]
    )


def _width(text: str) -> int:
    """Columns of a terminal; combining marks take none, wide characters two."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(bool(unicodedata.combining(c)) for c in text)
