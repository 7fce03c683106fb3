"""(IA)^3: the card's invariants, against factors written into the kernels by hand, and runs of its three forms."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import MODEL, SPEC, STACK, Answers, experiment, forward, run, stages, to_numpy, unstacked, weights
from told import same, watched

from jaxcl.core.between import Between
from jaxcl.core.til import NO_TASK
from jaxcl.data.pipeline import batches
from jaxcl.errors import RequestError
from jaxcl.methods.ia3 import ia3
from jaxcl.methods.lora import lora
from jaxcl.models.export_hf import merged
from jaxcl.models.layout import axes
from jaxcl.surgery.scales import folded

RNG = np.random.default_rng(0)
SITES = {f"layers/{i}/{s}" for i in range(2) for s in ("attn/k/out_delta", "attn/v/out_delta", "mlp/down/in_delta")}


def begun(method, spec=SPEC, n=2) -> Between:
    between = Between(experiment([method], spec=spec, n=n), lambda: None)
    between.begin(0)
    return between


def filled(params: dict, seed: int = 0) -> dict:
    """Deltas with random numbers."""
    draw = np.random.default_rng(seed)
    keys = [k for k in sorted(params) if k.endswith("_delta")]
    return params | {k: jnp.asarray(draw.normal(size=params[k].shape), jnp.float32) for k in keys}


def by_hand(params: dict) -> dict:
    """The kernels and biases with every l = 1 + d in them, in numpy."""
    out = {k: np.asarray(v) for k, v in params.items() if not k.endswith("_delta")}
    for key in (k for k in params if k.endswith("_delta")):
        site, _, name = key.rpartition("/")
        scale = 1 + np.asarray(params[key])
        if name == "in_delta":
            out[site + "/kernel"] = np.diag(scale) @ out[site + "/kernel"]
        else:
            out[site + "/kernel"] = out[site + "/kernel"] @ np.diag(scale)
            if site + "/bias" in out:
                out[site + "/bias"] = scale * out[site + "/bias"]
    return out


@pytest.fixture(scope="module")
def batch():
    return next(batches(Answers("s", 4, seed=1), None, 4))


def test_vectors_of_ones_change_no_bit_and_have_the_sizes_of_the_card(batch):
    between = begun(ia3())
    world = between.world
    assert world.trained == SITES
    kv = SPEC.kv_heads * SPEC.head_dim
    assert all(world.params[k].shape == ((SPEC.mlp if "down" in k else kv),) for k in SITES)
    assert sum(world.params[k].size for k in SITES) == (2 * kv + SPEC.mlp) * SPEC.layers
    before, after = (forward(SPEC, p, batch) for p in (weights(), world.params))
    assert np.array_equal(before.hidden, after.hidden) and np.array_equal(before.nll, after.nll)
    state = optax.adam(1e-3).init({k: world.params[k] for k in world.trained})
    moments = [x.size for x in jax.tree.leaves(state) if x.ndim]
    assert sum(moments) == 2 * (2 * kv + SPEC.mlp) * SPEC.layers


@pytest.mark.parametrize("biases", [(), ("attn/k", "attn/v")], ids=["plain", "biases"])
@pytest.mark.parametrize("segments", [(), STACK], ids=["unstacked", "stacked"])
def test_the_model_is_that_with_the_vectors_in_its_kernels(batch, segments, biases):
    """Biases too: l scales a projection's output."""
    spec = dataclasses.replace(SPEC, segments=segments, biases=biases)
    params = filled(begun(ia3(), spec).world.params)
    params |= {k: jnp.asarray(RNG.normal(size=v.shape), jnp.float32) for k, v in params.items() if k.endswith("bias")}
    got = forward(spec, params, batch).nll
    single = unstacked(params, spec)
    flat = dataclasses.replace(spec, segments=())
    np.testing.assert_allclose(got, forward(flat, by_hand(single), batch).nll, atol=2e-5)
    whole = folded(params, [k for k in params if k.endswith("_delta")])
    assert not any(k.endswith("_delta") for k in whole)
    np.testing.assert_allclose(got, forward(spec, whole, batch).nll, atol=2e-5)
    without = {k: v for k, v in params.items() if k in whole}
    assert np.abs(got - forward(spec, without, batch).nll).max() > 0.1
    exported, _ = merged(spec, params)
    for key, value in by_hand(single).items():
        np.testing.assert_allclose(exported[key], value, rtol=1e-5, atol=1e-6)


