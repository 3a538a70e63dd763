"""The rows of the paper's comparison: what each learns across tasks, and what it adapts to one."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

from ..engine.evaluate import Adapt


@dataclass(frozen=True)
class Row:
    """One row of the paper's comparison.

    Attributes:
        key, label: of files and tables.
        learn: what meta-training moves beside the head's start, as `MetaConfig.learn`.
        last_block_only: of the last block (Θ4) alone, as `MetaConfig.last_block_only`.
        hard: the hard-task meta-batch, as `MetaConfig.hard`.
        adapt: what the inner loop moves; with ``all``, meta-training follows the recipe of MAML.
        pretrained: whether it starts from the pre-trained network; otherwise from MAML's own, random.
        meta_trained: whether there is meta-training at all.
        rate_of: key of the row whose meta learning rate it takes where one was chosen for that row alone.
    """

    key: str
    label: str
    learn: str = "head"
    last_block_only: bool = False
    hard: str = "none"
    adapt: Adapt = "head"
    pretrained: bool = True
    meta_trained: bool = True
    rate_of: str = ""

    @property
    def is_whole_network(self) -> bool:
        """Whether the inner loop adapts all weights, which takes many times as long."""
        return self.adapt == "all"

    @property
    def plain_key(self) -> str:
        """The key of the same row with the plain meta-batch."""
        return self.key.removesuffix("-ht")

    def with_hard_tasks(self) -> Row:
        """The same row with the hard-task meta-batch."""
        return replace(self, key=f"{self.key}-ht", label=f"{self.label} + HT", hard="resample")


UPDATE_HEAD = Row("update-head", "update θ", meta_trained=False)
UPDATE_ALL = Row("update-all", "update [Θ;θ]", adapt="all", meta_trained=False)
FT_HEAD = Row("ft-head", "FT θ")
FT_LAST = Row("ft-last", "FT[Θ4;θ]", learn="weights", last_block_only=True, rate_of="ft-all")
FT_ALL = Row("ft-all", "FT[Θ;θ]", learn="weights")
SS_LAST = Row("ss-last", "SS[Θ4;θ]", learn="scale_shift", last_block_only=True, rate_of="ss")
SS = Row("ss", "SS[Θ;θ]", learn="scale_shift")
SS_HT = SS.with_hard_tasks()
MAML = Row("maml", "MAML", learn="weights", adapt="all", pretrained=False)
MAML_HT = MAML.with_hard_tasks()
MAML_DEEP = Row("maml-deep", "MAML deep", learn="weights", adapt="all")
MAML_DEEP_HT = MAML_DEEP.with_hard_tasks()

# The paper's ablation: what learns nothing, then what does, each with the plain meta-batch.
PLAIN_ROWS = (UPDATE_ALL, UPDATE_HEAD, FT_HEAD, FT_LAST, FT_ALL, SS_LAST, SS, MAML, MAML_DEEP)
ALL_ROWS = tuple(
    itertools.chain.from_iterable(
        (row, row.with_hard_tasks()) if row.meta_trained else (row,) for row in PLAIN_ROWS
    )
)

# Meta learning rates to choose from on the validation split, of what the row learns (FT θ: of the head's start): each
# method's own neighbourhood, with two rates that weights (FT) and scale and shift have in common.
_WEIGHT_RATES, _SCALE_RATES = (3e-5, 1e-4, 3e-4, 1e-3), (3e-4, 1e-3, 3e-3, 1e-2)
RATES = {
    FT_HEAD: (1e-4, 3e-4, 1e-3),
    FT_LAST: _WEIGHT_RATES,
    FT_ALL: _WEIGHT_RATES,
    SS_LAST: _SCALE_RATES,
    SS: _SCALE_RATES,
    SS_HT: _SCALE_RATES,
}
