"""Prefix tuning: attention against numpy, prefixes that are words, the network, tasks of their own, and refusals."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from support import (
    MODEL,
    SPEC,
    STACK,
    Answers,
    asked,
    experiment,
    filled,
    forward,
    run,
    stages,
    to_numpy,
    weights,
    written,
)
from test_prompt import LOCAL, batch_of, texts
from told import check_past_tasks, watched

from jaxcl.core.between import Between
from jaxcl.core.til import NO_TASK
from jaxcl.data.pipeline import batches
from jaxcl.errors import RequestError
from jaxcl.methods.lora import lora
from jaxcl.methods.prefix_tuning import prefix_tuning
from jaxcl.methods.tasks import live
from jaxcl.models.attention import Part, attend
from jaxcl.models.decoder import head
from jaxcl.models.layout import axes
from jaxcl.models.prefix import MAP, NAMES
from jaxcl.surgery.prefixes import collapsed

RNG = np.random.default_rng(0)
SPECS = {
    "plain": SPEC,
    "stacked": dataclasses.replace(SPEC, segments=STACK),
    "remat": dataclasses.replace(SPEC, remat="block"),
    "normed": dataclasses.replace(SPEC, qk_norm="head"),
}


def begun(method, spec=SPEC, n=2, **kw) -> Between:
    between = Between(experiment([method], spec=spec, n=n, **kw), lambda: None)
    between.begin(0)
    return between


def keys_of(params) -> dict:
    return {k: params[k] for k in live(params, NAMES)}


def text(length: int) -> np.ndarray:
    """The first tokens of the stage, in the order in which its rows are given to a method that asks for all of them."""
    world = begun(prefix_tuning(length=1, start="random", hidden=0)).world
    batch = next(world.tools.batches(0))
    return np.asarray(batch["tokens"])[np.asarray(batch["segments"]) > 0][:length]


def test_attention_is_the_mixture_of_both_by_the_mass_of_the_prefix():
    b, t, p, h, g, d = 2, 5, 3, 4, 2, 6
    q, k, v = RNG.normal(size=(b, t, h, d)), RNG.normal(size=(b, t, g, d)), RNG.normal(size=(b, t, g, d))
    pk, pv = RNG.normal(size=(2, b, p, g, d))
    mask = np.broadcast_to(np.tril(np.ones((t, t), bool)), (b, t, t))
    seen = np.ones((b, t, p), bool)

    def scores(keys, mask):
        s = np.einsum("bthd,bshd->bhts", q, np.repeat(keys, h // g, axis=2)) / np.sqrt(d)
        return np.where(mask[:, None], np.exp(s), 0.0)

    def mixed(e, values):
        return np.einsum("bhts,bshd->bthd", e / e.sum(-1, keepdims=True), np.repeat(values, h // g, axis=2))

    own, more = scores(k, mask), scores(pk, seen)
    w = (more.sum(-1) / (more.sum(-1) + own.sum(-1))).transpose(0, 2, 1)[..., None]
    want = (1 - w) * mixed(own, v) + w * mixed(more, pv)
    j = [jnp.asarray(x, jnp.float32) for x in (q, k, v, pk, pv)]
    got = attend(j[0], [Part(j[1], j[2], mask), Part(j[3], j[4], seen)])
    np.testing.assert_allclose(got, want, atol=1e-5)
    hidden = attend(j[0], [Part(j[1], j[2], mask), Part(j[3], j[4], ~seen)])
    np.testing.assert_allclose(hidden, mixed(own, v), atol=1e-5)


@pytest.mark.parametrize("name", SPECS)
def test_a_prefix_of_text_is_this_text_before_every_row(name):
    spec = SPECS[name]
    world = begun(prefix_tuning(length=4, hidden=0), spec).world
    rows = texts()
    words = np.concatenate([np.broadcast_to(text(4), (len(rows), 4)), rows], axis=1)
    taps = ("layers/1/mlp/down:in", "layers/0:out")
    got = forward(spec, world.params, batch_of(rows), taps=taps)
    want = forward(spec, weights(spec), batch_of(words), taps=taps)
    np.testing.assert_allclose(got.hidden, want.hidden[:, 4:], atol=2e-5)
    np.testing.assert_allclose(got.nll[:, 1:], want.nll[:, 5:], atol=2e-5)
    assert got.nll.shape == rows.shape and got.taps[taps[0]].shape == (*rows.shape, SPEC.mlp)
    for tap in taps:
        np.testing.assert_allclose(got.taps[tap], want.taps[tap][:, 4:], atol=2e-5)


def test_layers_with_windows_see_the_whole_prefix_and_turn_keys_at_their_own_rate():
    """Two tokens behind three words, within the window of four: words and prefix are the same."""
    world = begun(prefix_tuning(length=3, hidden=0), LOCAL).world
    rows = texts(2, 1)
    words = np.concatenate([np.broadcast_to(text(3), (2, 3)), rows], axis=1)
    want = forward(LOCAL, weights(LOCAL), batch_of(words)).hidden[:, 3:]
    np.testing.assert_allclose(forward(LOCAL, world.params, batch_of(rows)).hidden, want, atol=2e-5)
    far = batch_of(texts(1, 9))
    low = forward(LOCAL, world.params, far).hidden[:, -1]
    changed = {k: v * 0 if k == "layers/0/attn/prefix_v" else v for k, v in world.params.items()}
    assert np.abs(forward(LOCAL, changed, far).hidden[:, -1] - low).max() > 1e-3


def test_no_rows_are_the_bare_model_and_zeros_are_not():
    params, batch = weights(), batch_of(texts())
    plain = forward(SPEC, params, batch).hidden
    kv = SPEC.kv_heads * SPEC.head_dim
    for length, equal in ((0, True), (2, False)):
        zeros = {f"layers/{i}/attn/{n}": jnp.zeros((length, kv)) for i in range(2) for n in NAMES}
        assert np.array_equal(forward(SPEC, params | zeros, batch).hidden, plain) == equal
    closed = {f"layers/{i}/attn/prefix_open": np.array([True, False]) for i in range(2)}
    got = forward(SPEC, params | zeros | closed, batch).hidden
    np.testing.assert_allclose(got[1], plain[1], atol=1e-6)
    assert np.abs(got[0] - plain[0]).max() > 1e-4


@pytest.mark.parametrize("name", ["plain", "stacked"])
def test_decoding_with_a_cache_equals_the_whole_forward_pass(name):
    spec = SPECS[name]
    params = begun(prefix_tuning(length=3, hidden=0), spec).world.params
    rows = texts(2, 6)
    made, _ = written(spec, params, rows, np.array([6, 6]), max_new=4, stop_ids=())
    whole = np.concatenate([rows, made], axis=1)
    at = np.broadcast_to(np.arange(5, 9), (2, 4))
    logits = head(spec, params, forward(spec, params, batch_of(whole)).hidden, at)
    assert np.array_equal(np.argmax(logits, axis=-1), made)
    cache = filled(spec, params, batch_of(rows), 6)
    assert cache["valid"].shape == (2, 6), "a prefix is in no cache"
    block = batch_of(whole[:, 5:8]) | {"targets_at": np.array([[1, 2]] * 2, np.int32)}
    block["positions"] = block["positions"] + 5
    out = asked(spec, params, block, cache)
    np.testing.assert_allclose(out.nll, forward(spec, params, batch_of(whole)).nll[:, 6:8], atol=1e-5)


@pytest.mark.parametrize("name", ["plain", "stacked"])
def test_the_network_against_numpy_and_collapsed(name):
    spec = SPECS[name]
    params = dict(begun(prefix_tuning(length=3, hidden=5), spec).world.params)
    batch, bare = batch_of(texts()), forward
    same_as_text = {k: v for k, v in params.items() if "prefix_map" not in k and not k.startswith("prefix/")}
    assert np.array_equal(bare(spec, params, batch).hidden, bare(spec, same_as_text, batch).hidden), "adds nothing yet"
    for k in params:
        if "prefix" in k:
            params[k] = jnp.asarray(RNG.normal(size=params[k].shape), jnp.float32)
    made = params | collapsed(params)
    np.testing.assert_allclose(bare(spec, made, batch).hidden, bare(spec, params, batch).hidden, atol=2e-5)
    assert not any(np.any(made[k]) for k in made if k.rpartition("/")[2] in MAP)
    p = to_numpy(params)
    hidden = np.tanh(p["prefix/rows"] @ p["prefix/in"] + p["prefix/in_bias"])
    for k in keys_of(params):
        site, n = k.rpartition("/")[0], NAMES.index(k.rpartition("/")[2])
        kernel, bias = p[site + "/prefix_map"][..., n, :], p[site + "/prefix_map_bias"][..., n, :]
        np.testing.assert_allclose(made[k], p[k] + hidden @ kernel + bias[..., None, :], rtol=1e-4, atol=1e-5)


def test_what_trains_and_how_large_it_is(tmp_path):
    kv = SPEC.kv_heads * SPEC.head_dim
    world = begun(prefix_tuning(length=4, hidden=0, start="random")).world
    assert world.trained == set(keys_of(world.params)) and len(world.trained) == 2 * SPEC.layers
    assert all(v.shape == (4, kv) and 0.01 < np.std(v) < 0.03 for v in keys_of(world.params).values())
    done = run([prefix_tuning(length=4, hidden=5), lora(rank=2, alpha=4.0, dropout=0.0)], tmp_path / "out", n=2, pack=2)
    free = {k for k in done.loop.now.world.trained if "lora" not in k}
    maps = {f"layers/{i}/attn/{n}" for i in range(2) for n in MAP}
    assert free == {"prefix/rows", "prefix/in", "prefix/in_bias", *maps}
    first = begun(prefix_tuning(length=4, hidden=5)).world.params
    assert done.compilations == 1 and not any(done.params[k].any() for k in maps)
    assert all(not np.array_equal(done.params[k], first[k]) for k in keys_of(first)), "collapsed into them"
    named = axes(SPEC, {**first, "layers/0/attn/prefix_k_bank": np.zeros((2, 4, kv))})
    assert named["layers/0/attn/prefix_v"] == (None, "kv") == named["layers/0/attn/prefix_k_bank"][1:]


@pytest.fixture(scope="module", params=[0, 5], ids=["keys", "network"])
def told(request, tmp_path_factory):
    method = prefix_tuning(length=3, hidden=request.param, per_task=True, max_stages=2)
    return watched([method], tmp_path_factory.mktemp("told") / "out")


def test_outputs_of_past_tasks_are_bit_identical_while_the_bank_has_room(told):
    check_past_tasks(told)


def test_rows_of_one_batch_have_their_own_prefixes(told):
    done, _ = told
    world, own = done.loop.now.world, done.loop.now.owns["prefix_tuning"]
    batch = next(batches(Answers("x", 4, seed=9), None, 4))
    tasks = np.array([1, NO_TASK, 2, 0], np.int32)
    model = prefix_tuning(per_task=True).wrap(MODEL.apply, own, None)
    got = model(world.spec, world.params, {**batch, "task_id": tasks}).nll
    for row, task in enumerate(tasks):
        slots = {k: [*done.params[k + "_bank"][:2], done.params[k]] for k in keys_of(done.params)}
        prefix = {k: found[task] for k, found in slots.items()} if task >= 0 else {}
        one = {k: v[row : row + 1] for k, v in batch.items()}
        np.testing.assert_allclose(got[row : row + 1], forward(SPEC, weights() | prefix, one).nll, atol=1e-5)


def test_a_task_may_begin_with_the_prefix_of_the_one_before():
    for start, kept in (("previous", True), ("random", False)):
        between = begun(prefix_tuning(length=3, hidden=0, per_task=True, start=start))
        before = keys_of(between.world.params)
        between.end()
        between.begin(1)
        now = between.world.params
        assert all(np.array_equal(now[k], v) == kept for k, v in before.items())
        assert all(np.array_equal(now[k + "_bank"][0], v) for k, v in before.items())


@pytest.mark.parametrize(
    "arguments,words",
    [
        ({"length": 0}, "length is 0; accepted: a whole number of at least 1"),
        ({"length": 65}, r"a prefix of 65 tokens of text; accepted: up to 64 \(context\)"),
        ({"start": "txt"}, "unknown start 'txt' in prefix_tuning; did you mean 'text'"),
        ({"hidden": -1}, r"hidden is -1; accepted: 0 \(no network\) or more"),
        ({"max_stages": 0}, "max_stages is 0"),
    ],
)
def test_bad_arguments(arguments, words):
    with pytest.raises(RequestError, match=words):
        begun(prefix_tuning(**{"length": 3} | arguments))


def test_one_prefix_a_model_and_told_tasks_that_fit():
    small = {"length": 3, "hidden": 0, "start": "random"}
    with pytest.raises(RequestError, match="'prefix_tuning' and 'again' do not go together"):
        two = [prefix_tuning(**small), prefix_tuning(**small, name="again")]
        Between(experiment(two), lambda: None).begin(0)
    untold = dataclasses.replace(experiment([prefix_tuning(**small, per_task=True)]), stages=stages(2))
    with pytest.raises(RequestError, match="needs to be told the task"):
        Between(untold, lambda: None).begin(0)
    between = begun(prefix_tuning(**small, per_task=True, max_stages=1, grow=False))
    with pytest.raises(RequestError, match="task 2 exceeds max_stages=1"):
        between.begin(1)
