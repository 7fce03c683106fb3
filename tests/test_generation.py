"""Written answers against a plain loop over the whole sequence: greedy, sampled, stopped, scored by several metrics."""

from __future__ import annotations

import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest
import support
from byte_model import WIDTH, Bytes, greedy, make_logits, make_view, prompt_of, rows
from sacrebleu.metrics import BLEU

from jaxcl.core.progress import Reporter
from jaxcl.core.zero_shot import evaluate
from jaxcl.errors import RequestError
from jaxcl.evaluate import answers
from jaxcl.evaluate.answers import Answers, How, cut
from jaxcl.evaluate.generation import exact_match, generation, written
from jaxcl.metrics.matrix_file import read_matrix
from jaxcl.metrics.pooling import pooled
from jaxcl.metrics.predictions import read_items


@pytest.fixture(scope="module")
def view():
    return make_view()


@pytest.fixture(scope="module")
def logits(view):
    return make_logits(view)


@pytest.fixture(scope="module")
def plain(logits):
    """What the model writes for the nine rows, 24 bytes each, by the plain loop."""
    return [greedy(logits, prompt_of(row), 24) for row in rows(9)]


def nothing(done: int, total: int) -> None: ...


def test_exact_match_writes_what_a_plain_loop_writes(view, plain):
    tests, texts = rows(9), [Bytes().decode(ids[:8]) for ids in plain]
    for i, row in enumerate(tests):
        if i % 3 == 0:
            row["target"] = texts[i].strip() or "-"
        if i % 3 == 1:
            row["targets"] = ["nothing", texts[i] + " "]
    seen = []
    made = exact_match("t", tests, Bytes(), window=WIDTH, batch_size=4, max_new=8)
    items = made.run(view, lambda done, total: seen.append((done, total)))
    assert [i["prediction"] for i in items] == [a.strip() for a in texts]
    assert len(set(texts)) > 2
    for i, item in enumerate(items):
        accepted = tests[i].get("targets") or [tests[i]["target"]]
        assert item["id"] == str(i)
        assert item["score"] == float(texts[i].strip() in {a.strip() for a in accepted})
    assert 0 < pooled(items) < 1
    assert seen[-1] == (9, 9)
    assert (made.id, made.metric, made.n, made.range) == ("t", "exact_match_strict", 9, (0.0, 1.0))
    assert exact_match("t", tests, Bytes(), window=WIDTH, rule="lenient").metric == "exact_match_lenient"


@pytest.mark.parametrize(
    ("kw", "words"),
    [
        ({"rule": "Strict"}, "unknown rule of exact match 'Strict'; did you mean 'strict'"),
        ({"max_new": 0}, "answers of 0 tokens; accepted: 1 to 63"),
        ({"window": 9}, "answers of 9 tokens; accepted: 1 to 8"),
        ({"window": 24}, "row '0': instruction, options and answer mark need 20 tokens, 15 are left"),
        ({"rows": []}, "eval 't' has no test rows"),
        ({"temperature": -1.0}, "temperature=-1.0; accepted: 0"),
        ({"seed": -1}, "seed=-1; accepted: 0 to"),
        ({"top_p": 0.0}, "top_p=0.0; accepted: above 0, up to 1"),
        ({"stop": ("x", "")}, "an empty stop string"),
    ],
)
def test_what_is_refused(kw, words):
    kw = {"window": 64, **kw}
    with pytest.raises(RequestError, match=words):
        exact_match("t", kw.pop("rows", rows(1)), Bytes(), **kw)
    with pytest.raises(RequestError, match="unknown text metric 'blue'; did you mean 'bleu'"):
        generation("t", rows(1), Bytes(), window=64, metrics=("blue",))


def test_several_metrics_read_one_pass(view, plain, monkeypatch):
    passes = []
    once = Answers.__call__
    monkeypatch.setattr(Answers, "__call__", lambda self, *a: (passes.append(1), once(self, *a))[1])
    tests, texts = rows(4), [Bytes().decode(ids[:8]) for ids in plain]
    for row, text in zip(tests, texts):
        row["target"] = text[:5].strip() + " and so on it goes"
    names = ("exact_match_strict", "bleu", "sari")
    evals = generation("t", tests, Bytes(), window=WIDTH, metrics=names, max_new=8, batch_size=4)
    assert [(e.id, e.metric, e.pool) for e in evals] == [
        ("t/exact_match_strict", "exact_match_strict", None), ("t/bleu", "bleu", "bleu"), ("t/sari", "sari", None)
    ]  # fmt: skip
    found = [e.run(view, nothing) for e in evals]
    assert len(passes) == 1
    view.at(view.spec, view.params, {}, {}, view.clock)
    assert [e.run(view, nothing) for e in evals] == found and len(passes) == 2
    assert [i["prediction"] for i in found[1]] == [t.strip() for t in texts[:4]] == [i["prediction"] for i in found[0]]
    whole = BLEU(effective_order=False).corpus_score(texts[:4], [[row["target"] for row in tests]]).score
    assert evals[1].range == (0.0, 100.0) and pooled(found[1], "bleu") == pytest.approx(whole)
    json.dumps(found, allow_nan=False)


def test_cut():
    assert cut("ab. c\nd", ("\n", ". ")) == "ab" and cut("abc", ("d",)) == "abc" and cut("abc", ()) == "abc"
    assert cut("abc", ("abc", "c")) == ""


