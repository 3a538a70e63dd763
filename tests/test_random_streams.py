from __future__ import annotations

import hashlib
import subprocess
import sys

import pytest
import torch

from mtl_fast.random_streams import RandomStreams


def draw(streams: RandomStreams, name: str, n: int = 5) -> list[float]:
    return torch.rand(n, generator=streams.stream(name), dtype=torch.float64).tolist()


def test_seed_and_name_decide_the_draws():
    assert draw(RandomStreams(3), "tasks") == draw(RandomStreams(3), "tasks")
    assert draw(RandomStreams(3), "tasks") != draw(RandomStreams(4), "tasks")
    assert draw(RandomStreams(3), "tasks") != draw(RandomStreams(3), "hard_tasks")


def test_the_generator_is_seeded_from_sha256_of_seed_and_name():
    seed = int.from_bytes(hashlib.sha256(b"7/tasks").digest()[:8], "little")
    assert RandomStreams(7).stream("tasks").initial_seed() == seed


def test_another_process_draws_the_same():
    code = (
        "import torch; from mtl_fast.random_streams import RandomStreams\n"
        "print(torch.rand(5, generator=RandomStreams(11).stream('tasks'), dtype=torch.float64).tolist())"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == str(draw(RandomStreams(11), "tasks"))


def test_streams_do_not_disturb_each_other():
    alone, together = RandomStreams(0), RandomStreams(0)
    expected = draw(alone, "tasks", 20)
    torch.manual_seed(5)
    found = []
    for _ in range(4):
        draw(together, "hard_tasks", 3)
        found += draw(together, "tasks", 5)
    assert found == expected


def test_a_stream_is_one_object():
    streams = RandomStreams(0)
    assert streams.stream("tasks") is streams.stream("tasks")


def test_state_goes_back_exactly_and_generators_handed_out_follow():
    streams = RandomStreams(1)
    tasks = streams.stream("tasks")
    draw(streams, "tasks", 7)
    state = streams.state_dict()
    assert all(entry.dtype == torch.uint8 for entry in state.values())
    expected = draw(streams, "tasks"), draw(streams, "hard_tasks"), draw(streams, "augmentation")
    streams.load_state_dict(state)
    # hard_tasks was created after the state was taken: it starts anew.
    assert (draw(streams, "tasks"), draw(streams, "hard_tasks"), draw(streams, "augmentation")) == expected
    assert streams.stream("tasks") is tasks

    other = RandomStreams(99)
    draw(other, "tasks", 2)
    other.load_state_dict(state)
    assert other.seed == 1
    assert (draw(other, "tasks"), draw(other, "hard_tasks"), draw(other, "augmentation")) == expected


def test_the_state_is_a_copy():
    streams = RandomStreams(1)
    draw(streams, "tasks")
    state = streams.state_dict()
    expected = draw(streams, "tasks")
    streams.load_state_dict(state)
    assert draw(streams, "tasks") == expected


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1])
def test_seeds_survive_the_state(seed):
    other = RandomStreams(5)
    other.load_state_dict(RandomStreams(seed).state_dict())
    assert other.seed == seed


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_seed_out_of_range(seed):
    with pytest.raises(ValueError, match=str(seed)):
        RandomStreams(seed)


@pytest.mark.parametrize("name", ["", "seed"])
def test_reserved_names(name):
    with pytest.raises(ValueError, match="reserved"):
        RandomStreams(0).stream(name)


def test_a_broken_state_changes_nothing():
    streams = RandomStreams(1)
    good = streams.state_dict()
    draw(streams, "augmentation", 3)
    before = streams.state_dict()
    with pytest.raises(ValueError, match="'tasks' is no generator state"):
        streams.load_state_dict(good | {"tasks": torch.zeros(3, dtype=torch.uint8)})
    with pytest.raises(ValueError, match="no 'seed' entry"):
        streams.load_state_dict({"tasks": before["augmentation"]})
    after = streams.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
