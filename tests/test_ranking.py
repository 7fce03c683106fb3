"""Label ranking against the plain forward of prompt and label together, and against numpy."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from jaxcl.core.view import View
from jaxcl.data.template import Template
from jaxcl.errors import RequestError
from jaxcl.evaluate.base import bucket, grouped, score
from jaxcl.evaluate.ranking import label_block, label_nll, label_ranking
from jaxcl.models.decoder import decoder, head
from jaxcl.models.spec import tiny

JITTED: dict = {}
LABELS = ["red", "dark blue", "red wine", "g"]


class Bytes:
    """One token a byte; 256 ends a sequence."""

    eos_id, pad_id, vocab_size = 256, 0, 257

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        return bytes(i for i in ids if i < 256).decode(errors="replace")


def rows(n: int, labels: list[str] = LABELS) -> list[dict]:
    rng = np.random.default_rng(0)
    words = ["".join(chr(97 + c) for c in rng.integers(0, 26, rng.integers(0, 90))) for _ in range(n)]
    return [
        {
            "task": "t",
            "id": str(i),
            "instruction": "What?\n",
            "input": w,
            "target": labels[i % len(labels)],
            "labels": labels,
        }
        for i, w in enumerate(words)
    ]


@pytest.fixture(scope="module")
def view() -> View:
    model = decoder(tiny(vocab=257, layers=2))
    params = model.init(model.spec, jax.random.key(0))
    # Larger weights than at a start, so that labels are far apart.
    params = {k: v * 6 if "embed" in k else v * 5 if "attn/" in k else v for k, v in params.items()}
    return View(model).at(model.spec, params, {}, {}, None)


def whole_nll(view: View, prompt: list[int], labels: list[list[int]]) -> list[np.ndarray]:
    """nll of each label's tokens after the prompt: plain forwards of both together, then numpy."""
    whole = [prompt + label for label in labels]
    ids = np.stack([np.pad(np.int32(w), (0, 192 - len(w))) for w in whole])
    segments = np.stack([np.arange(192, dtype=np.int32) < len(w) for w in whole]).astype(np.int32)
    logits = plain_logits(
        view, {"tokens": ids, "segments": segments, "positions": np.arange(192)[None] * segments}
    )
    logits = logits - logits.max(-1, keepdims=True)
    nll = np.log(np.exp(logits).sum(-1, keepdims=True)) - logits
    n = len(prompt)
    return [nll[i, np.arange(n - 1, n - 1 + len(label)), label] for i, label in enumerate(labels)]


def plain_logits(view: View, batch: dict) -> np.ndarray:
    if "plain" not in JITTED:
        JITTED["plain"] = jax.jit(lambda params, batch: view.model.apply(view.spec, params, batch).hidden)
        JITTED["head"] = jax.jit(lambda params, hidden, at: head(view.spec, params, hidden, at))
    at = np.tile(np.arange(192, dtype=np.int32), (len(batch["tokens"]), 1))
    return np.asarray(JITTED["head"](view.params, JITTED["plain"](view.params, batch), at), np.float64)


def labels_ids(labels=LABELS) -> list[list[int]]:
    return [[*f" {label}".encode(), 256] for label in labels]


def test_a_block_by_hand():
    block = label_block(last=9, start=3, labels=[[1, 2], [5, 6, 7]], size=8)
    expected = {
        "tokens": [9, 1, 2, 9, 5, 6, 7, 0],
        "segments": [1, 1, 1, 2, 2, 2, 2, 0],
        "positions": [3, 4, 5, 3, 4, 5, 6, 0],
        "targets_at": [0, 1, 2, 0, 4, 5, 6, 0],
    }
    assert block.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(block[name], value)
        assert block[name].dtype == np.int32


def test_labels_score_as_if_each_stood_after_its_whole_prompt(view):
    prompts = [list(b"one prompt"), list(b"another one, longer"), list(b"x")]
    blocks = [label_block(p[-1], len(p) - 1, labels_ids(), 64) for p in prompts]
    block = {k: np.stack([b[k] for b in blocks]) for k in blocks[0]}
    prompt = {k: np.zeros((3, 32), np.int32) for k in ("tokens", "segments", "positions")}
    for i, p in enumerate(prompts):
        prompt["tokens"][i, : len(p) - 1] = p[:-1]
        prompt["segments"][i, : len(p) - 1] = 1
        prompt["positions"][i, : len(p) - 1] = np.arange(len(p) - 1)
    nll = np.asarray(view.call(label_nll, prompt, block))
    for i, p in enumerate(prompts):
        for number, expected in enumerate(whole_nll(view, p, labels_ids())):
            inside = (block["segments"][i] == number + 1) & (block["targets_at"][i] > 0)
            np.testing.assert_allclose(nll[i][inside], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("normalise", "labels"), [("sum", list("aeiouxyz")), ("mean", LABELS)])
