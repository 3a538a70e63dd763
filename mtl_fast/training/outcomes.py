"""Finished runs in one small file, so that several machines, or several days, can share a long comparison."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from ..config import Config
from ..errors import InputError
from .checkpoint import provenance
from .experiment import Experiment, Outcome
from .rows import Row

# Of `provenance`, what tells one machine's runs from another's.
_TOLD = ("source_commit", "torch", "platform", "cpu_capability", "cuda_devices")


class Outcomes:
    """The runs that a file tells of, one JSON object a line: settings, outcome, and where it was made.

    A run is found by what it is (row, task shape, rate, seed, settings, size of the data, test tasks), not by its
    weights: those of another machine differ in the last bits, and so may accuracies by some tasks.

    Args:
        file: read where it is there; lines are added to it. What follows the last line break was cut off by a full disk or
            a kill: it is left out, and overwritten by the next line.

    Raises:
        InputError: a line of it cannot be read.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._known: list[tuple[dict[str, Any], Outcome]] = []
        if file.exists():
            whole, _, _ = file.read_bytes().rpartition(b"\n")
            for number, line in enumerate(whole.splitlines(), 1):
                try:
                    entry = json.loads(line)
                    self._known.append((_comparable(entry["facts"]), _unpacked(entry["outcome"])))
                except (ValueError, KeyError, IndexError, TypeError, InputError):
                    raise InputError(f"{file}, line {number}: not the outcome of a run") from None

    def find(
        self, experiment: Experiment, row: Row, n_shot: int, *, lr: float | None, n_tasks: int | None
    ) -> Outcome | None:
        """What `Experiment.outcome` would give, as it was given before; of several the last."""
        if not self._known:
            return None
        wanted = _facts(experiment, row, n_shot, lr=lr, n_tasks=n_tasks)
        return next((outcome for facts, outcome in reversed(self._known) if facts == wanted), None)

    def add(
        self,
        experiment: Experiment,
        row: Row,
        n_shot: int,
        outcome: Outcome,
        *,
        lr: float | None,
        n_tasks: int | None,
    ) -> Outcome:
        """Writes a run to the file at once; returns it with where it was made."""
        made = {name: value for name, value in provenance().items() if name in _TOLD}
        outcome = dataclasses.replace(outcome, made=made)
        facts = _facts(experiment, row, n_shot, lr=lr, n_tasks=n_tasks)
        self._known.append((facts, outcome))
        line = json.dumps({"facts": facts, "outcome": _packed(outcome)}) + "\n"
        with self.file.open("a+b") as stream:
            stream.seek(0)
            stream.truncate(stream.read().rfind(b"\n") + 1)
            stream.write(line.encode())
        return outcome


def _packed(outcome: Outcome) -> dict[str, Any]:
    """For JSON: of thousands of tasks' accuracies few differ, so each is told by its place among those."""
    values = sorted(set(outcome.task_accuracy))
    place = {value: i for i, value in enumerate(values)}
    packed = {"values": values, "places": [place[value] for value in outcome.task_accuracy]}
    return dataclasses.asdict(outcome) | {"task_accuracy": packed}


def _unpacked(entry: dict[str, Any]) -> Outcome:
    packed = entry["task_accuracy"]
    accuracies = [packed["values"][place] for place in packed["places"]]
    lr, steps = entry["inner"]
    return Outcome(**entry | {"task_accuracy": accuracies, "inner": (lr, steps)})


def _facts(
    experiment: Experiment, row: Row, n_shot: int, *, lr: float | None, n_tasks: int | None
) -> dict[str, Any]:
    """All that decides a run but the machine, in JSON's types."""
    facts = {"row": row.key, "n_shot": n_shot, **experiment.facts(row, n_shot, lr=lr, n_tasks=n_tasks)}
    return _comparable(json.loads(json.dumps(facts)))


def _comparable(facts: dict[str, Any]) -> dict[str, Any]:
    """Settings that came later have their defaults; where it is computed is no part of a run."""
    config = dataclasses.asdict(Config.from_dict(facts["config"]))
    del config["device"]
    return facts | {"config": json.loads(json.dumps(config))}
