"""Files of results: what identifies a line, going on where a run stopped, comparing two files, the README's table."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from bench import records
from bench.__main__ import main
from bench.compare import compare
from bench.harness import Family, Line, Settings, Target
from bench.page import markdown, page
from bench.parts import ALL, PARTS, rows_of
from bench.records import append, key, latest, line_of, measured, read, record, words_of
from bench.report import lines_of

SETTINGS = Settings(rounds=7)
LINE = Line(
    "fit and predict, first order, 1-shot, 100 steps",
    source="fit and predict, first order, 1-shot, 100 steps",
    against="plain",
    peers=("plain", "other"),
    ours="1 ms",
    peer="3 ms",
    values=(3.0, 2.5, 3.5),
    best=2.8,
    target=Target(2, 4),
    family=Family("fits, first order", 1, Target(2, 4)),
    details={"seconds": {"ours": [0.001, 0.001, 0.001], "plain": [0.003, 0.0025, 0.0035]}},
)


@pytest.fixture(autouse=True)
def commit(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The commit that the sources seem to be of; a test may set another."""
    commits = ["abc"]
    facts = records.provenance()
    monkeypatch.setattr(records, "provenance", lambda: facts | {"source_commit": commits[-1]})
    return commits


def test_rows_of_all_parts_say_operation_mode_and_shape_and_have_names_of_their_own() -> None:
    for quick in (False, True):
        names = [row.name for row in rows_of(ALL, quick)]
        assert len(set(names)) == len(names) >= len(PARTS)
        assert all(all(words_of(name)) for name in names)


def test_a_record_holds_its_key_and_gives_the_line_back() -> None:
    found = json.loads(json.dumps(record(LINE, SETTINGS)))
    assert line_of(found) == LINE
    assert (found["operation"], found["mode"]) == ("fit and predict", "first order")
    assert (found["must_holds"], found["aim_holds"]) == (True, False)
    assert set(records.KEY) <= set(found)
    assert found["commit"] == "abc"


def test_the_key_is_the_same_for_another_commit_and_winner_and_differs_for_other_threads(
    commit: list[str],
) -> None:
    first = record(LINE, SETTINGS)
    commit.append("def")
    assert key(record(LINE, SETTINGS) | {"against": "other", "date": "2000-01-01"}) == key(first)
    assert key(first | {"threads": 64}) != key(first)
    assert key(first | {"quick": True}) != key(first)


def test_a_broken_last_line_is_left_out_and_the_next_one_is_whole(tmp_path: Path) -> None:
    file = tmp_path / "new" / "lines.jsonl"
    append(file, [record(LINE, SETTINGS)])
    with file.open("a", encoding="utf-8") as handle:
        handle.write('{"row": "half')
    append(file, [record(LINE, SETTINGS)])
    assert [found["row"] for found in read(file)] == [LINE.row] * 2
    assert len(latest(read(file))) == 1


def test_only_rows_of_these_sources_and_settings_need_not_be_measured_again(commit: list[str]) -> None:
    found = [record(LINE, SETTINGS), record(Line("a, b, c", refused="wrong"), SETTINGS)]
    assert measured(found, SETTINGS) == {LINE.row: [LINE]}
    assert measured(found, Settings(rounds=9)) == {}
    commit.append("def")
    assert measured(found, SETTINGS) == {}
    commit.append("abc+changes")
    assert measured([record(LINE, SETTINGS)], SETTINGS) == {}


def test_a_second_run_measures_what_is_missing_and_appends_nothing_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "lines.jsonl"
    arguments = ["ops", "--quick", "--threads", "1", "--output", str(file)]
    assert main([*arguments, "--rows", "ss_conv, kernel, 8"]) == 0
    first = file.read_text("utf-8").splitlines()
    assert main([*arguments, "--rows", "ss_conv, kernel"]) == 0
    second = file.read_text("utf-8").splitlines()
    assert second[: len(first)] == first
    # The other row, and the mean of both.
    assert [json.loads(line)["shape"] for line in second[len(first) :]] == [
        "16 @ 6, batch 4",
        "geometric mean",
    ]
    assert main([*arguments, "--rows", "ss_conv, kernel"]) == 0
    assert file.read_text("utf-8").splitlines() == second
    capsys.readouterr()


def test_a_row_s_lines_are_kept_together_or_not_at_all() -> None:
    against = [replace(LINE, peers=(name,), family=None) for name in ("plain", "other")]

    class Killed:
        name = LINE.row

        def measure(self, settings: Settings) -> Iterator[Line]:
            yield against[0]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(lines_of([Killed()], SETTINGS))
    whole = [record(line, SETTINGS) for line in against]
    assert measured(whole, SETTINGS) == {LINE.row: against}
    assert (
        measured([whole[0], record(replace(against[1], values=(), refused="wrong"), SETTINGS)], SETTINGS)
        == {}
    )


def test_a_row_s_last_measurement_supersedes_its_earlier_ones() -> None:
    first, other = record(LINE, SETTINGS), record(replace(LINE, row="a, b, c", source="a, b, c"), SETTINGS)
    more_peers = record(replace(LINE, peers=("plain", "other", "third")), SETTINGS)
    assert list(latest([first, other, more_peers]).values()) == [more_peers, other]
    refused = record(Line(LINE.row, source=LINE.source, refused="wrong"), SETTINGS) | {"time": "later"}
    assert list(latest([first, refused]).values()) == [refused]
    assert "refused: wrong" in markdown([refused])
    twice = record(replace(LINE, peers=("third",)), SETTINGS)
    assert list(latest([first, twice]).values()) == [first, twice]
    assert list(latest([first, twice, first]).values()) == [first]


