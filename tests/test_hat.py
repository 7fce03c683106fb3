"""HAT: the formulas against numpy, and a run in which past tasks keep their outputs bit for bit."""

from __future__ import annotations

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import MODEL, SPEC, STACK, Answers, experiment, run, stages, to_numpy, unstacked

from jaxcl.core.between import Between
from jaxcl.core.til import Told, task_of
from jaxcl.core.types import Clock, Outputs, Stream
from jaxcl.data.pipeline import batches, pipeline
from jaxcl.data.stage import Stage
from jaxcl.errors import RequestError
from jaxcl.evaluate.base import Eval
from jaxcl.methods.hat import hat, masks
from jaxcl.methods.replay import replay
from jaxcl.transforms.hat import anneal, bounded, compensate, protect, soft_step, sparsity

SITES = ("layers/0/mlp/down", "layers/1/mlp/down")
RNG = np.random.default_rng(0)


def sigmoid(x):
    return 1 / (1 + np.exp(-np.float64(x)))


# the formulas


def test_s_grows_from_one_over_s_max_to_s_max_batch_by_batch():
    got = np.array([anneal(step, 7, 400.0) for step in range(7)])
    want = [1 / 400 + (400 - 1 / 400) * (b - 1) / (7 - 1) for b in range(1, 8)]
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert (np.diff(got) > 0).all() and got[-1] == 400.0
    twice = np.array([anneal(step, 11, 50.0, sweeps=2) for step in range(11)])
    np.testing.assert_allclose(twice[:6], [1 / 50 + (50 - 1 / 50) * b / 5 for b in range(6)], rtol=1e-5)
    np.testing.assert_allclose(twice[6:], [1 / 50 + (50 - 1 / 50) * b / 4 for b in range(5)], rtol=1e-5)
    assert float(anneal(0, 1, 400.0)) == pytest.approx(1 / 400)


def test_an_update_is_scaled_by_one_minus_the_smaller_use_of_its_two_units():
    update = RNG.normal(size=(3, 4)).astype(np.float32)
    used_in, used_out = np.array([0.0, 0.4, 1.0], np.float32), np.array([0.0, 1.0, 0.7, 0.2], np.float32)
    want = np.array([[update[j, i] * (1 - min(used_in[j], used_out[i])) for i in range(4)] for j in range(3)])
    got = np.asarray(protect(jnp.asarray(update), jnp.asarray(used_in), jnp.asarray(used_out)))
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert got[2, 1] == 0.0, "both units used"
    assert np.array_equal(got[0], update[0]) and np.array_equal(got[:, 0], update[:, 0]), "one unit free"
    assert np.array_equal(protect(jnp.asarray(update), jnp.zeros(3), jnp.zeros(4)), update), "the first task"


def test_the_compensated_gradient_is_that_of_a_mask_of_slope_s_max():
    """d sigmoid(s_max x)/dx as if at e: s_max sigmoid'(e), whatever s is; at s = 1 it is s_max times autodiff."""
    e = np.array([-5.9, -1.3, -0.01, 0.0, 0.02, 0.8, 4.0], np.float32)
    slope = sigmoid(e) * (1 - sigmoid(e))
    for s in (1 / 400, 0.3, 1.0, 8.0):
        grad = jax.grad(lambda x, s=s: jnp.sum(soft_step(s * x)))(jnp.asarray(e))
        got = compensate(grad, jnp.asarray(e), s, 400.0)
        np.testing.assert_allclose(got, 400.0 * slope, rtol=2e-4)
    auto = jax.grad(lambda x: jnp.sum(jax.nn.sigmoid(x)))(jnp.asarray(e))
    np.testing.assert_allclose(compensate(auto, jnp.asarray(e), 1.0, 400.0), 400.0 * auto, rtol=1e-5)
    far = float(compensate(jnp.float32(1.0), jnp.float32(3.0), 100.0, 400.0))
    assert far == pytest.approx(4.0 * (np.cosh(50.0) + 1) / (np.cosh(3.0) + 1), rel=1e-4), "s e is cut at 50"


def test_the_slope_of_the_mask_keeps_its_digits_on_both_sides():
    x = np.array([-30.0, -16.0, -2.0, 0.0, 2.0, 16.0, 30.0], np.float32)
    got = np.asarray(jax.vmap(jax.grad(soft_step))(jnp.asarray(x)), np.float64)
    np.testing.assert_allclose(got, 1 / (2 + 2 * np.cosh(np.float64(x))), rtol=1e-5)
    np.testing.assert_allclose(soft_step(jnp.asarray(x)), sigmoid(x), rtol=1e-6)


