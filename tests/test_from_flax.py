"""Models that are not ours train under jaxcl: an NNX recurrent net and a Linen mixer."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

from jaxcl.errors import RequestError
from jaxcl.models.from_flax import FlaxSpec, from_flax, into_flax

VOCAB, WIDTH = 11, 12


class Recurrent(nnx.Module):
    """Embedding, GRU, a list of two dense layers, dropout."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        self.rnn = nnx.RNN(nnx.GRUCell(WIDTH, WIDTH, rngs=rngs))
        self.mlp = nnx.List([nnx.Linear(WIDTH, WIDTH, rngs=rngs), nnx.Linear(WIDTH, VOCAB, rngs=rngs)])
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, tokens, deterministic=True):
        x = self.dropout(self.rnn(self.embed(tokens)), deterministic=deterministic)
        return self.mlp[1](nnx.gelu(self.mlp[0](x)))


class Mixer(linen.Module):
    """A causal mean over earlier tokens, then a dense net."""

    @linen.compact
    def __call__(self, tokens):
        x = linen.Embed(VOCAB, WIDTH)(tokens)
        count = jnp.arange(1, tokens.shape[1] + 1)[:, None]
        x = jnp.concatenate([x, jnp.cumsum(x, axis=1) / count], axis=-1)
        return linen.Dense(VOCAB)(linen.gelu(linen.Dense(WIDTH, name="inner")(x)))


def batch_of(rows: int = 8, width: int = 10) -> dict[str, np.ndarray]:
    """Counting modulo 11 from a random start by a step that the first two tokens show."""
    rng = np.random.default_rng(0)
    start, step = rng.integers(0, VOCAB, (rows, 1)), rng.integers(1, 3, (rows, 1))
    tokens = ((start + step * np.arange(width)) % VOCAB).astype(np.int32)
    segments = np.ones_like(tokens)
    segments[0, 7:] = 0
    return {"tokens": tokens, "segments": segments, "positions": np.tile(np.arange(width, dtype=np.int32), (rows, 1))}


def linen_module():
    return Mixer().bind(Mixer().init(jax.random.key(0), batch_of()["tokens"]))


MAKERS = {"nnx": lambda: Recurrent(nnx.Rngs(0)), "linen": linen_module}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
def test_trains_and_goes_back_into_the_module(make):
    module, batch = make(), batch_of()
    model, params = from_flax(module, logits=lambda m, b: m(b["tokens"]))
    assert isinstance(model.spec, FlaxSpec) and hash(model.spec) is not None
    assert all(isinstance(k, str) and isinstance(v, jax.Array) for k, v in params.items())
    tx = optax.sgd(0.5)

    @jax.jit
    def step(params, state):
        loss, grads = jax.value_and_grad(lambda p: model.apply(model.spec, p, batch, train=True).nll.mean())(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    state, losses, new = tx.init(params), [], params
    for _ in range(60):
        new, state, loss = step(new, state)
        losses.append(float(loss))
    assert losses[-1] < 0.6 * losses[0], losses
    assert new.keys() == params.keys() == model.init(model.spec, jax.random.key(1)).keys()
    assert all(not np.array_equal(new[k], params[k]) for k in params), "every parameter learned"


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
def test_outputs_equal_the_modules_own(make):
    module, batch = make(), batch_of()
    model, params = from_flax(module, logits=lambda m, b: m(b["tokens"]))
    scores = np.asarray(module(batch["tokens"]), np.float64)
    out = model.apply(model.spec, params, batch)
    prob = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    want = np.zeros(batch["tokens"].shape)
    for b in range(8):
        for t in range(1, 10):
            want[b, t] = -np.log(prob[b, t - 1, batch["tokens"][b, t]]) * (batch["segments"][b, t] > 0)
    np.testing.assert_allclose(out.nll, want, atol=1e-5)
    at = np.array([[3, 0], *[[9, 4]] * 7], np.int32)
    some = model.apply(model.spec, params, {**batch, "targets_at": at})
    np.testing.assert_allclose(some.nll, np.where(at > 0, np.take_along_axis(want, at, 1), 0), atol=1e-5)
    np.testing.assert_allclose(
        model.head(model.spec, params, out.hidden, at), np.take_along_axis(scores, at[..., None], 1), atol=1e-5
    )
    assert model.axes(model.spec, params).keys() == params.keys()


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
def test_trained_weights_go_back_into_the_module(make):
    module, tokens = make(), batch_of()["tokens"]
    model, params = from_flax(module, logits=lambda m, b: m(b["tokens"]))
    new = {k: v + 0.1 * jax.random.normal(jax.random.key(i), v.shape) for i, (k, v) in enumerate(params.items())}
    copy = into_flax(module, new | {"layers/0/lora_a": jnp.ones(3)})
    same = model.apply(model.spec, new, batch_of()).hidden
    np.testing.assert_allclose(copy(tokens), same, atol=1e-5)
    assert not np.allclose(module(tokens), copy(tokens), atol=1e-2), "the module itself stays as it was"
    with pytest.raises(RequestError, match="dict is no Flax module"):
        into_flax({}, new)


def test_paths_are_the_modules_own():
    _, params = from_flax(Recurrent(nnx.Rngs(0)), logits=lambda m, b: m(b["tokens"]))
    assert {"embed/embedding", "mlp/0/kernel", "mlp/1/bias"} <= params.keys()
    assert not any("dropout" in k or "rngs" in k for k in params), "only parameters"
    _, params = from_flax(linen_module(), logits=lambda m, b: m(b["tokens"]))
    assert {"Embed_0/embedding", "inner/kernel", "Dense_0/bias"} <= params.keys()


def test_train_reaches_logits_that_ask_for_it():
    module, batch = Recurrent(nnx.Rngs(0)), batch_of()
    model, params = from_flax(module, logits=lambda m, b, train: m(b["tokens"], deterministic=not train))
    still, again, noisy = (model.apply(model.spec, params, batch, train=t).nll for t in (False, False, True))
    assert np.array_equal(still, again) and not np.allclose(still, noisy)


def test_what_it_cannot_do_is_refused():
    model, params = from_flax(linen_module(), logits=lambda m, b: m(b["tokens"]))
    with pytest.raises(RequestError, match="Mixer cannot give a key-value cache"):
        model.apply(model.spec, params, batch_of(), cache={})
    with pytest.raises(RequestError, match="tap 'layers/0:out'"):
        model.apply(model.spec, params, batch_of(), taps=("layers/0:out",))
    with pytest.raises(RequestError, match="bind"):
        from_flax(Mixer(), logits=lambda m, b: m(b["tokens"]))
    with pytest.raises(RequestError, match="dict is no Flax module"):
        from_flax({}, logits=lambda m, b: m)
