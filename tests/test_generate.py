"""The cache gives what the whole sequence gives; generation follows from it."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.errors import RequestError
from jaxcl.models.cache import extend, prefill
from jaxcl.models.decoder import decoder
from jaxcl.models.generate import draw, generate, penalised
from jaxcl.models.spec import tiny
from jaxcl.models.stacking import restack

SPEC = tiny(vocab=40, layers=2)
MODEL = decoder(SPEC)
WIDTH = 9
LENGTHS = np.array([9, 4, 6], np.int32)
SPECS = {"unstacked": SPEC, "stacked": dataclasses.replace(SPEC, segments=((("block",), 2),))}


@pytest.fixture(scope="module")
def params() -> dict[str, np.ndarray]:
    drawn = MODEL.init(dataclasses.replace(SPEC, init_std=0.3), jax.random.key(5))
    return {k: np.asarray(v) for k, v in drawn.items()}


@pytest.fixture(scope="module")
def prompts() -> np.ndarray:
    tokens = np.random.default_rng(0).integers(1, 40, (3, WIDTH)).astype(np.int32)
    return np.where(np.arange(WIDTH) < LENGTHS[:, None], tokens, 0).astype(np.int32)


def block(tokens: np.ndarray, start: int = 0) -> dict[str, np.ndarray]:
    """A batch of unpadded rows that begin at position ``start``."""
    rows, width = tokens.shape
    positions = np.tile(np.arange(start, start + width, dtype=np.int32), (rows, 1))
    return {"tokens": tokens, "segments": np.ones((rows, width), np.int32), "positions": positions}


def padded(prompts: np.ndarray) -> dict[str, np.ndarray]:
    inside = np.arange(WIDTH) < LENGTHS[:, None]
    return {**block(prompts), "segments": inside.astype(np.int32)}


run_prefill = jax.jit(functools.partial(prefill, MODEL.apply), static_argnums=(0, 3))
run_extend = jax.jit(functools.partial(extend, MODEL.apply), static_argnums=(0, 4))
run_whole = jax.jit(MODEL.apply, static_argnums=0)


def hidden_of(spec, params, tokens):
    """Final hidden states of whole rows, without any cache. Causal, so what follows does not matter."""
    return run_whole(spec, params, block(tokens)).hidden


@pytest.mark.parametrize("name", SPECS)
def test_blocks_after_a_cache_equal_the_whole_sequence(params, name):
    spec, rich = SPECS[name], restack(params, SPEC, SPECS[name].segments)[0]
    tokens = np.random.default_rng(1).integers(0, 40, (2, 11)).astype(np.int32)
    whole = hidden_of(spec, rich, tokens)
    cache = run_prefill(spec, rich, block(tokens[:, :5]), 16).cache
    for start, stop in ((5, 6), (6, 10), (10, 11)):
        out = run_extend(spec, rich, block(tokens[:, start:stop], start), cache, True)
        np.testing.assert_allclose(out.hidden, whole[:, start:stop], atol=2e-5)
        assert out.nll is None
        assert np.array_equal(out.cache["valid"].sum(axis=1), [stop, stop])
        assert {k: v.shape for k, v in out.cache.items()} == {k: v.shape for k, v in cache.items()}
        cache = out.cache


@pytest.mark.parametrize("name", SPECS)
def test_labels_from_one_cached_prompt(params, prompts, name):
    """The nll of three labels of different length, all in one read-only block, equals each run whole."""
    spec, rich = SPECS[name], restack(params, SPEC, SPECS[name].segments)[0]
    labels = [[3, 4, 5], [6], [7, 8]]
    m = 1 + max(map(len, labels))
    tokens, segments, positions = (np.zeros((3, 3 * m), np.int32) for _ in range(3))
    targets = np.array(
        [[m * l + 1 + i if i < len(labels[l]) else 0 for l in range(3) for i in range(m - 1)]] * 3
    )
    for row, n in enumerate(LENGTHS):
        for l, label in enumerate(labels):
            here = slice(m * l, m * l + 1 + len(label))
            tokens[row, here] = [prompts[row, n - 1], *label]
            segments[row, here] = l + 1
            positions[row, here] = np.arange(n - 1, n + len(label))
    first = run_prefill(spec, rich, padded(prompts), WIDTH)
    batch = {"tokens": tokens, "segments": segments, "positions": positions, "targets_at": targets}
    out = run_extend(spec, rich, batch, first.cache, False)
    assert all(np.array_equal(out.cache[k], first.cache[k]) for k in first.cache), "nothing is written"
    nll = np.asarray(out.nll).reshape(3, 3, m - 1)
    for row, n in enumerate(LENGTHS):
        for l, label in enumerate(labels):
            whole = np.zeros((1, WIDTH + m), np.int32)  # one shape for all; what follows does not matter
            whole[0, : n + len(label)] = [*prompts[row, :n], *label]
            want = run_whole(SPEC, params, block(whole)).nll[0, n : n + len(label)]
            np.testing.assert_allclose(nll[row, l, : len(label)], want, atol=2e-5)
            assert np.all(nll[row, l, len(label) :] == 0)


def test_foreign_entries_pass_through(params, prompts):
    """A wrapper's own cache entry made at prefill is still there, untouched, after blocks."""

    def routed(spec, params, batch, *, cache=None, **kw):
        out = MODEL.apply(spec, params, batch, cache=cache, **kw)
        if cache is not None and "router/slot" not in cache:
            out = out._replace(cache={**out.cache, "router/slot": batch["tokens"][:, 0]})
        return out

    cache = prefill(routed, SPEC, params, padded(prompts), 12).cache
    out = extend(routed, SPEC, params, block(prompts[:, :1], 9), cache, write=True)
    assert np.array_equal(out.cache["router/slot"], prompts[:, 0])
    tokens, _ = generate(routed, MODEL.head, SPEC, params, prompts, LENGTHS, max_new=2, stop_ids=())
    assert tokens.shape == (3, 2)


