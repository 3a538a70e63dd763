"""Pieces of an evaluation: computed once, found again, by other shards too, and never mixed up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mtl_fast.errors import InputError
from mtl_fast.training.parts import Parts, Shard

FACTS = {"weights": "abc", "config": {"seed": 0}}


def piece(value: float, calls: list[float]) -> dict[str, Tensor]:
    calls.append(value)
    return {"x": torch.tensor([value])}


def get(parts: Parts, name: str, value: float, calls: list[float]) -> float:
    return float(parts.get(name, lambda: piece(value, calls))["x"])


def test_a_piece_is_computed_once(tmp_path: Path) -> None:
    calls: list[float] = []
    parts = Parts(tmp_path / "parts", FACTS, shard=Shard())
    assert [get(parts, "a", 1.0, calls), get(parts, "a", 2.0, calls), get(parts, "b", 3.0, calls)] == [
        1,
        1,
        3,
    ]
    assert calls == [1.0, 3.0]
    again = Parts(tmp_path / "parts", FACTS, shard=Shard(), resume=True)
    assert get(again, "b", 4.0, calls) == 3.0
    parts.remove()
    assert not (tmp_path / "parts").exists()
    parts.remove()


def test_what_is_to_be_replaced_is_computed_anew_where_it_does_not_fit(tmp_path: Path) -> None:
    calls: list[float] = []
    get(Parts(tmp_path, FACTS, shard=Shard()), "a", 1.0, calls)
    options: dict[str, Any] = {"shard": Shard(), "resume": True, "replace": True}
    assert get(Parts(tmp_path, FACTS, **options), "a", 2.0, calls) == 1.0
    other = Parts(tmp_path, {**FACTS, "weights": "def"}, **options)
    assert [get(other, "a", value, calls) for value in (3.0, 4.0)] == [3, 3]
    (file,) = tmp_path.rglob("a.safetensors")
    file.write_bytes(file.read_bytes()[:-2])
    assert [get(other, "a", value, calls) for value in (5.0, 6.0)] == [5, 5]


def test_without_a_folder_nothing_is_kept() -> None:
    calls: list[float] = []
    parts = Parts(None, FACTS, shard=Shard())
    assert [get(parts, "a", 1.0, calls), get(parts, "a", 2.0, calls)] == [1, 2]
    parts.remove()


def test_shards_write_apart_and_read_each_other(tmp_path: Path) -> None:
    calls: list[float] = []
    first, second = (Parts(tmp_path, FACTS, shard=Shard(i, 2)) for i in (1, 2))
    get(first, "a", 1.0, calls)
    assert get(second, "a", 2.0, calls) == 1.0
    get(second, "b", 3.0, calls)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.safetensors")) == [
        "1-of-2/a.safetensors",
        "2-of-2/b.safetensors",
    ]
    # Beside others a new shard starts; its own pieces, or any pieces for one alone, take `resume`.
    Parts(tmp_path, FACTS, shard=Shard(3, 3))
    for shard in (Shard(1, 2), Shard()):
        with pytest.raises(InputError, match=r"holds parts of an evaluation; --resume goes on"):
            Parts(tmp_path, FACTS, shard=shard)


def test_pieces_of_another_evaluation_are_refused(tmp_path: Path) -> None:
    get(Parts(tmp_path, FACTS, shard=Shard()), "a", 1.0, [])
    other = Parts(tmp_path, FACTS | {"config": {"seed": 1}}, shard=Shard(), resume=True)
    with pytest.raises(InputError, match=r"a\.safetensors: .* \(config\.seed is 0 there and 1 here\)"):
        get(other, "a", 2.0, [])


def test_a_damaged_piece_is_named(tmp_path: Path) -> None:
    parts = Parts(tmp_path, FACTS, shard=Shard())
    get(parts, "a", 1.0, [])
    (file,) = tmp_path.rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"a\.safetensors is cut short"):
        get(parts, "a", 2.0, [])


@pytest.mark.parametrize("n", [0, 1, 6, 100])
def test_shares_are_all_of_it(n: int) -> None:
    for total in (1, 2, 3, 7):
        shares = [Shard(i + 1, total).share(n) for i in range(total)]
        assert [i for share in shares for i in share] == list(range(n))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_shards_are_written_as_fractions() -> None:
    assert Shard.parse("2/4") == Shard(2, 4)
    assert str(Shard(2, 4)) == "2/4"
    for text in ("0/4", "5/4", "4", "1/0", "-1/2", "a/b", "1/2/3", ""):
        with pytest.raises(InputError, match=r"--shard .*: expected I/N"):
            Shard.parse(text)
