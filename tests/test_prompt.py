"""Soft prompts in the model: rows that are words' embeddings are those words, wherever a model is asked."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import MODEL, SPEC, STACK, asked, filled, forward, weights, written

from jaxcl.errors import RequestError
from jaxcl.models.decoder import decoder
from jaxcl.models.layout import axes
from jaxcl.models.prompt import ROWS, VALID, produced
from jaxcl.models.spec import tiny

P, T = 3, 7
LOCAL = tiny(
    vocab=32, layers=2, width=16, heads=2, kv_heads=1, mlp=32, context=64, window=4, embed_scale=4.0,
    segments=((("local", "block"), 1),), local_theta=100.0,
)  # fmt: skip
SPECS = {
    "plain": SPEC,
    "stacked": dataclasses.replace(SPEC, segments=STACK),
    "remat": dataclasses.replace(SPEC, remat="block"),
    "windows": LOCAL,
}
RNG = np.random.default_rng(0)
WORDS = RNG.integers(0, 32, P).astype(np.int32)


def batch_of(tokens: np.ndarray) -> dict:
    places = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    return {"tokens": tokens.astype(np.int32), "segments": np.ones_like(tokens, np.int32), "positions": places}


def texts(rows: int = 2, width: int = T) -> np.ndarray:
    return RNG.integers(0, 32, (rows, width)).astype(np.int32)


def behind_words(tokens: np.ndarray) -> np.ndarray:
    return np.concatenate([np.broadcast_to(WORDS, (len(tokens), P)), tokens], axis=1)


def prompted(spec) -> dict:
    params = weights(spec)
    return {**params, ROWS: params["embed/kernel"][WORDS] * spec.embed_scale}


@pytest.mark.parametrize("name", SPECS)
def test_rows_that_are_embeddings_are_these_words(name):
    spec, tokens = SPECS[name], texts()
    taps = ("layers/1/mlp/down:in", "layers/0:out")
    got = forward(spec, prompted(spec), batch_of(tokens), taps=taps)
    want = forward(spec, weights(spec), batch_of(behind_words(tokens)), taps=taps)
    np.testing.assert_allclose(got.hidden, want.hidden[:, P:], atol=1e-5)
    np.testing.assert_allclose(got.nll[:, 1:], want.nll[:, P + 1 :], atol=1e-5)
    assert not got.nll[:, 0].any() and got.nll.shape == tokens.shape
    for tap in taps:
        np.testing.assert_allclose(got.taps[tap], want.taps[tap][:, P:], atol=1e-5)


def test_the_gradient_of_the_rows_is_that_of_the_words_embeddings():
    """Words that stand in front alone: the embedding's gradient at them is the prompt's."""
    tokens = np.setdiff1d(np.arange(32), WORDS)[None, :T].astype(np.int32)
    params = weights() | {"head/kernel": weights()["embed/kernel"].T}
    spec = dataclasses.replace(SPEC, tied=False)

    def inside(rows):
        return forward(spec, {**params, ROWS: rows}, batch_of(tokens)).nll.sum()

    def outside(table):
        nll = forward(spec, {**params, "embed/kernel": table}, batch_of(behind_words(tokens))).nll
        return nll[:, P + 1 :].sum()

    table = params["embed/kernel"]
    want = jax.grad(outside)(table)[WORDS]
    np.testing.assert_allclose(jax.grad(inside)(table[WORDS]), want, atol=1e-5)


def test_every_segment_of_a_packed_row_sees_the_prompt():
    tokens = texts(1, 9)
    packed = batch_of(tokens) | {
        "segments": np.array([[1, 1, 1, 1, 2, 2, 2, 0, 0]], np.int32),
        "positions": np.array([[0, 1, 2, 3, 0, 1, 2, 0, 0]], np.int32),
    }
    got = forward(SPEC, prompted(SPEC), packed).hidden
    for part in (slice(0, 4), slice(4, 7)):
        alone = forward(SPEC, weights(), batch_of(behind_words(tokens[:, part]))).hidden
        np.testing.assert_allclose(got[:, part], alone[:, P:], atol=1e-5)


@pytest.mark.parametrize("left", [0, 3])
def test_the_amount_of_padding_on_either_side_changes_nothing(left):
    tokens = texts(1, 12)
    inside = slice(left, left + 5)
    segments, positions = np.zeros((1, 12), np.int32), np.zeros((1, 12), np.int32)
    segments[:, inside], positions[:, inside] = 1, np.arange(5)
    padded = {"tokens": tokens, "segments": segments, "positions": positions}
    got = forward(SPEC, prompted(SPEC), padded)
    want = forward(SPEC, prompted(SPEC), batch_of(tokens[:, inside]))
    np.testing.assert_allclose(got.hidden[:, inside], want.hidden, atol=1e-5)
    np.testing.assert_allclose(got.nll[:, inside], want.nll, atol=1e-5)


@pytest.mark.parametrize("name", ["plain", "stacked", "windows"])
def test_generation_with_a_cache_continues_as_behind_the_words(name):
    spec, tokens = SPECS[name], texts(3)
    lengths = np.array([T, 4, 2], np.int32)
    how = {"max_new": 5, "stop_ids": ()}
    got, _ = written(spec, prompted(spec), tokens, lengths, **how)
    want, _ = written(spec, weights(spec), behind_words(tokens), lengths + P, **how)
    assert np.array_equal(got, want)


def test_labels_ranked_over_a_cache_have_the_nll_of_prompt_and_label_run_whole():
    tokens, labels = texts(2, 5), texts(2, 2)
    params = prompted(SPEC)
    cache = filled(SPEC, params, batch_of(tokens), 5)
    assert cache["valid"].shape == (2, 5 + P) and bool(cache["valid"].all())
    block = {
        "tokens": np.concatenate([tokens[:, -1:], labels], axis=1),
        "segments": np.ones((2, 3), np.int32),
        "positions": np.broadcast_to(np.arange(4, 7, dtype=np.int32), (2, 3)),
        "targets_at": np.array([[1, 2]] * 2, np.int32),
    }
    out = asked(SPEC, params, block, cache)
    whole = forward(SPEC, params, batch_of(np.concatenate([tokens, labels], axis=1)))
    np.testing.assert_allclose(out.nll, whole.nll[:, 5:], atol=1e-5)
    assert all(np.array_equal(out.cache[k], v) for k, v in cache.items())


def test_no_rows_are_no_prompt_and_rows_of_ones_own_may_be_missing():
    batch, params = batch_of(texts(3)), prompted(SPEC)
    plain = forward(SPEC, weights(), batch)
    none = forward(SPEC, {**params, ROWS: jnp.zeros((0, SPEC.width))}, batch)
    np.testing.assert_allclose(none.hidden, plain.hidden, atol=1e-6)
    there = np.array([[True] * P, [False] * P, [True, False, True]])
    own = jnp.stack([params[ROWS], params[ROWS] + 1, params[ROWS]])
    got = forward(SPEC, {**params, ROWS: own, VALID: there}, batch).hidden
    np.testing.assert_allclose(got[1], plain.hidden[1], atol=1e-5)
    for row, words in ((0, WORDS), (2, WORDS[[0, 2]])):
        alone = np.concatenate([words, batch["tokens"][row]])[None]
        want = forward(SPEC, weights(), batch_of(alone)).hidden[0, len(words) :]
        np.testing.assert_allclose(got[row], want, atol=1e-5)


def test_with_rotary_positions_the_order_of_the_rows_counts():
    params, batch = prompted(SPEC), batch_of(texts())
    turned = forward(SPEC, {**params, ROWS: params[ROWS][::-1]}, batch).hidden
    assert np.abs(turned - forward(SPEC, params, batch).hidden).max() > 1e-3


def test_injections_see_the_tokens_alone():
    params, batch = prompted(SPEC), batch_of(texts())
    seen = {}

    def last(x, y):
        seen["shapes"] = (x.shape, y.shape)
        return y.at[:, -1].set(1.0), {}

    got = MODEL.apply(SPEC, params, batch, inject={"layers/1/mlp/down": last}).hidden
    want = forward(SPEC, params, batch).hidden
    assert seen["shapes"] == ((2, T, SPEC.mlp), (2, T, SPEC.width))
    np.testing.assert_allclose(got[:, :-1], want[:, :-1], atol=1e-6)
    assert np.abs(got[:, -1] - want[:, -1]).max() > 0.01


def test_the_network_against_numpy():
    draw = lambda *shape: RNG.normal(size=shape)  # noqa: E731
    rows, w, b, v, c, scale, shift = draw(4, 16), draw(16, 5), draw(5), draw(5, 16), draw(16), draw(16), draw(16)
    made = np.maximum(rows @ w + b, 0) @ v + c
    normed = (made - made.mean(1, keepdims=True)) / np.sqrt(made.var(1, keepdims=True) + 1e-5)
    parts = {"in": w, "in_bias": b, "out": v, "out_bias": c, "scale": scale, "bias": shift}
    params = {ROWS: jnp.asarray(rows)} | {f"prompt/mlp_{k}": jnp.asarray(x) for k, x in parts.items()}
    np.testing.assert_allclose(produced(params), rows + normed * scale + shift, rtol=1e-4, atol=1e-5)


def test_axes_and_what_has_no_room():
    named = axes(SPEC, {**prompted(SPEC), "prompt/rows_bank": np.zeros((4, P, 16))})
    assert named[ROWS] == (None, "embed") and named["prompt/rows_bank"] == (None, None, "embed")
    long = batch_of(texts(1, 62))
    with pytest.raises(RequestError, match=r"prompt and tokens are 65 positions; accepted: up to 64 \(context\)"):
        forward(SPEC, prompted(SPEC), long)
    out = forward(SPEC, weights(), batch_of(texts()), taps=("layers/0:out",))
    with pytest.raises(RequestError, match="the soft prompt's own stream is not known"):
        decoder(SPEC).apply(SPEC, prompted(SPEC), batch_of(texts()), start=(1, out.taps["layers/0:out"]))
