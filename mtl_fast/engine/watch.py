"""Which rank died or hangs: a thread in each process that shows its own sign of life and looks at the others'.

A collective operation that waits for a dead process says at best that a connection broke, on a GPU nothing at
all. So every process writes a beat and the number of collectives it has entered into the store that all share.
A rank whose beat stops is gone; one that stays behind another in collectives hangs.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from typing import Any, NoReturn

INTERVAL = 0.5  # seconds between two beats
GONE_AFTER = 30.0  # seconds without a beat: long enough for a thread that had to wait for the interpreter
BROKEN_AFTER = 5.0  # the same once a connection broke, when it is only asked whose
_FAILED = "failed"
_WAY_ON = "what was saved is kept, and --resume goes on from there"


class Watch(threading.Thread):
    """Ends this process, with a line that names the rank, when another one is gone, hangs or has failed.

    Args:
        store: a client of the store that all ranks share, for this thread alone.
        rank, size: this process and the number of all.
        timeout: seconds that a rank may stay behind in a collective, or take to start.
    """

    def __init__(self, store: Any, rank: int, size: int, timeout: float) -> None:
        super().__init__(name="rank watch", daemon=True)
        self.entered = 0
        self._store, self._rank, self._size, self._timeout = store, rank, size, timeout
        store.set(f"beat/{rank}", "0 0")
        self._done = threading.Event()
        self._broken = threading.Event()

    def run(self) -> None:
        now = time.monotonic()
        others = {rank: _Other(now) for rank in range(self._size) if rank != self._rank}
        beat = 0
        while not self._done.wait(INTERVAL):
            beat += 1
            try:
                self._store.set(f"beat/{self._rank}", f"{beat} {self.entered}")
                here = [r for r, other in others.items() if other.started or self._store.check([f"beat/{r}"])]
                beats = self._store.multi_get([f"beat/{r}" for r in here]) if here else []
                for rank, seen in zip(here, beats, strict=True):
                    others[rank].see(seen, self.entered)
                failed = bool(self._store.check([_FAILED]))
            except RuntimeError as error:  # the store went with the process that held it
                if not self._done.wait(2 * INTERVAL):
                    _tell(f"the launcher on the first machine is gone ({_first_line(error)})")
                    _leave()
                return
            if failed and not self._done.is_set():
                _leave()  # the one that wrote it has said why
            if (verdict := self._verdict(others)) and not self._done.is_set():
                self._end(verdict)

    def stop(self) -> None:
        """The run is over for this rank: nobody is missed any more."""
        self._done.set()
        self.join(10 * INTERVAL)  # a thread inside the store when Python ends would abort the process

    def fail(self) -> None:
        """Lets the other ranks end without a word: this one says why."""
        self.stop()
        # Where the store is gone, that ends the others.
        with contextlib.suppress(RuntimeError):
            self._store.set(_FAILED, str(self._rank))

    def find_out(self, error: Exception) -> NoReturn:
        """A collective failed: waits until it shows which rank is the reason, and ends."""
        self._broken.set()
        time.sleep(min(BROKEN_AFTER, self._timeout) + 4 * INTERVAL)
        self._end(f"ranks lost each other ({_first_line(error)})")

    def _verdict(self, others: dict[int, _Other]) -> str:
        now = time.monotonic()
        limit = min(BROKEN_AFTER if self._broken.is_set() else GONE_AFTER, self._timeout)
        gone = [r for r, other in others.items() if other.started and now - other.beat_at > limit]
        if gone:
            return f"{_ranks(gone, self._size)} gone: no sign of life for {limit:g} s"
        late = [r for r, other in others.items() if not other.started and now - other.beat_at > self._timeout]
        if late:
            return (
                f"{_ranks(late, self._size)} not there: no sign of life {self._timeout:g} s after the start"
            )
        hung = [r for r, other in others.items() if other.behind_for(now) > self._timeout]
        if hung:
            return f"{_ranks(hung, self._size)} hanging: the others have waited for {self._timeout:g} s"
        return ""

    def _end(self, verdict: str) -> NoReturn:
        """One rank tells it: the first to write."""
        try:
            first = self._store.compare_set(_FAILED, "", str(self._rank)).decode() == str(self._rank)
        except RuntimeError:
            first = True
        if first:
            _tell(verdict)
        _leave()


class _Other:
    """What was last seen of another rank."""

    def __init__(self, now: float) -> None:
        self.started = False
        self.beat_at = now
        self._seen = b""
        self._entered = -1
        self._behind_since: float | None = None

    def see(self, beat: bytes, mine: int) -> None:
        """Takes its latest beat; `mine` is the number of collectives that this process has entered."""
        now = time.monotonic()
        if beat != self._seen:
            self.started, self._seen, self.beat_at = True, beat, now
        entered = int(beat.split()[1])
        if entered != self._entered or entered >= mine:
            self._entered, self._behind_since = entered, None
        if entered < mine and self._behind_since is None:
            self._behind_since = now

    def behind_for(self, now: float) -> float:
        """Seconds that it has not moved while this process was ahead of it."""
        return 0.0 if self._behind_since is None else now - self._behind_since


def _ranks(ranks: list[int], size: int) -> str:
    names = ", ".join(map(str, ranks))
    return f"rank {names} of {size} is" if len(ranks) == 1 else f"ranks {names} of {size} are"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _tell(verdict: str) -> None:
    print(f"mtl-fast: error: {verdict}; {_WAY_ON}", file=sys.stderr, flush=True)


def _leave() -> NoReturn:
    """The main thread may be inside a collective, where no exception reaches it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)
