"""A roofline model of a launch's time on a card. Nothing here was measured.

    time = max(products × padding, memory, L2, issue slots × padding) × wave quantisation

- products: operations of the algorithm at the rate of the card's tensor cores (or of its float32 units);
- memory: compulsory bytes, each tensor element once;
- L2: what all programs together ask of it, and what is written;
- issue slots: of kernels with products, instructions of the main loop's passes; the loop's own matrix instructions
  say how many passes the operations are. Other kernels' trip counts are not in their machine code: left out;
- wave quantisation: programs on the fullest multiprocessor over those on the mean one: all are shared out evenly, the
  fullest ends last;
- padding: operations of whole blocks over those of the algorithm; what is masked is computed, not read.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, prod

import torch
from torch import Tensor

from mtl_fast.kernels.triton.inspection import Inspection
from mtl_fast.kernels.triton.launch import Launch, Work

from .cards import REACHED_MATRIX, REACHED_MEMORY, Card


@dataclass(frozen=True)
class Modelled:
    """Seconds of each term, and the factors.

    Attributes:
        products, memory, l2, issue: seconds, padding included; `issue` is 0 where it is not known.
        waves, padding: factors of at least 1.
    """

    products: float
    memory: float
    l2: float
    issue: float
    waves: float
    padding: float

    @property
    def terms(self) -> dict[str, float]:
        """By name."""
        return {"products": self.products, "memory": self.memory, "L2": self.l2, "issue": self.issue}

    @property
    def limit(self) -> str:
        """The term that sets the time."""
        return max(self.terms, key=lambda name: self.terms[name])

    @property
    def seconds(self) -> float:
        return max(self.terms.values()) * self.waves


def modelled(launch: Launch, found: Inspection, card: Card) -> Modelled:
    """The time of a launch whose code for the card's chip was inspected."""
    work, programs = launch.work, prod(launch.grid)
    flop, issue = max(work.flop, work.padded), 0.0
    if work.matrix and found.loop_flop:
        passes = flop / found.loop_flop
        issue = passes * found.loop * found.num_warps / card.issue
    return Modelled(
        products=flop / rate(launch, card),
        memory=(work.read + work.written) / (card.memory * REACHED_MEMORY),
        l2=l2_bytes(work) / card.l2,
        issue=issue,
        waves=ceil(programs / card.multiprocessors) * card.multiprocessors / max(programs, 1),
        padding=flop / work.flop if work.flop else 1.0,
    )


def l2_bytes(work: Work) -> int:
    """What all programs together read from L2 and write to it."""
    return (work.l2_read or work.read) + work.written


def rate(launch: Launch, card: Card) -> float:
    """Operations a second that the card gives this launch."""
    if not launch.work.matrix:
        return card.fp32
    dtypes = {value.dtype for value in launch.arguments.values() if isinstance(value, Tensor)}
    half = bool(dtypes & {torch.bfloat16, torch.float16})
    return (card.half if half else card.tf32) * REACHED_MATRIX
