"""T5-large learns O-LoRA's order 1 with the reference's settings: the same runs as olora_order1, other defaults.

    jaxcl run olora_t5_large --data data
    jaxcl run olora_t5_large --data data --set method=inclora --set model=path/to/t5-large
"""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxcl import experiment_files
from jaxcl.core.experiment import Experiment

order1: Any = experiment_files.load("olora_order1")


@dataclasses.dataclass(frozen=True)
class Config(order1.Config):
    """O-LoRA's code for orders 1 to 3 (Wang et al. 2023): all rows, one pass, batch 64, rate 1e-3 constant, rank 8,
    alpha 32, dropout 0.1, strength 0.5, a source of 512 and a target of 50 tokens, exact match of what is written. For
    a GPU or a slice of TPUs. T5's own dropout is what its config says, 0.1."""

    model: str = "t5-large"
    rows: int | None = None
    test_rows: int | None = None
    window: int = 562  # source and target together
    prefix: bool = True
    by: str = "generation"
    eval_batch: int = 128
    batch_size: int = 64
    accumulate: int = 4
    dtype: str = "bfloat16"
    remat: str = "block"
    stacked: bool = True


def build(cfg: Config) -> Experiment:
    """The experiment; weights come from the hub or a folder, data from --data or $JAXCL_DATA."""
    return order1.build(cfg)
