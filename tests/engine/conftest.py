"""Groups of ranks, started once for the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.rank_forks import RankForks


@pytest.fixture(scope="session")
def forks() -> Iterator[RankForks]:
    forks = RankForks("tests.engine.rank_jobs")
    yield forks
    forks.close()
