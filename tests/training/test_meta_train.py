"""Meta-training: the two-part rounds, the bits of a seed, the schedule, the guard, what is kept."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mtl_fast.config import MetaConfig
from mtl_fast.engine.base import StepOutput
from mtl_fast.engine.scores import Evaluation
from mtl_fast.episodes import Episodes
from mtl_fast.errors import InputError
from mtl_fast.training import meta_train
from mtl_fast.training.meta_checks import check_rounds
from mtl_fast.training.meta_train import MetaTraining
from mtl_fast.training.models import load_model, weights_of
from mtl_fast.training.run import Interrupted
from tests.training import tiny
from tests.training.tiny import CONFIG, at_update, ctrl_c


def watched(run: MetaTraining) -> list[tuple[str, Any]]:
    """What the run asks of sampler and pool, in order: (name, episodes or the pool's classes)."""
    events: list[tuple[str, Any]] = []

    def watch(owner: Any, name: str, event: str) -> None:
        original = getattr(owner, name)

        def spy(*arguments: Any) -> Any:
            out = original(*arguments)
            events.append((event, arguments[0] if event == "add" else out))
            return out

        setattr(owner, name, spy)

    watch(run.sampler, "sample", "random")
    if run.pool is not None:
        watch(run.pool, "sample", "hard")
        watch(run.pool, "add", "add")
        watch(run.pool, "clear", "clear")
    return events


@pytest.mark.parametrize("hard", ["resample", "reuse"])
def test_one_seed_gives_the_same_bits_and_another_gives_others(
    hard: str, pretrained: Path, tmp_path: Path
) -> None:
    config = tiny.with_meta(hard=hard)
    for name, one in {"a": config, "b": config, "c": replace(config, seed=1)}.items():
        tiny.meta_training(tmp_path / name, pretrained, one).run()
    tiny.assert_same_run(tmp_path / "a", tmp_path / "b")
    assert not tiny.same_tensors(tiny.model_of(tmp_path / "a"), tiny.model_of(tmp_path / "c"))


@pytest.mark.parametrize(
    ("hard", "update"),
    [
        ("resample", 5),
        ("resample", 6),
        ("reuse", 7),
        ("none", 5),
        ("reuse", 3),
    ],  # 3: the last before a checkpoint
)
def test_ctrl_c_saves_and_going_on_gives_the_same_bits(
    hard: str, update: int, pretrained: Path, tmp_path: Path
) -> None:
    config = tiny.with_meta(hard=hard)
    tiny.meta_training(tmp_path / "alone", pretrained, config).run()
    run = tiny.meta_training(tmp_path / "cut", pretrained, config)
    at_update(run, update, ctrl_c)
    with pytest.raises(Interrupted, match=rf"update {update + 1} of 10.*--resume"):
        run.run()
    again = tiny.meta_training(tmp_path / "cut", pretrained, config, resume=True)
    assert again.update == update + 1
    again.run()
    tiny.assert_same_run(tmp_path / "alone", tmp_path / "cut")


def test_ctrl_c_in_the_last_update_stops_what_would_follow(
    pretrained: Path, meta_trained: Path, tmp_path: Path
) -> None:
    run = tiny.meta_training(tmp_path, pretrained)
    at_update(run, 9, ctrl_c)
    with pytest.raises(Interrupted, match="after its last update"):
        run.run()
    tiny.assert_same_run(tmp_path, meta_trained)


def test_a_finished_run_is_left_as_it_is(
    pretrained: Path, meta_trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path: path.read_bytes() for path in meta_trained.iterdir()}
    run = tiny.meta_training(meta_trained, pretrained, resume=True)
    monkeypatch.setattr(run, "_update", lambda: pytest.fail("trained on"))
    assert run.run() == meta_trained / "model.safetensors"
    assert {path: path.read_bytes() for path in meta_trained.iterdir()} == before


def test_a_round_is_random_tasks_that_fill_the_pool_then_hard_ones_that_do_not(
    pretrained: Path, tmp_path: Path
) -> None:
    config = tiny.with_meta(n_tasks=40, random_tasks_per_round=6, hard_tasks_per_round=4)
    run = tiny.meta_training(tmp_path, pretrained, config)
    events = watched(run)
    run.run()
    one = ["random", "add"] * 3 + ["hard"] * 2 + ["clear"]
    assert [name for name, _ in events] == one * 4
    assert all(e.n_tasks == 2 for name, e in events if name in ("random", "hard"))
    for i, (name, added) in enumerate(events):
        if name == "add":
            assert added is events[i - 1][1]


def test_hard_tasks_are_made_of_the_classes_of_lowest_accuracy(pretrained: Path, tmp_path: Path) -> None:
    """The higher a class's label, the worse it does: a task fails on its highest one."""
    config = tiny.with_meta(
        n_tasks=20, random_tasks_per_round=6, hard_tasks_per_round=4, tasks_per_update=2, validate_every=20
    )
    run = tiny.meta_training(tmp_path, pretrained, config)
    events, step = watched(run), run.engine.step
    run.engine.step = lambda episodes: StepOutput(step(episodes).loss, 1 - episodes.classes / 10)  # type: ignore[method-assign]
    run.run()
    for round_events in (events[:9], events[9:]):
        drawn = torch.cat([e.classes for name, e in round_events if name == "random"])
        pool = set(drawn.amax(dim=1).tolist())
        assert pool != set(range(7))
        hard = torch.cat([e.classes for name, e in round_events if name == "hard"])
        assert len(hard) == 4
        for classes in hard.tolist():
            assert pool <= set(classes) if len(pool) <= 3 else set(classes) <= pool


@pytest.mark.parametrize("hard", ["resample", "reuse"])
def test_plain_and_hard_runs_draw_the_same_random_tasks(hard: str, pretrained: Path, tmp_path: Path) -> None:
    drawn = {}
    for mode in ("none", hard):
        run = tiny.meta_training(tmp_path / mode, pretrained, tiny.with_meta(hard=mode))
        events = watched(run)
        run.run()
        drawn[mode] = [e for name, e in events if name == "random"]
    assert len(drawn["none"]) == 10
    # Rounds of 3 updates, the last one cut after its first.
    assert len(drawn[hard]) == 7
    for plain, random in zip(drawn["none"], drawn[hard], strict=False):
        assert all(map(torch.equal, plain._tensors(), random._tensors()))


def test_hard_tasks_count_as_tasks(meta_trained: Path) -> None:
    rows = tiny.rows_of(meta_trained)
    assert [(row["step"], row["tasks"]) for row in rows] == [
        ("0", "0"),
        ("4", "8"),
        ("8", "16"),
        ("10", "20"),
    ]
    curve = load_model(meta_trained).meta["curve"]
    assert [point[0] for point in curve] == [0, 8, 16, 20]
    assert [float(row["validation_accuracy"]) for row in rows] == [point[1] for point in curve]


def test_the_log_holds_the_means_since_the_last_row(pretrained: Path, tmp_path: Path) -> None:
    run = tiny.meta_training(tmp_path, pretrained)
    outputs: list[StepOutput] = []
    step = run.engine.step
    run.engine.step = lambda episodes: outputs.append(step(episodes)) or outputs[-1]  # type: ignore[func-returns-value,method-assign]
    run.run()
    rows = tiny.rows_of(tmp_path)
    assert rows[0]["loss"] == ""
    for row, part in zip(rows[1:], (outputs[:4], outputs[4:8], outputs[8:]), strict=True):
        loss = torch.cat([out.loss for out in part]).double().mean()
        accuracy = torch.cat([out.class_accuracy for out in part]).double().mean()
        assert float(row["loss"]) == pytest.approx(float(loss), rel=1e-6)
        assert float(row["train_accuracy"]) == pytest.approx(float(accuracy), rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"random_tasks_per_round": 5}, ["--meta.random-tasks-per-round is 5", "--meta.tasks-per-update 2"]),
        ({"hard_tasks_per_round": 3}, ["--meta.hard-tasks-per-round is 3", "--meta.tasks-per-update 2"]),
        ({"n_tasks": 21}, ["--meta.n-tasks is 21", "--meta.tasks-per-update 2"]),
        (
            {"tasks_per_update": 4, "random_tasks_per_round": 8, "hard_tasks_per_round": 8, "n_tasks": 30},
            ["30", "4"],
        ),
        ({"tasks_per_update": 0}, ["--meta.tasks-per-update is 0", "at least 1"]),
        ({"hard_tasks_per_round": 0}, ["--meta.hard-tasks-per-round is 0"]),
    ],
)
def test_counts_that_do_not_divide_are_named(changes: dict[str, int], says: list[str]) -> None:
    base = MetaConfig(n_tasks=20, random_tasks_per_round=4, hard_tasks_per_round=2)
    check_rounds(base)
    with pytest.raises(InputError) as caught:
        check_rounds(replace(base, **changes))
    assert all(text in str(caught.value) for text in says), caught.value
    assert "\n" not in str(caught.value)


