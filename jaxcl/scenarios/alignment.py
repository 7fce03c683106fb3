"""Continual alignment: one preference objective after another, harmlessness and then helpfulness. Scenario 10."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jaxcl.scenarios.base import Scenario, Settings, StreamInfo
from jaxcl.scenarios.keeping import share_of

if TYPE_CHECKING:
    from jaxcl.core.types import Model, Params
    from jaxcl.evaluate.base import Eval
    from jaxcl.models.tokenizer import Tokenizer

_FOLDERS = {"harmless": "hh_harmless", "helpful": "helpful_en"}


def _build(info: StreamInfo, stages: Sequence[str], tokenizer: Tokenizer, settings: Settings) -> Scenario:
    from jaxcl.data.leaks import check, unrepeated
    from jaxcl.data.preference import answer_ids, chosen_source, chosen_that_fit, preference_rows
    from jaxcl.data.stage import Stage, subsample
    from jaxcl.evaluate.preference import preference

    settings.known(info, "keep", "beta")
    beta, data = settings.option("beta", 0.1), settings.data_dir
    tests = {name: preference_rows(_FOLDERS[name], "test", data) for name in stages}
    asked = [row["prompt"] for rows in tests.values() for row in rows]
    trains = {name: preference_rows(_FOLDERS[name], "train", data) for name in stages}
    trains = {name: unrepeated(rows, asked, _prompt, allow=settings.allow) for name, rows in trains.items()}
    texts = [{name: {r["id"]: r["prompt"] for r in rows} for name, rows in part.items()} for part in (trains, tests)]
    leaks = check(*texts, allow=settings.allow)
    fit = {name: chosen_that_fit(rows, tokenizer, settings.window) for name, rows in trains.items()}
    dropped = {name: len(trains[name]) - len(rows) for name, rows in fit.items() if len(rows) < len(trains[name])}
    rows = {name: subsample(of, settings.rows, settings.seed) for name, of in fit.items()}
    few = {name: subsample(of, settings.test_rows, settings.seed) for name, of in tests.items()}
    targets = max(len(answer_ids(row, tokenizer)) for of in rows.values() for row in of)
    shared: dict[str, Any] = {"window": settings.window, "batch_size": settings.batch_size}
    evals = [e for name, of in few.items() for e in _accuracy(name, of, tokenizer, shared)]
    made = [
        Stage(name, chosen_source(name, of, tokenizer, window=settings.window, targets=targets), (evals[2 * n].id,))
        for n, (name, of) in enumerate(rows.items())
    ]

    def against(model: Model, params: Params) -> list[Eval]:
        """The change of the preference since the model was given: DPO's implicit reward."""
        how = {"metrics": ("reward_accuracy", "reward_margin"), "reference": params, "beta": beta, "role": "probe"}
        return [e for name, of in few.items() for e in preference(f"{name}/reward", of, tokenizer, **shared, **how)]

    notes = {"leaks": leaks, "left out: chosen answers longer than 3/4 of the window": dropped}
    kept = {key: value for key, value in notes.items() if value}
    return Scenario(info, made, evals, share_of(made, settings, 0.1), kept, against)


def _accuracy(name: str, rows: Sequence[dict[str, Any]], tokenizer: Tokenizer, shared: dict[str, Any]) -> list[Eval]:
    """Preference accuracy by summed log-likelihood, the objective's number, and per token beside it."""
    import dataclasses

    from jaxcl.evaluate.preference import preference

    summed, per_token = preference(name, rows, tokenizer, metrics=("accuracy", "accuracy_per_token"), **shared)
    return [summed, dataclasses.replace(per_token, role="probe")]


def _prompt(row: dict[str, Any]) -> str:
    return row["prompt"]


STREAMS = (
    StreamInfo(
        name="alignment/harmless_helpful",
        scenario="alignment",
        stages=tuple(_FOLDERS),
        metric="preference accuracy by log-likelihood",
        regime="DIL",
        card="refine-align/rlhf-pieces",
        doc="harmlessness (HH-RLHF), then helpfulness; the chosen answers are learned, pairs are measured",
        unit="one preference objective",
        keeps="10% of all rows (option keep)",
        protocol="both objectives after each stage, the implicit reward against the given model beside; alignment tax "
        "by the general suite",
        public=("hf:Anthropic/hh-rlhf",),
        data=tuple(f"preference/{folder}" for folder in _FOLDERS.values()),
        build=_build,
        texts=lambda info, stage, settings: _texts(stage, settings),
    ),
)


def _texts(stage: str, settings: Settings) -> list[str]:
    from jaxcl.data.preference import preference_rows

    return [row["prompt"] for row in preference_rows(_FOLDERS[stage], "train", settings.data_dir)]
