"""Edits as rows, and their scores against the oracle's and by hand."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import forward

from jaxcl.core.types import Clock, Outputs
from jaxcl.core.view import View
from jaxcl.data.editing import Asked, asked, edit_records, edit_source
from jaxcl.errors import RequestError
from jaxcl.evaluate.editing import answer_nll, correct, unchanged
from jaxcl.metrics.pooling import pooled as score
from jaxcl.models.decoder import decoder
from jaxcl.models.spec import tiny
from jaxcl.models.tokenizer import ByteTokenizer

ROW = {
    "id": "e0", "subject": "Rome", "prompt": "Rome is in", "target": "France", "target_true": "Italy",
    "rephrases": ["The country of Rome:", "Rome lies in"], "locality_prompt": "Oslo is in", "locality_target": "Norway",
}  # fmt: skip
TOKENIZER = ByteTokenizer()
SPEC = tiny(layers=1, width=16)
MODEL = decoder(SPEC)
NO_COUNT = lambda done, total: None  # noqa: E731


def write(folder: Path, rows: list[Any], split: str = "edit") -> Path:
    (folder / "editing" / "mine").mkdir(parents=True, exist_ok=True)
    with gzip.open(folder / "editing" / "mine" / f"{split}.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return folder


def test_records_and_what_is_asked_of_them(tmp_path):
    rows = [ROW, {**ROW, "id": "e1", "rephrases": [], "locality_target": "", "target_true": None}]
    records = edit_records("mine", write(tmp_path, rows))
    assert records == rows and edit_records("mine", tmp_path, rows=1) == rows[:1]
    assert asked(records, "edit") == [Asked("e0", "Rome is in", "France"), Asked("e1", "Rome is in", "France")]
    assert [a.id for a in asked(records, "rephrase")] == ["e0/0", "e0/1"]
    assert asked(records, "locality") == [Asked("e0", "Oslo is in", "Norway")]
    assert asked(records, "truth") == [Asked("e0", "Rome is in", "Italy")]


def test_a_row_of_training(tmp_path):
    rows = [ROW, {**ROW, "id": "e1", "prompt": "Rome, what a town, is in", "target": "UK"}]
    source = edit_source("mine", edit_records("mine", write(tmp_path, rows)), TOKENIZER)
    first, second = source[0], source[1]
    text = bytes(first["tokens"][: np.count_nonzero(first["segments"])].tolist()).decode()
    assert text == "Rome is in France" and first["tokens"].shape == second["tokens"].shape == (27,)
    assert first["targets_at"].tolist() == [10, 11, 12, 13, 14, 15, 16]
    assert second["targets_at"].tolist() == [24, 25, 26, 0, 0, 0, 0] and second["weight"].sum() == 3
    assert (source.id(1), source.label(0), len(source)) == ("e1", "mine", 2)
    with pytest.raises(RequestError, match=r"edit 'e1' has 27 tokens; accepted: up to 20"):
        edit_source("mine", rows, TOKENIZER, window=20)


BAD_ROWS = [
    ({"prompt": 3}, ":1: field 'prompt' must be a string"), ({"rephrases": "no"}, "which may be empty"),
    ({"target": ""}, "field 'target' is empty"), ({"prompt": ""}, "field 'prompt' is empty"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "said"), BAD_ROWS, ids=str)
def test_malformed_rows_are_refused(tmp_path, change, said):
    with pytest.raises(RequestError, match=said):
        edit_records("mine", write(tmp_path, [{**ROW, **change}]))


def test_names_and_numbers_are_refused(tmp_path):
    write(tmp_path, [ROW])
    with pytest.raises(RequestError, match="did you mean 'mine'"):
        edit_records("mime", tmp_path)
    with pytest.raises(RequestError, match="rows=2 of editing/mine: accepted: 1 to 1"):
        edit_records("mine", tmp_path, rows=2)
    with pytest.raises(RequestError, match="unknown kind of question 'edits'"):
        asked([ROW], "edits")
    one = asked([ROW], "edit")
    with pytest.raises(RequestError, match="unknown reading"):
        correct("r", one, TOKENIZER, by="tokens")
    with pytest.raises(RequestError, match="'x' has an empty prompt or answer"):
        correct("r", [Asked("x", "a", "")], TOKENIZER, by="token")
    with pytest.raises(RequestError, match="no test rows"):
        correct("r", [], TOKENIZER, by="token")


@pytest.mark.parametrize("name", ["zsre", "counterfact", "hallucination", "temporal_ood"])
def test_the_real_files_are_read(name):
    if not os.environ.get("JAXCL_DATA"):
        pytest.skip("needs $JAXCL_DATA")
    records = edit_records(name, rows=50)
    assert len(records) == 50 and len(asked(records, "edit")) == 50
    assert (len(asked(records, "rephrase")) == 0) == (name == "hallucination")
    assert len(edit_source(name, records, TOKENIZER)) == 50


class Parrot:
    """A model that says, token by token, what a table holds for the prompt it was given: hidden is the token's id."""

    def __init__(self, says: dict[str, str]):
        self.says = {p: TOKENIZER.encode(" " + a) for p, a in says.items()}
        rows = [TOKENIZER.encode(p) + a for p, a in self.says.items()]
        self.table = np.zeros((len(rows), 64), np.int32)
        for row, ids in zip(self.table, rows):
            row[: len(ids)] = ids

    def apply(self, spec, params, batch, *, cache=None, **rest):
        """Finds the row by its first tokens, kept in the cache, and gives its token at each next position."""
        table = jnp.asarray(self.table)
        if cache is None or "who" not in cache:
            shared = jnp.sum(batch["tokens"][:, None, :8] == table[None, :, :8], axis=-1)
            who = jnp.argmax(shared, axis=1)
        else:
            who = cache["who"]
        hidden = jnp.take_along_axis(table[who], batch["positions"] + 1, axis=1)[..., None]
        kept = None if cache is None else {"valid": cache["valid"], "who": who}
        return Outputs(hidden=hidden, cache=kept)

    def head(self, spec, params, hidden, at):
        return jax.nn.one_hot(jnp.take_along_axis(hidden, at[..., None], axis=1)[..., 0], 300)

    def view(self) -> View:
        model = dataclasses.make_dataclass("M", ["spec", "apply", "head"])(("parrot", id(self)), self.apply, self.head)
        return View(model).at(model.spec, {}, {}, {}, Clock.at())