def greedy(params, prompt, steps: int, stop: tuple[int, ...]) -> list[int]:
    """Token by token, the whole sequence again each time (padded to one shape, which causality ignores)."""
    tokens = np.zeros((1, WIDTH + steps), np.int32)
    tokens[0, : len(prompt)], made = prompt, []
    for at in range(len(prompt), len(prompt) + steps):
        hidden = np.asarray(hidden_of(SPEC, params, tokens), np.float64)[0, at - 1]
        made.append(int(np.argmax(params["embed/kernel"] @ hidden)))
        tokens[0, at] = made[-1]
        if made[-1] in stop:
            break
    return made


def test_greedy_equals_the_whole_sequence_every_time(params, prompts):
    free = [greedy(params, prompts[r, :n], 12, ()) for r, n in enumerate(LENGTHS)]
    assert len({tuple(f) for f in free}) == 3 and len(set(free[0])) > 1, "three different, not constant"
    stop = (free[0][4], 41)
    want = [greedy(params, prompts[r, :n], 12, stop) for r, n in enumerate(LENGTHS)]
    run = jax.jit(
        functools.partial(generate, MODEL.apply, MODEL.head, SPEC),
        static_argnames=("max_new", "stop_ids", "pad"),
    )
    tokens, lengths = run(params, prompts, LENGTHS, max_new=12, stop_ids=stop, pad=39)
    for row, made in enumerate(want):
        assert list(tokens[row]) == made + [39] * (12 - len(made))
        assert lengths[row] == len(made) - (made[-1] in stop)
    stacked, spec = restack(params, SPEC, SPECS["stacked"].segments)
    again = generate(
        MODEL.apply, MODEL.head, spec, stacked, prompts, LENGTHS, max_new=12, stop_ids=stop, pad=39
    )
    assert np.array_equal(again[0], tokens) and np.array_equal(again[1], lengths)


