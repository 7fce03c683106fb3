"""LoRA experts: the card's invariants, against numpy and LoRA's own keys, and runs that open, freeze and make room."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import MODEL, SPEC, STACK, Answers, experiment, forward, run, same, to_numpy, unstacked, weights

from jaxcl.core.between import Between
from jaxcl.data.pipeline import batches
from jaxcl.errors import RequestError
from jaxcl.methods.lora import lora
from jaxcl.methods.lora_experts import lora_experts, most_used, uneven
from jaxcl.methods.prompt_tuning import prompt_tuning
from jaxcl.methods.replay import replay
from jaxcl.models.export_hf import merged
from jaxcl.models.layout import axes
from jaxcl.models.t5 import t5
from jaxcl.models.t5_spec import tiny_t5

RNG = np.random.default_rng(0)
SMALL = {"rank": 2, "alpha": 4.0, "dropout": 0.0, "targets": ("mlp/down",)}
SITE, OTHER = "layers/1/mlp/down", "layers/0/mlp/down"


@pytest.fixture(scope="module")
def batch():
    return next(batches(Answers("s", 4, seed=1), None, 4))


def begun(method, spec=SPEC, **kw):
    between = Between(experiment([method], spec=spec, n=2, **kw), lambda: None)
    between.begin(0)
    return between


def filled(params: dict, seed: int = 0) -> dict:
    """Random A, B and routers; which experts are open stays."""
    draw = np.random.default_rng(seed)
    parts = ("/expert_a", "/expert_b", "/expert_router", "/expert_router_old")
    return params | {
        k: jnp.asarray(draw.normal(size=params[k].shape), jnp.float32) for k in sorted(params) if k.endswith(parts)
    }


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def by_hand(params: dict, site: str):
    """The site's output in numpy, as an injection."""
    p = to_numpy({k.rpartition("/")[2]: v for k, v in params.items() if k.startswith(site)})

    def output(x, y):
        gates = jax.nn.softmax(x @ p["expert_router"].T + p["expert_bias"])
        for e in range(len(p["expert_bias"])):
            y = y + gates[..., e, None] * p["expert_scale"] * ((x @ p["expert_a"][e].T) @ p["expert_b"][e].T)
        return y, {}

    return output


def test_a_site_gives_the_mixture_of_its_open_experts(batch):
    params = filled(begun(lora_experts(first=3, max_experts=5, **SMALL)).world.params)
    assert params[SITE + "/expert_a"].shape == (5, 2, SPEC.mlp)
    inject = {site: by_hand(params, site) for site in (SITE, OTHER)}
    want = MODEL.apply(SPEC, weights(), batch, inject=inject)
    np.testing.assert_allclose(forward(SPEC, params, batch).nll, want.nll, atol=1e-4)
    assert np.abs(want.nll - forward(SPEC, weights(), batch).nll).max() > 0.05


def test_one_expert_is_lora_and_equal_gates_are_the_mean_of_all(batch):
    one = filled(begun(lora_experts(max_experts=1, **SMALL)).world.params)
    plain = weights() | {
        f"{s}/lora_{x}": one[f"{s}/expert_{x}"].reshape(one[f"{s}/expert_{x}"].shape[1:] if x != "scale" else ())
        for s in (SITE, OTHER) for x in ("a", "b", "scale")
    }  # fmt: skip
    np.testing.assert_allclose(forward(SPEC, one, batch).nll, forward(SPEC, plain, batch).nll, atol=1e-5)

    many = filled(begun(lora_experts(first=3, max_experts=4, **SMALL)).world.params)
    many |= {k: v * 0 for k, v in many.items() if k.endswith("/expert_router")}
    mean = dict(weights())
    for s in (SITE, OTHER):
        a, b = (np.asarray(many[f"{s}/expert_{x}"])[:3] for x in "ab")
        mean[s + "/kernel"] = mean[s + "/kernel"] + 2.0 * sum(ai.T @ bi.T for ai, bi in zip(a, b, strict=True)) / 3
    np.testing.assert_allclose(forward(SPEC, many, batch).nll, forward(SPEC, mean, batch).nll, atol=1e-4)


def test_experts_change_no_bit_at_first_and_their_order_does_not_matter(batch):
    params = begun(lora_experts(first=3, max_experts=4)).world.params
    before, after = (forward(SPEC, p, batch) for p in (weights(), params))
    assert np.array_equal(before.hidden, after.hidden) and np.array_equal(before.nll, after.nll)
    params = filled(params)
    turned = dict(params)
    for key in params:
        if "/expert_" in key and params[key].ndim and not key.endswith("_scale"):
            turned[key] = params[key][jnp.asarray([2, 3, 0, 1])]
    np.testing.assert_allclose(forward(SPEC, turned, batch).nll, forward(SPEC, params, batch).nll, atol=1e-4)