def test_embeddings_stay_within_six():
    e, update = jnp.array([5.9, -5.5, 0.3, -2.0]), jnp.array([0.5, -3.0, 0.1, 100.0])
    np.testing.assert_allclose(e + bounded(update, e), [6.0, -6.0, 0.4, 6.0], atol=1e-6)


def test_sparsity_counts_free_units_of_all_layers_together():
    a = {k: RNG.uniform(size=n).astype(np.float32) for k, n in (("x", 5), ("y", 3))}
    used = {"x": np.array([0, 1, 0.5, 0, 0.2], np.float32), "y": np.ones(3, np.float32)}
    top = sum(a[k][i] * (1 - used[k][i]) for k in a for i in range(len(a[k])))
    bottom = sum(1 - used[k][i] for k in a for i in range(len(a[k])))
    assert float(sparsity(a, used)) == pytest.approx(top / bottom, rel=1e-5)
    assert float(sparsity(a, {k: np.ones_like(v) for k, v in a.items()})) == 0.0, "no unit is free"


def test_every_row_has_the_mask_of_its_task():
    live, bank = RNG.normal(size=4), RNG.normal(size=(3, 4))
    task = np.array([0, 2, 1, 3, -1], np.int32)
    got = masks(jnp.asarray(live), jnp.asarray(bank), jnp.asarray(task), 2, 7.0, 40.0)
    want = [sigmoid(40 * bank[0]), sigmoid(7 * live), sigmoid(40 * bank[1]), np.ones(4), np.ones(4)]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-30)


# in the model and in the step


def told_batch(tasks: list[int], rows: int = 4) -> dict:
    batch = next(batches(Answers("x", rows, seed=5), None, rows))
    return {**batch, "task_id": np.array(tasks, np.int32)}


def prepared(spec=SPEC, **kw):
    """(method, world, memory) at the start of the first stage."""
    method = hat(**kw)
    between = Between(experiment([method], spec=spec), lambda: None)
    between.begin(0)
    return method, between.world, between.owns["hat"]


@pytest.mark.parametrize("segments", [(), STACK], ids=["unstacked", "stacked"])
def test_the_mask_multiplies_the_hidden_units_of_each_row(segments):
    """Row by row against kernels whose rows are scaled by hand."""
    spec = dataclasses.replace(SPEC, segments=segments)
    method, world, own = prepared(spec, s_max=3.0, max_stages=3)
    params = dict(world.params)
    for key in [k for k in params if k.endswith("/hat_bank")]:
        params[key] = jax.random.normal(jax.random.key(9), params[key].shape)
    batch = told_batch([0, 1, 2, 1])
    model = method.wrap(MODEL.apply, own, Clock.at(stage=1, phase_step=2, phase_len=5))
    for train, s in ((False, 3.0), (True, 1 / 3 + (3 - 1 / 3) * 2 / 4)):
        got = model(spec, params, batch, train=train).nll
        single = unstacked(params, spec)
        for b, task in enumerate(batch["task_id"]):
            scaled = dict(single)
            for site in SITES:
                live, bank = single[site + "/hat_e"], single[site + "/hat_bank"]
                a = [sigmoid(3 * bank[0]), sigmoid(s * live), np.ones(len(live))][task]
                scaled[site + "/kernel"] = single[site + "/kernel"] * np.float32(a)[:, None]
            row = {k: v[b : b + 1] for k, v in batch.items()}
            np.testing.assert_allclose(got[b : b + 1], MODEL.apply(SPEC, scaled, row).nll, atol=2e-5)


def test_only_what_can_be_protected_trains():
    _, world, _ = prepared(max_stages=2)
    names = {f"{s.rpartition('/')[0]}/{n}/kernel" for s in SITES for n in ("gate", "up", "down")}
    assert world.trained == names | {s + "/hat_e" for s in SITES}


