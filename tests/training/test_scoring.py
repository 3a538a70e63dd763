"""A test in pieces: killed, gone on with and shared among shards, always to the same bits."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mtl_fast.cli import main
from mtl_fast.config import EvaluationConfig
from mtl_fast.errors import InputError
from mtl_fast.training import checkpoint, models, scoring
from mtl_fast.training.evaluate import Score, drawn_episodes, evaluate_model, score
from mtl_fast.training.models import load_model
from tests.training import tiny
from tests.training.forks import Forks

TASKS = EvaluationConfig(n_tasks=23)


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "load_split", lambda source, split, size: tiny.split(split))
    monkeypatch.setattr(scoring, "TASKS_PER_PART", 5)
    monkeypatch.setattr(scoring, "IMAGES_PER_PART", 60)


@pytest.fixture(scope="module")
def episode_model(meta_trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The meta-trained model, its norm that of each task."""
    folder = tmp_path_factory.mktemp("episode")
    tensors, meta = checkpoint.load(meta_trained / "model.safetensors")
    meta["config"]["meta"]["norm"] = "episode"
    checkpoint.save(folder / "model.safetensors", tensors, meta)
    return folder


@pytest.fixture(params=["frozen", "episode", "all weights"])
def model(
    request: pytest.FixtureRequest, meta_trained: Path, episode_model: Path, maml_trained: Path
) -> Path:
    return {"frozen": meta_trained, "episode": episode_model, "all weights": maml_trained}[request.param]


def run(model: Path, output: Path | None = None, **options: Any) -> Score:
    return evaluate_model(
        model, **({"evaluation": TASKS, "device": "cpu", "by_step": True, "output": output} | options)
    )


def same(a: Score, b: Score) -> bool:
    assert a.accuracy_by_step is not None
    assert b.accuracy_by_step is not None
    return torch.equal(a.task_accuracy, b.task_accuracy) and torch.equal(
        a.accuracy_by_step, b.accuracy_by_step
    )


class Killed(Exception):
    """What ends a test in the middle here."""


def killing(monkeypatch: pytest.MonkeyPatch, name: str, at: int) -> Callable[[], None]:
    """The call number `at` of a function of `scoring` does not come back; returns what undoes that."""
    original, calls = getattr(scoring, name), []

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(None)
        if len(calls) == at:
            raise Killed
        return original(*arguments, **options)

    monkeypatch.setattr(scoring, name, counted)
    return lambda: monkeypatch.setattr(scoring, name, original)


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


FINISHED = ["accuracy_by_step.csv", "accuracy_by_step.png", "evaluation.json", "evaluation.safetensors"]


def test_pieces_add_up_to_the_whole(model: Path) -> None:
    loaded, store = load_model(model), tiny.split("test")
    config = replace(loaded.config, evaluation=TASKS)
    whole, _ = score(loaded, config, store, drawn_episodes(config, store))
    assert torch.equal(run(model).task_accuracy, whole.task_accuracy)


def test_accuracy_by_step_of_all_weights_is_that_of_tests_with_as_many_steps(maml_trained: Path) -> None:
    for options in ({}, {"adapt": "head"}, {"evaluation": replace(TASKS, mirror_support=True)}):
        by_step = run(maml_trained, **options).accuracy_by_step
        assert by_step is not None
        assert by_step.shape == (23, tiny.MAML.inner.test_steps + 1)
        for n_steps in (0, 2):
            alone = run(maml_trained, inner_steps=n_steps, by_step=False, **options)
            assert torch.equal(by_step[:, n_steps], alone.task_accuracy), (options, n_steps)


