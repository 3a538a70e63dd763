"""What a run tells while it runs: a CSV of numbers, TensorBoard when it is installed, and its progress."""

from __future__ import annotations

import csv
import io
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from mtl_fast.errors import InputError
from mtl_fast.files import replace_file, utf8

Value = float | int | str | None


class RunLog:
    """The log of one phase; use it as a context manager.

    Rows go to ``folder/log.csv``, one line each, written whole and at once; a column that appears later
    is added to the header. Where TensorBoard is installed, numbers also go to ``folder/tensorboard``.
    Progress goes to the error stream: a bar on a terminal, else a plain line now and then.

    Args:
        folder: made when missing.
        phase: what the progress is called, such as ``pretrain``.
        total: number of steps of the whole phase; None shows neither share nor remaining time.
        unit: what a step is called.
        step: where the run goes on: rows after this step, which the run will write again, are dropped, and so
            is a line that a kill cut short. 0 starts afresh.
        stream: where progress goes; None is the error stream as it is now.
        quiet_seconds: least time between two plain lines.
        clock: seconds that never run backwards.

    Raises:
        InputError: the folder or the CSV cannot be written or read.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        phase: str = "run",
        total: int | None = None,
        unit: str = "step",
        step: int = 0,
        stream: TextIO | None = None,
        quiet_seconds: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.folder = Path(folder)
        self.path = self.folder / "log.csv"
        self._columns: list[str] = ["step"]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._rewrite(self._kept_rows(step))
            self._file = self._opened()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not text"
            raise InputError(
                f"cannot keep the log {self.path}: {reason}; mend it or choose another --output"
            ) from error
        self._board = _tensorboard(self.folder / "tensorboard", step)
        stream = sys.stderr if stream is None else stream
        plain = bool(os.environ.get("CI")) or not stream.isatty()
        self._progress: _Lines | _Bar
        if plain:
            self._progress = _Lines(phase, total, unit, step, stream, quiet_seconds, clock)
        else:
            self._progress = _Bar(phase, total, unit, step, stream)

    def row(self, step: int, **values: Value) -> None:
        """Writes one row; floats to all their digits, None as an empty cell. Numbers show in the progress.

        Raises:
            InputError: the disk is full, say; a run that goes on drops what there is of the row.
        """
        new = [name for name in values if name not in self._columns]
        try:
            if new:
                self._file.close()
                self._columns += new
                self._rewrite(_read(self.path)[1])
                self._file = self._opened()
            line = utf8(self._line({"step": step, **values}))
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            raise InputError(
                f"cannot write the log {self.path}: {error.strerror}; free some space, then --resume goes on"
            ) from None
        numbers = {name: value for name, value in values.items() if isinstance(value, (int, float))}
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, str):
                    self._board.add_text(name, utf8(value).decode(), step)
                elif value is not None:
                    self._board.add_scalar(name, value, step)
        self._progress.show({name: value for name, value in numbers.items() if name != "step"})

    def advance(self, step: int, pace: str = "") -> None:
        """Says that the run has done `step` steps in all, and how fast; the pace is no part of the CSV."""
        self._progress.advance(step, pace)

    def say(self, text: str) -> None:
        """A line of its own on the progress stream."""
        self._progress.say(text)

    def close(self) -> None:
        """Ends the progress and closes the files; twice does no harm."""
        self._progress.close()
        self._file.close()
        if self._board is not None:
            self._board.close()
            self._board = None

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _kept_rows(self, step: int) -> list[dict[str, str]]:
        if step <= 0 or not self.path.exists():
            return []
        columns, rows = _read(self.path)
        self._columns += [name for name in columns if name not in self._columns]
        return [row for row in rows if row["step"].isdecimal() and int(row["step"]) <= step]

    def _opened(self) -> io.FileIO:
        """To append to, without a buffer that could be written when it is too late."""
        return open(self.path, "ab", buffering=0)

    def _rewrite(self, rows: Iterable[dict[str, str]]) -> None:
        text = self._line({name: name for name in self._columns}) + "".join(map(self._line, rows))
        replace_file(self.path, [utf8(text)])

    def _line(self, values: dict[str, Any]) -> str:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerow([values.get(name) for name in self._columns])
        return text.getvalue()


class NoLog(RunLog):
    """The log of a rank that writes nothing."""

    def __init__(self) -> None:
        """Opens nothing."""

    def row(self, step: int, **values: Value) -> None:
        """Drops the row."""

    def advance(self, step: int, pace: str = "") -> None:
        """Shows nothing."""

    def say(self, text: str) -> None:
        """Says nothing."""

    def close(self) -> None:
        """Closes nothing."""


def read_log(path: str | Path) -> list[dict[str, str]]:
    """The rows of a ``log.csv``, complete ones only; cells are text, empty where a row had no value."""
    return _read(Path(path))[1]


def _read(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    text = path.read_text(encoding="utf-8")
    # What stands after the last line break was being written when the process was killed.
    reader = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1]), restval="")
    columns = list(reader.fieldnames or [])
    rows = [{name: row[name] for name in columns} for row in reader] if "step" in columns else []
    return columns, rows


def _tensorboard(folder: Path, step: int) -> Any:
    """A writer that forgets events after `step`, or None where TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=step + 1 if step else None)


