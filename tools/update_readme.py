"""Puts results between README.md's markers; `--check` only says whether they already stand there."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Name of the markers → where the text comes from, and the command that makes it.
SECTIONS = {
    "results": ("docs/results/results.md", "make results"),
    "ablation": ("docs/ablation/ablation.md", "make ablation"),
    "speed": ("bench/results/speed.md", "python -m bench page bench/results/cpu.jsonl"),
}


def with_section(readme: str, name: str, text: str) -> str:
    """`readme` with `text` between the markers of that name."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, found, rest = readme.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise SystemExit(f"README.md needs the markers {begin} and {end}")
    return f"{before}{begin}\n{text.strip()}\n{end}{after}"


def main() -> None:
    """Updates the README, or with --check exits 1 where it would change."""
    readme = ROOT / "README.md"
    old = new = readme.read_text(encoding="utf-8")
    for name, (source, command) in SECTIONS.items():
        before, new = new, with_section(new, name, (ROOT / source).read_text(encoding="utf-8"))
        if "--check" in sys.argv[1:] and new != before:
            raise SystemExit(f"README.md does not show {source}; run {command}, then tools/update_readme.py")
    if new != old:
        readme.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
