"""Losses of edits: perplexity, likely answers and preferred ones, from log-probabilities that are worked out here."""

from __future__ import annotations

import math

import jax
import numpy as np
import pytest
from support import forward

from jaxcl.core.types import Clock
from jaxcl.core.view import View
from jaxcl.data.edit_batches import batched, fitting_edits, leaked, neighbours, old_answers, questions_left
from jaxcl.data.editing import Asked, edit_source
from jaxcl.errors import RequestError
from jaxcl.evaluate.edit_loss import LIKELY, answer_likely, answer_perplexity, answer_preferred
from jaxcl.metrics.pooling import pooled
from jaxcl.models.decoder import decoder
from jaxcl.models.spec import tiny
from jaxcl.models.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()
SPEC = tiny(layers=1, width=16)
MODEL = decoder(SPEC)
ASKED = [Asked("0", "Rome is in", "France"), Asked("1", "Oslo", "Norway or Denmark"), Asked("2", "Who", "I")]
NO_COUNT = lambda done, total: None  # noqa: E731


def record(i: str, prompt: str, target: str = "new", **more: object) -> dict:
    base = {"id": i, "subject": "s", "prompt": prompt, "target": target, "target_true": "old", "rephrases": []}
    return base | {"locality_prompt": f"near {prompt}", "locality_target": "true"} | more


@pytest.fixture(scope="module")
def view() -> View:
    return View(MODEL).at(SPEC, MODEL.init(SPEC, jax.random.key(3)), {}, {}, Clock.at())


def nats(view: View, a: Asked) -> np.ndarray:
    """-log p of each answer token, from the logits of the whole text in one row without padding."""
    prompt, answer = TOKENIZER.encode(a.prompt), TOKENIZER.encode(" " + a.answer)
    ids = np.array([prompt + answer], np.int32)
    batch = {"tokens": ids, "segments": np.ones_like(ids), "positions": np.arange(ids.size, dtype=np.int32)[None]}
    batch["weight"] = np.ones(ids.shape, np.float32)
    hidden = forward(SPEC, view.params, batch).hidden
    at = np.arange(len(prompt) - 1, ids.size - 1)[None]
    logits = np.asarray(MODEL.head(SPEC, view.params, hidden, at), np.float64)[0]
    return np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(answer)), answer]


def test_perplexity_weighs_tokens_alike(view):
    made = answer_perplexity("p", ASKED, TOKENIZER, batch_size=2)
    items = made.run(view, NO_COUNT)
    each = [nats(view, a) for a in ASKED]
    assert pooled(items, made.pool) == pytest.approx(math.exp(np.concatenate(each).mean()), rel=1e-4)
    assert [i["score"] for i in items] == pytest.approx([math.exp(n.mean()) for n in each], rel=1e-4)
    assert not made.higher_is_better and made.metric == "perplexity"
    assert pooled(items, made.pool) != pytest.approx(np.mean([i["score"] for i in items]), rel=1e-4)


def test_an_answer_is_likely_below_a_loss(view):
    means = [nats(view, a).mean() for a in ASKED]
    between = float(np.mean(sorted(means)[:2]))
    items = answer_likely("l", ASKED, TOKENIZER, below=between).run(view, NO_COUNT)
    assert [i["score"] for i in items] == [float(m < between) for m in means] and sum(i["score"] for i in items) == 1
    assert math.exp(-LIKELY) == pytest.approx(0.8)
    assert pooled(answer_likely("l", ASKED, TOKENIZER).run(view, NO_COUNT)) == 0, "an untrained model knows nothing"


def test_the_preferred_answer_is_the_one_with_less_loss_a_token(view):
    other = [a._replace(answer=b.answer) for a, b in zip(ASKED, ASKED[1:] + ASKED[:1])]
    items = answer_preferred("s", ASKED, other, TOKENIZER).run(view, NO_COUNT)
    better = [nats(view, a).mean() < nats(view, b).mean() for a, b in zip(ASKED, other)]
    assert [i["score"] for i in items] == [float(b) for b in better]
    assert [i["prediction"] for i in items] == [(a if b else o).answer for a, o, b in zip(ASKED, other, better)]
    swapped = answer_preferred("s", other, ASKED, TOKENIZER).run(view, NO_COUNT)
    assert [i["score"] for i in swapped] == [1 - i["score"] for i in items]
    with pytest.raises(RequestError, match="eval 's': the two answers are not to the same prompts"):
        answer_preferred("s", ASKED, ASKED[1:], TOKENIZER)


# the stream in batches


def test_batches_are_the_stream_cut():
    records = [record(str(i), f"p{i}") for i in range(7)]
    parts = batched("edits", records, 3)
    assert list(parts) == ["edits_1", "edits_2", "edits_3"] and [len(p) for p in parts.values()] == [3, 3, 1]
    assert [r for p in parts.values() for r in p] == records
    assert batched("edits", records, 7) == {"edits": records}
    assert list(batched("edits", [record(str(i), "p") for i in range(12)], 1))[:2] == ["edits_01", "edits_02"]


def test_questions_that_are_trained_on_are_left_out_and_counted():
    records = [
        record("a", "Who rules?", rephrases=["The ruler is", "Where is it"]),
        record("b", "where is it?", locality_prompt="who rules"),
    ]
    assert leaked(records) == {"rephrase": {"a/1"}, "locality": {"b"}}
    out, notes = questions_left(records)
    assert out == leaked(records)
    assert notes == {"left out: questions that are trained on": {"rephrase": 1, "locality": 1}}
    out, notes = questions_left(records, allow=("edit-prompts",))
    assert out == {"rephrase": set(), "locality": set()}
    assert notes["leaks"]["edit-prompts"]["count"] == 2
    with pytest.raises(RequestError, match="unknown leak 'edit-prompt'"):
        questions_left(records, allow=("edit-prompt",))


def test_old_answers_and_neighbours_keep_their_prompts():
    records = [record("a", "p", rephrases=["q", "r"]), record("b", "s", target_true=None, locality_target="")]
    assert old_answers(records, "edit") == [Asked("a", "p", "old")]
    assert old_answers(records, "rephrase", {"rephrase": {"a/0"}}) == [Asked("a/1", "r", "old")]
    assert neighbours(records, {}) == ([Asked("a", "near p", "true")], [Asked("a", "near p", "new")])


def test_edits_that_do_not_fit_are_left_out_whole():
    records = [record("a", "p"), record("b", "p" * 40)]
    assert fitting_edits(records, TOKENIZER, 20) == records[:1]
    with pytest.raises(RequestError, match="none of 2 edits fits into 4 tokens"):
        fitting_edits(records, TOKENIZER, 4)


def test_batches_share_the_number_of_targets():
    source = edit_source("edits_1", [record("a", "p")], TOKENIZER, window=16, targets=9)
    assert source[0]["targets_at"].shape == (9,) and source[0]["weight"].sum() == 4