def test_closed_experts_have_no_gate_and_no_gradient(batch):
    params = filled(begun(lora_experts(first=2, max_experts=4, **SMALL)).world.params)
    mass = forward(SPEC, params, batch).aux[SITE]["experts/mass"]
    assert not np.any(mass[:, 2:]) and np.all(mass[:, :2] > 0)
    grads = jax.grad(lambda p: jnp.sum(MODEL.apply(SPEC, p, batch).nll))(params)
    for part in ("a", "b", "router"):
        found = np.asarray(grads[f"{SITE}/expert_{part}"])
        assert not found[2:].any() and all(np.abs(one).max() > 0 for one in found[:2])


def test_gates_are_summed_over_a_rows_tokens_without_padding_or_prompt(batch):
    methods = [prompt_tuning(length=3), lora_experts(first=2, max_experts=2, **SMALL)]
    for chosen in (methods[1:], methods):
        between = Between(experiment(chosen, n=2), lambda: None)
        between.begin(0)
        world = between.world
        params, tap = filled(world.params), SITE + ":in"
        params |= {f"{SITE}/expert_bias_old": jnp.asarray([0.0, -jnp.inf])}
        out = MODEL.apply(world.spec, params, batch, taps=(tap,))
        x, real = np.asarray(out.taps[tap]), np.asarray(batch["segments"]) > 0
        p = to_numpy(params)
        gates, old = (softmax(x @ p[f"{SITE}/expert_router{w}"].T + p[f"{SITE}/expert_bias{w}"]) for w in ("", "_old"))
        want = np.stack([g[r].sum(0) for g, r in zip(gates, real, strict=True)])
        np.testing.assert_allclose(out.aux[SITE]["experts/mass"], want, rtol=2e-4)
        np.testing.assert_allclose(out.aux[SITE]["experts/mass"].sum(1), real.sum(1), rtol=1e-5)
        apart = np.where(old > 0, old * (np.log(np.maximum(old, 1e-30)) - np.log(gates)), 0).sum(-1)
        want = np.array([a[r].sum() for a, r in zip(apart, real, strict=True)])
        np.testing.assert_allclose(out.aux[SITE]["experts/drift"], want, rtol=1e-3)


def test_balance_is_the_squared_coefficient_of_variation():
    mass, open_ = RNG.uniform(1, 5, (6, 4)).astype(np.float32), np.array([True, True, True, False])
    entries = mass[:, :3]
    np.testing.assert_allclose(uneven(mass, open_), entries.var(ddof=1) / entries.mean() ** 2, rtol=1e-5)
    assert float(uneven(np.full((6, 4), 2.5, np.float32), open_)) == 0
    assert float(uneven(np.tile([[1.0, 2.0, 1.0, 0.0]], (6, 1)), open_)) > 0
    padded = np.concatenate([mass, np.zeros((2, 4), np.float32)])  # rows without a token
    np.testing.assert_allclose(uneven(padded, open_), uneven(mass, open_), rtol=1e-6)
    two = np.stack([mass, mass + 1])
    want = sum(e.var(ddof=1) / e.mean() ** 2 for e in (entries, entries + 1))
    np.testing.assert_allclose(uneven(two, np.stack([open_] * 2)), want, rtol=1e-5)


def test_what_was_used_most_and_still_trains_is_frozen():
    bias = jnp.asarray([0, 0, 0, -np.inf], jnp.float32)
    mass = jnp.asarray([3.0, 9.0, 5.0, 99.0])
    once = most_used(mass, jnp.zeros(4), bias)
    assert once.tolist() == [0, 1, 0, 0] and most_used(mass, once, bias).tolist() == [0, 1, 1, 0]
    full = jnp.asarray([1.0, 1.0, 1.0, 0.0])
    assert most_used(mass, full, bias).tolist() == full.tolist()


@pytest.fixture(scope="module", params=[(), STACK], ids=["layers", "stacked"])
def trained(request, tmp_path_factory):
    """Three stages from two experts on, with replay, balance, weight decay and room for three."""
    spec, seen = dataclasses.replace(SPEC, segments=request.param), []

    method = lora_experts(first=2, max_experts=3, balance=0.1, **SMALL)
    tx = optax.chain(optax.add_decayed_weights(0.01), optax.sgd(0.05, momentum=0.9))

    def kept(world, own):
        seen.append((to_numpy(unstacked(world.params, world.spec)), to_numpy(own["fixed"]["frozen"])))
        return ended(world, own)

    ended = method.end
    methods = [replay(ratio=0.5), dataclasses.replace(method, end=kept)]
    done = run(methods, tmp_path_factory.mktemp("run") / "out", spec=spec, tx=tx, n=3)
    return done, seen


def frozen_of(table: dict, site: str) -> np.ndarray:
    """A layer's row of the method's table, however it is stacked."""
    key = site + "/expert_bias"
    return table[key] if key in table else table["layers/0:2:1/mlp/down/expert_bias"][int(site.split("/")[1])]