@pytest.mark.parametrize(
    ("name", "at", "n_pieces"),
    [("fit_and_score", 1, 3), ("fit_and_score", 4, 6), ("embed_rows", 2, 1), ("accuracy_by_step", 2, 4)],
)
def test_a_killed_test_goes_on_to_the_same_bits(
    name: str, at: int, n_pieces: int, meta_trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(meta_trained, tmp_path / "whole")
    undo = killing(monkeypatch, name, at)
    with pytest.raises(Killed):
        run(meta_trained, tmp_path / "killed")
    assert len(names(tmp_path / "killed" / "parts")) == n_pieces
    with pytest.raises(InputError, match=r"parts: holds parts of an evaluation; --resume goes on"):
        run(meta_trained, tmp_path / "killed")
    undo()
    computed: list[int] = []
    original = scoring.fit_and_score

    def counted(*arguments: Any, **options: Any) -> Any:
        computed.append(1)
        return original(*arguments, **options)

    monkeypatch.setattr(scoring, "fit_and_score", counted)
    assert same(run(meta_trained, tmp_path / "killed", resume=True), expected)
    # What was done is not done again: two of three pieces of features come first, then five of scores.
    assert len(computed) == 5 - max(0, n_pieces - 3)
    for folder in ("whole", "killed"):
        assert names(tmp_path / folder) == FINISHED
    first, second = (json.loads((tmp_path / f / "evaluation.json").read_text()) for f in ("whole", "killed"))
    assert first == second
    for name in ("accuracy_by_step.csv", "accuracy_by_step.png"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()


def test_a_process_killed_at_any_moment_leaves_what_goes_on(meta_trained: Path, tmp_path: Path) -> None:
    """Half of a piece on disk, one not yet in place, the result in place and nothing of it told."""
    expected = run(meta_trained, tmp_path / "whole")
    forks = Forks()
    try:
        for i, point in enumerate(
            (
                "write 1 features-000000060.safetensors",
                "rename 1 tasks-0000005.safetensors",
                "renamed 1 evaluation.safetensors",
            )
        ):
            folder = tmp_path / str(i)
            assert forks.run("evaluate", folder, model=meta_trained, die=point) == -9, point
            assert not (folder / "evaluation.json").exists()
            assert forks.run("evaluate", folder, model=meta_trained, resume="yes") == 0, point
            assert names(folder) == FINISHED
            tensors, _ = checkpoint.load(folder / "evaluation.safetensors")
            assert torch.equal(tensors["task_accuracy"], expected.task_accuracy)
            whole, gone_on = ((f / "evaluation.json").read_bytes() for f in (tmp_path / "whole", folder))
            assert whole == gone_on
    finally:
        forks.close()


def test_a_finished_test_is_only_told_again(
    meta_trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(meta_trained, tmp_path)
    monkeypatch.setattr(scoring, "fit_and_score", lambda *_, **__: pytest.fail("worked"))
    again = run(meta_trained, tmp_path, resume=True)
    assert same(again, expected)
    assert str(again) == str(expected)
    with pytest.raises(
        InputError, match=r"result of another evaluation \(config\.seed is 0 there and 1 here\)"
    ):
        run(meta_trained, tmp_path, resume=True, seed=1)


def test_shards_in_any_order_and_number_give_the_whole(model: Path, tmp_path: Path) -> None:
    expected = run(model)
    lengths = []
    for shard in ("3/3", "1/3"):
        part = run(model, tmp_path, shard=shard)
        lengths.append(len(part.task_accuracy))
        assert f"test tasks of tiny (shard {shard}): " in str(part)
    assert lengths == [8, 5]
    assert same(run(model, tmp_path, shard="2/3"), replace(expected, **slices(expected, 5, 15)))
    assert "evaluation.json" not in names(tmp_path)
    assert same(run(model, tmp_path, resume=True), expected)
    assert names(tmp_path) == FINISHED


def slices(whole: Score, first: int, last: int) -> dict[str, Any]:
    assert whole.accuracy_by_step is not None
    return {
        "task_accuracy": whole.task_accuracy[first:last],
        "accuracy_by_step": whole.accuracy_by_step[first:last],
    }


def test_what_a_shard_left_undone_is_done_when_all_is_put_together(
    meta_trained: Path, tmp_path: Path
) -> None:
    run(meta_trained, tmp_path, shard="2/2")
    assert same(run(meta_trained, tmp_path, resume=True), run(meta_trained))


def test_shards_share_the_embedding(
    meta_trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each begins elsewhere in the list, and takes what is there."""
    rows: list[torch.Tensor] = []
    original = scoring.embed_rows

    def spy(encoder: Any, store: Any, part: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        rows.append(part)
        return original(encoder, store, part, *arguments, **options)

    monkeypatch.setattr(scoring, "embed_rows", spy)
    undo = killing(monkeypatch, "embed_rows", 2)
    with pytest.raises(Killed):
        run(meta_trained, tmp_path, shard="2/2")
    undo()
    monkeypatch.setattr(scoring, "embed_rows", spy)
    run(meta_trained, tmp_path, shard="1/2")
    assert int(rows[0].min()) > 0
    assert int(rows[1].min()) == 0
    distinct = torch.cat(rows)
    assert len(distinct) == len(distinct.unique())


def test_a_shard_without_tasks_and_options_without_a_folder_are_named(
    meta_trained: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        InputError, match=r"--shard 1/6: has no tasks, for 23 .* in 5 parts of 5; .* at most 5"
    ):
        run(meta_trained, tmp_path, shard="1/6")
    for options in ({"shard": "1/2"}, {"resume": True}):
        with pytest.raises(InputError, match="needs --output"):
            run(meta_trained, **options)


def test_a_test_of_other_settings_does_not_go_on(
    meta_trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undo = killing(monkeypatch, "fit_and_score", 3)
    with pytest.raises(Killed):
        run(meta_trained, tmp_path)
    undo()
    for options, says in (
        ({"seed": 1}, "config.seed is 0 there and 1 here"),
        ({"n_shot": 2}, "config.episodes.n_shot is 1 there and 2 here"),
        ({"by_step": False}, "by_step is true there and false here"),
        ({"head": "zeros"}, "weights is"),
    ):
        with pytest.raises(InputError, match=says):
            run(meta_trained, tmp_path, resume=True, **options)


def test_the_commands_embed_test_and_share(
    meta_trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, model = tmp_path / "features.safetensors", ["--checkpoint", str(meta_trained)]
    assert main(["embed", *model, "--output", str(file), "--device=cpu"]) == 0
    assert capsys.readouterr().out == f"embeddings: {file} (168 images, 7 classes)\n"
    test = ["--evaluation.n-tasks=8", "--by-step", "--device=cpu"]
    assert main(["evaluate", *model, *test]) == 0
    of_images = capsys.readouterr().out
    test = ["evaluate", "--embeddings", str(file), *test, "--output", str(tmp_path / "test")]
    for shard in ("1/2", "2/2"):
        assert main([*test, f"--shard={shard}"]) == 0
        assert f"tasks of {file} (shard {shard}): " in capsys.readouterr().out
    assert main([*test, "--resume"]) == 0
    assert capsys.readouterr().out == of_images.replace(" tasks of tiny:", f" tasks of {file}:")
    assert names(tmp_path / "test") == FINISHED
