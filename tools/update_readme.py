"""Puts docs/results/results.md between README.md's markers; `--check` only says whether it already stands there."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"


def with_results(readme: str, results: str) -> str:
    """`readme` with `results` between its markers."""
    before, found, rest = readme.partition(BEGIN)
    _, closed, after = rest.partition(END)
    if not found or not closed:
        raise SystemExit(f"README.md needs the markers {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{results.strip()}\n{END}{after}"


def main() -> None:
    """Updates the README, or with --check exits 1 where it would change."""
    readme = ROOT / "README.md"
    old = readme.read_text(encoding="utf-8")
    new = with_results(old, (ROOT / "docs" / "results" / "results.md").read_text(encoding="utf-8"))
    if "--check" in sys.argv[1:]:
        raise SystemExit(
            0 if new == old else "README.md does not show docs/results/results.md; run make results"
        )
    readme.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
