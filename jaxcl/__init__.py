"""jaxcl: continual learning for large language models in JAX, as small pure functions that compose.

Everything is imported on first use, so that ``jaxcl --help`` does not wait for JAX.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "jaxcl.core.types": "Batch Budget Clock Ctx Fixed Method Model Outputs Params Phase State Stream World "
    "method weighted_nll",
    "jaxcl.core.experiment": "Experiment",
    "jaxcl.core.step": "make_step",
    "jaxcl.core.run": "run_experiment train",
    "jaxcl.core.til": "til",
    "jaxcl.data.columns": "Columns",
    "jaxcl.data.named": "load_rows",
    "jaxcl.data.named_stages": "answer_stages text_stages",
    "jaxcl.data.stage": "Stage",
    "jaxcl.methods.agem": "agem",
    "jaxcl.methods.elle": "elle",
    "jaxcl.methods.ewc": "ewc",
    "jaxcl.methods.feature_reg": "feature_reg",
    "jaxcl.methods.idbr": "idbr",
    "jaxcl.methods.finetune": "finetune",
    "jaxcl.methods.gem": "gem",
    "jaxcl.methods.generative_replay": "generative_replay",
    "jaxcl.methods.hat": "hat",
    "jaxcl.methods.grpo": "grpo",
    "jaxcl.methods.grace": "grace",
    "jaxcl.methods.ia3": "ia3",
    "jaxcl.methods.prompt_tuning": "prompt_tuning",
    "jaxcl.methods.prefix_tuning": "prefix_tuning",
    "jaxcl.methods.progressive_prompts": "progressive_prompts",
    "jaxcl.methods.bottleneck": "bottleneck",
    "jaxcl.methods.lora_experts": "lora_experts",
    "jaxcl.methods.inclora": "inclora",
    "jaxcl.methods.joint": "joint",
    "jaxcl.methods.l2_sp": "l2_sp",
    "jaxcl.methods.lamol": "lamol",
    "jaxcl.methods.llama_pro": "llama_pro",
    "jaxcl.methods.lora": "lora",
    "jaxcl.methods.lwf": "lwf",
    "jaxcl.methods.inflora": "inflora",
    "jaxcl.methods.mas": "mas",
    "jaxcl.methods.mir": "mir",
    "jaxcl.methods.der": "der",
    "jaxcl.methods.ogd": "ogd",
    "jaxcl.methods.olora": "olora",
    "jaxcl.methods.ppo": "ppo",
    "jaxcl.methods.replay": "replay",
    "jaxcl.methods.rho1": "rho1",
    "jaxcl.methods.si": "si",
    "jaxcl.models.decoder": "decoder",
    "jaxcl.models.from_flax": "from_flax into_flax",
    "jaxcl.transforms.infinite": "infinite",
    "jaxcl.transforms.rewarm": "rewarm",
    "jaxcl.transforms.mofo": "mofo scale_by_mofo",
}
_WHERE = {name: module for module, names in _HOME.items() for name in names.split()}
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'jaxcl' has no attribute {name!r}")
    value = getattr(importlib.import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