def test_the_loop_ends_when_all_rows_have_ended(params, prompts):
    """Counted outside the program: blocks run after the prompt, one a token."""
    ran = []

    def counted(spec, params, batch, **kw):
        if batch["tokens"].shape[1] == 1:
            jax.debug.callback(lambda: ran.append(1))
        return MODEL.apply(spec, params, batch, **kw)

    firsts = [greedy(params, prompts[r, :n], 1, ())[0] for r, n in enumerate(LENGTHS)]
    _, lengths = generate(counted, MODEL.head, SPEC, params, prompts, LENGTHS, max_new=8, stop_ids=firsts)
    jax.effects_barrier()
    assert not ran and np.array_equal(lengths, [0, 0, 0])
    generate(counted, MODEL.head, SPEC, params, prompts, LENGTHS, max_new=8, stop_ids=())
    jax.effects_barrier()
    assert len(ran) == 7


def test_sampling_is_seeded_and_follows_the_distribution(params, prompts):
    """20000 draws from one row against the softmax, and against the renormalised nucleus."""
    scores = np.array([2.0, 1.0, 0.5, 0.0, -1.0], np.float32)
    prob = np.exp(scores) / np.exp(scores).sum()
    keys = jax.random.split(jax.random.key(0), 20000)
    for top_p, kept in ((1.0, 5), (0.7, 2), (0.1, 1)):
        want = np.where(np.arange(5) < kept, prob, 0.0)
        want /= want.sum()
        drawn = jax.vmap(lambda k, p=top_p: draw(k, jnp.array(scores)[None], p)[0])(keys)
        got = np.bincount(drawn, minlength=5) / 20000
        np.testing.assert_allclose(got, want, atol=0.015)
    run = functools.partial(generate, MODEL.apply, MODEL.head, SPEC, params, prompts, LENGTHS, stop_ids=())
    a, b, c = (run(max_new=6, temperature=1.0, key=jax.random.key(k))[0] for k in (1, 1, 2))
    assert np.array_equal(a, b) and not np.array_equal(a, c)
    with pytest.raises(RequestError, match="key"):
        run(max_new=6, temperature=1.0)


def test_top_k_keeps_the_most_likely_and_works_before_top_p():
    """20000 draws against the renormalised softmax of what is kept, by hand."""
    scores = np.array([0.5, 2.0, -1.0, 1.0, 0.0], np.float32)
    prob = np.exp(scores) / np.exp(scores).sum()
    keys = jax.random.split(jax.random.key(0), 20000)
    for top_k, top_p, kept in ((1, 1.0, [1]), (3, 1.0, [1, 3, 0]), (9, 1.0, range(5)), (3, 0.8, [1, 3])):
        want = np.where(np.isin(np.arange(5), kept), prob, 0.0)
        drawn = jax.vmap(lambda k, p=top_p, n=top_k: draw(k, jnp.array(scores)[None], p, n)[0])(keys)
        np.testing.assert_allclose(np.bincount(drawn, minlength=5) / 20000, want / want.sum(), atol=0.015)


def test_a_repetition_penalty_looks_at_prompt_and_answer(params, prompts):
    """Greedy with a penalty against the whole sequence each time, the penalty written out in numpy."""
    penalty = 1.8

    def penalised_greedy(prompt) -> list[int]:
        tokens = list(prompt)
        for _ in range(8):
            row = np.zeros((1, WIDTH + 8), np.int32)
            row[0, : len(tokens)] = tokens
            hidden = np.asarray(hidden_of(SPEC, params, row), np.float64)[0, len(tokens) - 1]
            scores = params["embed/kernel"] @ hidden
            for t in set(tokens):
                scores[t] = scores[t] / penalty if scores[t] > 0 else scores[t] * penalty
            tokens.append(int(np.argmax(scores)))
        return tokens[len(prompt) :]

    want = [penalised_greedy(prompts[r, :n].tolist()) for r, n in enumerate(LENGTHS)]
    run = functools.partial(generate, MODEL.apply, MODEL.head, SPEC, params, prompts, LENGTHS, stop_ids=())
    made, _ = run(max_new=8, repetition_penalty=penalty)
    assert np.array_equal(made, want) and not np.array_equal(made, run(max_new=8)[0])
    assert np.array_equal(penalised(jnp.array([2.0, -2.0]), 2.0), [1.0, -4.0])
