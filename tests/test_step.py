"""One step: against a plain gradient, its laws of order, accumulation, and what it does not compute."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import MODEL, SPEC, Answers, experiment, relative, to_numpy
from support import weights as decoder_weights

from jaxcl.core.between import Between
from jaxcl.core.paths import split
from jaxcl.core.step import make_step, step_key
from jaxcl.core.types import Clock, Fixed, Method, Outputs, Phase, State, Stream
from jaxcl.data.pipeline import batches
from jaxcl.methods.lora import lora
from jaxcl.surgery.adapters import add_lora

PHASE = Phase("train", 1, (Stream(0, np.arange(8)),))
LR = 0.1


def apply(spec, params, batch, *, cache=None, taps=(), train=False, key=None) -> Outputs:
    """A bigram model: small enough that a test may compile several steps."""
    before = jnp.take_along_axis(batch["tokens"], jnp.maximum(batch["targets_at"] - 1, 0), 1)
    gold = jnp.take_along_axis(batch["tokens"], batch["targets_at"], 1)
    scores = jax.nn.log_softmax(jnp.tanh(params["embed"][before]) @ params["out"] * params["scale"])
    nll = -jnp.take_along_axis(scores, gold[..., None], -1)[..., 0]
    return Outputs(nll=jnp.where(batch["targets_at"] > 0, nll, 0.0))


def weights() -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    shapes = {"embed": (32, 6), "out": (6, 32), "scale": (32,)}
    return {k: jnp.asarray(rng.normal(size=v), jnp.float32) for k, v in shapes.items()}


@pytest.fixture(scope="module")
def batch() -> dict:
    """Eight rows of one to three targets each, weighted differently."""
    found = next(batches(Answers("s", 8, seed=3), None, 8)) | dict.fromkeys(("source", "stage"), np.zeros(8, np.int32))
    return found | {"weight": found["weight"] * np.linspace(0.2, 2, 8, dtype=np.float32)[:, None]}


def step(methods, batch, *, tx=None, accumulate=1, live=None, phase=PHASE):
    """(state, metrics) after one jitted step from `weights`."""
    tx, train = tx or optax.sgd(LR), weights()
    state = State(Clock.at(phase_len=5), train, tx.init(train), live or {})
    fn = make_step(apply, None, methods, tx, phase, accumulate)
    return jax.jit(fn)(state, Fixed({}, {}), batch, np.uint32(0))


@pytest.fixture(scope="module")
def plain(batch):
    return step([], batch)


def test_a_step_is_a_gradient_step_on_the_weighted_mean(batch, plain):
    """The nll as the model gives it; the mean, the gradient and the update written here."""

    def mean(params):
        nll = apply(None, params, batch).nll
        return jnp.sum(batch["weight"] * nll) / batch["weight"].sum()

    loss, grads = jax.jit(jax.value_and_grad(mean))(weights())
    state, metrics = plain
    want = {k: v - LR * grads[k] for k, v in weights().items()}
    assert relative(to_numpy(state.train), to_numpy(want)) < 1e-6
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
    np.testing.assert_allclose(metrics["objective"], loss, rtol=1e-6)
    np.testing.assert_allclose(metrics["weight"], batch["weight"].sum(), rtol=1e-6)
    norm = np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in to_numpy(grads).values()))
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
    assert (int(state.clock.step), int(state.clock.phase_step), int(state.clock.phase_len)) == (1, 1, 5)


def test_weighs_multiply_and_the_divisor_comes_after_them(batch):
    by_row = np.linspace(0, 1, 8, dtype=np.float32)[:, None]
    methods = [
        Method(name="a", weigh=lambda ctx: jnp.broadcast_to(by_row, ctx.weight.shape)),
        Method(name="b", weigh=lambda ctx: ctx.out.nll**0 * (ctx.out.nll > 3.0)),
    ]
    metrics = step(methods, batch)[1]
    nll = np.asarray(apply(None, weights(), batch).nll)
    weight = batch["weight"] * by_row * (nll > 3.0)
    np.testing.assert_allclose(metrics["loss"], (weight * nll).sum() / max(weight.sum(), 1), rtol=1e-5)
    np.testing.assert_allclose(metrics["weight"], weight.sum(), rtol=1e-5)


def test_weights_carry_no_gradient(batch):
    """A weight made of the nll itself is a constant to the gradient."""
    method = Method(name="hard", weigh=lambda ctx: ctx.out.nll)
    state, _ = step([method], batch)
    nll = np.asarray(apply(None, weights(), batch).nll)
    fixed = step([], batch | {"weight": batch["weight"] * nll})[0]
    assert relative(to_numpy(state.train), to_numpy(fixed.train)) < 1e-5


def test_terms_are_added_under_their_names(batch, plain):
    norm = lambda ctx: {"l2": 0.5 * sum(jnp.sum(p**2) for p in ctx.params.values()), "one": jnp.float32(1)}  # noqa: E731
    state, metrics = step([Method(name="decay", loss=norm)], batch)
    squares = 0.5 * sum(np.sum(np.square(p, dtype=np.float64)) for p in to_numpy(weights()).values())
    np.testing.assert_allclose(metrics["decay/l2"], squares, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], plain[1]["loss"] + squares + 1, rtol=1e-5)
    want = {k: np.asarray(v) - LR * np.asarray(weights()[k]) for k, v in plain[0].train.items()}
    assert relative(to_numpy(state.train), want) < 1e-5


def scaled(tree, by: float):
    return jax.tree.map(lambda x: x * by, tree)


def shifted(tree, by: float):
    return jax.tree.map(lambda x: x + by, tree)


def test_gradients_are_decorated_last_outermost_and_updates_projected_in_order(batch, plain):
    def decorator(change):
        def grad(inner, own, clock):
            def outer(*args, **kwargs):
                grads, aux = inner(*args, **kwargs)
                return change(grads), aux

            return outer

        return grad

    double = Method(name="double", grad=decorator(lambda g: scaled(g, 2)))
    add = Method(name="add", grad=decorator(lambda g: shifted(g, 1)))
    gradient = {k: (np.asarray(v) - np.asarray(plain[0].train[k])) / LR for k, v in weights().items()}
    for methods, want in (([double, add], lambda g: 2 * g + 1), ([add, double], lambda g: 2 * (g + 1))):
        state, _ = step(methods, batch)
        for k, v in weights().items():
            np.testing.assert_allclose(state.train[k], v - LR * want(gradient[k]), atol=1e-4)
    double = Method(name="double", project=lambda u, p, own, clock: scaled(u, 2))
    add = Method(name="add", project=lambda u, p, own, clock: shifted(u, 1))
    for methods, want in (([double, add], lambda u: 2 * u + 1), ([add, double], lambda u: 2 * (u + 1))):
        state, _ = step(methods, batch)
        for k, v in weights().items():
            np.testing.assert_allclose(state.train[k], v + want(-LR * gradient[k]), atol=1e-4)


def test_a_gradient_can_be_had_without_the_terms(batch, plain):
    def grad(inner, own, clock):
        return lambda train, batch, key, *, terms=True: inner(train, batch, key, terms=False)

    heavy = Method(name="heavy", loss=lambda ctx: {"x": 100 * sum(jnp.sum(p) for p in ctx.params.values())})
    state, _ = step([heavy, Method(name="without", grad=grad)], batch)
    assert relative(to_numpy(state.train), to_numpy(plain[0].train)) < 1e-6


def test_models_are_wrapped_first_innermost(batch):
    def wrapper(change):
        def wrap(apply, own, clock):
            def outer(*args, **kwargs):
                out = apply(*args, **kwargs)
                return out._replace(nll=change(out.nll))

            return outer

        return wrap

    nll = np.asarray(apply(None, weights(), batch).nll)
    double = Method(name="double", wrap=wrapper(lambda x: 2 * x))
    add = Method(name="add", wrap=wrapper(lambda x: x + 1))
    for methods, want in (([double, add], 2 * nll + 1), ([add, double], 2 * (nll + 1))):
        loss = step(methods, batch)[1]["loss"]
        np.testing.assert_allclose(loss, (batch["weight"] * want).sum() / batch["weight"].sum(), rtol=1e-5)


def test_observers_see_gradients_and_updates_and_write_their_own_memory_only(batch, plain):
    def observe(ctx, grads, updates, params):
        ratio = jnp.stack([jnp.sum(jnp.abs(updates[k] + LR * grads[k])) for k in grads])
        seen = {"nll": ctx.out.nll, "w": params["scale"]}
        return seen | {"count": ctx.own["live"]["count"] + 1, "off": jnp.max(ratio)}

    start = {"count": jnp.int32(4), "off": jnp.float32(9), "nll": jnp.zeros((8, 3)), "w": jnp.zeros(32)}
    live = {"watch": start, "other": {"x": jnp.ones(3)}}
    for accumulate in (1, 2):
        methods = [Method(name="watch", observe=observe), Method(name="other")]
        state, _ = step(methods, batch, live=live, accumulate=accumulate)
        seen = to_numpy(state.live["watch"])
        assert seen["count"] == 5 and seen["off"] < 1e-5
        np.testing.assert_allclose(seen["nll"], apply(None, weights(), batch).nll, rtol=1e-4, atol=1e-5)
        assert np.array_equal(seen["w"], weights()["scale"]), "the weights before the update"
        assert np.array_equal(state.live["other"]["x"], np.ones(3))


def test_a_method_sees_its_own_memory_only(batch):
    seen = {}

    def loss(name):
        def fn(ctx):
            seen[name] = ctx.own
            return {"x": jnp.sum(ctx.own["live"]["x"])}

        return fn

    methods = [Method(name=n, loss=loss(n)) for n in ("a", "b")]
    _, metrics = step(methods, batch, live={"a": {"x": jnp.ones(2)}, "b": {"x": jnp.ones(5)}})
    assert (metrics["a/x"], metrics["b/x"]) == (2, 5)
    assert {n: v["live"]["x"].shape for n, v in seen.items()} == {"a": (2,), "b": (5,)}


PENALTY = Method(name="p", loss=lambda ctx: {"l2": sum(jnp.sum(v**2) for v in ctx.params.values())})


@pytest.mark.parametrize("parts", [2, 4])
def test_micro_batches_equal_the_whole_batch(batch, parts):
    """Rows weigh differently, so this fails where micro-batches count alike; the penalty counts once."""
    whole, one = step([PENALTY], batch)
    split_up, many = step([PENALTY], batch, accumulate=parts)
    assert relative(to_numpy(split_up.train), to_numpy(whole.train)) < 1e-5
    for k in one:
        np.testing.assert_allclose(many[k], one[k], rtol=1e-5)


def test_without_any_target_penalties_still_count(batch):
    blank = batch | {"weight": np.zeros_like(batch["weight"])}
    whole, one = step([PENALTY], blank)
    split_up, many = step([PENALTY], blank, accumulate=2)
    assert one["objective"] == 0 and one["p/l2"] > 0
    np.testing.assert_allclose(many["p/l2"], one["p/l2"], rtol=1e-5)
    assert relative(to_numpy(split_up.train), to_numpy(whole.train)) < 1e-5


def test_methods_that_a_phase_leaves_out_do_not_run(batch, plain):
    quiet = Phase("train", 1, PHASE.streams, active=frozenset({"other"}))
    state, metrics = step([PENALTY], batch, phase=quiet)
    assert "p/l2" not in metrics and relative(to_numpy(state.train), to_numpy(plain[0].train)) < 1e-6


def test_the_clock_reaches_the_optimizer(batch):
    def update(updates, state, params=None, *, clock, **_):
        return jax.tree.map(lambda g: jnp.zeros_like(g) + clock.phase_len, updates), state

    tx = optax.GradientTransformationExtraArgs(lambda _: (), update)
    state, _ = step([], batch, tx=tx)
    np.testing.assert_allclose(state.train["scale"], weights()["scale"] + 5)


def test_keys_differ_by_stage_phase_and_step_and_not_otherwise():
    clocks = [Clock.at(stage=s, phase=p, phase_step=n) for s in range(2) for p in range(2) for n in range(2)]
    keys = {jax.random.key_data(step_key(np.uint32(1), c)).tobytes() for c in clocks}
    assert len(keys) == 8
    assert jax.random.key_data(step_key(np.uint32(1), clocks[3]._replace(step=99))).tobytes() in keys


def dots(jaxpr) -> Iterator[tuple[int, ...]]:
    """Shapes of the results of all matrix products, inner programs included."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield tuple(equation.outvars[0].aval.shape)
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from dots(inner)


