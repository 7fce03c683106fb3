"""LoRA and its continual forms: the arithmetic of adapters, banks and merging against numpy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import MODEL, SPEC, STACK, Answers, experiment, run, to_numpy, weights

from jaxcl.core.between import Between
from jaxcl.data.pipeline import batches
from jaxcl.errors import KeyTaken, RequestError
from jaxcl.methods.inclora import inclora
from jaxcl.methods.lora import lora, lora_scale
from jaxcl.models.stacking import restack
from jaxcl.surgery.adapters import add_bank, add_lora, delta, fresh_a, merge, to_bank, zero_b

Q, V = "layers/0/attn/q", "layers/1/attn/v"
rng = np.random.default_rng(0)


@pytest.fixture(scope="module")
def batch():
    return next(batches(Answers("s", 8, seed=1), None, 8))


@pytest.fixture(scope="module")
def hidden(batch):
    """Hidden states under any parameters."""
    return jax.jit(lambda params: MODEL.apply(SPEC, params, batch).hidden)


def filled(params: dict, seed: int = 0) -> dict:
    """Adapters with random numbers in B too."""
    draw = np.random.default_rng(seed)
    adapters = [k for k in params if k.endswith(("_a", "_b"))]
    return params | {k: jnp.asarray(draw.normal(size=params[k].shape), jnp.float32) for k in adapters}


def test_kaiming_uniform_and_zero():
    params = {"layers/0/mlp/up/kernel": jnp.zeros((400, 30))}
    site, bound = "layers/0/mlp/up", 1 / np.sqrt(400)
    a = np.asarray(fresh_a(params, [site], 50, jax.random.key(0))[site + "/lora_a"])
    assert a.shape == (50, 400) and np.abs(a).max() <= bound and np.abs(a).max() > 0.99 * bound
    np.testing.assert_allclose(a.std(), bound / np.sqrt(3), rtol=0.02)
    assert abs(a.mean()) < 4 * bound / np.sqrt(3) / np.sqrt(a.size)
    assert not np.asarray(zero_b(params, [site], 50)[site + "/lora_b"]).any()


def test_every_site_and_layer_draws_its_own_numbers_however_it_is_stacked():
    one, key = weights(), jax.random.key(5)
    stack = restack(one, SPEC, STACK)[0]
    a = fresh_a(one, [f"layers/{i}/attn/{s}" for i in range(2) for s in "qv"], 2, key)
    b = fresh_a(stack, [f"layers/0:2:1/attn/{s}" for s in "qv"], 2, key)
    assert len({v.tobytes() for v in to_numpy(a).values()}) == 4
    for s in "qv":
        for i in range(2):
            assert np.array_equal(b[f"layers/0:2:1/attn/{s}/lora_a"][i], a[f"layers/{i}/attn/{s}/lora_a"])


def test_a_fresh_adapter_changes_no_bit(hidden):
    params = weights()
    fresh = add_lora(params, [Q, V], 2, 2.0, jax.random.key(0))
    assert np.array_equal(hidden(fresh), hidden(params))
    assert np.array_equal(hidden(add_bank(fresh, [Q, V], 3)), hidden(params))


def test_merged_and_unmerged_agree_and_unmerging_restores(hidden):
    base = weights()
    params = add_lora(base, [Q, V], 2, 0.5, jax.random.key(0))
    params = filled(add_bank(params, [Q, V], 2))
    whole = merge(params, [Q, V])
    assert whole.keys() == base.keys()
    np.testing.assert_allclose(hidden(whole), hidden(params), rtol=1e-4, atol=1e-5)
    assert not np.allclose(hidden(whole), hidden(base), atol=1e-2)
    for s in (Q, V):
        back = whole[s + "/kernel"] - delta(params, s, "bank") - delta(params, s, "lora")
        np.testing.assert_allclose(back, base[s + "/kernel"], atol=1e-5)
    with pytest.raises(RequestError, match="bfloat16 loses small deltas"):
        merge({k: v.astype(jnp.bfloat16) for k, v in params.items()}, [Q])




def test_deltas_against_numpy_and_their_rank():
    params = filled(add_bank(add_lora(weights(), [Q], 2, 0.5, jax.random.key(0)), [Q], 3))
    p = to_numpy(params)
    live = 0.5 * (p[Q + "/lora_b"] @ p[Q + "/lora_a"]).T
    np.testing.assert_allclose(delta(params, Q), live, rtol=1e-5)
    bank = sum(0.5 * (p[Q + "/bank_b"][s] @ p[Q + "/bank_a"][s]).T for s in range(3))
    np.testing.assert_allclose(delta(params, Q, "bank"), bank, rtol=1e-4, atol=1e-6)
    change = np.asarray(merge(params, [Q])[Q + "/kernel"] - weights()[Q + "/kernel"], np.float64)
    assert np.linalg.matrix_rank(change, tol=1e-4) == 4 * 2 <= min(change.shape)


def test_the_concatenated_form_equals_the_sum():
    """[B_1 B_2 B_3][A_1; A_2; A_3] x with the scale of one adapter."""
    params = filled(add_bank(add_lora(weights(), [Q], 2, 0.5, jax.random.key(0)), [Q], 3))
    p = to_numpy(params)
    a = np.concatenate(list(p[Q + "/bank_a"]))
    b = np.concatenate(list(p[Q + "/bank_b"]), axis=1)
    assert a.shape == (6, 16) and b.shape[1] == 6
    np.testing.assert_allclose(delta(params, Q, "bank"), 0.5 * (b @ a).T, rtol=1e-4, atol=1e-6)


def test_stacked_sites_merge_layer_by_layer():
    one = filled(add_bank(add_lora(weights(), ["layers/0/attn/q", "layers/1/attn/q"], 2, 0.5, jax.random.key(0)),
                          ["layers/0/attn/q", "layers/1/attn/q"], 2))  # fmt: skip
    stack = restack(one, SPEC, STACK)[0]
    merged = merge(stack, ["layers/0:2:1/attn/q"])
    for i in range(2):
        want = merge(one, [f"layers/{i}/attn/q"])[f"layers/{i}/attn/q/kernel"]
        np.testing.assert_allclose(merged["layers/0:2:1/attn/q/kernel"][i], want, rtol=1e-6)


def test_a_full_bank_doubles_and_keeps_what_it_has():
    params = filled(add_bank(add_lora(weights(), [Q], 2, 0.5, jax.random.key(0)), [Q], 2))
    grown = to_bank(params, [Q], 2)
    assert grown[Q + "/bank_a"].shape[0] == 4
    assert np.array_equal(grown[Q + "/bank_a"][:2], params[Q + "/bank_a"])
    assert np.array_equal(grown[Q + "/bank_b"][2], params[Q + "/lora_b"]) and not grown[Q + "/bank_b"][3].any()


def test_a_new_stage_starts_where_the_last_one_ended(hidden):
    """The live adapter moves into the bank: the same function, bit by bit the same old rows."""
    b = Between(experiment([inclora(rank=2, alpha=4.0, dropout=0.0, max_stages=3)], n=3), lambda: None)
    b.begin(0)
    for stage in (1, 2):
        live = {k: v for k, v in filled(b.world.params, seed=stage).items() if "/lora_" in k}
        b.world = b.world._replace(params=b.world.params | live)
        before, old = hidden(b.world.params), to_numpy(b.world.params)
        b.end()
        b.begin(stage)
        np.testing.assert_allclose(hidden(b.world.params), before, rtol=1e-5, atol=1e-5)
        new = to_numpy(b.world.params)
        for s in ("layers/0/attn/q", "layers/1/attn/v"):
            assert np.array_equal(new[s + "/bank_a"][stage - 1], old[s + "/lora_a"])
            assert np.array_equal(new[s + "/bank_b"][: stage - 1], old[s + "/bank_b"][: stage - 1])
            assert not new[s + "/bank_a"][stage:].any() and not new[s + "/lora_b"].any()
            assert not np.array_equal(new[s + "/lora_a"], old[s + "/lora_a"])


def test_merging_at_the_end_keeps_the_function(hidden):
    b = Between(experiment([lora(rank=2, alpha=4.0, dropout=0.0, merged=True)], n=2), lambda: None)
    b.begin(0)
    b.world = b.world._replace(params=filled(b.world.params))
    keys, before = b.world.params.keys(), hidden(b.world.params)
    b.end()
    np.testing.assert_allclose(hidden(b.world.params), before, rtol=1e-4, atol=1e-5)
    assert b.world.params.keys() == keys, "nothing grows"


def test_with_one_task_incremental_lora_is_lora(tmp_path):
    same = {"rank": 2, "alpha": 4.0, "dropout": 0.1}
    one = run([lora(**same)], tmp_path / "lora", n=1)
    inc = run([inclora(max_stages=3, **same)], tmp_path / "inc", n=1)
    np.testing.assert_allclose(inc.losses(), one.losses(), rtol=1e-6)
    live = [k for k in one.params if "/lora_" in k]
    for k in live:
        np.testing.assert_allclose(inc.params[k], one.params[k], rtol=1e-4, atol=1e-6)


def test_scale():
    assert lora_scale(8, 32.0, False) == 4.0 and lora_scale(16, 32.0, True) == 8.0


@pytest.mark.parametrize(
    "arguments,words",
    [
        ({"rank": 0}, "rank 0"),
        ({"alpha": -1.0}, "alpha -1"),
        ({"rank": 9}, "rank 9 at 'layers/0/attn/q'.*1 to 8"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"targets": ("attn/query",)}, "'attn/query' names no dense site"),
    ],
)
def test_bad_arguments(arguments, words):
    with pytest.raises(RequestError, match=words):
        Between(experiment([lora(**{"rank": 2, "dropout": 0.0} | arguments)]), lambda: None).begin(0)


def test_a_site_takes_one_adapter():
    params = add_lora(weights(), [Q], 2, 1.0, jax.random.key(0))
    with pytest.raises(KeyTaken, match="has an adapter already") as error:
        add_lora(params, [Q], 2, 1.0, jax.random.key(0))
    assert error.value.key == Q + "/lora_a"
