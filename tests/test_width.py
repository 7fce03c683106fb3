"""Width growth: the function is kept where it can be, and memories are what a recomputation would give."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import MODEL, SPEC, Answers

from jaxcl.core.types import World
from jaxcl.data.pipeline import batches
from jaxcl.errors import RequestError
from jaxcl.models.decoder import decoder
from jaxcl.models.layout import layout
from jaxcl.models.stacking import restack
from jaxcl.surgery.adapters import add_bank, add_lora
from jaxcl.surgery.width import Sizes, copies, noisy, sizes, widen

TWO = dataclasses.replace(SPEC, heads=4, kv_heads=2, head_dim=4, mlp=24)
SPECS = {
    "llama": TWO,
    "untied": dataclasses.replace(TWO, tied=False),
    "stacked": dataclasses.replace(TWO, segments=((("block",), 2),)),
    "norms on both sides, biases, norms of heads": dataclasses.replace(
        TWO, norms="both", biases=("attn/q", "attn/k", "attn/v", "attn/o", "mlp/down"), qk_norm="head", embed_scale=4.0
    ),
}
INNER, DOUBLE = Sizes(16, 3, 31), Sizes(32, 4, 48)


def world_of(spec, adapters: bool = False) -> World:
    key = jax.random.key(3)
    params = decoder(spec).init(spec, key)
    if adapters:
        where = [k.removesuffix("/kernel") for k in params if k.endswith(("attn/q/kernel", "mlp/down/kernel"))]
        params = add_bank(add_lora(params, where, 2, 0.5, key), where, 2)
    for n, k in enumerate(sorted(params)):  # no ones and no zeros, so that every divisor is seen
        if k.endswith(("scale", "bias", "lora_b", "bank_a", "bank_b")) and "lora_scale" not in k:
            noise = 0.3 * jax.random.normal(jax.random.fold_in(key, n), params[k].shape)
            params = {**params, k: params[k] + noise}
    return World(spec, params, frozenset(), 0, 0, key, None, {}, ())


def batch_of() -> dict:
    batch = next(batches(Answers("a", 4), None, 4))
    return {k: batch[k] for k in ("tokens", "segments", "positions")}


def nll(spec, params):
    return MODEL.apply(spec, params, batch_of()).nll


@pytest.mark.parametrize("adapters", [False, True], ids=["bare", "with adapters"])
@pytest.mark.parametrize("name", SPECS)
def test_growth_of_heads_and_mlp_keeps_the_function(name, adapters):
    old = world_of(SPECS[name], adapters)
    new = widen(old, INNER, seed=5)
    assert new.edits[0].exact and sizes(new.spec) == INNER and new.spec.heads == 6
    np.testing.assert_allclose(nll(new.spec, new.params), nll(old.spec, old.params), atol=1e-5)
    assert not np.array_equal(new.params.keys(), []) and new.params.keys() == old.params.keys()


@pytest.mark.parametrize("name", SPECS)
def test_as_many_copies_of_every_unit_keep_the_function(name):
    old = world_of(SPECS[name], adapters=True)
    new = widen(old, DOUBLE, even=True)
    assert new.edits[0].exact
    np.testing.assert_allclose(nll(new.spec, new.params), nll(old.spec, old.params), atol=1e-5)


def test_unequal_copies_of_the_stream_are_approximate_and_say_so():
    old = world_of(TWO)
    new = widen(old, Sizes(20, 2, 24), seed=5)
    error = np.abs(nll(new.spec, new.params) - nll(old.spec, old.params)).max()
    assert not new.edits[0].exact and 1e-3 < error < 5.0
    over_width = widen(world_of(dataclasses.replace(TWO, qk_norm="width")), INNER, seed=5)
    assert not over_width.edits[0].exact, "a norm over all heads' units measures copies too"


@pytest.mark.parametrize("name", SPECS)
def test_parameters_are_those_of_the_wider_spec(name):
    old = world_of(SPECS[name])
    new = widen(old, Sizes(20, 3, 31), seed=1)
    single, spec = restack(new.params, new.spec, new.spec.unstacked)
    assert {k: v.shape for k, v in single.items()} == {k: leaf.shape for k, leaf in layout(spec).items()}


def test_the_rule_by_hand():
    """down reads MLP units and writes the stream: W'[i, j] = W[c(i), c(j)] / n(c(i)) of the MLP's copies."""
    old = world_of(TWO)
    new = widen(old, Sizes(20, 2, 31), seed=7)
    edit = new.edits[0]
    origin = edit.moved["layers/1/mlp/down/kernel"]
    rows, columns = origin.index[-2], origin.index[-1]
    assert rows[:24].tolist() == list(range(24)) and len(rows) == 31 and max(rows) == 23
    want = np.asarray(old.params["layers/1/mlp/down/kernel"])[rows][:, columns].copy()
    for i, source in enumerate(rows):
        want[i] /= np.sum(rows == source)
    np.testing.assert_allclose(new.params["layers/1/mlp/down/kernel"], want, rtol=1e-6)
    up = edit.moved["layers/1/mlp/up/kernel"]
    assert np.array_equal(up.index[-1], rows) and np.array_equal(up.index[-2], columns), "one map for all that meet"
    other = edit.moved["layers/0/mlp/up/kernel"].index
    assert np.array_equal(other[-2], columns) and not np.array_equal(other[-1], rows), "MLP units: one map a layer"
    scale = np.asarray(old.params["final_norm/scale"])[columns]
    counts = np.array([np.sum(columns == c) for c in columns])
    np.testing.assert_allclose(new.params["final_norm/scale"], scale / counts, rtol=1e-6)
    assert np.array_equal(new.params["embed/kernel"], np.asarray(old.params["embed/kernel"])[:, columns])


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize(("to", "even"), [(INNER, False), (DOUBLE, True)], ids=["inner", "double"])
def test_gradients_and_fisher_are_carried_to_what_they_are_in_the_wider_model(name, to, even):
    """The Edit against recomputation: autodiff in the grown model."""
    old = world_of(SPECS[name])
    new = widen(old, to, even=even, seed=2)
    grads = [jax.grad(lambda p, w=w: nll(w.spec, p).sum())(w.params) for w in (old, new)]
    carried = new.edits[0].apply(grads[0], "gradient")
    squares = new.edits[0].apply({"task": {k: g**2 for k, g in grads[0].items()}}, "square")["task"]
    for path, want in grads[1].items():
        size = float(jnp.abs(want).max()) + 1e-6
        np.testing.assert_allclose(carried[path] / size, want / size, atol=2e-4, err_msg=path)
        np.testing.assert_allclose(squares[path] / size**2, (want / size) ** 2, atol=4e-4, err_msg=path)


def test_the_gradient_of_a_quadratic_penalty_follows():
    """EWC on the grown model, tables through the Edit: its value for a copied change is that of the old model."""
    old = world_of(TWO)
    new = widen(old, DOUBLE, even=True)
    edit = new.edits[0]
    rng = np.random.default_rng(0)
    fisher = {k: jnp.asarray(rng.uniform(0, 1, v.shape), jnp.float32) for k, v in old.params.items()}
    moved = {k: v + 0.1 * jnp.asarray(rng.normal(size=v.shape), jnp.float32) for k, v in old.params.items()}
    anchor, wide, moved = edit.apply(old.params, "value"), edit.apply(fisher, "square"), edit.apply(moved, "value")
    for path, origin in edit.moved.items():
        # each old entry is there once per pair of copies; its change is divided by the reads, its Fisher by the
        # square of the writes, so the sum over copies is the old term over (reads * writes)
        reads = np.prod([n[0] for n in origin.value.values()] or [1.0])
        writes = np.prod([n[0] for n in origin.gradient.values()] or [1.0])
        total = jnp.sum(wide[path] * (moved[path] - anchor[path]) ** 2)
        step = np.asarray(edit.apply(old.params, "value")[path]) * 0
        assert step.shape == wide[path].shape
        before = jnp.sum(fisher[path] * ((moved_old(moved[path], origin) - old.params[path]) ** 2))
        np.testing.assert_allclose(total, before / (reads * writes), rtol=1e-3)


def moved_old(wide: jax.Array, origin) -> np.ndarray:
    """The old tensor back out of a doubled one: its first entries, times what reading divided by."""
    out = np.asarray(wide)
    for axis, index in origin.index.items():
        out = np.take(out, np.arange(index.max() + 1), axis)
    return out * np.prod([n[0] for n in origin.value.values()] or [1.0])


def test_noise_falls_on_copies_only():
    old = world_of(TWO)
    new = widen(old, Sizes(20, 2, 31), seed=7)
    shaken = noisy(new.params, new.edits[0], jax.random.key(0), 0.01)
    for path, origin in new.edits[0].moved.items():
        change = np.asarray(shaken[path] - new.params[path])
        first = tuple(slice(0, n) for n in old.params[path].shape)
        assert not change[first].any() and change.any() == bool(origin.index)
        assert np.abs(change).max() < 0.06
    assert 0.008 < np.std(np.asarray(shaken["embed/kernel"] - new.params["embed/kernel"])[:, 16:]) < 0.012


def test_copies_in_turn_and_at_random():
    assert copies(3, 7, None).tolist() == [0, 1, 2, 0, 1, 2, 0]
    drawn = copies(8, 1000, np.random.default_rng(0))
    assert drawn[:8].tolist() == list(range(8)) and set(drawn.tolist()) == set(range(8))


def test_what_cannot_be_widened_is_refused():
    with pytest.raises(RequestError, match="width 8 is below the present 16"):
        widen(world_of(TWO), Sizes(8, 2, 24))
    with pytest.raises(RequestError, match="accepted: a DecoderSpec"):
        widen(world_of(TWO)._replace(spec=3), DOUBLE)
    strange = world_of(TWO)
    strange = strange._replace(params={**strange.params, "probe/kernel": jnp.ones((16, 2))})
    with pytest.raises(RequestError, match=r"'probe/kernel' \[16, 2\] cannot be widened"):
        widen(strange, DOUBLE)
