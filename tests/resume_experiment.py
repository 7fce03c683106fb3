"""Two short stages that can be stopped anywhere; run by the tests of resuming, also as a process of its own."""

from __future__ import annotations

import dataclasses

import optax
from killed import Slow, nll
from support import experiment
from user_methods import theirs

from jaxcl.core.experiment import Experiment
from jaxcl.data.stage import Stage
from jaxcl.errors import unknown
from jaxcl.methods.agem import agem
from jaxcl.methods.bottleneck import bottleneck
from jaxcl.methods.der import der
from jaxcl.methods.elle import elle
from jaxcl.methods.ewc import ewc
from jaxcl.methods.feature_reg import feature_reg
from jaxcl.methods.finetune import finetune
from jaxcl.methods.gem import gem
from jaxcl.methods.generative_replay import generative_replay
from jaxcl.methods.grace import grace
from jaxcl.methods.grpo import grpo
from jaxcl.methods.hat import hat
from jaxcl.methods.ia3 import ia3
from jaxcl.methods.idbr import idbr
from jaxcl.methods.inclora import inclora
from jaxcl.methods.inflora import inflora
from jaxcl.methods.joint import joint
from jaxcl.methods.l2_sp import l2_sp
from jaxcl.methods.lamol import lamol
from jaxcl.methods.llama_pro import llama_pro
from jaxcl.methods.lora import lora
from jaxcl.methods.lora_experts import lora_experts
from jaxcl.methods.lwf import lwf
from jaxcl.methods.mas import mas
from jaxcl.methods.mir import mir
from jaxcl.methods.ogd import ogd
from jaxcl.methods.olora import olora
from jaxcl.methods.ppo import ppo
from jaxcl.methods.prefix_tuning import prefix_tuning
from jaxcl.methods.progressive_prompts import progressive_prompts
from jaxcl.methods.prompt_tuning import prompt_tuning
from jaxcl.methods.replay import replay
from jaxcl.methods.rho1 import rho1
from jaxcl.methods.si import si
from jaxcl.transforms.mofo import mofo

ADAPTER = {"rank": 2, "alpha": 4.0, "dropout": 0.2}
METHODS = {
    "finetune": finetune,
    "joint": joint,
    "replay": lambda: replay(ratio=0.5, capacity=10),
    "balanced": lambda: replay(ratio=0.5, capacity=10, policy="class_balanced"),
    "mir": lambda: mir(candidates=2, capacity=10, score="s2"),
    "der": lambda: der(k=4, capacity=10),
    "generative_replay": lambda: generative_replay(gamma=0.5, condition="prefix", kept=4, oversample=4, eos=31),
    "lamol": lambda: lamol(gamma=0.5, eos=31, max_stages=2),
    "l2_sp": lambda: l2_sp(strength=0.5),
    "annealed": lambda: l2_sp(strength=50.0, anchor="previous", form="decoupled", rate=3e-3, anneal=3),
    "ewc": lambda: ewc(strength=20.0, rows=8, fisher="sampled"),
    "separate": lambda: ewc(strength=20.0, rows=8, mode="separate", max_stages=2),
    "si": lambda: si(strength=1.0),
    "mas": lambda: mas(strength=0.1, rows=8),
    "lwf": lwf,
    "asked": lambda: lwf(teacher="topk", rows="new", k=4),
    "feature_reg": lambda: feature_reg(layers=(1, -1), distance="relational", positions="mean"),
    "idbr": lambda: idbr(width=5, max_stages=2),
    "agem": lambda: agem(capacity=10),
    "gem": lambda: gem(capacity=10, max_stages=2),
    "ogd": lambda: ogd(rows=4, max_stages=2),
    "hat": lambda: hat(max_stages=2),
    "grace": lambda: grace(eps_init=0.1, n_iter=3),
    "rho1": lambda: rho1(reference=0.3),
    "live": lambda: rho1(reference=None, scores="live"),
    "lora": lambda: lora(**ADAPTER),
    "merged": lambda: lora(merged=True, **ADAPTER),
    "inclora": lambda: inclora(max_stages=2, **ADAPTER),
    "olora": lambda: olora(max_stages=2, **ADAPTER),
    "inflora": lambda: inflora(rank=2, max_stages=2, stages=2, rows=8),
    "folded": lambda: olora(max_stages=2, fold=True, **ADAPTER | {"dropout": 0.0}),
    "ia3": lambda: ia3(per_task=True, max_stages=2),
    "prompt_tuning": lambda: prompt_tuning(length=3, hidden=5, per_task=True, max_stages=2),
    "prefix_tuning": lambda: prefix_tuning(length=3, hidden=5, per_task=True, max_stages=2),
    "progressive_prompts": lambda: progressive_prompts(length=3, hidden=5, max_stages=2),
    "bottleneck": lambda: bottleneck(width=3, norms=True, per_task=True, router="perplexity", max_stages=2),
    "lora_experts": lambda: lora_experts(rank=2, balance=0.1, max_experts=2),
    "llama_pro": lambda: llama_pro(groups=2),
    "elle": lambda: elle(growth=({"heads": 2, "layers": 1},), capacity=20, recover=4, segments=2),
    "ppo": lambda: ppo(reward="token:7", max_new=4, ptx=0.1, reference="ema"),
    "grpo": lambda: grpo(reward="token:7", max_new=4, group=2, epochs=2),
} | theirs("ROWS")


@dataclasses.dataclass(frozen=True)
class Config:
    methods: tuple[str, ...] = ("replay", "ewc")
    optimizer: str = "adam"
    rows: int = 64
    reset_opt: bool = True
    seed: int = 3


def build(cfg: Config) -> Experiment:
    stages = [Stage(f"s{i}", Slow(f"s{i}", cfg.rows, seed=i), evals=("nll",)) for i in range(2)]
    tx = mofo(3e-3, fraction=0.2) if cfg.optimizer == "mofo" else optax.adam(3e-3)
    for name in cfg.methods:
        if name not in METHODS:
            raise unknown("method", name, METHODS, where="resume_experiment")
    return experiment(
        [METHODS[m]() for m in cfg.methods], stages=stages, tx=tx, evals=[nll()], batch_size=4, save_every=3,
        reset_opt=cfg.reset_opt, seed=cfg.seed,
    )  # fmt: skip