def test_what_is_merged_can_be_divided_out_and_a_factor_passed_on():
    params = filled(begun(ia3()).world.params)
    keys = sorted(SITES)
    back = to_numpy(folded(params, keys))
    for key in keys:
        site, scale = key.rpartition("/")[0], 1 + np.asarray(params[key])
        back[site + "/kernel"] = back[site + "/kernel"] / (scale[:, None] if key.endswith("in_delta") else scale)
    for path, value in weights().items():
        np.testing.assert_allclose(back[path], value, rtol=1e-5)


def test_l_times_c_and_the_next_kernel_over_c_is_the_same_function(batch):
    params = begun(ia3()).world.params
    key, kernel = "layers/0/mlp/down/in_delta", "layers/0/mlp/down/kernel"
    moved = params | {key: jnp.full_like(params[key], 3.0), kernel: params[kernel] / 4}
    np.testing.assert_allclose(forward(SPEC, moved, batch).nll, forward(SPEC, params, batch).nll, atol=1e-5)


def test_weight_decay_pulls_the_factors_to_one():
    tx = optax.chain(optax.scale(0.0), optax.add_decayed_weights(0.5), optax.scale(-1.0))  # decay and nothing else
    between = begun(ia3())
    train = {k: filled(between.world.params)[k] for k in between.world.trained}
    updates, _ = tx.update(train, tx.init(train), train)
    for key, update in updates.items():
        np.testing.assert_allclose(1 + train[key] + update, 1 + 0.5 * np.asarray(train[key]), rtol=1e-6)


def test_merged_at_the_end_is_the_same_function_with_vectors_of_ones(batch):
    between = begun(ia3(merged=True))
    between.world = between.world._replace(params=filled(between.world.params))
    before, old = forward(SPEC, between.world.params, batch).nll, between.world.params
    between.end()
    now = between.world.params
    assert now.keys() == old.keys() and not any(np.any(now[k]) for k in SITES)
    np.testing.assert_allclose(forward(SPEC, now, batch).nll, before, atol=2e-5)
    low = {k: v.astype(jnp.bfloat16) if k.endswith("kernel") else v for k, v in old.items()}
    with pytest.raises(RequestError, match="merging into 'layers/0/attn/k/kernel' of bfloat16 loses small changes"):
        ia3(merged=True).end(between.world._replace(params=low), {})


def test_factors_are_sharded_as_the_units_they_scale():
    named = axes(SPEC, begun(ia3(per_task=True)).world.params)
    assert named["layers/0/attn/k/out_delta"] == ("kv",) and named["layers/0/mlp/down/in_delta"] == ("mlp",)
    assert named["layers/0/mlp/down/in_delta_bank"] == (None, "mlp")


def test_it_goes_beside_lora(tmp_path):
    done = run([lora(rank=2, alpha=4.0, dropout=0.0), ia3()], tmp_path / "out", n=1)
    free = done.loop.now.world.trained
    assert {k.rpartition("/")[2] for k in free} == {"lora_a", "lora_b", "in_delta", "out_delta"}
    assert all(done.params[k].any() for k in free)


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """Three tasks with vectors of their own and room for two."""
    return watched([ia3(per_task=True, max_stages=2)], tmp_path_factory.mktemp("ia3") / "out")


def test_outputs_of_past_tasks_are_bit_identical_while_the_bank_has_room(told):
    done, seen = told
    for task in range(3):
        first, *after = seen[task]  # row 0
        for stage in range(task):
            np.testing.assert_allclose(after[stage][0], first[0], atol=1e-5, err_msg="not learned: the base model")
        assert np.abs(after[task][0] - first[0]).max() > 1e-3, "learned"
    assert same(seen[0][1], seen[0][2])
    np.testing.assert_allclose(seen[0][3][0], seen[0][1][0], atol=1e-5)  # of another program, with a larger bank
    assert done.compilations == 2, "the bank doubled once"
    bank = done.params["layers/0/attn/k/out_delta_bank"]
    assert bank.shape[0] == 4 and bank[0].any() and bank[1].any() and not bank[2:].any()


