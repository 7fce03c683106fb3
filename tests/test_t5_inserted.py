"""Prefixes and bottlenecks in a T5: against numpy, made of text, with a cache, and with tasks of their own."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import experiment
from t5_models import SPECS, STACK, batch, drawn, logits, prompts, reference, texts, whole
from told import check_past_tasks, watched

from jaxcl.core.between import Between
from jaxcl.errors import RequestError
from jaxcl.methods.bottleneck import NAMES as INSERTED
from jaxcl.methods.bottleneck import bottleneck
from jaxcl.methods.prefix_tuning import prefix_tuning
from jaxcl.methods.tasks import live
from jaxcl.models.export_hf import merged
from jaxcl.models.export_peft import written
from jaxcl.models.generate import generate
from jaxcl.models.prefix import MAP, NAMES
from jaxcl.models.stacking import restack
from jaxcl.models.t5 import apply, head
from jaxcl.models.t5_spec import axes
from jaxcl.surgery.bottlenecks import PLACES

SPEC = SPECS["v1.1"]
ATTENTIONS = [f"encoder/layers/{i}/attn" for i in range(2)]
ATTENTIONS += [f"decoder/layers/{i}/{name}" for i in range(2) for name in ("attn", "cross/attn")]
RNG = np.random.default_rng(3)


def begun(method, spec=SPEC) -> dict:
    """The parameters with which the first stage begins."""
    between = Between(experiment([method], spec=spec, n=1, params=drawn(spec, jax.random.key(0))), lambda: None)
    between.begin(0)
    return between.world.params


def filled(params: dict, names: tuple[str, ...]) -> dict:
    return params | {k: jnp.asarray(0.3 * RNG.normal(size=params[k].shape), jnp.float32) for k in live(params, names)}


def check_against_numpy(params: dict) -> None:
    p, rows = {k: np.asarray(v, np.float64) for k, v in params.items()}, batch(texts())
    out = whole(SPEC, params, rows)
    got = logits(SPEC, params, out.hidden, np.maximum(rows["targets_at"] - 1, 0))
    for i, (source, target) in enumerate(texts()):
        want = reference(SPEC, p, [*source, 1], [0, *target[:-1]])
        np.testing.assert_allclose(got[i, : len(target)], want, atol=2e-4)
    assert np.abs(out.nll - whole(SPEC, drawn(SPEC, jax.random.key(0)), rows).nll).max() > 0.05


def test_prefixes_of_every_attention_against_numpy():
    params = begun(prefix_tuning(length=3, hidden=0, start="random"))
    assert live(params, NAMES) == sorted(f"{site}/{name}" for site in ATTENTIONS for name in NAMES)
    check_against_numpy(filled(params, NAMES))


@pytest.mark.parametrize("style", PLACES)
def test_bottlenecks_of_both_stacks_against_numpy(style):
    params, rows = begun(bottleneck(width=3, style=style)), batch(texts())
    fresh, bare = whole(SPEC, params, rows), whole(SPEC, drawn(SPEC, jax.random.key(0)), rows)
    assert np.array_equal(fresh.hidden, bare.hidden), "they change nothing yet"
    assert sum(k.endswith("_down") for k in params) == 2 * SPEC.layers * len(PLACES[style])
    check_against_numpy(filled(params, INSERTED))


def test_a_prefix_of_text_has_the_keys_and_values_of_its_tokens():
    """In layer 0 by hand; of the others, the products of what they read."""
    spec = dataclasses.replace(SPEC, vocab=300)
    made = begun(prefix_tuning(length=4, hidden=0), spec)
    p = {k: np.asarray(v, np.float64) for k, v in made.items()}
    exp = experiment([], spec=spec, n=1, params=drawn(spec, jax.random.key(0)))
    rows = next(Between(exp, lambda: None).world.tools.batches(0))
    text = np.asarray(rows["tokens"])[np.asarray(rows["segments"]) > 0][:4].tolist()

    def keys(x, site):
        normed = x / np.sqrt((x**2).mean(-1, keepdims=True) + spec.norm_eps) * p[site + "_norm/scale"]
        return normed @ p[site + "/k/kernel"]

    for side, tokens in (("encoder", text), ("decoder", [0, *text[:-1]])):
        site = f"{side}/layers/0/attn"
        np.testing.assert_allclose(p[site + "/prefix_k"], keys(p["embed/kernel"][tokens], site), rtol=1e-4, atol=1e-4)
    taps = tuple(f"{site}/{n}:in" for site in ATTENTIONS for n in "kv")
    bare = {k: v for k, v in made.items() if "prefix" not in k}
    seen = jax.jit(functools.partial(apply, spec, taps=taps))(bare, batch([(text, text)])).taps
    for site, n in ((site, n) for site in ATTENTIONS for n in "kv"):
        want = np.asarray(seen[f"{site}/{n}:in"])[0, :4] @ p[f"{site}/{n}/kernel"]
        np.testing.assert_allclose(p[f"{site}/prefix_{n}"], want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", [prefix_tuning(length=3, hidden=4), bottleneck(width=3, style="parallel")])
def test_stacked_layers_are_the_layers_alone(method):
    stacked = dataclasses.replace(SPEC, segments=STACK)
    one, two = begun(method), begun(method, stacked)
    assert any("/0:2:1/" in k for k in two) and axes(stacked, two).keys() == two.keys()
    again = restack(two, stacked, SPEC.unstacked)[0]
    assert again.keys() == one.keys()
    for k in one:
        np.testing.assert_allclose(again[k], one[k], atol=1e-5, err_msg=k)
    params = filled(one, (*NAMES, *MAP, *INSERTED))
    got, want = whole(stacked, restack(params, SPEC, STACK)[0], batch(texts())), whole(SPEC, params, batch(texts()))
    np.testing.assert_allclose(got.nll, want.nll, atol=1e-4)


@pytest.mark.parametrize("method", [prefix_tuning(length=3, hidden=0, start="random"), bottleneck(width=3)])
def test_decoding_with_a_cache_equals_the_whole_forward_pass(method):
    params = filled(begun(method), (*NAMES, *INSERTED))
    make = jax.jit(functools.partial(generate, apply, head, SPEC, max_new=5, stop_ids=()))
    made = np.asarray(make(params, *prompts(texts(), 40))[0])
    rows = batch([(source, line.tolist()) for (source, _), line in zip(texts(), made)], window=45)
    hidden = whole(SPEC, params, rows).hidden
    got = logits(SPEC, params, hidden, np.maximum(rows["targets_at"][:, :5] - 1, 0))
    assert np.array_equal(np.argmax(got, axis=-1), made)


def test_no_library_has_the_same_form():
    params = {k: np.asarray(v) for k, v in begun(prefix_tuning(length=3, hidden=0, start="random")).items()}
    with pytest.raises(RequestError, match="PEFT's prefix has relative positions in a T5, ours has none"):
        written(SPEC, params)
    for inserted in (params, begun(bottleneck(width=3))):
        with pytest.raises(RequestError, match="which no Hugging Face model of this kind holds"):
            merged(SPEC, inserted)


@pytest.mark.parametrize(
    "method",
    [pytest.param(prefix_tuning(length=3, hidden=5, per_task=True, max_stages=2), marks=pytest.mark.slow),
     bottleneck(width=3, norms=True, per_task=True, max_stages=2)],
)  # fmt: skip
def test_outputs_of_past_tasks_are_bit_identical_while_the_bank_has_room(method, tmp_path):
    check_past_tasks(watched([method], tmp_path / "out", spec=SPEC, params=drawn(SPEC, jax.random.key(0))))
