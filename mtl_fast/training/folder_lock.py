"""One run at a time in a folder: another one is told so before it reads or writes anything there."""

from __future__ import annotations

import os
import time
import weakref
from pathlib import Path
from types import TracebackType

from ..errors import InputError

try:
    import fcntl
except ImportError:  # no POSIX: folders are not locked
    fcntl = None  # type: ignore[assignment]  # no module

# Seconds: a killed command's workers take a moment to end. What is finished is only read, by a study's workers in turn.
PATIENCE, PATIENCE_WITH_READERS, PAUSE = 3.0, 120.0, 0.05
# Folders that this process has → descriptor and how many claims: a demo's phases lie in the demo's own folders.
_claimed: dict[tuple[int, int], tuple[int, int]] = {}


class FolderLock:
    """This process's claim to a folder: from the start until `release`, or the end of this object or of the process.

    It is the system's lock (flock) on the folder itself: no file tells of it, so that no kill can leave one behind, and a
    clock that runs backwards changes nothing. A process may claim again what it has. Systems and network drives
    that lock no folders are used without. A context manager, which claims anew what was released.

    Args:
        folder: exists; None claims nothing.
        shared: others may share the folder, such as shards, but nobody may have it alone.
        finished: nobody works there for longer than reading takes, so others are waited for.

    Raises:
        InputError: another process is at work there.
    """

    def __init__(self, folder: Path | None, *, shared: bool = False, finished: bool = False) -> None:
        self._folder, self._shared, self._finished = folder, shared, finished
        self._give_back: weakref.finalize | None = None
        self.claim()

    def claim(self) -> None:
        """Takes the folder, unless this claim holds already."""
        if self._folder is None or self._give_back is not None or fcntl is None:
            return
        try:
            descriptor = os.open(self._folder, os.O_RDONLY)
        except OSError:  # whoever writes there will say what is wrong
            return
        status = os.fstat(descriptor)
        key = status.st_dev, status.st_ino
        held, n_claims = _claimed.get(key, (descriptor, 0))
        if n_claims:
            os.close(descriptor)
        elif not self._locked(descriptor):
            os.close(descriptor)
            raise InputError(
                f"{self._folder}: another run is at work there; wait until it ends, or give another --output"
            )
        _claimed[key] = held, n_claims + 1
        self._give_back = weakref.finalize(self, _unclaim, key)

    def _locked(self, descriptor: int) -> bool:
        """Whether the lock was to be had, or there are none here."""
        kind = fcntl.LOCK_SH if self._shared else fcntl.LOCK_EX
        end = time.monotonic() + (PATIENCE_WITH_READERS if self._finished else PATIENCE)
        while True:
            try:
                fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= end:
                    return False
                time.sleep(PAUSE)
            except OSError:
                return True
            else:
                return True

    def release(self) -> None:
        """Gives the folder back; twice does no harm."""
        if self._give_back is not None:
            self._give_back()
            self._give_back = None

    def __enter__(self) -> FolderLock:
        self.claim()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def _unclaim(key: tuple[int, int]) -> None:
    descriptor, n_claims = _claimed.pop(key)
    if n_claims > 1:
        _claimed[key] = descriptor, n_claims - 1
    else:
        os.close(descriptor)