def _number(value: float) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _listed(numbers: dict[str, float]) -> str:
    return ", ".join(f"{name} {_number(value)}" for name, value in numbers.items())


def duration(seconds: float) -> str:
    """``7 s``, ``3:05`` or ``1:02:07``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes}:{rest:02d}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


class _Bar:
    """A tqdm bar, for a terminal."""

    def __init__(self, phase: str, total: int | None, unit: str, step: int, stream: TextIO) -> None:
        from tqdm import tqdm

        self._stream = stream
        self._tqdm = tqdm
        self._numbers = ""
        # The rate is smoothed over the last steps, so that remaining time follows a change of pace.
        self._bar = tqdm(
            total=total, initial=step, desc=phase, unit=unit, file=stream, dynamic_ncols=True, smoothing=0.1
        )

    def show(self, numbers: dict[str, float]) -> None:
        self._numbers = _listed(numbers)

    def advance(self, step: int, pace: str) -> None:
        self._bar.set_postfix_str(", ".join(filter(None, (self._numbers, pace))), refresh=False)
        self._bar.update(step - self._bar.n)

    def say(self, text: str) -> None:
        self._tqdm.write(text, file=self._stream)

    def close(self) -> None:
        self._bar.close()


class _Lines:
    """A plain line now and then, for a file, a pipe or CI: one in `quiet` seconds, and one at the end."""

    def __init__(
        self,
        phase: str,
        total: int | None,
        unit: str,
        step: int,
        stream: TextIO,
        quiet: float,
        clock: Callable[[], float],
    ) -> None:
        self._phase, self._total, self._unit, self._stream = phase, total, unit, stream
        self._quiet, self._clock = quiet, clock
        self._first = self._step = self._said = step
        self._started = self._spoke = clock()
        self._numbers = self._pace = ""
        self._closed = False

    def show(self, numbers: dict[str, float]) -> None:
        self._numbers = _listed(numbers)

    def advance(self, step: int, pace: str) -> None:
        self._step, self._pace = step, pace
        if self._clock() - self._spoke >= self._quiet:
            self._speak()

    def say(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def close(self) -> None:
        if not self._closed and self._step > self._said:
            self._speak()
        self._closed = True

    def _speak(self) -> None:
        now = self._clock()
        self._spoke, self._said = now, self._step
        elapsed = now - self._started
        rate = (self._step - self._first) / elapsed if elapsed > 0 else 0.0
        parts = [f"{self._phase}: {self._unit} {self._step}"]
        if self._total:
            parts[0] += f" of {self._total} ({100 * self._step / self._total:.0f} %)"
        if rate > 0:
            parts.append(f"{rate:.3g} {self._unit}s/s")
        if self._total and self._step < self._total and rate > 0:
            parts.append(f"{duration((self._total - self._step) / rate)} left")
        else:
            parts.append(f"{duration(elapsed)}")
        self.say(", ".join(filter(None, (*parts, self._numbers, self._pace))))
