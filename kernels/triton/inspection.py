"""What a compiled launch takes of a chip, and what is wrong with it: the gates that every shipped kernel passes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

from . import machine_code
from .ahead import CHIPS, Chip, compile_launch
from .launch import Launch
from .shipped import shipped

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
    names: Sequence[str], chips: Iterable[str], workers: int | None = None
) -> Iterator[tuple[str, Inspection]]:
    """Inspects shipped launches, by name, for each chip, in as many processes as there are cores.

    Raises:
        RuntimeError: a launch that does not compile; the message names it and the chip.
    """
    jobs = [(name, chip) for chip in chips for name in names]
    # Not forked from this process, whose threads a copy would lack.
    with ProcessPoolExecutor(workers or os.cpu_count(), mp_context=get_context("spawn")) as pool:
        yield from zip((name for name, _ in jobs), pool.map(_inspected, jobs, chunksize=4), strict=True)


_launches: dict[str, Launch] = {}  # of a worker


def _inspected(job: tuple[str, str]) -> Inspection:
    name, chip = job
    if not _launches:
        _launches.update(shipped())
    try:
        return inspect(_launches[name], chip)
    except Exception as error:
        raise RuntimeError(f"{name} does not compile for {chip}: {type(error).__name__}: {error}") from error
