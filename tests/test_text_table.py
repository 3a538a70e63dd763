"""Tables: columns that line up, also where characters are wide or take no room."""

from __future__ import annotations

import pytest

from mtl_fast.text_table import grid


def test_plain_and_markdown() -> None:
    head, body = ["what", "n"], [["a", "1,000"], ["bird|s", "7"]]
    assert grid(head, body, "plain").splitlines() == [
        "what        n",
        "──────  ─────",
        "a       1,000",
        "bird|s      7",
    ]
    assert grid(head, body, "markdown").splitlines() == [
        "| what    |     n |",
        "|---------|------:|",
        "| a       | 1,000 |",
        r"| bird\|s |     7 |",
    ]


def test_wide_and_combining_characters() -> None:
    rows = grid(["x", "n"], [["漢字", "1"], ["e\u0301", "2"]], "plain").splitlines()
    assert rows[1:] == ["────  ─", "漢字  1", "e\u0301     2"]


def test_latex_needs_no_package_and_escapes_what_it_reads_as_commands() -> None:
    table = grid(["accuracy, %", "1-shot"], [["SS[Θ4;θ] − a_b", "7.0 ± 0.5"], ["x & \\y", "–"]], "latex")
    assert table.splitlines() == [
        r"\begin{tabular}{lr}",
        r"\hline",
        r"accuracy, \% & 1-shot \\",
        r"\hline",
        r"SS[$\Theta$4;$\theta$] $-$ a\_b & 7.0 $\pm$ 0.5 \\",
        r"x \& \textbackslash{}y & -- \\",
        r"\hline",
        r"\end{tabular}",
    ]


def test_an_unknown_style_is_an_error() -> None:
    with pytest.raises(ValueError, match="style must be one of 'markdown', 'plain', 'latex', it is 'html'"):
        grid(["a"], [["b"]], "html")  # type: ignore[arg-type]
