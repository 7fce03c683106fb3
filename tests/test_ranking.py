"""Label ranking against the plain forward of prompt and label together, and against numpy."""

from __future__ import annotations

import tracemalloc

import jax
import numpy as np
import pytest

from jaxcl.core.types import Clock
from jaxcl.core.view import View
from jaxcl.data.template import Template
from jaxcl.errors import RequestError
from jaxcl.evaluate import endings as engine
from jaxcl.evaluate.base import bucket, grouped
from jaxcl.evaluate.endings import (
    block_arrays,
    by_length,
    common,
    cut,
    ending_nll,
    endings_nll,
    prompt_arrays,
    size_of,
    stacked,
)
from jaxcl.evaluate.ranking import label_ranking
from jaxcl.metrics.pooling import pooled
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
    """nll of each label's tokens after the prompt."""
    return whole(view, prompt, labels)[0]


def whole(view: View, prompt: list[int], labels: list[list[int]]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """nll of each label's tokens after the prompt, and by how much it is above that of the most likely token: plain
    forwards of both together, then numpy."""
    both = [prompt + label for label in labels]
    ids = np.stack([np.pad(np.int32(w), (0, 192 - len(w))) for w in both])
    segments = np.stack([np.arange(192, dtype=np.int32) < len(w) for w in both]).astype(np.int32)
    logits = plain_logits(
        view, {"tokens": ids, "segments": segments, "positions": np.arange(192)[None] * segments}
    )
    logits = logits - logits.max(-1, keepdims=True)
    nll = np.log(np.exp(logits).sum(-1, keepdims=True)) - logits
    n = len(prompt)
    found = [nll[i, np.arange(n - 1, n - 1 + len(label)), label] for i, label in enumerate(labels)]
    least = [nll[i, n - 1 : n - 1 + len(label)].min(-1) for i, label in enumerate(labels)]
    return found, [f - l for f, l in zip(found, least)]


def plain_logits(view: View, batch: dict) -> np.ndarray:
    if "plain" not in JITTED:
        JITTED["plain"] = jax.jit(lambda params, batch: view.model.apply(view.spec, params, batch).hidden)
        JITTED["head"] = jax.jit(lambda params, hidden, at: head(view.spec, params, hidden, at))
    at = np.tile(np.arange(192, dtype=np.int32), (len(batch["tokens"]), 1))
    return np.asarray(JITTED["head"](view.params, JITTED["plain"](view.params, batch), at), np.float64)


def labels_ids(labels=LABELS) -> list[list[int]]:
    return [[*f" {label}".encode(), 256] for label in labels]


def quiet(done: int, total: int) -> None:
    pass


def test_a_block_by_hand():
    made = block_arrays(4, [[[1, 2], [5, 6, 7]], [[8, 9]]], most=4, count=2, size=4)
    expected = {
        "first": [1, 5, 8, 0],
        "tokens": [[1, 5, 6, 0], [8, 0, 0, 0]],
        "targets": [[2, 6, 7, 0], [9, 0, 0, 0]],
        "segments": [[1, 2, 2, 0], [3, 0, 0, 0]],
        "positions": [[4, 4, 5, 0], [4, 0, 0, 0]],
    }
    assert made.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(made[name], value)
        assert made[name].dtype == np.int32


def test_endings_are_cut_into_blocks_in_order(monkeypatch):
    monkeypatch.setattr(engine, "BLOCK", 3)
    some = [[1], [1, 2], [1, 2, 3], [1, 2], [1, 2, 3, 4, 5, 6], [1, 2]]  # 0, 1, 2, 1, 5, 1 tokens to run
    assert cut(some) == [some[:3], [some[3]], [some[4]], [some[5]]]


def test_sizes_are_few_and_waste_a_quarter_at_most():
    sizes = [size_of(n, 8) for n in range(1, 513)]
    assert all(n <= size < max(n + 8, 1.25 * n) for n, size in enumerate(sizes, 1))
    assert len(set(sizes)) == 4 * 4 + 4 and size_of(0, 8) == 0


def test_some_batches_share_a_length_that_holds_all_their_rows(monkeypatch):
    monkeypatch.setattr(engine, "SERVED", 2)
    found = list(by_length([9, 1, 5, 3, 4, 8, 2], batch_size=2))
    assert found == [(4, [1, 6]), (4, [3, 4]), (9, [2, 5]), (9, [0])]


def test_what_prompts_begin_with_leaves_each_a_token():
    assert common([[1, 2, 3], [1, 2, 4, 5]]) == 2
    assert common([[1, 2], [1, 2, 4, 5], [1, 2]]) == 1
    assert common([[1, 2, 3]]) == 0 and common([[1], [2]]) == 0


PROMPTS = [list(b"say one prompt"), list(b"say another one, longer"), list(b"say x")]


@pytest.mark.parametrize("begin", [0, 4])
@pytest.mark.parametrize("block", [4, 64])
def test_labels_score_as_if_each_stood_after_its_whole_prompt(view, monkeypatch, begin, block):
    monkeypatch.setattr(engine, "BLOCK", block)
    parts = cut(labels_ids())
    assert len(parts) == (4 if block == 4 else 1)
    shape = (4, len(parts), 32)
    prompt = stacked([prompt_arrays(p, begin, 32) for p in PROMPTS], 3)
    block = stacked([block_arrays(len(p), parts, *shape) for p in PROMPTS], 3)
    found = np.asarray(view.call(ending_nll, prompt, block))
    assert found.shape == (3, 2, 4)
    for (nll, missed), p in zip(found, PROMPTS):
        expected, best = whole(view, p, labels_ids())
        np.testing.assert_allclose(nll, [e.sum() for e in expected], atol=1e-4, rtol=1e-4)
        np.testing.assert_array_equal(missed, [(b > 1e-9).sum() for b in best])


def test_many_endings_score_as_few_do(view):
    """80 labels in blocks that run one after another, beside a row with a single one."""
    many = [[*f"{n} and {n * n}".encode(), 256] for n in range(80)]
    assert len(cut(many)) > 10
    found = endings_nll(view, [PROMPTS[0], PROMPTS[1]], [many, many[:1]], 2, quiet)
    assert found[0].shape == (2, 80) and found[1].shape == (2, 1)
    for some in ([0, 7], [79]):
        expected = [e.sum() for e in whole(view, PROMPTS[0], [many[i] for i in some])[0]]
        np.testing.assert_allclose(found[0][0, some], expected, rtol=1e-4)


def test_a_wrapped_model_sees_whole_prompts(view):
    """What a method may look at is not taken apart; the numbers are the same."""
    seen = []

    class Wrapped:
        wrapped = True

        def call(self, fn, prompt, block):
            seen.append(prompt["begin"].shape[1])
            return view.call(fn, prompt, block)

    ids = [labels_ids()] * 3
    whole = endings_nll(Wrapped(), PROMPTS, ids, 4, quiet)
    shared = endings_nll(view, PROMPTS, ids, 4, quiet)
    assert seen == [0] and common(PROMPTS) == 4
    np.testing.assert_allclose(whole, shared, rtol=1e-5)


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
    assert pooled(items) == pytest.approx(right / 11)
    assert seen[-1] == (11, 11) and [d for d, _ in seen] == sorted(d for d, _ in seen)
    assert (made.metric, made.range, made.n, made.higher_is_better) == ("accuracy", (0.0, 1.0), 11, True)


def test_batch_size_and_neighbours_change_nothing(view):
    tests = rows(9)
    one = label_ranking("t", tests, Bytes(), window=128, batch_size=1).run(view, quiet)
    many = label_ranking("t", tests[::-1], Bytes(), window=128, batch_size=4).run(view, quiet)
    assert one == many[::-1]


def test_every_shape_is_compiled_once(view):
    made = label_ranking("t", rows(11), Bytes(), window=128, batch_size=4)
    made.run(view, quiet)
    (jitted,) = [f for key, f in view._jitted.items() if ending_nll in key]
    shapes = jitted._cache_size()
    again = label_ranking("u", rows(11), Bytes(), window=128, batch_size=4)
    again.run(view, quiet)
    assert jitted._cache_size() == shapes


class Scores:
    """A view whose labels have given nlls."""

    def __init__(self, *nll: float):
        self.nll = np.float32(nll)

    def call(self, fn, prompt, block):
        rows, labels = block["first"].shape
        found = np.full((rows, 2, labels), np.inf, np.float32)
        found[:, 0, : len(self.nll)] = self.nll
        return found


def test_the_first_label_wins_a_tie():
    row = {"task": "t", "id": "0", "instruction": "", "input": "x", "target": "b", "labels": ["b", "a"]}
    flipped = row | {"id": "1", "labels": ["a", "b"]}
    items = label_ranking("t", [row, flipped], Bytes(), window=32).run(Scores(1.0, 1.0), quiet)
    assert [(i["prediction"], i["score"]) for i in items] == [("b", 1.0), ("a", 0.0)]


def test_sum_and_mean_differ_where_they_should():
    """ " aaa" and its end are 5 tokens of 1 nat, " b" and its end 3 of 1.5."""
    row = {"task": "t", "id": "0", "instruction": "", "input": "x", "target": "b", "labels": ["aaa", "b"]}
    best = {
        how: label_ranking("t", [row], Bytes(), window=32, normalise=how).run(Scores(5.0, 4.5), quiet)[0]
        for how in ("sum", "mean")
    }
    assert {how: item["prediction"] for how, item in best.items()} == {"sum": "b", "mean": "aaa"}


def test_candidates_grow_with_the_stage(view):
    """All labels seen so far, at least those of the eval's own stage; the prompt stays as the row has it."""
    seen = lambda stage: LABELS[: 2 + stage]  # noqa: E731
    tests = [{k: v for k, v in row.items() if k != "labels"} for row in rows(4, LABELS[:2])]
    made = label_ranking("t", tests, Bytes(), window=128, labels_at=seen)
    assert made.chance is None
    for stage in (0, 1, 2, 0):
        items = made.run(view.at(view.spec, view.params, {}, {}, Clock.at(stage=stage)), quiet)
        for item, row in zip(items, tests):
            prompt = list(f"What?\n{row['input']}\nAnswer:".encode())
            nll = [e.sum() for e in whole_nll(view, prompt, labels_ids(seen(stage)))]
            assert item["prediction"] == seen(stage)[int(np.argmin(nll))]
    late = label_ranking("u", [tests[0] | {"target": LABELS[3]}], Bytes(), window=128, labels_at=seen, stage=2)
    early = view.at(view.spec, view.params, {}, {}, Clock.at())
    assert late.run(early, quiet)[0]["prediction"] in LABELS  # its own stage counts where the run is not there yet
    words = "target 'red wine', not one of the labels seen at stage 0; accepted: dark blue, red"
    with pytest.raises(RequestError, match=words):
        label_ranking("u", [tests[0] | {"target": LABELS[2]}], Bytes(), window=128, labels_at=seen)
    shrinks = label_ranking("u", tests, Bytes(), window=128, labels_at=lambda stage: LABELS[2 * (stage > 0) :][:2])
    with pytest.raises(RequestError, match="not one of the labels seen at stage 1"):
        shrinks.run(view.at(view.spec, view.params, {}, {}, Clock.at(stage=1)), quiet)
    view.at(view.spec, view.params, {}, {}, None)


def test_memory_does_not_grow_with_the_items(view):
    """Device arrays: none is left. Host: what four times the rows take more is less than their ids would as lists."""
    peaks = {}
    for n in (16, 48):
        made = label_ranking("t", rows(n), Bytes(), window=128, batch_size=8)
        made.run(view, quiet)  # compiles, and encodes the prompts
        before = len(jax.live_arrays())
        tracemalloc.start()
        items = made.run(view, quiet)
        peaks[n] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(jax.live_arrays()) == before and len(items) == n
    assert peaks[48] - peaks[16] < 32 * 2000  # an item, its scores, its list of endings


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