def test_a_mean_of_a_part_leaves_that_of_all_rows() -> None:
    whole = replace(LINE, row="fits, first order, geometric mean", source="")
    part = replace(whole, row="fits, first order, geometric mean of 1 of 2 rows", target=None)
    assert len(latest([record(whole, SETTINGS), record(part, SETTINGS)])) == 2


def test_comparing_says_how_time_and_ratio_moved(tmp_path: Path, commit: list[str]) -> None:
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    alone = record(LINE, SETTINGS) | {"row": "only, in, a", "shape": "a"}
    append(a, [record(LINE, SETTINGS), alone])
    commit.append("def")
    faster = {"values": (6.0, 5.0, 7.0), "spread": {"middle": 6.0, "low": 5.4, "high": 6.6}, "ours": "0.5 ms"}
    append(b, [record(LINE, SETTINGS) | faster | {"details": {"seconds": {"ours": [0.0005]}}}])
    text = compare(a, b)
    row = next(line for line in text.splitlines() if line.startswith(LINE.row))
    for word in ("1 ms", "0.5 ms", "0.50"):
        assert word in row
    assert row.endswith("higher")
    assert f"1 rows of {a} are not in the other file" in text
    assert "A: commit abc; B: commit def" in text


def test_the_page_has_rows_with_targets_and_names_the_machine(tmp_path: Path) -> None:
    missed = record(LINE, SETTINGS) | {"row": "slow, first order, x", "shape": "x"}
    missed["spread"] = {"middle": 1.5, "low": 1.4, "high": 1.6}
    untold = record(Line("without, a, target", values=(2.0,)), SETTINGS)
    text = markdown([record(LINE, SETTINGS), missed, untold])
    assert f"| {LINE.row} | plain | **3×** (2.7×–3.3×) | ≥ 2× holds | ≥ 4× MISSED |" in text
    assert "| **1.5×** (1.4×–1.6×) | ≥ 2× MISSED |" in text
    assert "without" not in text
    assert "commit abc." in text
    noted = record(replace(LINE, note="extrapolated"), SETTINGS)
    assert f"- {LINE.row}, against plain: extrapolated." in markdown([noted])
    later = record(LINE, SETTINGS) | {"commit": "def", "mode": "later"}
    assert "commit abc; def: fit and predict, later." in markdown([noted, noted, later])
    memory = record(replace(LINE, unit="%", details={"bytes": {"ours": [1, 2, 3]}}), SETTINGS)
    assert "3 fresh processes a side" in markdown([memory])
    assert "processes" not in text
    file = tmp_path / "lines.jsonl"
    append(file, [record(LINE, SETTINGS), missed])
    page(file, tmp_path / "page")
    assert (tmp_path / "page" / "speed.png").read_bytes().startswith(b"\x89PNG")
    assert LINE.row in (tmp_path / "page" / "speed.md").read_text("utf-8")
    # Measured again with more rounds, it is still one row.
    again = record(replace(LINE, values=(5.0, 5.0)), replace(SETTINGS, rounds=2 * SETTINGS.rounds))
    append(file, [again])
    page(file, tmp_path / "page")
    rows = (tmp_path / "page" / "speed.md").read_text("utf-8")
    assert rows.count(f"| {LINE.row} |") == 1
    assert "**5×**" in rows


def test_the_page_draws_shares_of_the_peak_and_scaling_where_there_are_such_rows(tmp_path: Path) -> None:
    file, folder = tmp_path / "lines.jsonl", tmp_path / "page"
    append(file, [record(LINE, SETTINGS)])
    page(file, folder)
    assert {path.name for path in folder.iterdir()} == {"speed.md", "speed.png"}
    details = {"what": "step", "axis": "tasks", "value": 2, "seconds": [0.1, 0.2]}
    point = Line("scaling, step, tasks 2", values=(20.0, 10.0), unit=" tasks/s", details=details)
    append(file, [record(replace(LINE, share=1.5), SETTINGS), record(point, SETTINGS)])
    page(file, folder)
    assert {path.name for path in folder.iterdir()} == {"speed.md", "speed.png", "share.png", "scaling.png"}


def test_rows_of_sources_without_a_name_are_not_quoted(tmp_path: Path, commit: list[str]) -> None:
    commit.append("abc+changes")
    append(tmp_path / "lines.jsonl", [record(LINE, SETTINGS)])
    with pytest.raises(ValueError, match="of changes that no commit holds"):
        page(tmp_path / "lines.jsonl", tmp_path)


def test_skipped_rows_are_tried_again(commit: list[str]) -> None:
    skipped = Line("a, b, c", source="a, b, c", skipped="not installed")
    found = json.loads(json.dumps(record(skipped, SETTINGS)))
    assert line_of(found) == skipped
    assert measured([found], SETTINGS) == {}


def test_quick_and_refused_rows_are_not_quoted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "lines.jsonl"
    append(
        file, [record(LINE, Settings(rounds=2, quick=True)), record(Line("a, b, c", refused="no"), SETTINGS)]
    )
    with pytest.raises(SystemExit) as caught:
        main(["page", str(file), "--output", str(tmp_path)])
    assert caught.value.code == 2
    assert "no finished row that may be quoted" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["compare", str(file), str(tmp_path / "none.jsonl")])
    assert "none.jsonl" in capsys.readouterr().err