def test_both_readings_by_hand():
    """Wanted against said: all right; a wrong start, then right; a wrong end; all wrong."""
    wanted = [Asked(x, 8 * x, answer) for x, answer in zip("abcd", ("xyz", "xyz", "xy", "x"))]
    said = [" xyz", " wyz", " xw", " w"]
    view = Parrot({a.prompt: s.strip() for a, s in zip(wanted, said)}).view()
    token = correct("t", wanted, TOKENIZER, by="token", batch_size=3).run(view, NO_COUNT)
    assert [i["score"] for i in token] == pytest.approx([1, 3 / 4, 2 / 3, 1 / 2])  # the space counts as a byte
    exact = correct("e", wanted, TOKENIZER, by="exact", batch_size=3).run(view, NO_COUNT)
    assert [i["score"] for i in exact] == [1, 0, 0, 0] and [i["prediction"] for i in exact] == said
    assert score(exact) <= score(token)


def test_the_free_reading_asks_for_an_end():
    """A new line or the end-of-sequence token right after the wanted text; what runs on is wrong, and so is less."""
    wanted = [Asked(x, 8 * x, answer) for x, answer in zip("abcde", ("xyz", "xyz", "xy", "xy", "x"))]
    said = ["xyz\nand on", "xyz, and on", "xy", "x\n", "x"]
    parrot = Parrot(dict(zip((a.prompt for a in wanted), said)))
    parrot.table[2, 8 + 3] = TOKENIZER.eos_id
    made = correct("f", wanted, TOKENIZER, by="free", batch_size=3)
    items = made.run(parrot.view(), NO_COUNT)
    assert made.metric == "free_match" and [i["score"] for i in items] == [1, 0, 1, 0, 0]
    assert [i["prediction"] for i in items[:4]] == ["xyz", "xyz, and on", "xy", "x"]


@pytest.fixture(scope="module")
def two():
    """Two random models and prompts."""
    first, second = (MODEL.init(SPEC, jax.random.key(i)) for i in (0, 1))
    rng = np.random.default_rng(0)
    words = ["".join(map(chr, rng.integers(97, 123, n))) for n in (3, 9, 5, 14, 7)]
    return first, second, [Asked(str(i), w, w[: 1 + i]) for i, w in enumerate(words)]


@pytest.mark.parametrize("by", ["token", "exact", "free"])
def test_locality_compares_with_the_model_before(two, by):
    first, second, questions = two
    made = unchanged("loc", questions, TOKENIZER, MODEL, first, by=by, batch_size=2)
    view = View(MODEL).at(SPEC, first, {}, {}, Clock.at())
    assert score(made.run(view, NO_COUNT)) == 1.0, "an unedited model is unchanged"
    theirs = made.run(view.at(SPEC, second, {}, {}, Clock.at()), NO_COUNT)
    old = correct("x", questions, TOKENIZER, by=by, batch_size=2)
    said = {name: [i["prediction"] for i in old.run(view.at(SPEC, p, {}, {}, Clock.at()), NO_COUNT)]
            for name, p in (("first", first), ("second", second))}  # fmt: skip
    assert [i["prediction"] for i in theirs] == said["second"] != said["first"]
    if by != "token":
        assert [i["score"] for i in theirs] == [float(a == b) for a, b in zip(said["first"], said["second"])]


def test_answer_nll_is_the_mean_over_the_answers_tokens(two):
    first, _, questions = two
    view = View(MODEL).at(SPEC, first, {}, {}, Clock.at())
    items = answer_nll("nll", questions, TOKENIZER, batch_size=2).run(view, NO_COUNT)
    for question, item in zip(questions, items):
        prompt, answer = question.ids(TOKENIZER)
        ids = np.array([prompt + answer], np.int32)
        places = np.arange(ids.shape[1], dtype=np.int32)[None]
        batch = {"tokens": ids, "segments": np.ones_like(ids), "positions": places}
        hidden = forward(SPEC, first, batch).hidden
        logits = np.asarray(hidden[0] @ first["embed/kernel"].T, np.float64)
        logp = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        wanted = -np.mean([logp[len(prompt) - 1 + i, token] for i, token in enumerate(answer)])
        assert item["score"] == pytest.approx(wanted, rel=1e-4)