def test_stop_strings_cut_and_end(view, plain, monkeypatch):
    """Texts end before the first stop string; a row that has come to one is not written on for another block."""
    texts = [Bytes().decode(ids) for ids in plain]
    pairs = [a + b for text in texts for a, b in itertools.pairwise(text[2:]) if (a + b).isascii()]
    stop = (pairs[0], next(c for text in texts[::-1] for c in text[1:] if c.isascii() and c not in pairs[0]))
    monkeypatch.setattr(answers, "BLOCK", 8)
    answers._writers.cache_clear()
    run = written("t", rows(9), Bytes(), window=WIDTH, max_new=24, stop=stop, batch_size=4)
    early, once = 0, 0
    for answer, text, ids in zip(run(view, nothing), texts, plain, strict=True):
        assert answer.text == cut(text, stop)
        assert answer.ids == ids[: len(answer.ids)], "what was written before the look is kept"
        if len(answer.text) < len(text) and text[len(answer.text) :].startswith(stop[0]):
            at = next(i for i in range(24) if bytes(ids[i : i + 2]) == stop[0].encode())
            assert at < len(answer.ids) <= -(-(at + 2) // 8) * 8, "two tokens: until the next look"
            early += len(answer.ids) < 24
        elif len(answer.text) < len(text):
            assert len(answer.ids) == ids.index(ord(stop[1])), "one token: at once"
            once += 1
    assert early and once
    answers._writers.cache_clear()


def test_sampling_is_seeded_and_rows_do_not_depend_on_their_neighbours(view, logits):
    """With the key of a row's own index; each token is drawn from the plain forward's distribution."""
    tests = rows(5)[1:]

    def texts(n, seed=3):
        how = How(6, temperature=0.8, seed=seed)
        made = Answers(lambda: [prompt_of(r) for r in tests[:n]], Bytes(), how, most=64, batch_size=3)
        return [a.ids for a in made(view, nothing)]

    first = texts(4)
    assert first[:2] == texts(2) and first != texts(4, seed=4)
    draw = jax.jit(lambda i, n, x: jax.random.categorical(jax.random.fold_in(jax.random.fold_in(root, i), n), x))
    root = jax.random.key(3)
    for i, row in enumerate(tests):
        prompt, made = prompt_of(row), []
        for n, token in enumerate(first[i]):
            assert token == int(draw(i, n, np.float32(logits(prompt + made)[-1] / 0.8)))
            made.append(token)
    (made,) = generation("t", tests, Bytes(), window=WIDTH, temperature=0.8, seed=3, top_p=0.9, stop=("!",))
    assert made.hparams == {"max_new": 9, "stop": ["!"], "temperature": 0.8, "top_p": 0.9, "seed": 3}
    assert generation("t", tests, Bytes(), window=WIDTH)[0].hparams == {"max_new": 9, "temperature": 0.0}


def test_nothing_is_compiled_again_for_other_weights_or_more_rows(view):
    """So what is on the device at a time has one size, however many rows there are."""
    tests = rows(9)
    many = [{**row, "id": f"{copy}/{row['id']}"} for copy in range(3) for row in tests]
    made = exact_match("t", tests, Bytes(), window=WIDTH, batch_size=4, max_new=8)
    again = exact_match("u", tests[::-1], Bytes(), window=WIDTH, batch_size=4, max_new=8)
    made.run(view, nothing)
    before = len(view._jitted), sum(f._cache_size() for f in view._jitted.values())
    view.at(view.spec, {k: v * 1.5 for k, v in view.params.items()}, {}, {}, view.clock)
    made.run(view, nothing)
    again.run(view, nothing)
    assert len(exact_match("v", many, Bytes(), window=WIDTH, batch_size=4, max_new=8).run(view, nothing)) == 27
    assert (len(view._jitted), sum(f._cache_size() for f in view._jitted.values())) == before
    view.at(view.spec, {k: v / 1.5 for k, v in view.params.items()}, {}, {}, view.clock)


def test_a_runs_files_keep_answers_and_how_they_were_asked_for(tmp_path):
    """Right or wrong per item can be had from predictions alone, which the metrics of refinement (CMR) ask for."""
    class Few(Bytes):
        eos_id = 31

        def encode(self, text):
            return [b % 31 for b in text.encode()]

    evals = generation("q/a", rows(3), Few(), window=40, metrics=("exact_match_strict",), max_new=4, seed=5,
                       temperature=1.0)  # fmt: skip
    stage = dataclasses.replace(support.stages(1)[0], evals=("q/a",))
    evaluate(support.experiment([], stages=[stage], evals=evals), tmp_path / "run", reporter=Reporter(quiet=True))
    said = json.loads((tmp_path / "run" / "matrix.json").read_text())["evals"][0]
    assert said["hparams"] == {"max_new": 4, "temperature": 1.0, "top_p": 1.0, "seed": 5}
    matrix = read_matrix(tmp_path / "run")
    items = read_items(tmp_path / "run", matrix.evals[0], 1)
    assert items is not None and items.ids == ("0", "1", "2") and items.parts.shape == (1, 3, 2)
    np.testing.assert_allclose(items.parts[0, :, 0].mean(), matrix.row0[0])
