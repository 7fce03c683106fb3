"""Rollouts: a batch made by `collect` serves several steps, is logged, and changes live memory."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import run

from jaxcl.core.between import row_ids
from jaxcl.core.feed import lengths
from jaxcl.core.types import Ctx, Method, Phase
from jaxcl.errors import RequestError


def sampled(forward, train, batch, key):
    """Two tokens after each row's first three."""
    rows = batch["tokens"].shape[0]
    prompts, lengths = batch["tokens"][:, :3], jnp.full(rows, 3)
    return forward.generate(train, prompts, lengths, max_new=2, stop_ids=(), temperature=1.0, key=key)[0]


def roller(name: str = "roller", every: int = 3, **kw) -> Method:
    def plan(world, own, phases):
        return [dataclasses.replace(p, collect_every=every) for p in phases]

    def collect(world, own, batch, key):
        new = world.tools.call(sampled, batch, key)
        tokens = jnp.concatenate([batch["tokens"][:, :3], new, batch["tokens"][:, 5:]], axis=1)
        count = own["live"]["count"] + 1
        log = {"roll/count": jnp.full(len(new), count), "roll/new": jnp.mean(new.astype(jnp.float32), 1)}
        return {**batch, "tokens": tokens, "log": log}, {**own, "live": {"count": count}}

    def loss(ctx: Ctx):
        return {"seen": 0.0 * ctx.own["live"]["count"] + jnp.mean(ctx.batch["tokens"][:, 3:5].astype(jnp.float32))}

    return Method(name=name, init=lambda w: {"live": {"count": jnp.zeros(())}}, plan=plan, collect=collect, loss=loss)


def test_a_rollout_serves_its_steps_and_is_logged(tmp_path):
    done = run([roller()], tmp_path / "out", n=1, rows=16, tx=optax.sgd(0.1))
    assert len(done.log) == 6, "two batches of data, three steps each"
    assert [r["roll/count"] for r in done.log] == [1, 1, 1, 2, 2, 2]
    assert all(np.isclose(r["roll/new"], r["roller/seen"]) for r in done.log), "the step sees the rollout"
    assert len({r["roll/new"] for r in done.log}) == 2 and done.compilations == 1
    assert float(done.loop.now.owns["roller"]["live"]["count"]) == 2


def test_steps_and_batches_of_a_phase():
    every = Phase("a", None, (), collect_every=4)
    assert lengths(every, 5) == (20, 5)
    assert lengths(dataclasses.replace(every, steps=10), 10) == (10, 3)
    assert lengths(Phase("b", None, ()), 7) == (7, 7)


@pytest.mark.parametrize(("names", "says"), [(("one", "two"), "'one' and 'two' both"), ((), "no method")])
def test_one_method_collects(names, says, tmp_path):
    phases = [Phase("train", 3, (), collect_every=3)]
    with pytest.raises(RequestError, match=says):
        run([roller(n) for n in names], tmp_path / "out", n=1, phases=phases)
    assert not (tmp_path / "out").exists()


def test_after_a_phase_comes_the_memory_of_the_method_that_planned_it(tmp_path):
    def plan(world, own, phases):
        def after(world, own):
            (path,) = [k for k in world.params if k == "final_norm/scale"]
            return world._replace(params={**world.params, path: own["fixed"]["old"]}), {"host": {"after": 1}}

        return [dataclasses.replace(phases[0], name="first", steps=2, after=after)]

    def init(world):
        return {"fixed": {"old": world.params["final_norm/scale"] + 0}}

    done = run([Method(name="back", init=init, plan=plan)], tmp_path / "out", n=1, tx=optax.sgd(0.1))
    assert done.loop.now.owns["back"]["host"] == {"after": 1}
    assert np.array_equal(done.params["final_norm/scale"], np.ones(16)), "what `after` put back stays"
    assert len(done.log) == 2


def test_a_method_that_observes_needs_nothing_trained(tmp_path):
    def observe(ctx, grads, updates, train):
        return {"sum": ctx.own["live"]["sum"] + jnp.sum(ctx.out.nll)}

    def mask(world, own):
        return dict.fromkeys(world.params, False)

    watcher = Method(name="watch", mask=mask, init=lambda w: {"live": {"sum": jnp.zeros(())}}, observe=observe)
    done = run([watcher], tmp_path / "out", n=1)
    total = sum(r["objective"] * r["weight"] for r in done.log)
    np.testing.assert_allclose(done.loop.now.owns["watch"]["live"]["sum"], total, rtol=1e-5)
    assert all(r["grad_norm"] == 0 for r in done.log)
    with pytest.raises(RequestError, match="nothing is left to train"):
        run([dataclasses.replace(watcher, observe=None)], tmp_path / "none", n=1)


def test_rows_of_a_restored_rollout_have_no_names():
    """A loss that is not finite right after a resume is still reported in one line."""
    assert row_ids({}, Phase("train", None, ()), []) == ["rows of a rollout"]
