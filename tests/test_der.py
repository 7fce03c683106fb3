"""DER: what is stored against the model itself, its loss where that is known in closed form, replay at alpha 0."""

from __future__ import annotations

import dataclasses

import numpy as np
import optax
import pytest
from support import MODEL, SPEC, forward, relative, run, stages, to_numpy

from jaxcl.data.pipeline import batches
from jaxcl.errors import RequestError
from jaxcl.methods import memory
from jaxcl.methods.der import der
from jaxcl.methods.finetune import finetune
from jaxcl.methods.replay import replay

SGD = optax.sgd(0.1)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Three stages of 16 rows, room for ten; what was stored at the end of each, and the weights then."""
    method, seen = der(k=5, capacity=10), []

    def kept(world, own):
        world, new = method.end(world, own)
        seen.append((to_numpy(world.params), memory.listed(new["host"]), to_numpy(new["fixed"])))
        return world, new

    run([dataclasses.replace(method, end=kept)], tmp_path_factory.mktemp("der") / "out", tx=SGD)
    return seen


def test_the_largest_logits_are_those_of_the_model_at_the_end_of_the_rows_stage(done):
    sources = [s.train for s in stages(3)]
    assert len(done[0][1]) == 10 and {s for s, _ in done[-1][1].tolist()} == {0, 1, 2}
    for _, rows, fixed in done:
        assert np.array_equal(fixed["slots"][: len(rows)], rows)
        for slot, (stage, row) in enumerate(rows.tolist()):
            params = done[stage][0]
            batch = next(batches(sources[stage], [row], 1))
            out = forward(SPEC, params, batch)
            at = np.maximum(batch["targets_at"] - 1, 0)
            logits = np.asarray(MODEL.head(SPEC, params, out.hidden, at))[0]
            order = np.argsort(-logits, axis=-1)[:, :5]
            want = np.take_along_axis(logits, order, axis=-1)
            np.testing.assert_allclose(fixed["value"][slot], want, atol=1e-5)
            np.testing.assert_allclose(np.take_along_axis(logits, fixed["index"][slot], -1), want, atol=1e-5)


def test_at_the_start_of_a_stage_the_distance_is_zero_and_so_is_its_gradient(tmp_path):
    many = {"tx": SGD, "n": 2}
    mine = run([der(alpha=1.0, beta=0.0, k=SPEC.vocab, capacity=8)], tmp_path / "der", **many)
    plain = run([finetune()], tmp_path / "plain", **many)
    apart = [r["der/logits"] for r in mine.log]
    first = len([r for r in mine.log if r["stage"] == 0])
    assert not any(apart[:first]) and apart[first] < 1e-9 < 1e-6 < apart[first + 1]
    norms = [[r["grad_norm"] for r in done.log[: first + 1]] for done in (mine, plain)]
    np.testing.assert_allclose(*norms, rtol=1e-5)
    assert mine.compilations == 1


def test_without_the_distance_it_is_replay_with_a_loss_of_its_own(tmp_path):
    many = {"tx": SGD, "n": 3}
    mine = run([der(alpha=0.0, beta=0.5, capacity=8, name="replay")], tmp_path / "der", **many)
    theirs = run([replay(mixing="joint", strength=0.5, capacity=8)], tmp_path / "replay", **many)
    np.testing.assert_allclose([r["replay/old"] for r in mine.log], [r["replay/old"] for r in theirs.log], rtol=1e-5)
    assert relative(mine.params, theirs.params) < 1e-5


def test_bad_values_are_refused():
    for wrong in ({"alpha": -1.0}, {"beta": -0.1}, {"k": 0}):
        with pytest.raises(RequestError, match="accepted: alpha >= 0, beta >= 0, k >= 1"):
            der(**wrong)
    with pytest.raises(RequestError, match="capacity is -1"):
        der(capacity=-1)
