"""`python -m bench PART`: the rows of one part of the system, or of all, beside plain PyTorch, as a table."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from .compare import compare
from .harness import Line, Settings
from .page import page
from .parts import ALL, PARTS, rows_of
from .records import append, measured, read, record
from .report import header, lines_of, text
from .scaling import picture

RESULTS = Path(__file__).parent / "results"


def main(arguments: list[str] | None = None) -> int:
    """Prints the table; 1 if any row was refused, 2 if none was asked for."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, what in {**{name: part.what for name, part in PARTS.items()}, ALL: "every part"}.items():
        _add_part(commands.add_parser(name, help=what, description=what))
    two = commands.add_parser("compare", help="the same rows of two files of results")
    two.add_argument("a", type=Path)
    two.add_argument("b", type=Path)
    one = commands.add_parser(
        "page", help="the README's table of speeds and its picture, from a file of results"
    )
    one.add_argument("file", type=Path)
    one.add_argument("--output", type=Path, default=RESULTS, help="folder of speed.md and speed.png")
    options = parser.parse_args(arguments)
    try:
        if options.command == "compare":
            print(compare(options.a, options.b))
            return 0
        if options.command == "page":
            page(options.file, options.output)
            return 0
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    return _measure(parser, options)


def _add_part(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", default="", help="only rows whose name contains this")
    parser.add_argument("--rounds", type=int, help="at least 7, or 2 with --quick (by default 9, or 2)")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="of both sides (default: torch's)"
    )
    parser.add_argument("--quick", action="store_true", help="small shapes, to try it out; not to be quoted")
    parser.add_argument(
        "--output",
        type=Path,
        help="a file to append JSON lines to, such as bench/results/x.jsonl; rows that it holds already, of the same "
        "commit, machine and settings, are not measured again",
    )


def _measure(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    fewest = 2 if options.quick else 7
    rounds = (2 if options.quick else 9) if options.rounds is None else options.rounds
    settings = Settings(rounds=rounds, quick=options.quick)
    if settings.rounds < fewest:
        parser.error(f"--rounds: a spread takes at least {fewest}")
    torch.set_num_threads(options.threads)
    rows = [row for row in rows_of(options.command, options.quick) if options.rows in row.name]
    if not rows:
        parser.error(f"--rows: no row of {options.command} contains {options.rows!r}")
    print(header(settings), flush=True)
    kept = measured(read(options.output), settings) if options.output and options.output.exists() else {}
    lines: list[Line] = []
    for of_row in lines_of(rows, settings, kept):
        print("\n".join(text(line, settings) for line in of_row), flush=True)
        new = [line for line in of_row if line not in kept.get(line.source, ())]
        if options.output and new:
            append(options.output, [record(line, settings) for line in new])
        lines += of_row
    if options.output and any("axis" in line.details for line in lines):
        print(f"picture: {picture(options.output.with_suffix('.png'), lines)}")
    return int(any(line.refused for line in lines))


if __name__ == "__main__":
    raise SystemExit(main())