def test_predictions_equal_those_of_plain_forwards(view, normalise, labels):
    tests, ids = rows(11, labels), labels_ids(labels)
    seen = []
    made = label_ranking("t", tests, Bytes(), window=128, batch_size=4, normalise=normalise)
    items = made.run(view, lambda done, total: seen.append((done, total)))
    assert [i["id"] for i in items] == [r["id"] for r in tests]
    right, predictions = 0, set()
    for item, row in zip(items, tests):
        prompt = list(f"What?\nOption: {', '.join(labels)} \n{row['input']}\nAnswer:".encode())
        assert len(prompt) + max(map(len, ids)) <= 160
        if len(prompt) > 128 - max(map(len, ids)):  # shortened as in training
            spare = len(prompt) - (128 - max(map(len, ids)))
            text = row["input"][: len(row["input"]) - spare]
            prompt = list(f"What?\nOption: {', '.join(labels)} \n{text}\nAnswer:".encode())
        reduce = np.sum if normalise == "sum" else np.mean
        best = labels[int(np.argmin([reduce(nll) for nll in whole_nll(view, prompt, ids)]))]
        assert item["prediction"] == best and item["score"] == float(best == row["target"])
        right += best == row["target"]
        predictions.add(best)
    assert len(predictions) > 1  # a model that always says one thing would test nothing
    assert score(items) == pytest.approx(right / 11)
    assert seen[-1] == (11, 11) and [d for d, _ in seen] == sorted(d for d, _ in seen)
    assert (made.metric, made.range, made.n, made.higher_is_better) == ("accuracy", (0.0, 1.0), 11, True)


def test_batch_size_and_neighbours_change_nothing(view):
    tests = rows(9)
    one = label_ranking("t", tests, Bytes(), window=128, batch_size=1).run(view, lambda *_: None)
    many = label_ranking("t", tests[::-1], Bytes(), window=128, batch_size=4).run(view, lambda *_: None)
    assert one == many[::-1]


def test_every_shape_is_compiled_once(view):
    made = label_ranking("t", rows(11), Bytes(), window=128, batch_size=4)
    made.run(view, lambda *_: None)
    (jitted,) = [f for key, f in view._jitted.items() if label_nll in key]
    shapes = jitted._cache_size()
    again = label_ranking("u", rows(40), Bytes(), window=128, batch_size=4)
    again.run(view, lambda *_: None)
    assert len({bucket(n, 128) for n in range(50, 128)}) == 2
    assert jitted._cache_size() == shapes


def test_the_first_label_wins_a_tie():
    class Flat:
        def call(self, fn, prompt, block):
            return np.where(block["targets_at"] > 0, 1.0, 0.0)

    row = {"task": "t", "id": "0", "instruction": "", "input": "x", "target": "b", "labels": ["b", "a"]}
    flipped = row | {"id": "1", "labels": ["a", "b"]}
    items = label_ranking("t", [row, flipped], Bytes(), window=32).run(Flat(), lambda *_: None)
    assert [(i["prediction"], i["score"]) for i in items] == [("b", 1.0), ("a", 0.0)]


def test_sum_and_mean_differ_where_they_should():
    class PerToken:  # "aaa" has 5 tokens of 1 nat, "b" has 3 of 1.5
        def call(self, fn, prompt, block):
            return np.where(block["targets_at"] > 0, np.where(block["segments"] == 1, 1.0, 1.5), 0.0)

    row = {"task": "t", "id": "0", "instruction": "", "input": "x", "target": "b", "labels": ["aaa", "b"]}
    best = {
        how: label_ranking("t", [row], Bytes(), window=32, normalise=how).run(PerToken(), lambda *_: None)[0]
        for how in ("sum", "mean")
    }
    assert {how: item["prediction"] for how, item in best.items()} == {"sum": "b", "mean": "aaa"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"labels": None}, "row '0' has no labels to rank"),
        ({"target": "re"}, "the target 're', not one of its labels; did you mean 'red'"),
        ({"labels": [*LABELS, "y" * 200]}, "row '0': instruction, options and answer mark need"),
    ],
)
def test_rows_that_cannot_be_ranked_are_refused(change, words):
    row = rows(1)[0] | change
    with pytest.raises(RequestError, match=words):
        label_ranking("t", [row], Bytes(), window=128, template=Template())


def test_evals_without_rows_and_unknown_choices_are_refused():
    for words, kw in (
        ("eval 't' has no test rows", {"rows": []}),
        ("id '0' occurs twice", {"rows": rows(1) * 2}),
        ("batch_size=0", {"batch_size": 0}),
        ("unknown normalisation 'summ'; did you mean 'sum'", {"normalise": "summ"}),
    ):
        tests = kw.pop("rows", rows(2))
        with pytest.raises(RequestError, match=words):
            label_ranking("t", tests, Bytes(), window=128, **kw)


def test_buckets_and_groups():
    assert [bucket(n, 200) for n in (0, 32, 33, 65, 129, 200)] == [32, 32, 64, 128, 200, 200]
    batches = list(grouped([64, 32, 64, 64, 32], 2))
    assert batches == [(32, [1, 4]), (64, [0, 2]), (64, [3])]


def test_chance_is_a_guess_among_each_rows_labels():
    tests = rows(4)
    tests[0]["labels"] = [*tests[0]["labels"], "one more"]
    guesses = [1 / len(row["labels"]) for row in tests]
    assert label_ranking("t", tests, Bytes(), window=128).chance == pytest.approx(sum(guesses) / 4)
