"""rep-n of what a model writes, prompt included, against the definition written out."""

from __future__ import annotations

import pytest
from byte_model import WIDTH, Bytes, greedy, make_logits, make_view, prompt_of, rows

from jaxcl.evaluate.repetition import repetition


@pytest.fixture(scope="module")
def view():
    return make_view()


def test_repetition_counts_prompt_and_continuation(view):
    tests = [{k: v for k, v in row.items() if k != "target"} for row in rows(3)]
    logits = make_logits(view)
    evals = repetition("r", tests, Bytes(), window=WIDTH, orders=(2, 40), max_new=12, temperature=0, batch_size=3)
    assert [(e.id, e.metric, e.higher_is_better, e.role) for e in evals] == [
        ("r/rep_2", "rep_2", False, "general"), ("r/rep_40", "rep_40", False, "general")
    ]  # fmt: skip
    items = [e.run(view, lambda *_: None) for e in evals]
    for i, row in enumerate(tests):
        ids = prompt_of(row) + greedy(logits, prompt_of(row), 12)
        grams = [tuple(ids[k : k + 2]) for k in range(len(ids) - 1)]
        assert items[0][i]["score"] == pytest.approx(1 - len(set(grams)) / len(grams)) and items[0][i]["score"] > 0
        assert items[0][i]["tokens"] == items[1][i]["tokens"] == len(ids)
    assert items[1][0]["tokens"] < 40 and items[1][0]["score"] == 0, "too short: counted, as 0"


def test_the_papers_settings_are_the_defaults():
    (made,) = repetition("r", rows(1), Bytes(), window=700, orders=(4,))
    assert made.hparams == {"max_new": 512, "temperature": 0.1, "top_p": 0.9, "seed": 0}