def test_gradients_of_frozen_weights_are_not_computed(batch):
    """Every dense site of the full step has a product in its kernel's shape; LoRA's step has none of them."""
    params = decoder_weights()
    sites = [k.removesuffix("/kernel") for k in params if k.startswith("layers/") and k.endswith("/kernel")]
    kernels = {params[s + "/kernel"].shape for s in sites}
    with_lora = add_lora(params, ["layers/0/attn/q", "layers/1/attn/q"], 2, 1.0, jax.random.key(0))
    live = [k for k in with_lora if k.endswith(("/lora_a", "/lora_b"))]

    def products(params, trained) -> list[tuple[int, ...]]:
        train, frozen = split(params, trained)
        tx = optax.sgd(LR)
        fn = make_step(MODEL.apply, SPEC, [], tx, PHASE)
        state = State(Clock.at(), train, tx.init(train), {})
        return list(dots(jax.make_jaxpr(fn)(state, Fixed(frozen, {}), batch, np.uint32(0)).jaxpr))

    full, frozen = products(params, params), products(with_lora, live)
    either = kernels | {shape[::-1] for shape in kernels}
    assert sum(shape in either for shape in full) >= len(sites)
    assert sum(shape in either for shape in frozen) == 0
    assert len(frozen) < len(full)


def test_lora_of_the_loop_freezes_by_not_differentiating():
    b = Between(experiment([lora(rank=2)]), lambda: None)
    b.begin(0)
    assert b.world.trained == {k for k in b.world.params if k.endswith(("/lora_a", "/lora_b"))}