def test_a_frozen_expert_stays_bit_for_bit_and_a_new_one_opens_with_every_stage(trained):
    done, seen = trained
    assert done.compilations == 2  # the bank doubled before the last stage
    for site in (SITE, OTHER):
        for stage, (params, table) in enumerate(seen):
            assert np.isfinite(params[site + "/expert_bias"]).sum() == 2 + stage
            assert frozen_of(table, site).sum() == stage, "one more after each stage"
            for e in np.flatnonzero(frozen_of(table, site)):
                for part in ("a", "b"):
                    key = f"{site}/expert_{part}"
                    assert np.array_equal(params[key][e], seen[stage - 1][0][key][e])
        last, before = (seen[i][0] for i in (2, 1))
        key, free = site + "/expert_b", [e for e in range(3) if not frozen_of(seen[2][1], site)[e]]
        assert free and not any(np.array_equal(last[key][e], before[key][e]) for e in free)
    assert {"lora_experts/balance", "lora_experts/router"} <= done.log[-1].keys()
    of_stage = [[r["lora_experts/router"] for r in done.log if r["stage"] == stage] for stage in (0, 2)]
    assert not any(of_stage[0]) and min(of_stage[1]) > 0


def test_making_room_keeps_the_function(batch):
    between = begun(lora_experts(first=2, max_experts=2, **SMALL))
    between.world = between.world._replace(params=filled(between.world.params))
    before = forward(SPEC, between.world.params, batch).nll
    between.end()
    between.begin(1)
    params = between.world.params
    assert params[SITE + "/expert_b"].shape[0] == 4 and not np.any(params[SITE + "/expert_b"][2:])
    assert np.abs(params[SITE + "/expert_a"][2:]).max() > 0
    closed = {k: v.at[2:].set(-jnp.inf) for k, v in params.items() if k.endswith("/expert_bias")}
    np.testing.assert_allclose(forward(SPEC, params | closed, batch).nll, before, atol=1e-6)


def test_axes_export_and_t5(batch):
    stacked = dataclasses.replace(SPEC, segments=STACK)
    named = axes(stacked, begun(lora_experts(first=2, max_experts=3, **SMALL), stacked).world.params)
    stack = "layers/0:2:1/mlp/down/expert_"
    assert named[stack + "a"] == (None, None, None, "mlp") and named[stack + "b"] == (None, None, "embed", None)
    assert named[stack + "router_old"] == (None, None, "mlp") and named[stack + "bias"] == (None, None)
    with pytest.raises(RequestError, match="no Hugging Face model"):
        merged(SPEC, to_numpy(begun(lora_experts(**SMALL)).world.params))
    spec = tiny_t5(vocab=32, layers=1, width=16, heads=2)
    start = t5(spec).init(spec, jax.random.key(0))
    method = lora_experts(**SMALL | {"targets": ("mlp/down", "decoder/layers/0/cross/attn/[kv]")})
    params = filled(begun(method, spec=spec, params=start).world.params)
    aux = t5(spec).apply(spec, params, {k: v for k, v in batch.items() if k not in ("row", "stage", "source")}).aux
    read = {site: np.asarray(found["experts/mass"]).sum(1) for site, found in aux.items()}
    lengths = read["encoder/layers/0/mlp/down"]
    np.testing.assert_allclose(read["decoder/layers/0/cross/attn/k"], lengths, rtol=1e-5)
    assert len(read) == 4 and (read["decoder/layers/0/mlp/down"] < lengths).all()


def test_bad_values_are_refused():
    for wrong in ({"first": 0}, {"first": 3, "max_experts": 2}, {"balance": -1.0}, {"keep": -0.1}):
        with pytest.raises(RequestError, match="accepted: 1 <= first <= max_experts, balance >= 0, keep >= 0"):
            lora_experts(**wrong)
    with pytest.raises(RequestError, match="rank 99 at"):
        begun(lora_experts(rank=99))
    with pytest.raises(RequestError, match="names no dense site"):
        begun(lora_experts(targets=("mlp/dwn",)))
    with pytest.raises(RequestError, match="dropout is 1"):
        begun(lora_experts(dropout=1.0))
    between = begun(lora_experts(max_experts=1, grow=False, **SMALL))
    between.end()
    with pytest.raises(RequestError, match="expert 2 exceeds max_experts=1"):
        between.begin(1)


def test_experts_go_beside_lora(tmp_path):
    done = run([lora(rank=2), lora_experts(**SMALL)], tmp_path / "out", n=2)
    assert {k.rpartition("/")[2] for k in done.loop.now.world.trained} >= {"lora_a", "expert_a"}
    start = to_numpy(weights())
    assert all(np.array_equal(done.params[k], v) for k, v in start.items())


def test_a_stack_begins_as_single_layers_do():
    spec = dataclasses.replace(SPEC, segments=STACK)
    stacked, single = (begun(lora_experts(**SMALL), s).world for s in (spec, SPEC))
    assert same(unstacked(stacked.params, spec), to_numpy(single.params))
