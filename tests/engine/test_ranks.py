"""n ranks and one process: the same gradients, updates, pool, tasks and tests."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mtl_fast.engine import ALONE, Ranks, join
from mtl_fast.engine.ranks import launched, own_device
from mtl_fast.errors import InputError
from tests.engine import rank_jobs
from tests.engine.cases import TOLERANCE
from tests.rank_forks import RankForks, said

SIZES = (1, 2, 3)


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    """What one process without torchrun finds."""
    return rank_jobs.everything(ALONE)


@pytest.fixture(scope="module", params=SIZES, ids=lambda size: f"{size}-ranks")
def found(
    request: pytest.FixtureRequest, forks: RankForks, tmp_path_factory: pytest.TempPathFactory
) -> list[Any]:
    """What each rank of a group finds."""
    folder = tmp_path_factory.mktemp("ranks")
    statuses = forks.run("work", request.param, folder)
    assert statuses == [0] * request.param, said(folder)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(request.param)]


def assert_alike(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        if wanted.is_floating_point():
            scale = max(float(wanted.abs().max()), 1.0)
            torch.testing.assert_close(
                found[name], wanted, rtol=0, atol=TOLERANCE * scale, msg=lambda m, n=name: f"{n}: {m}"
            )
        else:
            assert torch.equal(found[name], wanted), name


@pytest.mark.parametrize("case", rank_jobs.STEPS, ids=lambda case: " ".join(map(str, case)))
def test_updates_pool_and_tasks_are_those_of_one_process(
    case: tuple[Any, ...], found: list[Any], expected: Any
) -> None:
    """Two tasks leave one of three ranks without any; in chunks or whole, random tasks, then hard ones."""
    name = " ".join(map(str, case))
    for one in found:
        assert_alike(one[name], expected[name])
    for other in found[1:]:
        assert all(torch.equal(other[name][key], value) for key, value in found[0][name].items())


def test_an_evaluation_gives_the_bits_of_one_process(found: list[Any], expected: Any) -> None:
    for one in found:
        assert one["evaluation"].keys() == expected["evaluation"].keys()
        for name, value in expected["evaluation"].items():
            assert torch.equal(one["evaluation"][name], value), name


@pytest.mark.parametrize("what", ["batch", "norm"])
def test_a_shared_batch_has_the_statistics_masks_and_gradients_of_the_whole(
    what: str, found: list[Any], expected: Any
) -> None:
    for one in found:
        assert_alike(one[what], expected[what])


def test_exchanges(found: list[Any]) -> None:
    size = len(found)
    for rank, one in enumerate(found):
        seen = one["exchanges"]
        assert seen["gathered"].flatten().tolist() == [float(r + 1) for r in range(size)]
        # Row r of every rank's result weighs r + 1, and rank q's loss weighs q + 1.
        assert seen["gradient"].tolist() == [(rank + 1.0) * size * (size + 1) / 2]
        ones, doubles, count, minus = seen["sums"]
        assert ones.dtype == torch.float32
        assert torch.equal(ones, torch.full((2, 2), float(size)))
        assert torch.equal(doubles, torch.full((3,), float(size), dtype=torch.float64))
        assert (count.dtype, int(count)) == (torch.int64, size)
        assert torch.equal(minus, -ones)
        assert seen["any"] == [True, False]
        assert seen["objects"] == [{"rank": r} for r in range(size)]
        assert seen["from first"] == 0
        alone = "no such file" if size == 1 else f"rank {size - 1}: no such file"
        assert seen["wrong"] == ["", alone, "no such file"]
        assert seen["backend"] == "gloo"


@pytest.mark.parametrize("by", [1, 2, 5])
def test_shares_are_neighbours_in_order_and_equal_to_within_one(by: int) -> None:
    for n in range(12):
        for size in range(1, 6):
            shares = [Ranks(rank, size).share(n, by) for rank in range(size)]
            assert [i for share in shares for i in range(n)[share]] == list(range(n))
            assert all(share.start % by == 0 or share.start == n for share in shares)
            groups = [-(-(share.stop - share.start) // by) for share in shares]
            assert max(groups) - min(groups) <= 1
            assert groups == sorted(groups, reverse=True)


def test_a_process_without_torchrun_is_alone_and_starts_nothing() -> None:
    assert not launched()
    with join(torch.device("cpu")) as ranks:
        assert ranks is ALONE
        assert (ranks.size, ranks.first, ranks.device) == (1, True, None)
        ones = torch.ones(2)
        ranks.sum_([ones])
        assert ones.tolist() == [1.0, 1.0]
        assert ranks.spread(ones, 2) is ones
        with pytest.raises(InputError, match=r"^wrong$"), ranks.together():
            raise InputError("wrong")
    assert not torch.distributed.is_initialized()


def test_each_rank_of_a_machine_takes_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    # The second machine of two with two GPUs each: ranks 2 and 3.
    for rank, local in ((2, "0"), (3, "1")):
        monkeypatch.setenv("LOCAL_RANK", local)
        assert own_device(torch.device("cuda"), rank, 4) == torch.device("cuda", int(local))
    assert taken == [torch.device("cuda", 0), torch.device("cuda", 1)]
    assert own_device(torch.device("cpu"), 3, 4) == torch.device("cpu")
    assert own_device(torch.device("cuda:1"), 0, 1) == torch.device("cuda:1")
    with pytest.raises(InputError, match="'cuda:1' is one GPU for 4 ranks; give --device auto"):
        own_device(torch.device("cuda:1"), 3, 4)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(
        InputError, match=r"process 3 of its machine, which has 2 GPUs; .* --nproc-per-node 2"
    ):
        own_device(torch.device("cuda"), 2, 4)
