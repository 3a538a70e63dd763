"""How programs of the base-learner share out their tasks, and the tasks that are shipped."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

# Products of float32; "tf32" would round their factors to 10 bits.
PRECISION = "ieee"


@dataclass(frozen=True)
class FitConfig:
    """How one program fits one task.

    Attributes:
        block_n: support rows, a power of two; a product sums over 16 at least.
        block_c: classes, a power of two; the 8 of 5-way halve the steps' products against 16.
        block_d: features at a time; where many rows wait in registers, fewer.
        block_m: query rows at a time.
        block_k: support rows at a time in products that read them in pieces.
        is_streamed: H [block_n, block_n] does not fit into registers beside the logits and R.
        num_warps: so few that a step waits little for its neighbours, so many that registers suffice.
        num_warps_back: of the steps backwards.
        num_stages: features on their way while others are multiplied; many rows leave registers for fewer.
        programs: that registers are shared out to where no step is kept; None leaves it to the assembler.
    """

    block_n: int
    block_c: int
    block_d: int
    block_m: int
    block_k: int
    is_streamed: bool
    num_warps: int
    num_warps_back: int
    num_stages: int
    programs: int | None


def fit_config(n_rows: int, n_way: int, chip: int) -> FitConfig:
    """The configuration of tasks of this size, whatever their number; all chips' have the same blocks."""
    block_n, block_c = max(16, triton.next_power_of_2(n_rows)), max(8, triton.next_power_of_2(n_way))
    is_streamed = block_n * max(block_n, 4 * block_c) > 4096
    # Of 32 rows sm_120's assembler spills at three stages.
    deepest = 2 if chip == 120 and block_n == 32 else 3
    num_warps = 16 if block_n * block_c > 4096 else 8 if block_n * block_c > 256 else 4
    return FitConfig(
        block_n=block_n,
        block_c=block_c,
        block_d=16 if is_streamed else 32,
        block_m=64,
        block_k=16 if is_streamed else min(block_n, 32),
        is_streamed=is_streamed,
        num_warps=num_warps,
        # sm_100's assembler spills some bytes of the 128 registers that 16 warps leave a thread.
        num_warps_back=min(num_warps, 8) if chip == 100 else num_warps,
        num_stages=deepest if block_n <= 32 else 1 if block_n * block_c > 4096 else 2,
        programs=_programs(block_n, block_c, is_streamed, chip),
    )


def _programs(block_n: int, block_c: int, is_streamed: bool, chip: int) -> int | None:
    # Of 64 rows at once their assemblers spill at three programs, for which 80 registers are left a thread.
    if block_n == 64 and not is_streamed and chip in (100, 120):
        return 2
    # Of 64 rows and 64 classes Triton 3.9's assembler spills at two, for which 128 are left.
    if block_n == block_c == 64:
        return 1
    return None


@dataclass(frozen=True)
class PieceConfig:
    """How programs share out the features of a task.

    Attributes:
        block_d: features a program: 20 pieces of 640 keep a few tasks' programs on many multiprocessors.
        block_m: query rows at a time.
        num_warps, num_stages: small products that wait for memory.
        programs: that registers are shared out to; None leaves it to the assembler.
    """

    block_d: int = 32
    block_m: int = 32
    num_warps: int = 4
    num_stages: int = 2
    programs: int | None = None


def piece_config(block_n: int, block_c: int) -> PieceConfig:
    """The configuration for tasks of these blocks of rows and classes."""
    # [block_n, block_d] and [block_c, block_d] wait in registers.
    if max(block_n, 2 * block_c) > 64:
        return PieceConfig(block_d=16, num_warps=8)
    return PieceConfig(num_warps=8 if block_n * block_c > 256 else 4)


def head_config(block_c: int) -> PieceConfig:
    """The same where queries are read and the head's gradient waits in registers."""
    config = piece_config(16, block_c)
    # Of 64 classes two stages take all 255 registers, and some assemblers spill; at one, 80 do for three programs.
    return replace(config, num_stages=1, programs=3) if block_c == 64 else config


@dataclass(frozen=True)
class Case:
    """Tasks that the gates, the report and the proofs look at."""

    name: str
    n_way: int
    n_rows: int
    dtype: torch.dtype = torch.float32
    has_mask: bool = False
    n_tasks: int = 2
    n_query: int = 75
    n_features: int = 640
    n_steps: int = 20

    def __str__(self) -> str:
        return f"{self.name}-{str(self.dtype).removeprefix('torch.')}"

    def operands(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """Support, labels, query, weight, bias and mask, without memory."""

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        support = empty(self.n_tasks, self.n_rows, self.n_features, dtype=self.dtype)
        query = empty(self.n_tasks, self.n_query, self.n_features, dtype=self.dtype)
        labels = empty(self.n_tasks, self.n_rows, dtype=torch.int64)
        mask = empty(self.n_tasks, self.n_rows, dtype=torch.bool) if self.has_mask else None
        head = empty(self.n_way, self.n_features), empty(self.n_way)
        return support, labels, query, *head, mask


CASES = (
    Case("5-way-1-shot", 5, 5),
    Case("5-way-5-shot", 5, 25),
    Case("5-way-5-shot", 5, 25, torch.bfloat16),
    Case("5-way-5-shot", 5, 25, torch.float16),
    Case("5-way-10-shot", 5, 50),
    Case("20-way-1-shot", 20, 20),
    Case("20-way-5-shot", 20, 100),
    Case("10-way-unequal", 10, 128, torch.bfloat16, True),
    Case("64-way-1-shot", 64, 64),
    Case("64-way-2-shot", 64, 128),
)
