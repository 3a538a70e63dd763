"""Which cells an ablation has, the order they are made in, and the meta learning rates they take."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import InputError
from .cells import Cell, Wanted, best_cell
from .rows import ALL_ROWS, RATES, Row

# Makes (or reads, or only counts) some cells; the text names the stage.
Make = Callable[[Sequence[Wanted], str], list[Cell]]


@dataclass(frozen=True)
class Scope:
    """Which cells an ablation has.

    Attributes:
        rows: of the paper's, in their order.
        shots: support images a class of the rows that adapt the head; rates are chosen at the first.
        seeds: of these rows; at each an encoder is pre-trained.
        whole_network_shots, whole_network_seeds: of the rows that adapt all weights.
        whole_network_tasks: so many of the test tasks these rows are tested on, the first ones.
        rates: row key → meta learning rate, where it was chosen before.
        choose: whether rates that are not given are chosen on the validation split; otherwise the recipe's hold.
    """

    rows: tuple[Row, ...] = ALL_ROWS
    shots: tuple[int, ...] = (1, 5)
    seeds: tuple[int, ...] = (0, 1, 2)
    whole_network_shots: tuple[int, ...] = (1,)
    whole_network_seeds: tuple[int, ...] = (0,)
    whole_network_tasks: int = 600
    rates: Mapping[str, float] = field(default_factory=dict)
    choose: bool = False

    def candidates(self, row: Row) -> tuple[float | None, ...]:
        """Meta learning rates to try for a plain row; None is the recipe's."""
        given = self.rates.get(row.key, self.rates.get(row.rate_of))
        if given is not None:
            return (given,)
        return RATES.get(row, (None,)) if self.choose else (None,)

    @property
    def pretrained_seeds(self) -> tuple[int, ...]:
        """The seeds that need a pre-trained network."""
        return tuple(
            dict.fromkeys(seed for row in self.rows if row.pretrained for seed in self.seeds_of(row))
        )

    def shots_of(self, row: Row) -> tuple[int, ...]:
        """The task shapes of a row."""
        return self.whole_network_shots if row.is_whole_network else self.shots

    def seeds_of(self, row: Row) -> tuple[int, ...]:
        """The seeds of a row."""
        return self.whole_network_seeds if row.is_whole_network else self.seeds

    def wanted(self, row: Row, n_shot: int, rate: float | None) -> Wanted:
        """The cell of a row at a rate."""
        n_tasks = self.whole_network_tasks if row.is_whole_network else None
        return Wanted(row, n_shot, rate, self.seeds_of(row), n_tasks)

    def run(self, make: Make) -> dict[tuple[str, int], Cell]:
        """Makes all cells, those first that are quick and tell most; returns (row key, n_shot) → cell.

        A row's rate is the best of its candidates in validation, at the first of the shots; with hard tasks it is
        that of the plain row, so that the two differ in nothing but the meta-batch. Rows with several candidates
        that are not all finished are left out.
        """
        head_only = [row for row in self.rows if not row.is_whole_network]
        plain = [row for row in head_only if row.hard == "none"]
        hard = [row for row in head_only if row.hard != "none"]
        first, *others = self.shots
        tried = [self.wanted(row, first, rate) for row in plain for rate in self.candidates(row)]
        cells = make(tried, f"{first}-shot, plain")
        chosen: dict[str, float | None] = {}
        for row in plain:
            rates = self.candidates(row)
            n_complete = sum(cell.row == row and cell.seeds == self.seeds for cell in cells)
            if len(rates) == 1:
                chosen[row.key] = rates[0]
            elif n_complete == len(rates):
                chosen[row.key] = best_cell(cells, row, first).rate
        cells = [cell for cell in cells if cell.row.key in chosen and cell.rate == chosen[cell.row.key]]
        stages = [(f"{first}-shot, hard tasks", hard, (first,))]
        stages += [(f"{n}-shot", head_only, (n,)) for n in others]
        for name, rows, shots in stages:
            known = [row for row in rows if row.plain_key in chosen]
            cells += make([self.wanted(row, n, chosen[row.plain_key]) for row in known for n in shots], name)
        whole = [row for row in self.rows if row.is_whole_network]
        for n in self.whole_network_shots if whole else ():
            cells += make(
                [self.wanted(row, n, self.candidates(row)[0]) for row in whole], f"whole network, {n}-shot"
            )
        return {(cell.row.key, cell.n_shot): cell for cell in cells}


def rates_of(file: Path) -> dict[str, float]:
    """The rates that a results.json or an ablation.json tells were chosen: row key → meta learning rate.

    Raises:
        InputError: it cannot be read as one.
    """
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
        return {row["row"]: float(row["meta_lr"]) for row in rows if row["chosen"] and row["meta_lr"]}
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(
            f"{file}: holds no rates; give the results.json of `mtl-fast results`, or `grid` or `preset`"
        ) from None
