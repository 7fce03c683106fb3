"""Probes: greedy answers, ranks among candidates and consistency, against plain forwards, decoding and counting."""

from __future__ import annotations

import functools
import gzip
import itertools
import json

import jax
import numpy as np
import pytest
from test_choice import log_p
from test_ranking import Bytes

from jaxcl.core.types import Clock
from jaxcl.core.view import View
from jaxcl.data.jsonl import read_rows
from jaxcl.errors import RequestError
from jaxcl.evaluate.probes import Answered, answer, consistency, consistent_accuracy, objects, probes, reciprocal_rank
from jaxcl.models.decoder import decoder
from jaxcl.models.generate import generate
from jaxcl.models.spec import tiny

ROWS = [
    {"id": "0", "relation": "P1", "prompt": "Rome is in", "answers": ["Italy"], "paraphrases": ["Rome lies in", "in"]},
    {"id": "1", "relation": "P1", "prompt": "Bern is in", "answers": ["Swiss", "CH"], "paraphrases": []},
    {"id": "2", "relation": "P1", "prompt": "Oslo is in", "answers": ["Norway"], "paraphrases": ["Oslo:"]},
    {"id": "3", "relation": "P2", "prompt": "pick", "answers": ["b"], "choices": ["a", "b", "", "c"], "answer": 1},
]
OBJECTS = ["Italy", "Swiss", "CH", "Norway"]


def quiet(done: int, total: int) -> None:
    pass


@pytest.fixture(scope="module")
def view() -> View:
    model = decoder(tiny(vocab=257, layers=1, width=16, heads=2, kv_heads=1, mlp=32))
    params = model.init(model.spec, jax.random.key(2))
    params = {k: v * 6 if "embed" in k else v * 5 if "attn/" in k else v for k, v in params.items()}
    return View(model).at(model.spec, params, {}, {}, Clock.at())


def nlls(view: View, prompt: str, texts: list[str]) -> np.ndarray:
    return np.array([-log_p(view, list(prompt.encode()), list(f" {t}".encode())) for t in texts])


def test_ranks_and_consistency_equal_plain_forwards(view):
    names = ("hits@1", "mrr", "consistency", "consistent_accuracy")
    made = {e.metric: e for e in probes("p", ROWS, Bytes(), window=64, metrics=names, batch_size=3)}
    items = {name: e.run(view, quiet) for name, e in made.items()}
    assert objects(ROWS) == {"P1": OBJECTS, "P2": ["b"]}
    for n, row in enumerate(ROWS):
        texts = ["a", "b", "c"] if "choices" in row else OBJECTS
        nll = nlls(view, row["prompt"], texts)
        right = [t in row["answers"] for t in texts]
        rank = 1 + sum(v <= nll[right].min() for v, r in zip(nll, right) if not r)
        assert items["hits@1"][n] == {"id": str(n), "prediction": texts[nll.argmin()], "score": float(rank == 1)}
        assert items["mrr"][n]["score"] == pytest.approx(1 / rank)
    several = [row for row in ROWS if row.get("paraphrases")]
    assert made["consistency"].n == 2 and [i["id"] for i in items["consistency"]] == ["0", "2"]
    for row, item, both in zip(several, items["consistency"], items["consistent_accuracy"]):
        best = [OBJECTS[nlls(view, p, OBJECTS).argmin()] for p in (row["prompt"], *row["paraphrases"])]
        same = [a == b for a, b in itertools.combinations(best, 2)]
        assert item["score"] == pytest.approx(np.mean(same))
        assert both["score"] == float(set(best) <= set(row["answers"]))
    assert made["hits@1"].chance == pytest.approx((1 / 4 + 2 / 4 + 1 / 4 + 1 / 3) / 4)
    assert made["mrr"].role == "probe" and made["mrr"].chance is None


def test_normalised_by_tokens_another_candidate_wins(view):
    """Among texts of many lengths the two rules disagree somewhere."""
    rows = [{"id": str(n), "relation": "r", "prompt": f"{n} is", "answers": ["n" * n]} for n in range(1, 13)]
    found = {}
    for how in ("sum", "mean"):
        made = probes("p", rows, Bytes(), window=64, metrics=("hits@1",), normalise=how)[0]
        found[how] = [i["prediction"] for i in made.run(view, quiet)]
        for row, said in zip(rows, found[how]):
            nll = nlls(view, row["prompt"], objects(rows)["r"])
            lengths = np.arange(2, 14) if how == "mean" else 1
            assert said == objects(rows)["r"][int((nll / lengths).argmin())]
    assert found["sum"] != found["mean"]


