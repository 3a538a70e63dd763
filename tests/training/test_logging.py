from __future__ import annotations

import io
import math
import sys
import types
from pathlib import Path

import pytest

from mtl_fast.errors import InputError
from mtl_fast.training.logging import RunLog, duration, read_log
from tests.full_disk import files_of


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def steps(folder: Path) -> list[int]:
    return [int(row["step"]) for row in read_log(folder / "log.csv")]


def test_rows_come_back_with_all_their_digits(tmp_path: Path) -> None:
    with RunLog(tmp_path / "new", stream=io.StringIO()) as log:
        log.row(1, loss=0.1 + 0.2, note='a "b", c')
        log.row(2, loss=math.inf, note=None)
    rows = read_log(tmp_path / "new" / "log.csv")
    assert float(rows[0]["loss"]) == 0.1 + 0.2
    assert rows[0]["note"] == 'a "b", c'
    assert rows[1] == {"step": "2", "loss": "inf", "note": ""}


def test_a_column_that_comes_later_is_added(tmp_path: Path) -> None:
    with RunLog(tmp_path, stream=io.StringIO()) as log:
        log.row(1, loss=1.0)
        log.row(2, loss=2.0, accuracy=0.5)
        log.row(3, accuracy=0.75)
    assert (tmp_path / "log.csv").read_text() == "step,loss,accuracy\n1,1.0,\n2,2.0,0.5\n3,,0.75\n"


def test_a_row_is_on_disk_at_once(tmp_path: Path) -> None:
    with RunLog(tmp_path, stream=io.StringIO()) as log:
        log.row(1, loss=1.0)
        assert steps(tmp_path) == [1]


@pytest.mark.parametrize("columns", [("loss",), ("loss", "accuracy")], ids=["a row", "a new column"])
def test_a_full_disk_is_one_line_and_what_there_is_of_the_row_is_dropped(
    columns: tuple[str, ...], tmp_path: Path
) -> None:
    with RunLog(tmp_path, stream=io.StringIO()) as log:
        log.row(1, loss=1 / 3)
        n_bytes = (tmp_path / "log.csv").stat().st_size
        with (
            files_of(n_bytes + 4),
            pytest.raises(InputError, match=r"log\.csv: File too large; free some space"),
        ):
            log.row(2, **dict.fromkeys(columns, 2 / 3))
    assert steps(tmp_path) == [1]
    with RunLog(tmp_path, step=1, stream=io.StringIO()) as log:
        log.row(2, loss=2 / 3)
    assert steps(tmp_path) == [1, 2]


@pytest.mark.parametrize("cut", range(1, 9))
def test_resuming_drops_what_will_be_written_again(tmp_path: Path, cut: int) -> None:
    with RunLog(tmp_path, stream=io.StringIO()) as log:
        for step in range(0, 50, 10):
            log.row(step, loss=step / 3, accuracy=0.5)
    whole = (tmp_path / "log.csv").read_text()
    # Killed in the middle of its last line.
    (tmp_path / "log.csv").write_text(whole[:-cut])
    with RunLog(tmp_path, step=20, stream=io.StringIO()) as log:
        for step in (30, 40):
            log.row(step, loss=step / 3, accuracy=0.5)
    assert (tmp_path / "log.csv").read_text() == whole


def test_step_zero_starts_afresh(tmp_path: Path) -> None:
    for _ in range(2):
        with RunLog(tmp_path, stream=io.StringIO()) as log:
            log.row(0, loss=1.0)
    assert steps(tmp_path) == [0]


def test_a_cut_keeps_the_rows_before_it(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("step,loss\n1,0.5\n2,0.2")
    with RunLog(tmp_path, step=5, stream=io.StringIO()):
        pass
    assert (tmp_path / "log.csv").read_text() == "step,loss\n1,0.5\n"


def test_a_log_that_cannot_be_kept_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot keep the log .*log\.csv"):
        RunLog(tmp_path / "file")
    (tmp_path / "log.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not text"):
        RunLog(tmp_path, step=3)
    assert (tmp_path / "log.csv").read_bytes() == b"\xff\xfe\x00"


def test_plain_lines_are_sparse_and_hold_rate_and_remaining_time(tmp_path: Path) -> None:
    stream, clock = io.StringIO(), Clock()
    with RunLog(
        tmp_path, phase="meta-train", total=1000, unit="update", step=200, stream=stream, clock=clock
    ) as log:
        log.row(200, loss=0.51234567)
        for step in range(201, 1001):
            clock.now += 0.1
            log.advance(step)
    assert stream.getvalue().splitlines() == [
        "meta-train: update 500 of 1000 (50 %), 10 updates/s, 50 s left, loss 0.5123",
        "meta-train: update 800 of 1000 (80 %), 10 updates/s, 20 s left, loss 0.5123",
        "meta-train: update 1000 of 1000 (100 %), 10 updates/s, 1:20, loss 0.5123",
    ]


def test_a_terminal_gets_a_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    stream = Terminal()
    with RunLog(tmp_path, phase="pretrain", total=10, unit="update", step=4, stream=stream) as log:
        log.row(5, loss=0.25)
        log.advance(10)
        log.say("a line")
    text = stream.getvalue()
    assert "pretrain:  40%" in text
    assert "10/10" in text
    assert "update/s" in text or "s/update" in text
    assert "loss 0.25" in text
    assert "a line\n" in text


def test_ci_gets_no_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    stream = Terminal()
    with RunLog(tmp_path, total=10, stream=stream) as log:
        log.advance(10)
    assert "\r" not in stream.getvalue()
    assert len(stream.getvalue().splitlines()) == 1


def test_tensorboard_gets_numbers_and_texts_when_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[object, ...]] = []

    class Writer:
        def __init__(self, folder: str, purge_step: int | None) -> None:
            seen.append((Path(folder).name, purge_step))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            seen.append((name, value, step))

        def add_text(self, name: str, value: str, step: int) -> None:
            seen.append((name, value, step))

        def close(self) -> None:
            seen.append(("closed",))

    fake = types.ModuleType("torch.utils.tensorboard")
    fake.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    with RunLog(tmp_path, step=7, stream=io.StringIO()) as log:
        log.row(8, loss=0.5, note="text", other=None)
        log.close()
    assert seen == [("tensorboard", 8), ("loss", 0.5, 8), ("note", "text", 8), ("closed",)]


def test_without_tensorboard_the_csv_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with RunLog(tmp_path, stream=io.StringIO()) as log:
        log.row(1, loss=0.5)
    assert [path.name for path in tmp_path.iterdir()] == ["log.csv"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(7.4, "7 s"), (59.6, "1:00"), (185, "3:05"), (3727, "1:02:07")]
)
def test_durations_read_as_people_say_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_name_that_is_no_text_is_logged_and_read_again(tmp_path: Path) -> None:
    with RunLog(tmp_path, stream=io.StringIO()) as log:
        log.row(1, hardest="a\udcff ×2")
    with RunLog(tmp_path, step=1, stream=io.StringIO()) as log:
        log.row(2, hardest="b", loss=1.0)
    assert [row["hardest"] for row in read_log(tmp_path / "log.csv")] == ["a\\udcff ×2", "b"]
