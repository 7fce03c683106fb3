"""New rows of the vocabulary: closed they change nothing, opened they count, cut off they are gone."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from support import SPEC, forward, same, to_numpy, weights, written

from jaxcl.data.encode import encode
from jaxcl.data.pipeline import stack
from jaxcl.errors import RequestError
from jaxcl.losses.distillation import kl
from jaxcl.models.decoder import decoder, logits
from jaxcl.surgery.vocabulary import BIAS, CLOSED, cut, growth, opened

UNTIED = dataclasses.replace(SPEC, tied=False)
MODEL = decoder(SPEC)
ROWS = [encode([3, 1, 4, 1], [5, 9], 12, 3), encode([2, 7, 1, 8, 2], [8], 12, 3)]
BATCH = stack(ROWS)


def grown(spec, params, n, key):
    """(params, spec) after growth."""
    larger, edit = growth(spec, params, n, key)
    return edit.apply(params, "value") | edit.fills, larger


@pytest.fixture(scope="module", params=[SPEC, UNTIED], ids=["tied", "untied"])
def pair(request):
    """(spec, params) before and after two rows were asked for; 32 rows stay divisible by 32, so 32 come."""
    old = weights(request.param)
    new, spec = grown(request.param, old, 2, jax.random.key(1))
    return (request.param, old), (spec, new)


def test_new_rows_are_closed_and_the_old_ones_stay(pair):
    (old_spec, old), (spec, new) = pair
    assert spec == dataclasses.replace(old_spec, vocab=64) and new.keys() == old.keys() | {BIAS}
    assert np.array_equal(new[BIAS], [0.0] * 32 + [CLOSED] * 32)
    assert np.array_equal(new["embed/kernel"][:32], old["embed/kernel"])
    if not spec.tied:
        assert new["head/kernel"].shape == (16, 64) and np.array_equal(new["head/kernel"][:, :32], old["head/kernel"])
    assert same({k: new[k] for k in old if "embed" not in k and "head" not in k}, {
        k: v for k, v in old.items() if "embed" not in k and "head" not in k
    })


def test_new_rows_lie_around_the_mean_of_the_old(pair):
    (_, old), _ = pair
    kernel = np.asarray(old["embed/kernel"])
    many, spec = grown(SPEC, {"embed/kernel": old["embed/kernel"]}, 4000, jax.random.key(0))
    rows = np.asarray(many["embed/kernel"])[32:]
    assert len(rows) == spec.vocab - 32 == 4000
    error = 0.1 * kernel.std(0) / np.sqrt(4000)
    assert np.all(np.abs(rows.mean(0) - kernel.mean(0)) < 5 * error)
    np.testing.assert_allclose(rows.std(0), 0.1 * kernel.std(0), rtol=0.06)


def test_closed_rows_alter_no_logit_and_have_no_probability(pair):
    (old_spec, old), (spec, new) = pair
    hidden = jax.random.normal(jax.random.key(2), (5, 16))
    before, after = logits(old_spec, old, hidden), logits(spec, new, hidden)
    np.testing.assert_allclose(after[:, :32], before, rtol=0, atol=1e-6)
    assert np.all(np.asarray(jax.nn.softmax(after))[:, 32:] == 0.0)
    nll = [forward(s, p, BATCH).nll for s, p in ((old_spec, old), (spec, new))]
    np.testing.assert_allclose(nll[1], nll[0], rtol=1e-6)
    assert np.all(np.asarray(kl(after, 2 * after)) >= 0), "finite, so a teacher may have closed rows too"


def test_an_opened_row_can_be_said_and_the_others_cannot(pair):
    _, (spec, new) = pair
    p = jax.nn.softmax(logits(spec, opened(new, 33), jax.random.normal(jax.random.key(2), (5, 16))))
    assert np.all(np.asarray(p)[:, 33] > 0) and np.all(np.asarray(p)[:, [32, *range(34, 64)]] == 0.0)


def test_sampling_never_says_a_closed_row(pair):
    _, (spec, new) = pair
    loud = {**new, "embed/kernel": new["embed/kernel"].at[32:].mul(50.0)}
    prompts = np.full((16, 1), 40, np.int32)
    how = {"max_new": 8, "stop_ids": (), "temperature": 2.0, "key": jax.random.key(0)}
    made, _ = written(spec, loud, prompts, np.ones(16, np.int32), **how)
    assert np.all(np.asarray(made) < 32)


def test_cutting_off_gives_back_what_was(pair):
    (old_spec, old), (spec, new) = pair
    params, small = cut(spec, new, 32)
    assert small == old_spec and same(to_numpy(params), to_numpy(old))
    with pytest.raises(RequestError, match="only closed rows"):
        cut(spec, opened(new, 33), 32)
    part, middle = cut(spec, new, 40)
    assert middle.vocab == 40 and part[BIAS].shape == (40,)


def test_growing_twice(pair):
    _, (spec, new) = pair
    twice, larger = grown(spec, new, 1, jax.random.key(5))
    assert larger.vocab == 128 and np.array_equal(twice[BIAS][:64], new[BIAS])


def test_memories_follow(pair):
    """A Fisher has nothing about a new row, an anchor its new value, also one of several tasks; the bias is born."""
    (spec, old), (_, new) = pair
    _, edit = growth(spec, old, 2, jax.random.key(1))
    memory = {k: jax.random.normal(jax.random.key(3), (3, *v.shape)) for k, v in old.items()}
    for kind in ("square", "value"):
        out = edit.apply(memory, kind)
        assert out.keys() == old.keys()
        embed = np.asarray(out["embed/kernel"])
        assert np.array_equal(embed[:, :32], memory["embed/kernel"])
        fresh = np.asarray(new["embed/kernel"])[32:] if kind == "value" else 0.0
        assert np.array_equal(embed[:, 32:], np.broadcast_to(fresh, (3, 32, 16)))
    assert edit.owners({}, "lamol") == {BIAS: "lamol"} and edit.exact


@pytest.mark.parametrize("vocab,n,want", [(259, 2, 261), (49152, 17, 49280), (32, 33, 96), (100, 1, 104)])
def test_a_vocabulary_stays_divisible(vocab, n, want):
    spec = dataclasses.replace(SPEC, vocab=vocab, width=4, head_dim=2)
    new, larger = grown(spec, {"embed/kernel": np.zeros((vocab, 4), np.float32)}, n, jax.random.key(0))
    assert larger.vocab == want and new["embed/kernel"].shape == (want, 4) and new[BIAS].shape == (want,)


def test_refusals():
    with pytest.raises(RequestError, match="0 new rows"):
        grown(SPEC, weights(), 0, jax.random.key(0))
    with pytest.raises(RequestError, match="no vocabulary"):
        grown(SPEC, {"x": np.zeros(2)}, 1, jax.random.key(0))
