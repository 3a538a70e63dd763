"""The cards that kernels are modelled for, with figures of their makers' documents."""

from __future__ import annotations

from dataclasses import dataclass

from mtl_fast.kernels.triton.ahead import CHIPS, Chip

# What a well-made kernel reaches of the makers' figures, from an H100: 750 of 989 TFLOP/s, 3.0 of 3.35 TB/s.
REACHED_MATRIX, REACHED_MEMORY = 750 / 989, 3.0 / 3.35
# Bytes that L2 gives a multiprocessor in a cycle: 6 TB/s on an H100, taken for all cards.
L2_BYTES_PER_CYCLE = 6e12 / (132 * 1.83e9)
SCHEDULERS = 4  # of a multiprocessor, an instruction of a warp each in a cycle


@dataclass(frozen=True)
class Card:
    """A card.

    Attributes:
        name: of the file of its report.
        title: as the maker calls it.
        capability: its chip's in `CHIPS`, such as ``sm_80``.
        multiprocessors, clock: how many, and the clock in Hz that the maker's figure for half types holds at.
        half, tf32, fp32: operations a second without sparsity: half types with float32 sums and TF32 on tensor
            cores, float32 without them.
        memory: bytes a second.
        source: titles of the documents that the figures are from.
    """

    name: str
    title: str
    capability: str
    multiprocessors: int
    clock: float
    half: float
    tf32: float
    fp32: float
    memory: float
    source: str

    @property
    def chip(self) -> Chip:
        return CHIPS[self.capability]

    @property
    def l2(self) -> float:
        """Bytes a second."""
        return L2_BYTES_PER_CYCLE * self.multiprocessors * self.clock

    @property
    def issue(self) -> float:
        """Instructions of a warp a second."""
        return SCHEDULERS * self.multiprocessors * self.clock


CARDS = (
    Card(
        "a100",
        "A100 SXM 80 GB",
        "sm_80",
        108,
        1.41e9,
        312e12,
        156e12,
        19.5e12,
        2.039e12,
        "NVIDIA A100 Tensor Core GPU Architecture; NVIDIA A100 80GB datasheet (memory)",
    ),
    Card(
        "rtx3090",
        "GeForce RTX 3090",
        "sm_86",
        82,
        1.695e9,
        71.2e12,
        35.6e12,
        35.6e12,
        0.936e12,
        "NVIDIA Ampere GA102 GPU Architecture, Second-Generation RTX, appendix A",
    ),
    Card(
        "l4",
        "L4",
        "sm_89",
        58,
        2.04e9,
        121e12,
        60e12,
        30.3e12,
        0.3e12,
        "NVIDIA L4 Tensor Core GPU datasheet (its figures with sparsity halved)",
    ),
    Card(
        "h100",
        "H100 SXM",
        "sm_90",
        132,
        1.83e9,
        989.4e12,
        494.7e12,
        66.9e12,
        3.35e12,
        "NVIDIA H100 Tensor Core GPU Architecture; NVIDIA H100 datasheet (memory)",
    ),
    Card(
        "b200",
        "B200 (HGX)",
        "sm_100",
        148,
        1.86e9,
        2250e12,
        1100e12,
        75e12,
        7.7e12,
        "NVIDIA Blackwell Architecture Technical Brief, HGX B200; NVIDIA HGX B200 datasheet (memory)",
    ),
    Card(
        "rtx5090",
        "GeForce RTX 5090",
        "sm_120",
        170,
        2.407e9,
        209.5e12,
        104.8e12,
        104.8e12,
        1.792e12,
        "NVIDIA RTX Blackwell GPU Architecture, appendix A",
    ),
)
