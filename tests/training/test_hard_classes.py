"""Which classes joined the pool: what a run counts, writes, keeps over a stop, and draws."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mtl_fast.training import checkpoint
from mtl_fast.training.hard_classes import (
    HardClasses,
    draw_hard_classes,
    hard_classes_figure,
    read_hard_classes,
)
from mtl_fast.training.run import Interrupted
from tests.read_back import NothingReadBack
from tests.training import tiny
from tests.training.tiny import at_update, ctrl_c

NAMES = ("ant", "bee", "cat", "dog")


def joined(*labels: int) -> Tensor:
    return torch.tensor(labels, dtype=torch.int64)


def a_record() -> HardClasses:
    """Two rounds of six tasks and the beginning of a third."""
    record = HardClasses(NAMES, torch.device("cpu"), 6)
    record.add(joined(2, 0, 2))
    record.add(joined(2))
    record.end_round()
    record.add(joined(3))
    record.end_round()
    record.add(joined(1, 1))
    return record


def test_rounds_are_counted_by_hand(tmp_path: Path) -> None:
    record = a_record()
    assert record.counts().tolist() == [[1, 0, 3, 0], [0, 0, 0, 1], [0, 2, 0, 0]]
    assert record.hardest() == "cat ×3, bee ×2, ant ×1"
    assert record.hardest() == ""
    record.add(joined(3, 0))
    assert record.hardest(1) == "ant ×1"  # equal counts in the order of labels
    record.save(tmp_path, 14)
    assert [json.loads(line) for line in (tmp_path / "hard_classes.jsonl").read_text().splitlines()] == [
        {"round": 1, "tasks": 6, "joined": {"cat": 3, "ant": 1}},
        {"round": 2, "tasks": 12, "joined": {"dog": 1}},
        {"round": 3, "tasks": 14, "joined": {"bee": 2, "ant": 1, "dog": 1}},
    ]


def test_the_state_goes_on_exactly() -> None:
    first = a_record()
    again = HardClasses(NAMES, torch.device("cpu"), 6)
    again.load_state_dict(first.state_dict())
    for record in (first, again):
        record.add(joined(0))
    assert np.array_equal(first.counts(), again.counts())
    assert first.hardest(4) == again.hardest(4) == "cat ×3, ant ×2, bee ×2, dog ×1"
    new = HardClasses(NAMES, torch.device("cpu"), 6)
    new.load_state_dict({})
    new.load_state_dict(new.state_dict())
    assert new.counts().shape == (0, 4)


def test_counting_reads_nothing_back() -> None:
    record, labels = HardClasses(NAMES, torch.device("cpu"), 6), joined(2, 0)
    with NothingReadBack():
        record.add(labels)
        record.end_round()


def test_a_run_writes_what_joined_its_pool(pretrained: Path, tmp_path: Path) -> None:
    run = tiny.meta_training(tmp_path, pretrained)
    added: list[list[str]] = [[]]
    assert run.pool is not None
    add, clear = run.pool.add, run.pool.clear
    names = run.train.class_names

    def adding(*arguments: Any) -> Tensor:
        labels = add(*arguments)
        added[-1] += [names[i] for i in labels.tolist()]
        return labels

    run.pool.add = adding  # type: ignore[method-assign]
    run.pool.clear = lambda: (added.append([]), clear())[1]  # type: ignore[func-returns-value,method-assign]
    run.run()
    rows = read_hard_classes(tmp_path)
    # 20 tasks in rounds of 4 random and 2 hard ones.
    assert [row["tasks"] for row in rows] == [6, 12, 18, 20]
    for row, expected in zip(rows, added, strict=True):
        assert row["joined"] == {name: expected.count(name) for name in expected}
    assert [sum(row["joined"].values()) for row in rows] == [4, 4, 4, 2]
    log = tiny.rows_of(tmp_path)
    assert log[0]["hardest"] == ""
    since = added[0] + added[1][:2]  # until the report after 8 tasks
    top = max(since.count(name) for name in since)
    name, _, count = log[1]["hardest"].partition(", ")[0].rpartition(" ×")
    assert (since.count(name), int(count)) == (top, top)
    assert (tmp_path / "hard_classes.png").exists()


def test_a_run_without_hard_tasks_writes_none(pretrained: Path, tmp_path: Path) -> None:
    tiny.meta_training(tmp_path, pretrained, tiny.with_meta(hard="none")).run()
    assert not list(tmp_path.glob("hard_classes.*"))
    assert "hardest" not in tiny.rows_of(tmp_path)[0]


def test_more_classes_of_a_task_and_fewer_of_the_pool(pretrained: Path, tmp_path: Path) -> None:
    """Both settings reach the pool: two classes a task join, and hard tasks are made of the top three."""
    config = tiny.with_meta(hard_classes_per_task=2, hard_pool_size=3, validate_every=20)
    run = tiny.meta_training(tmp_path, pretrained, config)
    pools: list[tuple[set[int], Tensor]] = []
    assert run.pool is not None
    sample = run.pool.sample

    def sampling(n: int) -> Any:
        assert run.pool is not None
        episodes = sample(n)
        pools.append((set(run.pool.classes.tolist()), episodes.classes))
        return episodes

    run.pool.sample = sampling  # type: ignore[method-assign]
    run.run()
    assert [sum(row["joined"].values()) for row in read_hard_classes(tmp_path)] == [8, 8, 8, 4]
    assert len(pools) == 3
    for members, classes in pools:
        assert len(members) == 3
        assert all(set(task) == members for task in classes.tolist())


@pytest.mark.parametrize("update", [3, 5, 7])
def test_a_stop_changes_nothing(update: int, pretrained: Path, meta_trained: Path, tmp_path: Path) -> None:
    run = tiny.meta_training(tmp_path, pretrained)
    at_update(run, update, ctrl_c)
    with pytest.raises(Interrupted):
        run.run()
    tiny.meta_training(tmp_path, pretrained, resume=True).run()
    for name in ("hard_classes.jsonl", "hard_classes.png"):
        assert (tmp_path / name).read_bytes() == (meta_trained / name).read_bytes()


def test_a_run_that_began_before_this_was_counted_goes_on(pretrained: Path, tmp_path: Path) -> None:
    run = tiny.meta_training(tmp_path, pretrained)
    at_update(run, 5, ctrl_c)
    with pytest.raises(Interrupted):
        run.run()
    tensors, meta = checkpoint.load(tmp_path / "checkpoint.safetensors")
    old = {name: tensor for name, tensor in tensors.items() if not name.startswith("hard_classes.")}
    assert len(old) == len(tensors) - 3
    for name in ("hard_classes_per_task", "hard_pool_size"):
        del meta["config"]["meta"][name]
    checkpoint.save(tmp_path / "checkpoint.safetensors", old, meta)
    tiny.meta_training(tmp_path, pretrained, resume=True).run()
    assert (tmp_path / "model.safetensors").exists()


def rows(n_rounds: int, n_classes: int) -> list[dict[str, Any]]:
    """Class i joins in each (i + 1)th round."""
    return [
        {
            "round": r + 1,
            "tasks": 30 * (r + 1),
            "joined": {f"class {i}": 1 + (i == 0) for i in range(n_classes) if r % (i + 1) == 0},
        }
        for r in range(n_rounds)
    ]


@pytest.mark.parametrize(("n_rounds", "n_classes"), [(1, 1), (3, 24), (61, 30), (1000, 64)])
def test_the_picture_fills_the_page_and_equal_numbers_give_equal_files(
    n_rounds: int, n_classes: int, tmp_path: Path
) -> None:
    for name in ("a.png", "b.png"):
        hard_classes_figure(tmp_path / name, rows(n_rounds, n_classes), title="classes")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with Image.open(tmp_path / "a.png") as image:
        assert image.size[0] == 1600
        picture = np.asarray(image.convert("RGB"))
    assert (picture[:, -4:] == 255).all()


def test_a_changed_number_changes_the_picture(tmp_path: Path) -> None:
    changed = rows(5, 3)
    changed[3]["joined"]["class 1"] = 9
    hard_classes_figure(tmp_path / "a.png", rows(5, 3), title="classes")
    hard_classes_figure(tmp_path / "b.png", changed, title="classes")
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()


def test_a_run_that_counted_nothing_has_no_picture(tmp_path: Path) -> None:
    draw_hard_classes(tmp_path, tmp_path / "a.png", title="")
    HardClasses(NAMES, torch.device("cpu"), 6).save(tmp_path, 0)
    draw_hard_classes(tmp_path, tmp_path / "a.png", title="")
    assert not (tmp_path / "a.png").exists()
    a_record().save(tmp_path, 14)
    draw_hard_classes(tmp_path, tmp_path / "a.png", title="")
    assert (tmp_path / "a.png").exists()


def test_names_that_the_font_lacks_or_that_are_too_long_do_no_harm(tmp_path: Path) -> None:
    names = ("漢字", "$x_1 unmatched", "a very long name of a class that does not fit its column at all")
    row = {"round": 1, "tasks": 30, "joined": dict.fromkeys(names, 2)}
    hard_classes_figure(tmp_path / "a.png", [row], title="$" * 3)
    with Image.open(tmp_path / "a.png") as image:
        assert (np.asarray(image.convert("RGB"))[:, :8] == 255).all()


def test_nothing_that_joined_is_nothing_to_draw(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.png: no class joined the pool"):
        hard_classes_figure(tmp_path / "a.png", [{"round": 1, "tasks": 30, "joined": {}}], title="")
