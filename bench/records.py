"""Lines of the table as JSON: what identifies one, reading them back, and going on where a run stopped.

A file of results is one JSON object a line. Two lines speak of the same thing when `key` gives the same: operation,
implementation, peers, mode, shape, dtype, device, threads, versions, and how it was measured. The commit
says which sources; `key` leaves it out, so that two commits can be compared.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from mtl_fast.training.checkpoint import provenance

from .harness import Family, Line, Settings, Spread, Target

Record = Mapping[str, Any]
CONDITIONS = ("dtype", "device", "threads", "versions", "rounds", "quick")
KEY = ("operation", "mode", "shape", "implementation", "peers", *CONDITIONS)


def machine() -> dict[str, Any]:
    """What a figure must be read with."""
    facts = provenance()
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": f"{_processor()}, {facts['cpu_capability']}",
        "threads": torch.get_num_threads(),
        "dtype": "float32",
        "versions": {name: facts[name] for name in ("mtl_fast", "torch", "python")},
        "commit": facts["source_commit"],
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration, IndexError):
        return platform.processor() or platform.machine()


def words_of(row: str) -> tuple[str, str, str]:
    """(operation, mode, shape) of a row's name, which is "operation, mode, shape …"."""
    operation, mode, shape = row.split(", ", 2)
    return operation, mode, shape


def record(line: Line, settings: Settings) -> dict[str, Any]:
    """The line with all that its key needs."""
    operation, mode, shape = words_of(line.row)
    fields = asdict(line)
    fields["spread"] = None if line.spread is None else asdict(line.spread)
    if line.spread is not None and line.target is not None and not settings.quick:
        fields["must_holds"], fields["aim_holds"] = line.target.holds(line.spread.middle)
    named = {"operation": operation, "mode": mode, "shape": shape}
    return machine() | asdict(settings) | named | fields


def append(path: Path, records: Iterable[Record]) -> None:
    """Adds what one measurement found to the file, with the time of day.

    A killed writer leaves at most one broken last line, which `read` leaves out.
    """
    now = time.strftime("%H:%M:%S")
    path.parent.mkdir(parents=True, exist_ok=True)
    broken = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    with path.open("a", encoding="utf-8") as file:
        file.write(
            "\n" * broken
            + "".join(json.dumps({**r, "time": now}, ensure_ascii=False) + "\n" for r in records)
        )


def read(path: Path) -> list[Record]:
    """The file's records in order.

    Raises:
        FileNotFoundError: there is no such file.
    """
    return list(_records(path))


def _records(path: Path) -> Iterator[Record]:
    for text in path.read_text("utf-8").splitlines():
        try:
            found = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(found, dict) and "row" in found:
            yield found


def key(found: Record) -> tuple[str, ...]:
    """What two records must share to be compared."""
    return _words(found, KEY)


def _words(found: Record, names: Iterable[str]) -> tuple[str, ...]:
    return tuple(json.dumps(found[name], sort_keys=True) for name in names)


def latest(
    records: Iterable[Record], conditions: Sequence[str] = CONDITIONS
) -> dict[tuple[str, ...], Record]:
    """What the last measurement of each row found under the same conditions, by key, in the order in which rows first came.

    Whatever an earlier one found is superseded: against peers that are others now, or before the row was refused.
    """
    rows: dict[tuple[str, ...], dict[tuple[str, ...], Record]] = {}
    before = None
    for found in records:
        row = (found["source"] or found["row"], *_words(found, conditions))
        measurement = (*row, *_words(found, CONDITIONS), found["date"], found.get("time"))
        if measurement != before or key(found) in rows[row]:
            rows[row] = {}
        rows[row][key(found)] = found
        before = measurement
    return {name: found for row in rows.values() for name, found in row.items()}


def measured(records: Iterable[Record], settings: Settings) -> dict[str, list[Line]]:
    """Rows that need not be measured again: same commit, machine, settings, with values. Row → its lines.

    Changes that are not committed have no name, so there every row is measured anew.
    """
    if machine()["commit"].endswith("+changes"):
        return {}
    now = json.loads(json.dumps(machine() | asdict(settings)))
    same = [name for name in now if name != "date"]
    lines: dict[str, list[Line]] = {}
    for found in latest(records).values():
        if all(found.get(name) == now[name] for name in same):
            lines.setdefault(found["source"], []).append(line_of(found))
    return {row: of_row for row, of_row in lines.items() if all(line.values for line in of_row)}


def line_of(found: Record) -> Line:
    """The inverse of `record`."""
    target, family = found["target"], found["family"]
    return Line(
        row=found["row"],
        against=found["against"],
        peers=tuple(found["peers"]),
        source=found["source"],
        implementation=found["implementation"],
        ours=found["ours"],
        peer=found["peer"],
        values=tuple(found["values"]),
        best=found["best"],
        share=found["share"],
        target=Target(**target) if target else None,
        refused=found["refused"],
        skipped=found.get("skipped", ""),
        note=found["note"],
        unit=found["unit"],
        family=Family(family["name"], family["n_rows"], Target(**family["target"])) if family else None,
        details=found["details"],
    )


def spread_of(found: Record) -> Spread | None:
    """Middle, 20th and 80th percentile of a record's values."""
    return Spread(**found["spread"]) if found["spread"] else None
