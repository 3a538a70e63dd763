"""`python -m bench page FILE`: the README's table of speeds and its pictures, from a file of results."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mtl_fast.training.checkpoint import short_commit
from mtl_fast.training.figures import INK, PALE, RIGHT, WIDTH, WRONG, blank_figure, write_picture

from .harness import Target
from .records import CONDITIONS, Record, latest, line_of, read, spread_of, words_of
from .report import verdict, with_range
from .scaling import picture as scaling_picture


def page(file: Path, folder: Path) -> None:
    """Writes speed.md and speed.png into `folder`, and share.png and scaling.png where there are such rows.

    Raises:
        ValueError: the file has no finished row, or only quick ones, which are not to be quoted; or rows of sources that
            have no name.
    """
    # A row that was measured again with more rounds is one row.
    conditions = [name for name in CONDITIONS if name != "rounds"]
    all_of = [r for r in latest(read(file), conditions).values() if not r["quick"]]
    found = [r for r in all_of if r["values"]]
    if not found:
        raise ValueError(f"{file}: no finished row that may be quoted; `python -m bench all` makes them")
    unnamed = [r["row"] for r in found if r["commit"].endswith("+changes")]
    if unnamed:
        raise ValueError(
            f"{file}: {unnamed[0]} is of changes that no commit holds ({len(unnamed)} rows): commit, measure again"
        )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "speed.md").write_text(markdown([r for r in all_of if r["values"] or r["refused"]]), "utf-8")
    bars(folder / "speed.png", [r for r in found if _is_ratio(r)])
    shares(folder / "share.png", found)
    scaling = [line_of(r) for r in found if "axis" in r["details"]]
    if scaling:
        scaling_picture(folder / "scaling.png", scaling)


def markdown(found: Sequence[Record]) -> str:
    """The rows that have a target or were refused, as a table, with their notes and what they were measured with."""
    lines = ["| what | against | ratio (p20–p80) | must | aim |", "|---|---|---|---|---|"]
    for r in found:
        spread = spread_of(r)
        if r["refused"]:
            lines.append(f"| {r['row']} | | refused: {r['refused']} | | |")
        if r["target"] is None or spread is None:
            continue
        target, unit = Target(**r["target"]), r["unit"]
        middle, *around = with_range(spread, unit)
        must, aim = verdict(target, spread.middle, unit).split(", ")
        lines.append(
            f"| {r['row']} | {r['against']} | {' '.join([f'**{middle}**', *around])} | "
            f"{must.removeprefix('must ')} | {aim.removeprefix('aim ')} |"
        )
    notes = [
        f"- {r['row']}, against {r['against']}: {r['note']}." for r in found if r["target"] and r["note"]
    ]
    return "\n".join([*lines, "", *notes, *([""] if notes else []), *_measured_with(found)]) + "\n"


def _measured_with(found: Sequence[Record]) -> list[str]:
    def all_of(values: Iterable[Any]) -> str:
        return ", ".join(dict.fromkeys(map(str, values)))

    device, threads, rounds, date = (
        all_of(r[name] for r in found) for name in ("device", "threads", "rounds", "date")
    )
    torch, ours = (all_of(r["versions"][name] for r in found) for name in ("torch", "mtl_fast"))
    said = [
        f"Made by `python -m bench` on {device}, {threads} threads,",
        f"torch {torch}, mtl_fast {ours}, {date}, commit {_commits(found)}.",
        f"Times: both sides in one process, interleaved, {rounds} rounds; median of the rounds' ratios.",
    ]
    processes = {str(len(r["values"])) for r in found if "bytes" in r["details"]}
    if processes:
        said.append(f"Memory: the highest point of {', '.join(sorted(processes))} fresh processes a side.")
    return said


def _commits(found: Sequence[Record]) -> str:
    """The commit of most rows, and which rows are of others."""
    rows: dict[str, list[Record]] = {}
    for r in found:
        rows.setdefault(r["commit"], []).append(r)
    first, *others = sorted(rows, key=lambda commit: -len(rows[commit]))
    said = short_commit(first)
    for commit in others:
        named = ", ".join(dict.fromkeys(f"{r['operation']}, {r['mode']}" for r in rows[commit]))
        said += f"; {short_commit(commit)}: {named}"
    return said


def _is_ratio(found: Record) -> bool:
    return found["target"] is not None and found["unit"] == "×"


def bars(path: Path, found: Sequence[Record]) -> None:
    """How many times faster, on a logarithmic axis, with the spread and marks at the must (|) and the aim (¦).

    A bar is blue where the must holds and vermilion where it is missed.
    """
    names = [f"{_short(r['row'])}\nagainst {r['against']}" for r in found]
    with blank_figure(WIDTH, 140 + 78 * len(found), "constrained") as figure:
        axes = figure.add_subplot()
        for y, r in enumerate(found):
            spread, target = spread_of(r), Target(**r["target"])
            assert spread is not None
            holds = target.holds(spread.middle)[0]
            axes.barh(y, spread.middle, height=0.55, color=RIGHT if holds else WRONG)
            axes.plot([spread.low, spread.high], [y, y], color=INK, linewidth=1.4)
            for bound, style in ((target.must, "-"), (target.aim, ":")):
                axes.plot([bound, bound], [y - 0.42, y + 0.42], color=INK, linewidth=1.6, linestyle=style)
            clear = max(spread.high, target.aim)  # of bar and marks
            said = with_range(spread, r["unit"])[0]
            axes.annotate(said, (clear, y), (8, 0), textcoords="offset points", va="center")
        axes.set_yticks(range(len(found)), names)
        axes.set_ylim(len(found) - 0.4, -0.6)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:,g}×")
        axes.set_xlim(0.8, 3.5 * max(r["spread"]["middle"] for r in found))
        axes.grid(axis="x", color=PALE)
        axes.set_axisbelow(True)
        axes.set_xlabel("times faster; solid mark: the least we ask for, dotted: what we aim at")
        write_picture(figure, path)


def shares(path: Path, found: Sequence[Record]) -> None:
    """How much of the measured peak each row reaches, in the direct algorithm's arithmetic; nothing without such rows."""
    share = {r["row"]: r["share"] for r in found if r["share"] is not None}
    if not share:
        return
    with blank_figure(WIDTH, 140 + 44 * len(share), "constrained") as figure:
        axes = figure.add_subplot()
        axes.barh(range(len(share)), [100 * value for value in share.values()], height=0.6, color=RIGHT)
        for y, value in enumerate(share.values()):
            axes.annotate(f"{value:.0%}", (100 * value, y), (6, 0), textcoords="offset points", va="center")
        axes.axvline(100, color=INK, linewidth=1.4)
        axes.set_yticks(range(len(share)), share)
        axes.set_ylim(len(share) - 0.4, -0.6)
        axes.set_xlim(0, 115 * max(1, *share.values()))
        axes.grid(axis="x", color=PALE)
        axes.set_axisbelow(True)
        axes.set_xlabel(
            "% of a large matrix product's rate in the same run; Winograd's algorithm can exceed 100"
        )
        write_picture(figure, path)


def _short(row: str) -> str:
    operation, mode, shape = words_of(row)
    return f"{operation}, {mode}: {shape}"