def test_project_scales_the_final_update_and_bounds_the_embedding():
    method, world, own = prepared(max_stages=2)
    train = {k: world.params[k] for k in world.trained}
    updates = {k: jnp.asarray(RNG.normal(size=v.shape), jnp.float32) * 20 for k, v in train.items()}
    same = method.project(updates, train, own, Clock.at())
    weights_only = [k for k in train if k.endswith("kernel")]
    assert all(np.array_equal(same[k], updates[k]) for k in weights_only), "A = 0: unchanged"
    used = {k: RNG.uniform(size=v.shape).astype(np.float32) for k, v in own["fixed"]["used"].items()}
    got = to_numpy(method.project(updates, train, {"fixed": {"used": used}}, Clock.at()))
    for site in SITES:
        mlp, free = site.rpartition("/")[0], 1 - used[site + "/hat_e"]
        for name in ("gate", "up"):
            np.testing.assert_allclose(got[f"{mlp}/{name}/kernel"], updates[f"{mlp}/{name}/kernel"] * free, rtol=1e-6)
        np.testing.assert_allclose(got[site + "/kernel"], updates[site + "/kernel"] * free[:, None], rtol=1e-6)
        e = np.asarray(train[site + "/hat_e"]) + got[site + "/hat_e"]
        want = np.clip(np.asarray(train[site + "/hat_e"]) + np.asarray(updates[site + "/hat_e"]), -6, 6)
        np.testing.assert_allclose(e, want, atol=2e-6)


def test_grad_compensates_the_embeddings_and_nothing_else():
    method, world, own = prepared(s_max=40.0, max_stages=2)
    train = {k: world.params[k] for k in world.trained}
    ones = {k: jnp.ones_like(v) for k, v in train.items()}
    clock = Clock.at(phase_step=1, phase_len=3)
    got, _ = method.grad(lambda *a, **k: (ones, {}), own, clock)(train, {}, jax.random.key(0))
    s = 1 / 40 + (40 - 1 / 40) / 2
    for key, value in got.items():
        e = np.float64(train[key])
        factor = 40 / s * (np.cosh(np.clip(s * e, -50, 50)) + 1) / (np.cosh(e) + 1)
        np.testing.assert_allclose(value, factor if key.endswith("/hat_e") else 1.0, rtol=1e-4)


# runs


def written(apply, head, spec, params, batch):
    out: Outputs = apply(spec, params, batch)
    return out.nll, out.hidden


def recorder(task: int, seen: list) -> Eval:
    """An eval that keeps what the model gives on some rows of a task, bit for bit."""
    rows = next(batches(Answers(f"s{task}", 8, seed=task), None, 8))

    def evaluate(view, progress):
        nll, hidden = (np.asarray(x) for x in view.call(written, {k: v for k, v in rows.items() if k != "row"}))
        seen.append((nll, hidden, to_numpy(dict(view.params))))
        return [{"id": str(i), "prediction": None, "score": float(x.sum())} for i, x in enumerate(nll)]

    return Eval(f"e{task}", "nll", 8, evaluate, higher_is_better=False, range=(0.0, float("inf")))


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """Three tasks under weight decay, with masks that are 0 or 1 in float32. (run, outputs by task and row)"""
    seen: dict[int, list] = {t: [] for t in range(3)}
    stages = [Stage(f"s{t}", Answers(f"s{t}", 32, seed=t), evals=(f"e{t}",)) for t in range(3)]
    tx = optax.adamw(3e-3, weight_decay=0.1)
    evals = [recorder(t, seen[t]) for t in range(3)]
    out = tmp_path_factory.mktemp("hat") / "out"
    return run([hat(s_max=1e6, max_stages=3)], out, stages=stages, evals=evals, tx=tx), seen


def test_outputs_of_past_tasks_are_bit_identical(three):
    done, seen = three
    used = to_numpy(done.loop.now.owns["hat"]["fixed"]["used"])
    assert all(np.isin(a, (0.0, 1.0)).all() for a in used.values()), "the premise"
    for task in range(3):
        _, *after = seen[task]  # the first is row 0
        for later in after[task + 1 :]:
            assert all(np.array_equal(a, b) for a, b in zip(later[:2], after[task][:2])), f"task {task}"
    assert not np.array_equal(seen[2][2][0], seen[2][3][0]), "task 2 was learned"
    assert not np.array_equal(seen[1][1][0], seen[1][2][0])


def test_weights_of_used_units_are_bit_identical_and_those_of_free_ones_move(three):
    _, seen = three
    _, *after = [params for _, _, params in seen[0]]
    for site in SITES:
        used = np.zeros(SPEC.mlp, bool)
        for before, now in itertools.pairwise(after):
            used |= before[site + "/hat_e"] > 0
            for name, turn in (("gate", np.transpose), ("up", np.transpose), ("down", np.asarray)):
                key = f"{site.rpartition('/')[0]}/{name}/kernel"
                units = [turn(x[key]) for x in (before, now)]  # one row a unit
                assert np.array_equal(units[0][used], units[1][used]) and used.any()
                assert (units[0][~used] != units[1][~used]).any(axis=1).all() and not used.all()


