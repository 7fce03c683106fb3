"""SmolLM2-135M-Instruct is edited with GRACE: ZsRE's facts one after another, in one stage.

    jaxcl run zsre_grace
    jaxcl run zsre_grace --set eps_init=20.0 --set rows=50
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable
from typing import Any

import optax

from jaxcl.core.experiment import Experiment
from jaxcl.data.editing import asked, edit_records, edit_source
from jaxcl.data.stage import Stage
from jaxcl.evaluate.base import Eval, Item, Progress
from jaxcl.evaluate.editing import READINGS, answer_nll, correct, unchanged
from jaxcl.methods.grace import grace
from jaxcl.models.fetch import load


@dataclasses.dataclass(frozen=True)
class Config:
    """Defaults: the paper's rule and optimiser, 200 edits. site null: at 27/32 of the depth, as in Llama-2-7B."""

    model: str = "smollm2-135m-instruct"
    edits: str = "zsre"
    rows: int | None = 200
    site: str | None = None
    eps_init: float = 1.0
    n_iter: int = 100
    learning_rate: float = 1.0
    stop_below: float | None = None  # nats; ends the training of a value early
    replace: str = "last"
    value: str = "cold"
    upstream: str = "zsre"  # whose training rows' true answers must stay known
    upstream_rows: int = 100
    row0: bool = True  # whether the model is measured before it is edited
    batch_size: int = 8
    seed: int = 0
    mesh: dict[str, int] | None = None


def build(cfg: Config) -> Experiment:
    """The experiment; weights come from the model cache (`jaxcl fetch`), data from --data or $JAXCL_DATA."""
    data = os.environ.get("JAXCL_DATA")
    records = edit_records(cfg.edits, data, rows=cfg.rows)
    others = edit_records(cfg.upstream, data, split="train", rows=cfg.upstream_rows)
    model, params, tokenizer, source = load(cfg.model)
    edit, rephrase, near = (asked(records, about) for about in ("edit", "rephrase", "locality"))
    evals = []
    for by in READINGS:
        evals += [
            correct(f"reliability_{by}", edit, tokenizer, by=by),
            correct(f"generality_{by}", rephrase, tokenizer, by=by, role="probe"),
            unchanged(f"locality_{by}", near, tokenizer, model, params, by=by),
        ]
    evals += [
        answer_nll("upstream_nll", asked(others, "truth"), tokenizer),
        counted("keys", lambda live: live["book"]["n"]),
        counted("edits", lambda live: live["made"].sum()),
    ]
    method = grace(
        site=cfg.site, eps_init=cfg.eps_init, n_iter=cfg.n_iter, lr=cfg.learning_rate, stop_below=cfg.stop_below,
        replace=cfg.replace, value=cfg.value, seed=cfg.seed,
    )  # fmt: skip
    learned = tuple(f"reliability_{by}" for by in READINGS)
    return Experiment(
        model=model,
        params=params,
        source=source,
        stages=[Stage(cfg.edits, edit_source(cfg.edits, records, tokenizer), learned)],
        evals=evals,
        methods=[method],
        tx=optax.identity(),
        batch_size=cfg.batch_size,
        seed=cfg.seed,
        mesh=cfg.mesh,
        save_every=10,
        row0=cfg.row0,
        tokenizer=tokenizer,
    )


def counted(name: str, read: Callable[[Any], Any]) -> Eval:
    """A number of the codebook as an eval of one row; 0 before there is one."""

    def run(view: Any, progress: Progress) -> list[Item]:
        live = view.live.get("grace")
        progress(1, 1)
        return [{"id": name, "prediction": None, "score": float(read(live)) if live else 0.0}]

    return Eval(name, "count", 1, run, higher_is_better=False, range=(0.0, math.inf), role="probe")
