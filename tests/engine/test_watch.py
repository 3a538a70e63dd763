"""A rank that dies, stops, hangs or fails ends all ranks soon, and is named once."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from mtl_fast.engine.watch import _Other
from tests.rank_forks import RankForks, said


@pytest.mark.parametrize(
    ("how", "ends", "says"),
    [
        ("killed", -9, "rank 1 of 3 is gone: no sign of life for 3 s; what was saved is kept"),
        ("stopped", -9, "rank 1 of 3 is gone: no sign of life for 3 s; what was saved is kept"),
        ("hanging", 1, "rank 1 of 3 is hanging: the others have waited for 3 s; what was saved is kept"),
        ("wrong input", 1, "InputError: rank 1: this disk is full"),
        ("program", 1, "rank 1 of 3 failed"),
    ],
)
def test_a_rank_that_does_not_come_ends_all_and_is_named(
    how: str, ends: int, says: str, forks: RankForks, tmp_path: Path
) -> None:
    start = time.monotonic()
    statuses = forks.run("fail", 3, tmp_path, how=how)
    text = said(tmp_path)
    assert statuses == [1, ends, 1], text
    assert "".join(text).count(says) == 1, text
    assert time.monotonic() - start < 20


def test_a_rank_that_never_starts_is_named(forks: RankForks, tmp_path: Path) -> None:
    assert forks.run("missing", 2, tmp_path) == [1, 0]
    assert "rank 1 of 2 is not there: no sign of life 3 s after the start" in said(tmp_path)[0]


def test_no_rank_outlives_its_launcher(forks: RankForks, tmp_path: Path) -> None:
    assert forks.run("orphaned", 2, tmp_path) == []
    end = time.monotonic() + 20
    while not all("launcher on the first machine is gone" in text for text in said(tmp_path)):
        assert time.monotonic() < end, said(tmp_path)
        time.sleep(0.1)


def test_only_a_rank_that_stays_behind_is_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    other = _Other(now)
    assert not other.started
    for second, (beat, mine, behind) in enumerate(
        [
            (b"1 5", 5, 0.0),
            (b"2 5", 6, 0.0),
            (b"3 5", 7, 1.0),
            (b"4 6", 7, 0.0),
            (b"5 6", 7, 1.0),
            (b"6 8", 7, 0.0),
        ]
    ):
        now = 100.0 + second
        other.see(beat, mine)
        assert other.started
        assert other.behind_for(now) == behind
        assert other.beat_at == now
    now += 9
    other.see(b"6 8", 8)
    assert now - other.beat_at == 9
