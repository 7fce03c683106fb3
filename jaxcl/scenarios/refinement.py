"""Continual model refinement: queries that leave the training distribution, without boundaries. Scenario 9.

Step t is a stage: its queries Q_t are its rows and its eval ``queries/<t>``, which is asked before the stage (what
the model gets wrong is E_t) and after it (what was fixed). ``ukr``, ``okr``, ``kg`` are the benchmark's held-out sets.
`jaxcl.scenarios.refinement_log.refined` reads the benchmark's numbers off a finished run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from jaxcl.errors import RequestError
from jaxcl.scenarios.base import Scenario, Settings, StreamInfo
from jaxcl.scenarios.keeping import share_of, whole

if TYPE_CHECKING:
    from jaxcl.evaluate.base import Eval
    from jaxcl.models.tokenizer import Tokenizer

STEPS, EVERY, OKR = 100, 10, 64
UKR, KG = 512, 256
"""Held-out rows: of the upstream set, and of each cluster."""
_FOLDERS = {"olora_benchmark": "MNLI RTE CB BoolQA MultiRC", "commonsense": "ARC-Challenge ARC-Easy openbookqa"}
_DATA = {  # stream: upstream, clusters
    "cmr": ("BoolQA", ("MultiRC", "ARC-Challenge", "ARC-Easy", "openbookqa")),
    "cmr_nli": ("MNLI", ("RTE", "CB")),
}
_OPTIONS = ("steps", "batch", "alpha", "beta", "gamma", "eval_every", "okr", "keep")
Row = dict[str, Any]


def _build(info: StreamInfo, stages: Sequence[str], tokenizer: Tokenizer, settings: Settings) -> Scenario:
    from jaxcl.data.cmr import UPSTREAM, Mix, query_stream
    from jaxcl.data.folder import instruct_stages
    from jaxcl.data.leaks import check
    from jaxcl.metrics.cmr import past_sample

    settings.known(info, *_OPTIONS)
    if settings.order != "given":
        raise RequestError(f"stream {info.name!r} draws its order by seed; accepted: order=given")
    upstream, clusters = _DATA[info.name.partition("/")[2]]
    steps, every, okr = (whole(settings, name, n) for name, n in
                         (("steps", STEPS), ("eval_every", EVERY), ("okr", OKR)))  # fmt: skip
    default = Mix()
    batch = whole(settings, "batch", min(default.batch, settings.rows or default.batch))
    mix = Mix(batch, *(settings.option(n, getattr(default, n)) for n in ("alpha", "beta", "gamma"))).check()
    pools, dropped = _pools((upstream, *clusters), tokenizer, settings)
    held = {name: _held_out(name, UKR if name == upstream else KG, settings) for name in (upstream, *clusters)}
    leaks = check(*({name: {r["id"]: _asks(r) for r in rows} for name, rows in part.items()} for part in (pools, held)),
                  allow=settings.allow)  # fmt: skip
    drawn = query_stream(len(pools[upstream]), {c: len(pools[c]) for c in clusters}, steps, mix, seed=settings.seed)
    pools[UPSTREAM] = pools[upstream]
    names = [f"step_{t:03}" for t in range(1, steps + 1)]
    queries = {name: [pools[c][i] for c, i in of_step] for name, (_, of_step) in zip(names, drawn)}

    evals = _Evals(tokenizer, settings, [r for rows in (*pools.values(), *held.values()) for r in rows])
    history = _histories(list(queries.values()))
    past = [past_sample(rows, min(okr, mix.batch), seed=settings.seed, step=t) for t, rows in enumerate(history)]
    measured: Callable[[int], bool] = functools.partial(_measured, steps=steps, every=every)
    made = [
        evals.held_out("ukr", held[upstream], measured, "general"),
        evals.past("okr", past, measured),
        evals.held_out("kg", [r for c in clusters for r in held[c]], measured, "probe"),
        *(evals.queries(f"queries/{name}", rows, t) for t, (name, rows) in enumerate(queries.items())),
    ]
    trained = instruct_stages(queries, tokenizer, window=settings.window, template=settings.template)
    trained = [type(s)(s.name, s.train, (f"queries/{s.name}",)) for s in trained]
    notes = {"leaks": leaks, "left out: longer than the window": dropped, "mix": mix._asdict(),
             "major": [major for major, _ in drawn]}  # fmt: skip
    return Scenario(info, trained, made, share_of(trained, settings, 0.1), {k: v for k, v in notes.items() if v})


class _Evals:
    """Exact match of the written answer, in all its uses: one length of answer, so that few shapes are compiled."""

    def __init__(self, tokenizer: Tokenizer, settings: Settings, rows: Sequence[Row]) -> None:
        from jaxcl.data.fitting import answer_room

        self.tokenizer, self.settings = tokenizer, settings
        self.room = answer_room(rows, tokenizer, settings.template, settings.window)

    def asked(self, eval_id: str, rows: Sequence[Row], role: str) -> Eval:
        from jaxcl.evaluate.generation import generation

        s = self.settings
        [made] = generation(
            eval_id, rows, self.tokenizer, window=s.window, template=s.template, max_new=self.room,
            batch_size=s.batch_size, role=role,
        )  # fmt: skip
        return made

    def held_out(self, eval_id: str, rows: Sequence[Row], when: Callable[[int], bool], role: str) -> Eval:
        from jaxcl.evaluate.at_stages import only

        return only(self.asked(eval_id, rows, role), when)

    def queries(self, eval_id: str, rows: Sequence[Row], t: int) -> Eval:
        """Those of step t (from 0): asked right before and right after it."""
        from jaxcl.evaluate.at_stages import only

        return only(self.asked(eval_id, rows, "task"), lambda done: done in (t, t + 1))

    def past(self, eval_id: str, samples: Sequence[Sequence[Row] | None], when: Callable[[int], bool]) -> Eval:
        """Past submissions, another sample after every step."""
        from jaxcl.evaluate.at_stages import changing

        asked = [self.asked(eval_id, rows, "probe") if rows and when(t) else None for t, rows in enumerate(samples)]
        return changing(eval_id, asked)


def _measured(done: int, steps: int, every: int) -> bool:
    """Whether the held-out sets are asked with so many steps done: at the start of every so many steps (and of the
    first), of the last step, and after it."""
    return done % every == 0 or done >= steps - 1


def _pools(names: Sequence[str], tokenizer: Tokenizer, settings: Settings) -> tuple[dict[str, list[Row]], Any]:
    """Training rows of each cluster that fit and repeat no held-out row."""
    from jaxcl.data.fitting import fitting
    from jaxcl.data.leaks import unrepeated

    tests = [_asks(row) for name in names for row in _read(name, "test", settings)]
    rows = {name: unrepeated(_read(name, "train", settings), tests, _asks, allow=settings.allow) for name in names}
    return fitting(rows, tokenizer, settings.template, settings.window)


def _held_out(name: str, most: int, settings: Settings) -> list[Row]:
    from jaxcl.data.stage import subsample

    rows = _read(name, "test", settings)
    return subsample(rows, min(most, settings.test_rows or most, len(rows)), settings.seed)


def _read(name: str, split: str, settings: Settings) -> list[Row]:
    from jaxcl.data.folder import read_split
    from jaxcl.data.jsonl import data_folder

    [folder] = [f for f, tasks in _FOLDERS.items() if name in tasks.split()]
    rows = read_split(data_folder(folder, settings.data_dir), name, split)
    return [row | {"id": f"{name}/{row['id']}"} for row in rows]


def _asks(row: Row) -> str:
    return row["instruction"] + row["input"]


def _histories(queries: Sequence[Sequence[Row]]) -> list[list[Row]]:
    """What was submitted before each step and after the last: a row once, however often it came."""
    out: list[list[Row]] = [[]]
    for rows in queries:
        seen = {row["id"] for row in out[-1]}
        out.append([*out[-1], *(row for row in rows if row["id"] not in seen)])
    return out


_NLI = ("tfds:multi_nli", "tfds:super_glue/rte", "tfds:super_glue/cb")
_QA = ("tfds:super_glue/boolq", "tfds:super_glue/multirc", "hf:allenai/ai2_arc", "hf:allenai/openbookqa")
STREAMS = tuple(
    StreamInfo(
        name=f"refinement/{name}",
        scenario="knowledge editing",
        stages=tuple(f"step_{t:03}" for t in range(1, STEPS + 1)),
        metric="exact match of written answers, before and after each step",
        regime="boundary-free",
        card="refine-align/cmr-benchmark",
        doc=f"CMR's stream: from {upstream} to {', '.join(clusters)}; alpha 0.9, beta 0.5, gamma 0.8",
        unit="the queries of one step (options steps, batch, alpha, beta, gamma)",
        keeps="10% of all queries (option keep), as a memory of past errors",
        protocol="answered before it is learned; upstream, past and unseen queries every 10 steps (option eval_every)",
        public=_NLI if name == "cmr_nli" else _QA,
        data=tuple(f"{f}/{task}" for f, tasks in _FOLDERS.items() for task in tasks.split()
                   if task in (upstream, *clusters)),
        build=_build,
    )
    for name, (upstream, clusters) in _DATA.items()
)  # fmt: skip
