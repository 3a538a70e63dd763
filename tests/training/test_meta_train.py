"""Meta-training: the two-part rounds, the bits of a seed, the schedule, the guard, what is kept."""

from __future__ import annotations

import copy
import math
import re
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mtl_fast.config import Config, MetaConfig
from mtl_fast.engine.evaluate import Evaluation
from mtl_fast.engine.step import StepOutput
from mtl_fast.episodes import Episodes
from mtl_fast.errors import InputError
from mtl_fast.training import meta_train
from mtl_fast.training.meta_train import MetaTraining, check_rounds, guarded_step, set_rates
from mtl_fast.training.models import load_model, weights_of
from mtl_fast.training.run import Interrupted
from tests.training import tiny
from tests.training.tiny import CONFIG


def at_update(run: MetaTraining, update: int, do: Callable[[], object]) -> None:
    """Does something in the middle of the run, at the beginning of that update."""
    original = run._update

    def hooked() -> None:
        if run.update == update:
            do()
        original()

    run._update = hooked  # type: ignore[method-assign]


def ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)


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


def test_both_rates_are_halved_down_to_the_floor() -> None:
    meta = MetaConfig(lr=1e-3, head_lr=4e-4, decay_every=7, lr_floor=1e-4)
    optimizer = meta_train._adam(meta, [nn.Parameter(torch.zeros(2))], [nn.Parameter(torch.zeros(3))])
    # start/2, start/4, …, each at least the floor
    for update, moved, head in (
        (0, 1e-3, 4e-4),
        (6, 1e-3, 4e-4),
        (7, 5e-4, 2e-4),
        (13, 5e-4, 2e-4),
        (14, 2.5e-4, 1e-4),
        (21, 1.25e-4, 1e-4),
        (28, 1e-4, 1e-4),
        (70_000, 1e-4, 1e-4),
    ):
        set_rates(optimizer, meta, update)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([moved, head], rel=1e-12)
    low = MetaConfig(lr=5e-5, head_lr=0.0, lr_floor=1e-4, decay_every=1)
    optimizer = meta_train._adam(low, [nn.Parameter(torch.zeros(2))], [nn.Parameter(torch.zeros(3))])
    set_rates(optimizer, low, 9)
    assert [group["lr"] for group in optimizer.param_groups] == [5e-5, 0.0]


def test_hard_updates_count_in_the_schedule_of_rates(pretrained: Path, tmp_path: Path) -> None:
    config = tiny.with_meta(decay_every=3, lr=8e-3, head_lr=4e-3, lr_floor=1.5e-3)
    run = tiny.meta_training(tmp_path, pretrained, config)
    rates = []
    step = run.optimizer.step
    run.optimizer.step = lambda: rates.append([g["lr"] for g in run.optimizer.param_groups]) or step()  # type: ignore[func-returns-value,method-assign,assignment]
    run.run()
    assert rates == [[8e-3, 4e-3]] * 3 + [[4e-3, 2e-3]] * 3 + [[2e-3, 1.5e-3]] * 3 + [[1.5e-3, 1.5e-3]]


def quadratic(seed: int) -> tuple[list[nn.Parameter], torch.optim.Adam]:
    g = torch.Generator().manual_seed(seed)
    parameters = [nn.Parameter(torch.randn(shape, generator=g)) for shape in ((3, 5), (7,), ())]
    return parameters, torch.optim.Adam(parameters, lr=0.01)


def give_gradients(parameters: list[nn.Parameter], step: int) -> None:
    g = torch.Generator().manual_seed(100 + step)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=g)


