"""The paper's ablation on one data set: every row, plain and with hard tasks, trained where missing, tested, told."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..config import DataConfig, preset
from ..errors import InputError
from .ablation_plan import plan_text
from .ablation_report import publish
from .cells import Study, finished_cells, require_distinct, run_cells, worker_pool
from .folder_lock import FolderLock
from .models import device_of
from .rows import ALL_ROWS, Row
from .run import make_folder, tell_of_missing_kernels
from .scope import Scope, rates_of


def ablation(
    output: str | Path,
    publish_to: str | Path,
    *,
    recipe: str = "paper",
    data: DataConfig | None = None,
    rows: Sequence[str] = (),
    shots: Sequence[int] = (1, 5),
    seeds: Sequence[int] = (0, 1, 2),
    whole_network_shots: Sequence[int] = (1,),
    whole_network_seeds: Sequence[int] = (0,),
    test_tasks: int = 2000,
    whole_network_tasks: int = 600,
    rates: str = "preset",
    plan: bool = False,
    finished: bool = False,
    workers: int = 1,
    device: str = "auto",
    outcomes: str | Path | None = None,
) -> None:
    """Makes (or reads, where finished) every run and publishes table, claims and figure; see `ablation_report`.

    Args:
        output: folder of the runs, one a seed; those of `results` with the same settings are read too.
        publish_to: folder of the summary.
        recipe: preset of the rows that adapt the head; those of MAML take ``maml`` and ``maml-deep``, on Glyphs
            ``glyphs-maml`` and ``glyphs-maml-deep``.
        data: images, where they are not the preset's.
        rows: keys; empty: all.
        shots, seeds, whole_network_shots, whole_network_seeds: as in `Scope`.
        test_tasks: drawn in each seed, the same for all rows.
        whole_network_tasks: how many of them the rows that adapt all weights are tested on.
        rates: ``preset``; ``grid`` chooses each row's on the validation split; or a results.json or ablation.json, with
            the grid for rows whose rate it does not tell.
        plan: only print runs and hours.
        finished: publish what is finished and make nothing.
        workers: runs at a time, one thread each; 0: a core each.
        device: as in `Config`.
        outcomes: JSON lines of finished runs, which are not made again; new ones are added. None: `output` alone.

    Raises:
        InputError: a line of `outcomes` that cannot be read; an unknown recipe or row, no shot or seed, fewer test tasks
            than `whole_network_tasks`, or rates that cannot be read; a folder that cannot be made, or where another
            process is at work.
    """
    if workers < 0:
        raise InputError(f"--workers is {workers}; give a number of runs at a time, or 0 for one a core")
    scope = _scope(
        rows, shots, seeds, whole_network_shots, whole_network_seeds, test_tasks, whole_network_tasks, rates
    )
    study = replace(
        _study(recipe, data, Path(output), test_tasks, device),
        outcomes=None if outcomes is None else Path(outcomes),
    )
    if plan:
        n_workers = workers or os.cpu_count() or 1
        print(plan_text(study, scope, lambda wanted: finished_cells(study, wanted), n_workers))
        return
    folder = Path(output)
    written = [folder, Path(publish_to)] + ([study.outcomes.parent] if study.outcomes else [])
    for made in written:  # before the work, not after it
        make_folder(made)
    if finished:
        cells = scope.run(lambda wanted, _: finished_cells(study, wanted))
    else:
        if device_of(study.config).type == "cpu":
            tell_of_missing_kernels()  # here, for the workers are silent
        with FolderLock(folder), worker_pool(workers) as pool:
            cells = scope.run(lambda wanted, stage: run_cells(pool, study, wanted, stage))
    publish(Path(publish_to), study, scope, cells)
    print(f"published in {publish_to}")


def _study(recipe: str, data: DataConfig | None, output: Path, test_tasks: int, device: str) -> Study:
    config = replace(preset(recipe), device=device)
    if data is not None:
        config = replace(config, data=data)
    if recipe.startswith("glyphs"):
        maml, maml_deep = preset("glyphs-maml"), preset("glyphs-maml-deep")
    else:
        maml, maml_deep = preset("maml"), preset("maml-deep")
    return Study(config, output, maml, maml_deep, n_drawn=test_tasks)


def _scope(
    keys: Sequence[str],
    shots: Sequence[int],
    seeds: Sequence[int],
    whole_network_shots: Sequence[int],
    whole_network_seeds: Sequence[int],
    test_tasks: int,
    whole_network_tasks: int,
    rates: str,
) -> Scope:
    known = {row.key: row for row in ALL_ROWS}
    unknown = [key for key in keys if key not in known]
    if unknown:
        raise InputError(f"--rows: {unknown[0]!r} is unknown; choose of: {', '.join(known)}")
    chosen: tuple[Row, ...] = tuple(row for row in ALL_ROWS if not keys or row.key in keys)
    for option, numbers in (
        ("--shots", shots),
        ("--seeds", seeds),
        ("--whole-network-shots", whole_network_shots),
        ("--whole-network-seeds", whole_network_seeds),
    ):
        require_distinct(option, numbers)
    if not 2 <= whole_network_tasks <= test_tasks:
        raise InputError(
            f"--whole-network-tasks is {whole_network_tasks}; it must be at least 2 and at most --test-tasks, {test_tasks}"
        )
    for row in chosen:
        if not row.is_whole_network and row.hard != "none" and known[row.plain_key] not in chosen:
            raise InputError(f"--rows: {row.key} takes the rate of {row.plain_key}; name that too")
    return Scope(
        chosen,
        tuple(shots),
        tuple(seeds),
        tuple(whole_network_shots),
        tuple(whole_network_seeds),
        whole_network_tasks,
        {} if rates in ("preset", "grid") else rates_of(Path(rates)),
        choose=rates != "preset",
    )
