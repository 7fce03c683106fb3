"""The rows of the table: every technique alone, and compositions of them that make sense.

Strengths and rates are for this small model, whose stages are 40 steps long; what is not named here is the method's own
default, the paper's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jaxcl
from jaxcl.core.types import Method

STAGES = 8
FULL, ADAPTER, PROMPT = 1e-3, 2e-3, 1e-2  # learning rates
MEMORY = {"capacity": 256}  # rows of the past, a tenth of the stream
REPLAY = {"ratio": 0.25, **MEMORY}
LORA = {"rank": 8, "alpha": 32.0, "dropout": 0.0, "targets": ["attn/*", "mlp/*"]}
BANK = {**LORA, "max_stages": STAGES}
WRITTEN = {"count": 40, "strength": 1.0, "oversample": 4.0, "max_new": 66}  # rows that a model writes of each old stage


@dataclasses.dataclass(frozen=True)
class Choice:
    """A row. make: its methods. rate: of the optimizer. told: whether the model is told the task, also at test. mofo:
    whether MoFO is the optimizer, Adam otherwise."""

    group: str
    make: Callable[[], list[Method]]
    rate: float = FULL
    told: bool = False
    mofo: bool = False


def alone(group: str, rate: float = FULL, **methods: Callable[[], Method]) -> dict[str, Choice]:
    return {name: Choice(group, lambda make=make: [make()], rate) for name, make in methods.items()}


BOUNDS = alone("bounds", finetune=jaxcl.finetune, joint=jaxcl.joint)
REPLAYED = alone(
    "replay",
    replay=lambda: jaxcl.replay(**REPLAY),
    mir=lambda: jaxcl.mir(candidates=2, **MEMORY),
    der=lambda: jaxcl.der(**MEMORY),
    generative_replay=lambda: jaxcl.generative_replay(**WRITTEN),
    lamol=lambda: jaxcl.lamol(gamma=1.0, strength=1.0, max_stages=STAGES, max_new=66),
)
REGULARIZED = alone(
    "regularization",
    l2_sp=lambda: jaxcl.l2_sp(anchor="previous"),
    ewc=lambda: jaxcl.ewc(strength=3.0, rows=64),
    si=lambda: jaxcl.si(strength=1.0),
    mas=lambda: jaxcl.mas(strength=0.1, rows=64),
    feature_reg=lambda: jaxcl.feature_reg(strength=1.0),
    idbr=jaxcl.idbr,
)
DISTILLED = alone("distillation", lwf=jaxcl.lwf)
GRADIENTS = alone(
    "gradients",
    agem=lambda: jaxcl.agem(**MEMORY),
    gem=lambda: jaxcl.gem(max_stages=STAGES, **MEMORY),
    ogd=lambda: jaxcl.ogd(rows=32, max_stages=STAGES),
) | {"mofo": Choice("gradients", lambda: [jaxcl.finetune()], mofo=True)}
ADAPTERS = (
    alone(
        "architecture", ADAPTER,
        lora=lambda: jaxcl.lora(**LORA),
        lora_merged=lambda: jaxcl.lora(merged=True, **LORA),
        inclora=lambda: jaxcl.inclora(**BANK),
        olora=lambda: jaxcl.olora(strength=2.0, **BANK),
        inflora=lambda: jaxcl.inflora(rank=8, stages=STAGES, max_stages=STAGES, targets=LORA["targets"], rows=128),
        lora_experts=lambda: jaxcl.lora_experts(dropout=0.0, max_experts=STAGES),
        bottleneck=jaxcl.bottleneck,
        llama_pro=lambda: jaxcl.llama_pro(groups=2),
    )
    | alone(
        "architecture", PROMPT,
        ia3=jaxcl.ia3,
        prompt_tuning=lambda: jaxcl.prompt_tuning(length=20),
        prefix_tuning=lambda: jaxcl.prefix_tuning(hidden=64),
    )
    | {
        "hat (told the task)": Choice("architecture", lambda: [jaxcl.hat()], told=True),
        "progressive_prompts (told)": Choice(
            "architecture", lambda: [jaxcl.progressive_prompts(hidden=64, max_stages=STAGES)], PROMPT, told=True
        ),
        "bottleneck by task (told)": Choice(
            "architecture", lambda: [jaxcl.bottleneck(per_task=True, max_stages=STAGES)], ADAPTER, told=True
        ),
    }
)  # fmt: skip
COMPOSED = {
    "replay + ewc": Choice("compositions", lambda: [jaxcl.replay(**REPLAY), jaxcl.ewc(strength=3.0, rows=64)]),
    "replay + lwf": Choice("compositions", lambda: [jaxcl.replay(**REPLAY), jaxcl.lwf(rows="old")]),
    "replay + feature_reg": Choice(
        "compositions", lambda: [jaxcl.replay(**REPLAY), jaxcl.feature_reg(strength=1.0, rows="old")]
    ),
    "replay + mofo": Choice("compositions", lambda: [jaxcl.replay(**REPLAY)], mofo=True),
    "generative_replay + lwf": Choice(
        "compositions", lambda: [jaxcl.generative_replay(**WRITTEN), jaxcl.lwf(rows="old")]
    ),
    "agem + ewc": Choice("compositions", lambda: [jaxcl.agem(**MEMORY), jaxcl.ewc(strength=3.0, rows=64)]),
    "lora + replay": Choice("compositions", lambda: [jaxcl.lora(**LORA), jaxcl.replay(**REPLAY)], ADAPTER),
    "lora + ewc": Choice("compositions", lambda: [jaxcl.lora(**LORA), jaxcl.ewc(strength=3.0, rows=64)], ADAPTER),
    "olora + replay": Choice(
        "compositions", lambda: [jaxcl.olora(strength=2.0, **BANK), jaxcl.replay(**REPLAY)], ADAPTER
    ),
    "lora_experts + replay": Choice(
        "compositions", lambda: [jaxcl.lora_experts(dropout=0.0, max_experts=STAGES), jaxcl.replay(**REPLAY)], ADAPTER
    ),
}
CHOICES: dict[str, Choice] = {
    **BOUNDS, **REPLAYED, **REGULARIZED, **DISTILLED, **GRADIENTS, **ADAPTERS, **COMPOSED
}  # fmt: skip