def test_rows_of_one_batch_have_their_own_vectors(told):
    """Row by row against the kernels of its task."""
    done, _ = told
    world, own = done.loop.now.world, done.loop.now.owns["ia3"]
    batch = next(batches(Answers("x", 4, seed=9), None, 4))
    tasks = np.array([1, NO_TASK, 2, 0], np.int32)
    model = ia3(per_task=True).wrap(MODEL.apply, own, None)
    got = model(world.spec, world.params, {**batch, "task_id": tasks}).nll
    share = np.eye(4, dtype=np.float32)[tasks] * (tasks >= 0)[:, None]
    weighed = model(world.spec, world.params, {**batch, "bank_weight": share}).nll
    assert np.array_equal(weighed, got), "the same choice, given as weights"
    for row, task in enumerate(tasks):
        slots = {k: [*done.params[k + "_bank"][:2], done.params[k], np.zeros_like(done.params[k])] for k in SITES}
        chosen = {k: found[task] for k, found in slots.items()}  # the last, at -1: no task
        plain = by_hand({k: v for k, v in done.params.items() if not k.endswith("_bank")} | chosen)
        one = {k: v[row : row + 1] for k, v in batch.items()}
        np.testing.assert_allclose(got[row : row + 1], forward(SPEC, plain, one).nll, atol=2e-5)


@pytest.mark.parametrize(
    "arguments,words",
    [
        ({"outputs": ("attn/key",)}, "target 'attn/key' names no dense site of the model; did you mean"),
        ({"outputs": (), "inputs": ()}, "outputs and inputs are both empty"),
        ({"merged": True, "per_task": True}, "merged and per_task are both true; accepted: one of them"),
        ({"per_task": True, "max_stages": 0}, "max_stages is 0; accepted: a whole number of at least 1"),
    ],
)
def test_bad_arguments(arguments, words):
    with pytest.raises(RequestError, match=words):
        begun(ia3(**arguments))


def test_a_site_is_rescaled_by_one_method_and_tasks_must_be_told_and_fit():
    with pytest.raises(RequestError, match="'ia3' and 'again' do not go together"):
        Between(experiment([ia3(), ia3(name="again")]), lambda: None).begin(0)
    untold = dataclasses.replace(experiment([ia3(per_task=True)]), stages=stages(2))
    with pytest.raises(RequestError, match="needs to be told the task"):
        Between(untold, lambda: None).begin(0)
    between = begun(ia3(per_task=True, max_stages=1, grow=False))
    with pytest.raises(RequestError, match="task 2 exceeds max_stages=1; raise it, or set grow to true"):
        between.begin(1)


def test_peft_gets_one_side_of_a_module():
    from jaxcl.models.export_peft import written

    params = to_numpy(filled(begun(ia3()).world.params))
    tensors, config = written(SPEC, params)
    down = "base_model.model.model.layers.1.mlp.down_proj.ia3_l"
    np.testing.assert_array_equal(tensors[down], 1 + params["layers/1/mlp/down/in_delta"][None])
    assert config["peft_type"] == "IA3" and json.dumps(config)
    assert config["feedforward_modules"] == [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    with pytest.raises(RequestError, match="scales one side of down_proj"):
        written(SPEC, params | {"layers/1/mlp/down/out_delta": np.zeros(SPEC.width, np.float32)})
    with pytest.raises(RequestError, match=r"the run has LoRA and \(IA\)\^3, and a PEFT folder holds one kind"):
        site = "layers/0/attn/q/lora_"
        lora_too = {site + "a": np.ones((1, 16), np.float32), site + "b": np.ones((16, 1), np.float32)}
        written(SPEC, params | lora_too | {site + "scale": np.float32(1)})
