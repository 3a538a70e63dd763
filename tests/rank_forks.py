"""Groups of ranks without the seconds that a process's imports cost: a server that forks them.

The launcher of a group does what torchrun does, it holds the store and waits; but it ends no rank because another
one ended, so that tests see the ranks do that themselves. As a program this reads jobs from its standard input, a
JSON line each, and answers with the ranks' exit statuses.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DEADLINE = 60.0  # seconds that a group may take
GRACE = 3.0  # and its last rank after the others


class RankForks:
    """The tests' side: groups that run the functions of one module."""

    def __init__(self, module: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.rank_forks", module],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, job: str, size: int, folder: Path, **arguments: Any) -> list[int]:
        """Runs that function as each of `size` ranks and returns the exit statuses in their order.

        The function gets `folder` and the arguments; what rank 2 prints is in ``folder/rank2.txt``. A rank that
        outlives the others or the deadline is killed and has the status −9. No status comes where the launcher died.
        """
        folder.mkdir(parents=True, exist_ok=True)
        line = {"job": job, "size": size, "folder": str(folder), "arguments": arguments}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(line) + "\n")
        self._process.stdin.flush()
        statuses: list[int] = json.loads(self._process.stdout.readline())
        return statuses

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def said(folder: Path) -> list[str]:
    """What each rank of the group printed."""
    return [path.read_text() for path in sorted(folder.glob("rank*.txt"))]


def launch(module: str, job: str, size: int, folder: str, arguments: dict[str, Any]) -> list[int]:
    """Forks the ranks, then opens the store: a thread of the store must not be there when a process forks."""
    ports = [os.pipe() for _ in range(size)]
    children = []
    for rank in range(size):
        child = os.fork()
        if child == 0:
            port = int(os.read(ports[rank][0], 16))
            os._exit(be_a_rank(module, job, rank, size, port, Path(folder), arguments))
        children.append(child)
    import torch.distributed as dist

    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    for _, port_in in ports:
        os.write(port_in, str(store.port).encode())
    statuses: dict[int, int] = {}
    end, last = time.monotonic() + DEADLINE, False
    while len(statuses) < size:
        for child in children:
            if child not in statuses and (found := os.waitpid(child, os.WNOHANG))[0]:
                statuses[child] = os.waitstatus_to_exitcode(found[1])
            elif child not in statuses and time.monotonic() > end:
                os.kill(child, signal.SIGKILL)
        if size > 1 and len(statuses) == size - 1 and not last:
            end, last = time.monotonic() + GRACE, True
        time.sleep(0.01)
    return [statuses[child] for child in children]


def be_a_rank(
    module: str, job: str, rank: int, size: int, port: int, folder: Path, arguments: dict[str, Any]
) -> int:
    out = os.open(folder / f"rank{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    try:
        status = getattr(importlib.import_module(module), job)(folder, **arguments)
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return int(status or 0)


def serve(module: str) -> None:
    import torch

    # Forks find these imported; torch itself would import dynamo at the first optimiser's step.
    for name in ("torch._dynamo", "torch.distributed", module):
        importlib.import_module(name)
    torch.set_num_threads(1)
    for line in sys.stdin:
        answer_out, answer_in = os.pipe()
        launcher = os.fork()
        if launcher == 0:
            os.close(answer_out)
            with os.fdopen(answer_in, "w") as answer:
                json.dump(launch(module, **json.loads(line)), answer)
            os._exit(0)
        os.close(answer_in)
        with os.fdopen(answer_out) as answer:
            print(answer.read() or "[]", flush=True)
        os.waitpid(launcher, 0)


if __name__ == "__main__":
    serve(sys.argv[1])