def state_of(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [
        tensor.detach().clone()
        for p in parameters
        for tensor in (p, *(v for v in optimizer.state[p].values() if isinstance(v, Tensor)))
    ]


def test_the_guarded_step_is_adam_where_all_is_finite() -> None:
    (guarded, g_adam), (plain, p_adam) = quadratic(0), quadratic(0)
    for step in range(4):
        give_gradients(guarded, step)
        give_gradients(plain, step)
        assert bool(guarded_step(g_adam, torch.tensor(True)))
        p_adam.step()
    pairs = zip(state_of(guarded, g_adam), state_of(plain, p_adam), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize("wrong", ["loss", "nan gradient", "inf gradient"])
def test_the_guarded_step_leaves_all_as_it_was_where_something_is_not_finite(wrong: str, before: int) -> None:
    """And the steps after it are those of a run that never had it."""
    (guarded, g_adam), (plain, p_adam) = quadratic(1), quadratic(1)
    for step in range(before):
        for parameters, adam in ((guarded, g_adam), (plain, p_adam)):
            give_gradients(parameters, step)
            guarded_step(adam, torch.tensor(True))
    give_gradients(guarded, 7)
    weights = [p.detach().clone() for p in guarded]
    if wrong != "loss":
        assert guarded[1].grad is not None
        guarded[1].grad[3] = math.nan if wrong == "nan gradient" else -math.inf
    assert not bool(guarded_step(g_adam, torch.tensor(wrong != "loss")))
    assert all(torch.equal(p, w) for p, w in zip(guarded, weights, strict=True))
    for parameters, adam in ((guarded, g_adam), (plain, p_adam)):
        give_gradients(parameters, 8)
        guarded_step(adam, torch.tensor(True))
    pairs = zip(state_of(guarded, g_adam), state_of(plain, p_adam), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_parameters_without_a_gradient_are_no_matter() -> None:
    parameters, adam = quadratic(2)
    give_gradients(parameters, 0)
    parameters[2].grad = None
    before = parameters[2].detach().clone()
    assert bool(guarded_step(adam, torch.tensor(True)))
    assert torch.equal(parameters[2], before)


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
    assert saved.keys() == {"checkpoint.safetensors", "config.json", "log.csv"}
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
    ("learn", "order", "norm"),
    [("scale_shift", "first", "frozen"), ("weights", "second", "frozen"), ("head", "first", "frozen")],
)
def test_only_what_was_named_moves(
    learn: str, order: str, norm: str, pretrained: Path, tmp_path: Path
) -> None:
    config = tiny.with_meta(learn=learn, norm=norm, n_tasks=4, hard="none", validate_every=4)
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
    # The shortcut's bias and its like get no gradient only where a norm follows on batch statistics.
    assert moved == (expected if learn != "head" else set())


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


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (
            replace(CONFIG, encoder=replace(CONFIG.encoder, widths=(4, 4, 4, 8))),
            "encoder.widths is [4, 4, 4, 4] there",
        ),
        (
            replace(CONFIG, encoder=replace(CONFIG.encoder, form="tensorflow")),
            'encoder.form is "common" there',
        ),
        (
            replace(CONFIG, data=replace(CONFIG.data, mean=(0.0, 0.0, 0.0))),
            "pre-trained with --data.mean 127.5 127.5 127.5, not 0.0 0.0 0.0",
        ),
        (replace(CONFIG, data=replace(CONFIG.data, std=(64.0, 64.0, 1.0))), "--data.std 64.0 64.0 64.0"),
    ],
)
def test_an_encoder_of_another_run_is_named(
    config: Config, says: str, pretrained: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=re.escape(says)) as caught:
        tiny.meta_training(tmp_path / "run", pretrained, config)
    assert str(pretrained / "model.safetensors") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_images_of_another_size_are_named(pretrained: Path, tmp_path: Path) -> None:
    stores = {name: tiny.a_store(name, 0, size=18) for name in ("train", "val")}
    with pytest.raises(InputError, match="image_size is 16 there and 18 here"):
        tiny.meta_training(tmp_path / "run", pretrained, **stores)


def test_a_run_goes_on_only_from_the_encoder_it_began_with(
    pretrained: Path, meta_trained: Path, tmp_path: Path
) -> None:
    model = copy.deepcopy(load_model(pretrained))
    with torch.no_grad():
        next(model.encoder.parameters()).add_(1e-3)
    before = (meta_trained / "checkpoint.safetensors").read_bytes()
    with pytest.raises(InputError, match=r"another encoder \(pretrained is"):
        MetaTraining(CONFIG, model, meta_trained, resume=True, **tiny.splits())
    assert (meta_trained / "checkpoint.safetensors").read_bytes() == before


def test_classes_fewer_than_a_task_needs_are_named(pretrained: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="few: 2 classes, fewer than n_way = 3"):
        tiny.meta_training(tmp_path / "run", pretrained, train=tiny.a_store("few", 0, n_classes=2))
    # A pool cannot hold more classes than there are: with just n_way of them every task has them all.
    run = tiny.meta_training(
        tmp_path / "just", pretrained, tiny.with_meta(n_tasks=6), train=tiny.a_store("just", 0, n_classes=3)
    )
    assert run.run().exists()


def test_the_command_takes_the_network_from_the_pretrained_model(
    pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meta_train, "load_split", lambda source, split, size: tiny.split(split))
    config = replace(tiny.with_meta(n_tasks=2, hard="none"), encoder=Config().encoder)
    path = meta_train.meta_train(config, pretrained, tmp_path)
    assert load_model(path).config.encoder == CONFIG.encoder
    with pytest.raises(InputError, match="holds a meta model where a pretrained one is needed"):
        meta_train.meta_train(config, path, tmp_path / "again")
