"""What a method may put into the model: functions in place of a site's output, and scales of its units."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import MODEL, SPEC, STACK, weights

from jaxcl.errors import RequestError
from jaxcl.models.cache import prefill
from jaxcl.models.decoder import decoder
from jaxcl.models.spec import tiny

SITE = "layers/1/mlp/down"


def batch_of(rows: int = 2, width: int = 8) -> dict:
    tokens = np.random.default_rng(0).integers(0, SPEC.vocab, (rows, width)).astype(np.int32)
    places = np.broadcast_to(np.arange(width, dtype=np.int32), tokens.shape)
    return {"tokens": tokens, "segments": np.ones_like(tokens), "positions": places}


def test_what_is_injected_replaces_the_output_and_its_notes_come_back():
    params, batch = weights(), batch_of()
    plain = MODEL.apply(SPEC, params, batch, taps=(f"{SITE}:in", "layers/0:out"))

    def halved(x, y):
        return y * 0.5, {"largest": jnp.max(x)}

    out = MODEL.apply(SPEC, params, batch, taps=("layers/0:out",), inject={SITE: halved})
    changed = {**params, f"{SITE}/kernel": params[f"{SITE}/kernel"] * 0.5}
    np.testing.assert_allclose(out.hidden, MODEL.apply(SPEC, changed, batch).hidden, atol=1e-6)
    assert np.array_equal(out.taps["layers/0:out"], plain.taps["layers/0:out"])
    assert float(out.aux[SITE]["largest"]) == float(np.max(plain.taps[f"{SITE}:in"]))
    assert not plain.aux


@pytest.mark.parametrize("remat", ["none", "block"])
def test_injection_under_remat_with_a_cache_and_a_gradient(remat):
    spec, params, batch = dataclasses.replace(SPEC, remat=remat), weights(), batch_of()

    def loss(value):
        inject = {SITE: lambda x, y: (y.at[:, 3].set(value), {})}
        return MODEL.apply(spec, params, batch, inject=inject).nll.sum()

    value = jnp.full(SPEC.width, 0.1)
    grad = jax.grad(loss)(value)
    nudge = 1e-2 * grad / jnp.linalg.norm(grad)
    slope = (loss(value + nudge) - loss(value - nudge)) / 2
    np.testing.assert_allclose(slope, jnp.vdot(grad, nudge), rtol=2e-2)

    def filled(spec, params, batch, cache=None):
        return MODEL.apply(spec, params, batch, cache=cache, inject={SITE: lambda x, y: (y, {"n": x.sum()})})

    out = prefill(filled, spec, params, batch, 16)
    assert out.aux[SITE]["n"].shape == () and np.array_equal(
        out.hidden, prefill(MODEL.apply, spec, params, batch, 16).hidden
    )


def test_sites_that_are_not_there_or_not_alone_are_refused():
    keep = lambda x, y: (y, {})  # noqa: E731
    with pytest.raises(RequestError, match="layers/1/mlp/up'"):
        MODEL.apply(SPEC, weights(), batch_of(), inject={"layers/1/mlp/upp": keep})
    spec = dataclasses.replace(SPEC, segments=STACK)
    with pytest.raises(RequestError, match="stack"):
        MODEL.apply(spec, weights(spec), batch_of(), inject={SITE: keep})


@pytest.mark.parametrize("segments", [(), STACK], ids=["unstacked", "stacked"])
def test_scales_are_diagonal_matrices_at_their_site(segments):
    """in_scale s: x diag(s) W, out_scale s: x W diag(s), written into the kernels by hand."""
    spec = dataclasses.replace(SPEC, segments=segments)
    rng = np.random.default_rng(1)
    plain, scaled = {**weights(spec)}, {**weights(spec)}
    for site, name in (("mlp/down", "in_scale"), ("attn/k", "out_scale"), ("attn/v", "out_scale")):
        for path in [p for p in weights(spec) if p.endswith(site + "/kernel")]:
            kernel = np.asarray(plain[path])
            units = kernel.shape[-2 if name == "in_scale" else -1]
            scale = rng.uniform(0.5, 1.5, (*kernel.shape[:-2], units)).astype(np.float32)
            scaled[path.replace("kernel", name)] = scale
            plain[path] = kernel * (scale[..., :, None] if name == "in_scale" else scale[..., None, :])
    got, want = (MODEL.apply(spec, p, batch_of()).nll for p in (scaled, plain))
    np.testing.assert_allclose(got, want, atol=2e-5)
    named = MODEL.axes(spec, scaled)
    assert {named[p][-1] for p in scaled if p.endswith("_scale")} == {"mlp", "kv"}


def test_a_forward_pass_that_starts_at_a_layer_ends_as_the_whole_one():
    params, batch = weights(), batch_of()
    whole = MODEL.apply(SPEC, params, batch, taps=("layers/0:out",))
    stream = whole.taps["layers/0:out"]
    wrong_tokens = {**batch, "tokens": np.zeros_like(batch["tokens"]), "targets_at": np.full((2, 1), 3, np.int32)}
    rest = MODEL.apply(SPEC, params, wrong_tokens, start=(1, stream))
    np.testing.assert_array_equal(rest.hidden, whole.hidden)  # the tokens count as labels only
    used = MODEL.apply(SPEC, {k: v for k, v in params.items() if "layers/0/" not in k}, batch, start=(1, stream))
    np.testing.assert_array_equal(used.nll, whole.nll)


def test_a_start_at_a_stack_and_inside_one():
    spec = tiny(layers=5, segments=((("block",), 2), (("block", "block"), 1), (("block",), 1)))
    model, batch = decoder(spec), batch_of()
    params = model.init(spec, jax.random.key(0))
    whole = model.apply(spec, params, batch, taps=("layers/1:out", "layers/2:out", "layers/3:out"))
    for layer in (2, 3, 4):
        rest = model.apply(spec, params, batch, start=(layer, whole.taps[f"layers/{layer - 1}:out"]))
        np.testing.assert_array_equal(rest.nll, whole.nll)
    embedded = jnp.take(params["embed/kernel"], batch["tokens"], axis=0)
    np.testing.assert_array_equal(model.apply(spec, params, batch, start=(0, embedded)).nll, whole.nll)
    with pytest.raises(RequestError, match="layer 1 is in a stack"):
        model.apply(spec, params, batch, start=(1, embedded))