def test_without_hard_tasks_rounds_need_not_divide(pretrained: Path, tmp_path: Path) -> None:
    check_rounds(MetaConfig(n_tasks=20, hard="none", random_tasks_per_round=5, hard_tasks_per_round=3))
    with pytest.raises(InputError, match="random-tasks-per-round is 5"):
        tiny.meta_training(tmp_path / "run", pretrained, tiny.with_meta(random_tasks_per_round=5))
    assert not (tmp_path / "run").exists()


def test_any_number_of_tasks_an_update_works(pretrained: Path, tmp_path: Path) -> None:
    for n in (1, 3):
        config = tiny.with_meta(
            tasks_per_update=n, n_tasks=9, random_tasks_per_round=3, hard_tasks_per_round=3, validate_every=9
        )
        run = tiny.meta_training(tmp_path / str(n), pretrained, config)
        events = watched(run)
        run.run()
        assert [e.n_tasks for name, e in events if name in ("random", "hard")] == [n] * (9 // n)


def test_training_tasks_may_have_another_number_of_queries(pretrained: Path, tmp_path: Path) -> None:
    config = tiny.with_meta(n_tasks=6, validate_every=6)
    config = replace(config, episodes=replace(config.episodes, n_query_train=2))
    run = tiny.meta_training(tmp_path, pretrained, config)
    events = watched(run)
    run.run()
    assert {e.n_query for name, e in events if name in ("random", "hard")} == {2}
    assert run.validation.n_query == 4


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("interrupt", [False, True])
def test_what_is_not_finite_leaves_what_was_saved(
    what: str, interrupt: bool, pretrained: Path, meta_trained: Path, tmp_path: Path
) -> None:
    run = tiny.meta_training(tmp_path, pretrained)
    step = run.engine.step
    saved: dict[str, bytes] = {}
    weights: dict[str, Tensor] = {}

    def spoil(episodes: Episodes) -> StepOutput:
        out = step(episodes)
        if run.update != 6:
            return out
        saved.update({path.name: path.read_bytes() for path in tmp_path.iterdir()})
        weights.update(weights_of(run.encoder, run.head))
        if interrupt:
            ctrl_c()
        if what == "loss":
            return StepOutput(out.loss * torch.tensor([1.0, math.nan]), out.class_accuracy)
        assert run.head.bias.grad is not None
        run.head.bias.grad[0] = math.inf
        return out

    run.engine.step = spoil  # type: ignore[method-assign]
    at_update(run, 7, lambda: check_weights())

    def check_weights() -> None:
        assert tiny.same_tensors(weights_of(run.encoder, run.head), weights)

    with pytest.raises(InputError) as caught:
        run.run()
    text = str(caught.value)
    assert "\n" not in text
    assert all(part in text for part in ("non-finite", "--meta.lr (now 0.001)", "--inner.lr (now 0.05)")), (
        text
    )
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == saved
    assert saved.keys() == {"checkpoint.safetensors", "config.json", "hard_classes.jsonl", "log.csv"}
    tiny.meta_training(tmp_path, pretrained, resume=True).run()
    tiny.assert_same_run(tmp_path, meta_trained)


def test_an_inner_rate_that_is_too_high_says_so(pretrained: Path, tmp_path: Path) -> None:
    config = replace(CONFIG, inner=replace(CONFIG.inner, lr=1e38, train_steps=5))
    with pytest.raises(InputError, match="non-finite"):
        tiny.meta_training(tmp_path, pretrained, config).run()
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ((0.2, 0.5, 0.9, 0.4), 8),
        ((0.9, 0.5, 0.6, 0.4), 0),
        ((0.2, 0.7, 0.7, 0.4), 4),
        ((0.1, 0.2, 0.3, 0.4), 10),
    ],
)
def test_the_best_iteration_by_validation_is_kept(
    scores: tuple[float, ...], best: int, pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny.meta_training(tmp_path, pretrained)
    seen: dict[int, dict[str, Tensor]] = {}

    def scripted(encoder: Any, head: Any, store: Any, episodes: Episodes, *_: Any, **__: Any) -> Evaluation:
        assert store.name == "val"
        assert episodes is run.validation
        seen[run.update] = weights_of(encoder, head)
        accuracy = torch.full((episodes.n_tasks,), scores[len(seen) - 1])
        return Evaluation(accuracy, accuracy, accuracy)

    monkeypatch.setattr(meta_train, "evaluate", scripted)
    run.run()
    assert list(seen) == [0, 4, 8, 10]
    assert not tiny.same_tensors(seen[4], seen[8])
    assert tiny.same_tensors(tiny.model_of(tmp_path), seen[best])
    meta = load_model(tmp_path).meta
    assert meta["tasks"] == 2 * best
    assert meta["validation_accuracy"] == pytest.approx(max(scores))


@pytest.mark.parametrize(
    ("learn", "order", "affine"),
    [
        ("scale_shift", "first", False),
        ("scale_shift", "second", True),
        ("weights", "second", False),
        ("head", "first", False),
    ],
)
def test_only_what_was_named_moves(
    learn: str, order: str, affine: bool, pretrained: Path, tmp_path: Path
) -> None:
    config = tiny.with_meta(learn=learn, train_affine=affine, n_tasks=4, hard="none", validate_every=4)
    config = replace(config, inner=replace(config.inner, order=order))
    run = tiny.meta_training(tmp_path, pretrained, config)
    before = weights_of(run.encoder, run.head)
    run.run()
    after = weights_of(run.encoder, run.head)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {"head.weight", "head.bias"} <= moved
    moved -= {"head.weight", "head.bias"}
    ends = {"scale_shift": (".scale", ".shift"), "weights": (".weight", ".bias"), "head": ()}[learn]
    expected = {name for name in before if name.endswith(ends) and ".norm." not in name and "encoder" in name}
    if affine:
        expected |= {name for name in before if name.endswith((".norm.weight", ".norm.bias"))}
    # The shortcut's bias and its like get no gradient only where a norm follows on batch statistics.
    assert moved == (expected if learn != "head" else set())
    # γ and β are in the model file and in the checkpoint, the optimiser's state of them too.
    assert tiny.same_tensors(tiny.model_of(tmp_path), run.best)
    again = tiny.meta_training(tmp_path, pretrained, config, resume=True)
    assert tiny.same_tensors(weights_of(again.encoder, again.head), after)
    assert len(again.optimizer.state) == len(run.optimizer.state) == len(moved) + 2


@pytest.mark.filterwarnings("ignore:norm 'running'")
def test_running_statistics_move_and_are_kept(pretrained: Path, tmp_path: Path) -> None:
    config = tiny.with_meta(norm="running", n_tasks=4, hard="none", validate_every=4)
    run = tiny.meta_training(tmp_path, pretrained, config)
    before = weights_of(run.encoder)
    run.run()
    after = weights_of(run.encoder)
    moved = {name.rsplit(".", 1)[1] for name in before if not torch.equal(before[name], after[name])}
    assert {"running_mean", "running_var"} <= moved


def test_chunks_do_not_change_what_is_learned(pretrained: Path, meta_trained: Path, tmp_path: Path) -> None:
    """One task at a time: the same tasks, the same losses to rounding."""
    tiny.meta_training(tmp_path, pretrained, tiny.with_meta(images_per_chunk=1, n_tasks=8)).run()
    chunked, whole = tiny.rows_of(tmp_path)[1], tiny.rows_of(meta_trained)[1]
    assert float(chunked["loss"]) == pytest.approx(float(whole["loss"]), rel=1e-4)


def test_the_pretrained_network_starts_as_it_was(pretrained: Path, tmp_path: Path) -> None:
    """Φ is the identity at the start: features are those of pre-training."""
    run, plain = tiny.meta_training(tmp_path, pretrained), load_model(pretrained)
    x = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(run.encoder(x), plain.encoder(x), rtol=1e-5, atol=1e-5)
