"""What a compiled launch takes of a chip, and what is wrong with it: the gates that every shipped kernel passes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache, partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

from . import ahead, machine_code
from .ahead import CHIPS, Chip, compile_launch
from .launch import Launch
from .shipped import compiled_as, shipped

# Reserved by the system of each program's shared memory since compute capability 8.0 (CUDA programming guide).
RESERVED_SHARED = 1024


@dataclass(frozen=True)
class Inspection:
    """What was read off a launch's machine code for a chip.

    Attributes:
        chip: its name.
        registers, spilled: a thread; bytes of stack and local memory.
        shared, num_warps: a program's.
        programs: that fit a multiprocessor at a time.
        matrix: the tensor cores' instruction, empty without one.
        length: instructions of the whole kernel.
        loop: instructions of its main loop, 0 without one.
        loop_flop: operations of a program's tensor cores in one pass through the loop.
        asynchronous: whether anything is copied to shared memory without passing through registers.
        loads: whether the main loop loads global memory into registers.
        divides: whether the main loop divides whole numbers.
    """

    chip: str
    registers: int
    spilled: int
    shared: int
    num_warps: int
    programs: int
    matrix: str
    length: int
    loop: int
    loop_flop: int
    asynchronous: bool
    loads: bool
    divides: bool


def inspect(launch: Launch, chip: Chip | str) -> Inspection:
    """Compiles the launch for the chip and reads its machine code."""
    chip = CHIPS[chip] if isinstance(chip, str) else chip
    compiled = compile_launch(launch, chip)
    num_warps = int(compiled.metadata.num_warps)
    instructions, loops = machine_code.instructions_and_loops(compiled.machine_code)
    loop = machine_code.main_loop(loops, MATRIX)
    products = [i.split()[0] for i in instructions if machine_code.count([i], MATRIX)]
    descriptors = machine_code.instruction_descriptors(compiled.ptx)
    return Inspection(
        chip=chip.name,
        registers=compiled.registers,
        spilled=compiled.spilled,
        shared=compiled.shared,
        num_warps=num_warps,
        programs=resident(chip, num_warps, compiled.registers, compiled.shared),
        matrix=max(products, key=products.count, default=""),
        length=len(instructions),
        loop=len(loop),
        loop_flop=machine_code.matrix_flop(loop, num_warps, descriptors),
        asynchronous=machine_code.count(instructions, machine_code.ASYNCHRONOUS) > 0,
        loads=machine_code.count(loop, r"LDG\b") > 0,
        divides=machine_code.divides(compiled.ptx),
    )


# Of any chip: on one with newer instructions, small products may take the older ones.
MATRIX = "|".join(sorted({chip.matrix for chip in CHIPS.values()}))


def resident(chip: Chip, num_warps: int, registers: int, shared: int) -> int:
    """How many programs fit a multiprocessor; registers are given out a warp in units of 256."""
    by_warp = -(-registers * 32 // 256) * 256
    return min(
        chip.threads // (32 * num_warps),
        chip.registers // (by_warp * num_warps),
        chip.shared_all // (shared + RESERVED_SHARED),
    )


def faults(launch: Launch, found: Inspection, longest_loop: int | None) -> list[str]:
    """The gates that a launch fails, in words; none if all is well.

    Args:
        launch: what was compiled.
        found: what came out.
        longest_loop: the most instructions that its main loop may have; None if that was never stored.
    """
    chip = CHIPS[found.chip]
    wrong = []
    if found.spilled:
        wrong.append(f"spills: {found.spilled} bytes of local memory a thread")
    if found.shared > chip.shared:
        wrong.append(f"{found.shared} bytes of shared memory; {chip.name} gives a program {chip.shared}")
    elif not found.programs:
        wrong.append(
            f"no program fits a multiprocessor: {found.registers} registers, {found.num_warps} warps"
        )
    if launch.work.matrix:
        if not machine_code.count([found.matrix], chip.matrix):
            wrong.append(f"its products run on {found.matrix or 'no tensor core'}, not on {chip.matrix}")
        if launch.num_stages > 1 and found.loads and not found.asynchronous:
            stages = f"{launch.num_stages} stages are asked for"
            wrong.append(f"{stages}, and the main loop waits for its loads: nothing is copied asynchronously")
        # A pass that is bound by memory hides a division behind its loads; a product's loop has no slot to spare.
        if found.divides:
            wrong.append("the main loop divides whole numbers")
    if longest_loop is None:
        wrong.append("no budget is stored for its main loop; tools/kernel_budgets.py writes it")
    elif found.loop > longest_loop:
        wrong.append(f"the main loop has {found.loop} instructions, more than the {longest_loop} allowed")
    return wrong


def inspected(
    jobs: Sequence[tuple[str, str]], workers: int | None = None, kept: Path | None = None
) -> Iterator[tuple[str, Inspection]]:
    """Inspects shipped launches in as many processes as there are cores, in the order of the jobs.

    Args:
        jobs: (name, chip): the launch of that name that is shipped for the chip.
        workers: processes.
        kept: as in `kept_or_inspected`.

    Raises:
        RuntimeError: a launch that does not compile; the message names it and the chip.
    """
    # Not forked from this process, whose threads a copy would lack.
    with ProcessPoolExecutor(workers or os.cpu_count(), mp_context=get_context("spawn")) as pool:
        found = pool.map(partial(_inspected, kept), jobs, chunksize=4)
        yield from zip((name for name, _ in jobs), found, strict=True)


def _inspected(kept: Path | None, job: tuple[str, str]) -> Inspection:
    name, chip = job
    try:
        return kept_or_inspected(_shipped_for(chip)[name], chip, kept)
    except Exception as error:
        raise RuntimeError(f"{name} does not compile for {chip}: {type(error).__name__}: {error}") from error


_shipped_for = cache(shipped)  # of a worker


def kept_or_inspected(launch: Launch, chip: str, kept: Path | None) -> Inspection:
    """What was read off the same code before, or what `inspect` finds, which is then kept.

    Args:
        launch: what to inspect.
        chip: its name.
        kept: folder of a file for each code, by `digest`; None keeps nothing.
    """
    if kept is None:
        return inspect(launch, chip)
    path = kept / f"{digest(launch, chip)}.json"
    if path.exists():
        return Inspection(**json.loads(path.read_text("utf-8")))
    found = inspect(launch, chip)
    kept.mkdir(parents=True, exist_ok=True)
    # Two processes may write it at once, each the same.
    own = path.with_suffix(f".{os.getpid()}")
    own.write_text(json.dumps(asdict(found)), encoding="utf-8")
    own.replace(path)
    return found


def digest(launch: Launch, chip: str) -> str:
    """Of all that an inspection depends on: the kernel's source and what it calls, options, chip, Triton, and readers."""
    key = version("triton"), launch.kernel.cache_key, compiled_as(launch)[1:], chip, _readers()
    return hashlib.sha256(repr(key).encode()).hexdigest()[:32]


@cache
def _readers() -> str:
    """Of the sources that compile and read."""
    texts = (Path(str(file)).read_bytes() for file in (__file__, ahead.__file__, machine_code.__file__))
    return hashlib.sha256(b"".join(texts)).hexdigest()
