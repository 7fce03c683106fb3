"""Feature regularization: distances against numpy, what they do not see, and the teacher of a run."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
from support import MODEL, SPEC, Answers, run, weights

from jaxcl.core.types import Clock, Ctx
from jaxcl.data.pipeline import batches
from jaxcl.errors import RequestError
from jaxcl.losses.features import DISTANCES, cosine, l2, relational
from jaxcl.methods.feature_reg import POSITIONS, feature_reg
from jaxcl.methods.lora import lora
from jaxcl.methods.replay import replay

rng = np.random.default_rng(0)
S, T = rng.normal(size=(2, 3, 5, 4)).astype(np.float32)
MASK = rng.uniform(size=(3, 5)) < 0.7


def grams(x: np.ndarray) -> np.ndarray:
    unit = x / np.linalg.norm(x, axis=-1, keepdims=True)
    return unit @ np.swapaxes(unit, -1, -2)


def test_distances_against_numpy():
    np.testing.assert_allclose(l2(S, T, MASK), np.mean((S - T) ** 2, -1)[MASK].mean(), rtol=1e-5)
    cos = np.sum(S * T, -1) / np.linalg.norm(S, axis=-1) / np.linalg.norm(T, axis=-1)
    np.testing.assert_allclose(cosine(S, T, MASK), 1 - cos[MASK].mean(), rtol=1e-5)
    pairs = MASK[:, :, None] & MASK[:, None]
    each = [np.sum((grams(S)[i] - grams(T)[i])[pairs[i]] ** 2) for i in range(3)]
    np.testing.assert_allclose(relational(S, T, MASK), np.mean(each), rtol=1e-5)
    pooled, held = (S[:, :1], T[:, :1]), np.array([[True], [False], [True]])
    want = np.sum((grams(S[[0, 2], 0]) - grams(T[[0, 2], 0])) ** 2)
    np.testing.assert_allclose(relational(*pooled, held), want, rtol=1e-5)


@pytest.mark.parametrize("name", DISTANCES)
def test_what_a_distance_sees(name):
    distance = jax.jit(DISTANCES[name])
    turn = np.linalg.qr(rng.normal(size=(4, 4)))[0].astype(np.float32)
    value, slope = jax.jit(jax.value_and_grad(DISTANCES[name]))(S, S, MASK)
    assert value < 1e-12 and np.abs(slope).max() < 1e-6
    assert distance(S, T, MASK) > 0.01 and not np.any(jax.grad(DISTANCES[name], 1)(S, T, MASK))
    scaled, turned = distance(3 * S, S, MASK), distance(S @ turn, S, MASK)
    assert (scaled < 1e-6) == (name != "l2") and (turned < 1e-6) == (name == "relational")
    spoilt = np.where(MASK[..., None], S, 1e3 * T)
    np.testing.assert_array_equal(distance(spoilt, T, MASK), distance(S, T, MASK))
    assert distance(S, T, np.zeros_like(MASK)) == 0
    assert np.all(np.isfinite(jax.grad(DISTANCES[name])(np.zeros_like(S), T, MASK)))


@pytest.fixture(scope="module")
def batch() -> dict:
    """Six rows of two stages and two of padding."""
    found = next(batches(Answers("s", 6, seed=3), None, 8))
    return found | {"stage": np.array([0, 0, 1, 1, 1, 1, -1, -1], np.int32)}


TEACHER = {k: 1.1 * v + 0.05 * rng.normal(size=v.shape).astype(np.float32) for k, v in weights().items()}


@functools.cache
def term(**arguments):
    """The jitted term at the initial weights: of (teacher, batch, stage)."""
    method = feature_reg(**arguments)

    @jax.jit
    def away(teacher, batch, stage):
        params = weights()
        out = MODEL.apply(SPEC, params, batch, taps=method.taps)
        own, clock = {"fixed": {"teacher": teacher}}, Clock.at()._replace(stage=stage)
        ctx = Ctx(params, own, batch, batch["weight"], out, clock, None, MODEL.apply, SPEC)
        return method.loss(ctx)["distance"]

    return lambda batch, teacher=TEACHER, stage=1: away(teacher, batch, np.int32(stage))


@pytest.fixture(scope="module")
def states(batch) -> dict:
    """Hidden states behind layer 0 and behind the last norm, of both models."""
    ask = jax.jit(lambda p: MODEL.apply(SPEC, p, batch, taps=("layers/0:out",)))
    outs = {"student": ask(weights()), "teacher": ask(TEACHER)}
    return {k: [np.asarray(out.taps["layers/0:out"]), np.asarray(out.hidden)] for k, out in outs.items()}


CASES = [*((p, "all", range(6)) for p in POSITIONS), ("all", "new", range(2, 6)), ("all", "old", range(2))]


@pytest.mark.parametrize(("positions", "rows", "chosen"), CASES)
def test_rows_and_positions(batch, states, positions, rows, chosen):
    want = []
    for student, teacher in zip(states["student"], states["teacher"]):
        pairs = []
        for r in chosen:
            length, answer = int((batch["segments"][r] > 0).sum()), int((batch["weight"][r] > 0).sum())
            prompt = length - answer
            where = {"all": range(length), "mean": range(length), "last": [prompt - 1]}
            at = list(where.get(positions, range(prompt - 1, length - 1)))
            one = [x[r, at] for x in (student, teacher)]
            pairs += zip(*([x.mean(0)] for x in one)) if positions == "mean" else zip(*one)
        want.append(np.mean([np.mean((s - t) ** 2) for s, t in pairs]))
    measure = term(distance="l2", layers=(0, -1), positions=positions, rows=rows)
    np.testing.assert_allclose(measure(batch), np.mean(want), rtol=1e-4)
    assert measure(batch, stage=0) == 0 and measure(batch, teacher=weights()) < 1e-12


def test_padding_does_not_matter_and_the_teacher_gets_no_gradient(batch):
    other = batch | {"tokens": np.where(batch["segments"] > 0, batch["tokens"], 7)}
    other["tokens"][6:] = 9  # whole rows of padding
    assert not np.array_equal(other["tokens"], batch["tokens"])
    for measure in (term(), term(distance="relational", positions="mean")):
        assert measure(batch) == measure(other) > 0
    slope = jax.grad(lambda t: term()(batch, t))(TEACHER)
    assert not any(np.any(g) for g in slope.values())


def test_the_teacher_is_the_model_of_the_stage_before_under_the_same_dropout(tmp_path):
    """An adapter that drops half of its input: a stage starts at its teacher all the same, and leaves it slowly."""
    methods = [feature_reg(strength=5.0, layers=(1, -1)), replay(ratio=0.5), lora(rank=2, alpha=8.0, dropout=0.5)]
    done = run(methods, tmp_path / "out", n=2)
    seen = [r["feature_reg/distance"] for r in done.log]
    first = next(i for i, r in enumerate(done.log) if r["stage"] == 1)
    assert max(seen[: first + 1]) < 1e-12 and all(x > 1e-6 for x in seen[first + 1 :])
    teacher = done.loop.now.owns["feature_reg"]["fixed"]["teacher"]
    assert teacher.keys() == done.loop.now.world.trained, "of a frozen base nothing is held"
    for k, v in teacher.items():
        np.testing.assert_array_equal(v, done.params[k])


@pytest.mark.parametrize(
    "arguments,words",
    [
        ({"strength": -1.0}, "strength is -1"),
        ({"distance": "cosin"}, "did you mean 'cosine'"),
        ({"layers": ()}, r"layers is \[\]"),
        ({"layers": (-2,)}, r"layers is \[-2\]"),
        ({"positions": "cls"}, "accepted: all, answers, last, mean"),
        ({"rows": "replayed"}, "accepted: all, new, old"),
    ],
)
def test_bad_values_are_refused(arguments, words):
    with pytest.raises(RequestError, match=words):
        feature_reg(**arguments)


def test_a_layer_that_the_model_does_not_have_is_named(tmp_path):
    with pytest.raises(RequestError, match="layers/7:out"):
        run([feature_reg(layers=(7,))], tmp_path / "out", n=1)