def test_exact_match_is_greedy_decoding(view):
    """Rows made so that one holds what the model writes, and others differ in the first or the last byte."""
    ids = np.array([list(b"Q: say")], np.int32)
    write = functools.partial(generate, max_new=4, stop_ids=())
    tokens, _ = view.call(write, ids, np.array([ids.size], np.int32))
    said = np.asarray(tokens)[0].tolist()

    class Shown(Bytes):
        """Decodes to numbers, so that any byte may be in a text."""

        def encode(self, text):
            head, *numbers = text.split(" #")
            return [*head.encode(), *(int(n) for n in numbers)]

    texts = [" ".join(f"#{t}" for t in each) for each in (said, said[:2], [said[0], said[1] ^ 1])]
    rows = [{"id": str(n), "relation": "r", "prompt": "say", "answers": [t]} for n, t in enumerate(texts)]
    rows.append(rows[2] | {"id": "3", "answers": [texts[2], texts[1]]})
    made = probes("p", rows, Shown(), window=64, metrics=("exact_match",), frame="Q: {prompt}")[0]
    items = made.run(view, quiet)
    assert [i["score"] for i in items] == [1.0, 1.0, 0.0, 1.0]
    assert made.id == "p" and items[0]["prediction"] is None  # no candidates were ranked


def test_ties_count_against_the_model_and_other_right_answers_do_not():
    row = {"answers": ["x", "y"]}
    nll = np.array([2.0, 2.0, 3.0, 1.0])
    made = answer(row, ["a", "x", "y"], ["a", "x", "y", "z"], nll, np.array([0, 1, 1, 0]))
    assert made == Answered("a", 2, False) and reciprocal_rank([made], row["answers"]) == 0.5
    made = answer(row, ["y", "x", "a"], ["y", "x", "a"], np.array([2.0, 1.0, 3.0]), np.array([0, 1, 1]))
    assert made == Answered("x", 1, True)


def test_consistency_by_hand():
    said = [Answered(best, 1, False) for best in ("a", "a", "b", "a")]
    assert consistency(said, ["a"]) == 3 / 6 and consistent_accuracy(said, ["a"]) == 0.0
    assert consistent_accuracy(said, ["a", "b"]) == 1.0


@pytest.mark.parametrize(
    ("change", "words", "kw"),
    [
        ({}, "unknown metric of probes 'hits@10'", {"metrics": ("hits@10",)}),
        ({}, "unknown normalisation 'men'", {"normalise": "men"}),
        ({}, "frame 'Q:'; accepted: a text that holds", {"frame": "Q:"}),
        ({}, "'0' has the answers \\['Italy'\\], none of them among the 1 candidates", {"candidates": {"P1": ["x"]}}),
        ({"paraphrases": []}, "no row has paraphrases", {"metrics": ("consistency",)}),
    ],
)
def test_what_probes_refuse(change, words, kw):
    with pytest.raises(RequestError, match=words):
        probes("p", [ROWS[0] | change], Bytes(), window=64, **kw)


def test_candidates_beyond_the_window_are_refused(view):
    with pytest.raises(RequestError, match="row '0' needs 16 tokens with its longest candidate; accepted: up to 12"):
        probes("p", ROWS[:1], Bytes(), window=12, metrics=("mrr",))[0].run(view, quiet)


GOOD = {
    "mcq": {"task": "t", "id": "0", "question": "q", "choices": ["a", "b"], "answer": 1},
    "probe": {"id": "0", "relation": "r", "prompt": "p", "answers": ["a"]},
    "preference": {"id": "0", "prompt": "p", "chosen": "a", "rejected": "b"},
}


@pytest.mark.parametrize(
    ("schema", "change", "words"),
    [
        ("mcq", {"answer": 2}, "field 'answer' is 2; accepted: 0 to 1"),
        ("mcq", {"answer": "1"}, "field 'answer' must be an integer"),
        ("mcq", {"choices": ["a"], "answer": 0}, "field 'choices' has 1 entries; accepted: two or more"),
        ("mcq", {"choices": ["a", ""]}, "field 'choices' holds an empty text"),
        ("probe", {"answers": [""]}, "field 'answers' holds an empty text"),
        ("probe", {"answers": "a"}, "field 'answers' must be a list of strings"),
        ("probe", {"choices": ["a", ""]}, "field 'answer' is missing"),
        ("probe", {"choices": ["a", "b"], "answer": 5}, "field 'answer' is 5; accepted: 0 to 1"),
        ("probe", {"prompt": ""}, "field 'prompt' is empty"),
        ("preference", {"rejected": "a"}, "field 'rejected' is the same as 'chosen'"),
        ("preference", {"chosen": " "}, "field 'chosen' is empty"),
        ("preference", {"chosen": None}, "field 'chosen' must be a string"),
    ],
)
def test_malformed_rows_are_refused_with_their_line(tmp_path, schema, change, words):
    path = tmp_path / "rows.jsonl.gz"
    rows = [GOOD[schema], GOOD[schema] | {"id": "1"} | change]
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    with pytest.raises(RequestError, match=f"rows.jsonl.gz:2: {words}"):
        read_rows(path, schema)
    path.write_bytes(gzip.compress(json.dumps(GOOD[schema]).encode()))
    assert read_rows(path, schema) == [GOOD[schema]]
