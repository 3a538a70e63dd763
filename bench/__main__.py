"""`python -m bench ops|step|pretrain|maml`: the rows of one part of the system beside plain PyTorch, as a table."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from .harness import Measurable, Settings
from .report import header, lines_of, record, text


def main(arguments: list[str] | None = None) -> int:
    """Prints the table; 1 if any row was refused, 2 if none was asked for."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("part", choices=("ops", "step", "pretrain", "maml"))
    parser.add_argument("--rows", default="", help="only rows whose name contains this")
    parser.add_argument("--rounds", type=int, help="at least 7, or 2 with --quick (by default 9, or 2)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="small shapes, to try it out")
    parser.add_argument(
        "--output", type=Path, help="a file to append JSON lines to, such as bench/results/x.jsonl"
    )
    options = parser.parse_args(arguments)
    fewest = 2 if options.quick else 7
    settings = Settings(rounds=options.rounds or (2 if options.quick else 9), quick=options.quick)
    if settings.rounds < fewest:
        parser.error(f"--rounds: a spread takes at least {fewest}")
    torch.set_num_threads(options.threads)
    rows = [row for row in _rows(options.part, options.quick) if options.rows in row.name]
    if not rows:
        parser.error(f"--rows: no row of {options.part} contains {options.rows!r}")
    print(header(settings), flush=True)
    refused = False
    for line in lines_of(rows, settings):
        print(text(line, settings), flush=True)
        refused |= bool(line.refused)
        if options.output:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            with options.output.open("a", encoding="utf-8") as file:
                file.write(record(line, settings) + "\n")
    return int(refused)


def _rows(part: str, quick: bool) -> list[Measurable]:
    if part == "step":
        from . import step

        return list(step.rows(quick))
    if part == "pretrain":
        from . import pretrain

        return list(pretrain.rows(quick))
    if part == "maml":
        from . import inner_loops

        return list(inner_loops.rows(quick))
    from . import encoder, fits
    from .ops import bench_ss_conv

    return [*bench_ss_conv.rows(quick), *encoder.rows(quick), *fits.rows(quick)]


if __name__ == "__main__":
    raise SystemExit(main())
