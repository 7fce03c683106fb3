"""rep-n: how much of what a model writes repeats itself. Card cpt/aligned-llm-forgetting (Li and Lee 2024)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from jaxcl.evaluate.base import Eval, Item, Progress, shared
from jaxcl.evaluate.generation import written
from jaxcl.metrics.repetition import ORDERS, rep_n

if TYPE_CHECKING:
    from jaxcl.models.tokenizer import Tokenizer


def repetition(
    eval_id: str,
    rows: Sequence[dict[str, Any]],
    tokenizer: Tokenizer,
    *,
    window: int,
    orders: Sequence[int] = ORDERS,
    max_new: int = 512,
    temperature: float = 0.1,
    top_p: float = 0.9,
    role: str = "general",
    **how: Any,
) -> list[Eval]:
    """Evals ``eval_id/rep_4``, ...: 1 - distinct n-grams / n-grams of prompt and continuation together, as token ids.

    rows: {task, id, instruction, input}; no answers are needed. The defaults are the paper's; greedy writing repeats
    more. Where both together are shorter than n tokens the score is 0, as in the reference; items hold their number of
    tokens, so these can be counted. how: as for `jaxcl.evaluate.generation.generation`.
    """
    answers = written(
        eval_id, rows, tokenizer, window=window, max_new=max_new, temperature=temperature, top_p=top_p, **how
    )

    def sequences(view: Any, progress: Progress) -> list[tuple[str, list[int]]]:
        found = answers(view, progress)
        return [(answer.text, [*prompt, *answer.ids]) for prompt, answer in zip(answers.prompts, found, strict=True)]

    once = shared(sequences)

    def runner(n: int) -> Callable[[Any, Progress], list[Item]]:
        def run(view: Any, progress: Progress) -> list[Item]:
            return [
                {"id": row["id"], "prediction": text.strip(), "score": rep_n(ids, n), "tokens": len(ids)}
                for row, (text, ids) in zip(rows, once(view, progress), strict=True)
            ]

        return run

    return [
        Eval(
            f"{eval_id}/rep_{n}",
            f"rep_{n}",
            len(rows),
            runner(n),
            higher_is_better=False,
            role=role,
            hparams=answers.how.hparams(),
        )
        for n in orders
    ]