def test_what_is_used_is_reported(three):
    done, _ = three
    used = done.loop.now.owns["hat"]["fixed"]["used"]
    told = json.loads((done.out / "metrics.json").read_text())["accounting"]["notes"]["hat"]["used"]
    assert told == {s: pytest.approx(float(np.mean(used[s + "/hat_e"])), abs=1e-4) for s in SITES}
    assert all(0.5 < share <= 1 for share in told.values()), "three random halves"


def test_the_largest_masks_of_all_tasks_are_remembered_at_s_max(tmp_path):
    done = run([hat(s_max=5.0, max_stages=3)], tmp_path / "out", n=2, tx=optax.adam(1e-2))
    for site in SITES:
        first, last = done.params[site + "/hat_bank"][0], done.params[site + "/hat_e"]
        want = np.maximum(sigmoid(5 * first), sigmoid(5 * last))
        np.testing.assert_allclose(done.loop.now.owns["hat"]["fixed"]["used"][site + "/hat_e"], want, rtol=1e-5)
        assert not done.params[site + "/hat_bank"][1].any(), "a slot for every stage but the last"


def test_without_strength_only_the_sparsity_term_goes(tmp_path):
    """One batch under plain descent: the weights' step is the same, the log has no term."""
    runs = {c: run([hat(strength=c, max_stages=2)], tmp_path / str(c), n=1, rows=8, tx=optax.sgd(0.1)) for c in (0, 2)}
    plain, sparse = runs[0], runs[2]
    assert "hat/sparsity" not in plain.log[0]
    assert plain.log[0]["loss"] == plain.log[0]["objective"] == sparse.log[0]["objective"]
    e = {k for k in plain.params if k.endswith("/hat_e")}
    assert all(np.array_equal(plain.params[k], sparse.params[k]) for k in plain.params.keys() - e)
    assert any(not np.array_equal(plain.params[k], sparse.params[k]) for k in e)
    masks_at_start = [sigmoid(v / 400) for v in (np.asarray(prepared(max_stages=2)[1].params[k]) for k in sorted(e))]
    assert sparse.log[0]["hat/sparsity"] == pytest.approx(2 * np.mean(masks_at_start), rel=1e-5)


def test_replayed_rows_bring_their_task(tmp_path):
    """A stream of the first stage, read in the second, has task 0 and so the first task's mask."""
    between = Between(experiment([hat(max_stages=2), replay(ratio=0.5)]), lambda: None)
    streams = (Stream(1, np.arange(8)), Stream(0, np.arange(8)))
    data = pipeline(between.sources, streams, stage=1, batch_size=8, steps=2, seed=0)
    rows = [(int(s), int(t)) for batch in data for s, t in zip(batch["source"], batch["task_id"])]
    assert sorted(set(rows)) == [(0, 1), (1, 0)]


@pytest.mark.parametrize("bad", [{"s_max": 0.5}, {"strength": -1.0}, {"sweeps": 0}, {"max_stages": 0}])
def test_bad_values_are_refused(bad):
    with pytest.raises(RequestError, match="accepted: s_max >= 1"):
        hat(**bad)


def begun(methods, stage: int = 0, **kw) -> Between:
    between = Between(experiment(methods, **kw), lambda: None)
    between.begin(stage)
    return between


def test_bad_company_targets_and_lengths_are_refused():
    with pytest.raises(RequestError, match="'masks' needs to be told the task"):
        begun([hat(name="masks")])  # by another name, `experiment` does not tell it
    with pytest.raises(RequestError, match="layers/0/attn/q' is no down projection"):
        begun([hat(targets=["attn/q"])])
    with pytest.raises(RequestError, match="'hat' and 'masks' do not go together: 'layers/0/mlp/down' has a mask"):
        begun([hat(), hat(name="masks")])
    with pytest.raises(RequestError, match="stage 2 exceeds max_stages=1"):
        begun([hat(max_stages=1)], 1)
    method, world, own = prepared(max_stages=2)
    with pytest.raises(RequestError, match="task_id"):
        method.wrap(MODEL.apply, own, Clock.at())(SPEC, world.params, next(batches(Answers("x"), None, 4)))


def test_an_eval_is_of_the_task_that_alone_teaches_it():
    evals = {"e0": ("e0",), "both": ("both", "e1"), "general": ("both",)}
    told = [Stage(n, Answers(n), evals=e) for n, e in evals.items()]
    assert [task_of(e, told) for e in ("e0", "both", "e1", "none")] == [0, -1, 1, -1]
    source = Told(stages(1)[0].train, 3)
    assert source[2]["task_id"] == 3 and source.id(2) == "s0/2" and len(source) == 16
