"""The benchmark's row of counted launches says what it is, and why where there is none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import pytest

from bench.gpu import counted
from bench.gpu.launches import Count
from bench.harness import Line, Settings
from bench.page import _is_ratio, markdown
from bench.records import record
from bench.report import text

QUICK = Settings(rounds=3, quick=True)


def counted_line(monkeypatch: pytest.MonkeyPatch, ways: Mapping[str, int] | Exception) -> Line:
    def ours_elsewhere(widths: object, sizes: list[int]) -> dict[str, dict[int, Count]]:
        if isinstance(ways, Exception):
            raise ways
        return {way: {size: Count(Counter(a=n)) for size in sizes} for way, n in ways.items()}

    monkeypatch.setattr(counted, "ours_elsewhere", ours_elsewhere)
    monkeypatch.setattr(counted, "plain", lambda *_: Count(Counter(), Counter(mm=300)))
    (line,) = counted.rows(quick=True)[0].measure(QUICK)
    return line


def test_launches_are_counted_and_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    line = counted_line(monkeypatch, {"ours": 10, "ours, captured": 3})
    assert (line.values, line.ours, line.peer) == ((30.0,), "10", "300")
    shown = text(line, Settings(rounds=9))
    assert "(counted)" in shown
    assert "30× fewer " in shown
    assert "must ≥ 20× fewer holds, aim ≥ 40× fewer MISSED" in shown
    assert "not timed; captured: 3" in shown
    # A bar among those of times would say what it is not.
    page_of = record(line, Settings(rounds=9))
    assert not _is_ratio(page_of)
    assert "| **30× fewer** | ≥ 20× fewer holds | ≥ 40× fewer MISSED |" in markdown([page_of])


def test_launches_that_cannot_be_counted_are_skipped_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("triton")
    line = counted_line(monkeypatch, RuntimeError("no interpreter"))
    assert line.skipped == "ours could not be counted: no interpreter"
    monkeypatch.setattr(counted, "find_spec", lambda _: None)
    assert "Triton is not installed" in counted_line(monkeypatch, {}).skipped
