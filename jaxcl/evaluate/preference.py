"""What a model prefers: the chosen answer or the rejected one, by likelihood or by DPO's implicit reward; and the mean
reward of what it writes.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxcl.core.types import Params
from jaxcl.data.encode import begun
from jaxcl.errors import RequestError, unknown
from jaxcl.evaluate.answers import Answers, How
from jaxcl.evaluate.base import Eval, Item, Progress, check_items, shared
from jaxcl.evaluate.endings import endings_nll

if TYPE_CHECKING:
    from jaxcl.models.tokenizer import Tokenizer

Row = dict[str, Any]
Rewards = Callable[[Sequence[str], Sequence[str]], Sequence[float]]
"""(prompts, answers) of one batch -> their rewards: a rule, or a learned head with its own weights."""


class Preferred(NamedTuple):
    """log p of the chosen and the rejected answer, f64[2], that of the reference, and their tokens."""

    ours: np.ndarray
    reference: np.ndarray
    tokens: np.ndarray

    @property
    def margin(self) -> float:
        """log p(chosen) - log p(rejected), less that of the reference."""
        change = self.ours - self.reference
        return float(change[0] - change[1])


NEED_REFERENCE = ("reward_accuracy", "reward_margin")
METRICS = ("accuracy", "accuracy_per_token", *NEED_REFERENCE)


def score(name: str, pair: Preferred, beta: float) -> float:
    """One of `METRICS` of one row; of equal answers none is preferred."""
    if name == "reward_margin":
        return beta * pair.margin
    if name == "reward_accuracy":
        return float(pair.margin > 0)
    chosen, rejected = pair.ours / pair.tokens if name == "accuracy_per_token" else pair.ours
    return float(chosen > rejected)


def preference(
    eval_id: str,
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    *,
    window: int,
    metrics: Sequence[str] = ("accuracy",),
    reference: Params | None = None,
    beta: float = 0.1,
    batch_size: int = 4,
    delimiter: str = " ",
    role: str = "task",
) -> list[Eval]:
    """One eval per name over ``preference`` rows, all from one pass; ids ``eval_id/name``, ``eval_id`` if there is one.

    'accuracy': log p(chosen) > log p(rejected) given the prompt, summed over their tokens and the end mark;
    'accuracy_per_token': divided by their number. With the ``reference`` model's weights (of the model as it was given,
    on its devices): 'reward_margin', beta times `Preferred.margin`, of DPO's implicit reward (Rafailov et al. 2023,
    section 4), and 'reward_accuracy', whether it is positive. Answers keep their first window/2 tokens, prompts their
    last. RequestError: no rows, an unknown name, a metric without the reference it needs, answers that are equal.
    """
    check_items(eval_id, rows, batch_size)
    for name in metrics:
        if name not in METRICS:
            raise unknown("metric of preference", name, METRICS)
        if name in NEED_REFERENCE and reference is None:
            raise RequestError(f"eval {eval_id!r}: {name} needs a reference; accepted: reference=the old weights")
    for row in rows:
        if row["chosen"] == row["rejected"]:
            where = f"eval {eval_id!r}: row {row['id']!r}"
            raise RequestError(f"{where} has one answer twice; accepted: a chosen and a rejected one")
    wanted = reference if set(metrics) & set(NEED_REFERENCE) else None
    once = shared(_Pairs(rows, tokenizer, window, batch_size, delimiter, wanted))
    return [
        Eval(
            eval_id if len(metrics) == 1 else f"{eval_id}/{name}",
            name,
            len(rows),
            functools.partial(_items, once, rows, name, beta),
            range=(-math.inf, math.inf) if name == "reward_margin" else (0.0, 1.0),
            role=role,
            chance=None if name == "reward_margin" else 0.5,
        )
        for name in metrics
    ]


def _items(
    once: Callable[[Any, Progress], list[Preferred]],
    rows: Sequence[Row],
    name: str,
    beta: float,
    view: Any,
    progress: Progress,
) -> list[Item]:
    found = []
    for row, pair in zip(rows, once(view, progress)):
        values = pair.ours / pair.tokens if name == "accuracy_per_token" else pair.ours
        said = "chosen" if values[0] > values[1] else "rejected"
        found.append({"id": row["id"], "prediction": said, "score": score(name, pair, beta)})
    return found


class _Pairs:
    """The pass: both answers after each prompt. The reference does not change, so it is asked once."""

    def __init__(
        self,
        rows: Sequence[Row],
        tokenizer: Tokenizer,
        window: int,
        batch_size: int,
        delimiter: str,
        reference: Params | None,
    ):
        self.rows, self.tokenizer, self.window, self.batch_size = list(rows), tokenizer, window, batch_size
        self.delimiter, self.weights = delimiter, reference
        self.reference: list[np.ndarray] = []

    @functools.cached_property
    def asked(self) -> tuple[list[np.ndarray], list[list[np.ndarray]]]:
        """Ids of the prompts, and of both answers of each."""
        most = self.window // 2
        endings = [[self._answer(row[side])[:most] for side in ("chosen", "rejected")] for row in self.rows]
        prompts = [
            begun(self.tokenizer, row["prompt"])[-(self.window - max(map(len, both))) :]
            for row, both in zip(self.rows, endings)
        ]
        return [np.array(ids, np.int32) for ids in prompts], [[np.array(e, np.int32) for e in b] for b in endings]

    def _answer(self, text: str) -> list[int]:
        return [*self.tokenizer.encode(self.delimiter + text), self.tokenizer.eos_id]

    def _logs(self, view: Any, progress: Progress) -> list[np.ndarray]:
        found = endings_nll(view, *self.asked, self.batch_size, progress)
        return [-nll.astype(np.float64) for nll, _ in found]

    def __call__(self, view: Any, progress: Progress) -> list[Preferred]:
        if self.weights is not None and not self.reference:
            before = copy.copy(view).at(view.model.spec, self.weights, {}, {}, view.clock)
            self.reference = self._logs(before, progress)
        reference = self.reference or [np.zeros(2)] * len(self.rows)
        tokens = [np.array([len(e) for e in both]) for both in self.asked[1]]
        return [Preferred(*each) for each in zip(self._logs(view, progress), reference, tokens)]


def mean_reward(
    eval_id: str,
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    reward: Rewards,
    *,
    window: int,
    max_new: int,
    batch_size: int = 16,
    bounds: tuple[float, float] = (-math.inf, math.inf),
    role: str = "task",
) -> Eval:
    """Mean of ``reward`` over the model's greedy answers of up to ``max_new`` tokens to the rows' prompts, which keep
    their last window - max_new tokens. bounds: the lowest and highest reward. RequestError: no rows, no room for a
    prompt; when it runs: rewards that are not one finite number an answer."""
    check_items(eval_id, rows, batch_size)
    how = How(max_new).check(f"eval {eval_id!r}", window)
    room = window - max_new
    prompts = [begun(tokenizer, row["prompt"])[-room:] for row in rows]
    answers = Answers(lambda: prompts, tokenizer, how, most=room, batch_size=batch_size)

    def run(view: Any, progress: Progress) -> list[Item]:
        texts = [answer.text for answer in answers(view, progress)]
        values: list[float] = []
        for at in range(0, len(rows), batch_size):
            part = slice(at, at + batch_size)
            made = np.asarray(reward([row["prompt"] for row in rows[part]], texts[part]), np.float64)
            if made.shape != (len(texts[part]),) or not np.isfinite(made).all():
                wanted = f"{len(texts[part])} finite numbers"
                raise RequestError(f"eval {eval_id!r}: rewards {made.tolist()!r}; accepted: {wanted}")
            values += made.tolist()
        return [{"id": r["id"], "prediction": t, "score": v} for r, t, v in zip(rows, texts, values)]

    return Eval(eval_id, "mean_reward", len(rows), run, range=bounds, role=role, hparams=how.hparams())
