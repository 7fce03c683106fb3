"""IDBR: its terms against numpy, prompts turned by hand, and what its heads may not see."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import MODEL, SPEC, Answers, experiment, forward, run, to_numpy, weights

from jaxcl.core.between import Between
from jaxcl.core.types import Clock, Ctx, World
from jaxcl.data.pipeline import batches, stack
from jaxcl.errors import RequestError
from jaxcl.losses.positions import prompt_end
from jaxcl.methods.idbr import idbr, spaces, turned, with_heads
from jaxcl.methods.replay import replay
from jaxcl.surgery.width import Sizes, widen

rng = np.random.default_rng(0)
KEY = jax.random.key(5)
SIZE, STAGES = 6, 4


def world(spec=SPEC) -> World:
    return World(spec, weights(spec), frozenset(), 0, 0, jax.random.key(0), None, {}, ())


PARAMS = with_heads(world(), SIZE, STAGES).params
TEACHER = {k: 1.1 * v + 0.05 * rng.normal(size=v.shape).astype(np.float32) for k, v in PARAMS.items()}


@pytest.fixture(scope="module")
def batch() -> dict:
    """Six rows of three stages and two of padding; one prompt of two tokens."""
    found = next(batches(Answers("s", 6, seed=3), None, 8))
    short = Answers("short", 1)
    short.prompts[0] = short.prompts[0][:2]
    found = jax.tree.map(lambda x, y: np.concatenate([y[None], x[1:]]), found, short[0])
    return found | {"stage": np.array([0, 0, 1, 2, 2, 2, -1, -1], np.int32)}


def context(batch: dict, params: dict, teacher: dict, stage: int) -> Ctx:
    out, clock = forward(SPEC, params, batch), Clock.at()._replace(stage=stage)
    own = {"fixed": {"teacher": teacher}}
    return Ctx(params, own, batch, batch["weight"], out, clock, KEY, MODEL.apply, SPEC, out_key=KEY)


@functools.cache
def terms(**arguments):
    """The jitted terms: of (batch, params, teacher, stage)."""
    method = idbr(width=SIZE, max_stages=STAGES, **arguments)
    loss = jax.jit(lambda *given: method.loss(context(*given)))
    return lambda batch, params=PARAMS, teacher=TEACHER, stage=2: loss(batch, params, teacher, np.int32(stage))


def nats(params: dict, head: str, x: np.ndarray, seen: int, wanted: np.ndarray) -> np.ndarray:
    logits = (x @ np.float64(params[f"idbr/{head}"]) + np.float64(params[f"idbr/{head}_bias"]))[:, :seen]
    return np.log(np.exp(logits).sum(1)) - logits[np.arange(len(x)), wanted]


def by_numpy(params: dict, batch: dict, rows: range) -> tuple[np.ndarray, np.ndarray]:
    hidden = np.float64(forward(SPEC, params, batch).hidden)
    ends = [int((batch["segments"][r] > 0).sum() - (batch["weight"][r] > 0).sum()) - 1 for r in rows]
    h = hidden[list(rows), ends]
    return tuple(np.tanh(h @ params[f"idbr/{n}"] + params[f"idbr/{n}_bias"]) for n in ("general", "specific"))


def test_the_terms_against_numpy(batch):
    found, rows = terms()(batch), range(6)
    (g, s), (g0, s0) = (by_numpy(to_numpy(p), batch, rows) for p in (PARAMS, TEACHER))
    away = 0.5 * np.mean((g - g0) ** 2, 1) + 0.5 * np.mean((s - s0) ** 2, 1)
    np.testing.assert_allclose(found["kept"], np.mean(away * [5, 5, 5, 0.5, 0.5, 0.5]), rtol=1e-4)
    np.testing.assert_allclose(found["task"], nats(PARAMS, "task", s, 3, batch["stage"][:6]).mean(), rtol=1e-4)
    other = batch | {"tokens": np.asarray(turned(batch, jax.random.fold_in(KEY, 0)))}
    swapped, _ = by_numpy(to_numpy(PARAMS), other, rows)
    both = [nats(PARAMS, "order", x, 2, np.full(6, i)) for i, x in enumerate((g, swapped))]
    np.testing.assert_allclose(found["order"], np.mean(both, 0)[1:].mean(), rtol=1e-4)  # one prompt cannot be turned


def test_weights_multiply_their_terms(batch):
    plain, more = terms()(batch), terms(order=3.0, task=2.0, general=1.0, specific=1.0)(batch)
    for name, factor in {"order": 3, "task": 2, "kept": 2}.items():
        np.testing.assert_allclose(more[name], factor * plain[name], rtol=1e-6)
    assert terms(order=0.0, new=0.0, old=0.0)(batch).keys() == {"task"}
    first = terms()(batch, stage=0)
    assert first["kept"] == 0 and first["order"] > 0


def test_turning_keeps_the_first_token_the_answer_and_the_cyclic_order(batch):
    ends, cuts = np.asarray(prompt_end(batch)), set()
    for seed in range(20):
        tokens = np.asarray(turned(batch, jax.random.key(seed)))
        for old, new, n in zip(batch["tokens"], tokens, ends):
            assert new[0] == old[0] and np.array_equal(new[n + 1 :], old[n + 1 :])
            fits = [c for c in range(1, max(n, 2)) if np.array_equal(np.roll(old[1 : n + 1], -c), new[1 : n + 1])]
            assert fits or n < 1
            cuts |= {(n, c) for c in fits[:1]}
    assert {c for n, c in cuts if n == ends.max()} >= {1, ends.max() - 1}


def test_at_the_teacher_nothing_pulls_and_no_gradient_reaches_it(batch):
    kept = lambda params, teacher: terms()(batch, params, teacher)["kept"]  # noqa: E731
    value, slope = jax.value_and_grad(kept)(PARAMS, PARAMS)
    assert value == 0 and not any(np.any(g) for g in slope.values())
    assert not any(np.any(g) for g in jax.grad(kept, 1)(PARAMS, TEACHER).values())
    assert any(np.any(g) for g in jax.grad(kept)(PARAMS, TEACHER).values())


def test_padding_and_stages_to_come_do_not_count(batch):
    other = batch | {"tokens": np.where(batch["segments"] > 0, batch["tokens"], 7)}
    other["tokens"][6:] = 9
    later = {**PARAMS, "idbr/task": PARAMS["idbr/task"].at[:, 3:].add(9.0)}
    plain = terms()(batch)
    for found in (terms()(other), terms()(batch, later)):
        assert all(np.array_equal(found[k], plain[k]) for k in ("task", "kept", "order"))
    slope = jax.grad(lambda p: terms()(batch, p)["task"])(PARAMS)["idbr/task"]
    assert np.any(slope[:, :3]) and not np.any(slope[:, 3:])


def test_a_stage_starts_at_its_teacher_and_the_heads_learn(tmp_path):
    done = run([idbr(width=8, max_stages=3), replay(ratio=0.5)], tmp_path / "out")
    kept = [r["idbr/kept"] for r in done.log]
    starts = [next(i for i, r in enumerate(done.log) if r["stage"] == s) for s in (1, 2)]
    assert all(kept[i] < 1e-12 < kept[i + 1] for i in starts)
    teacher = done.loop.now.owns["idbr"]["fixed"]["teacher"]
    assert teacher.keys() == done.loop.now.world.trained and "idbr/general" in teacher
    for k, v in teacher.items():
        np.testing.assert_array_equal(v, done.params[k])
    begun = Between(experiment([idbr(width=8, max_stages=3)]), lambda: None)
    begun.begin(0)
    for k in ("general", "specific", "task", "order"):
        assert np.any(done.params[f"idbr/{k}"] != np.asarray(begun.world.params[f"idbr/{k}"]))


@pytest.mark.parametrize("tied", [True, False])
def test_the_heads_grow_with_the_model(tied):
    """Twice the width, every unit copied once: the same features, within rounding."""
    old = with_heads(world(dataclasses.replace(SPEC, tied=tied)), SIZE, STAGES)
    new = widen(old, Sizes(32, 2, 64), even=True)
    rows = stack([Answers("held out", 6, seed=9)[i] for i in range(6)])
    before, after = (spaces(w.params, forward(w.spec, w.params, rows).hidden, rows) for w in (old, new))
    assert new.params["idbr/general"].shape == (32, SIZE) and new.params["idbr/task"].shape == (SIZE, STAGES)
    for x, y in zip(before, after):
        np.testing.assert_allclose(y, x, atol=1e-5)


def test_the_heads_do_not_touch_the_model(batch):
    bare = {k: v for k, v in PARAMS.items() if not k.startswith("idbr/")}
    assert jnp.array_equal(forward(SPEC, PARAMS, batch).nll, forward(SPEC, bare, batch).nll)


@pytest.mark.parametrize(
    "arguments,words",
    [
        ({"general": -0.5}, "general is -0.5; accepted: 0 or more"),
        ({"task": -1}, "task is -1"),
        ({"width": 0}, "width is 0; accepted: a whole number of at least 1"),
        ({"max_stages": 0}, "max_stages is 0"),
    ],
)
def test_bad_values_are_refused(arguments, words):
    with pytest.raises(RequestError, match=words):
        idbr(**arguments)


def test_one_stage_too_many_and_a_second_set_of_heads_are_refused(tmp_path):
    with pytest.raises(RequestError, match="stage 3 exceeds max_stages=2"):
        run([idbr(width=4, max_stages=2)], tmp_path / "out")
    with pytest.raises(RequestError, match="'idbr' and 'second' do not go together"):
        Between(experiment([idbr(), idbr(name="second")]), lambda: None).begin(0)
