"""What Llama's relatives add to the decoder: against numpy written out here, with caches, packing and stacks."""

from __future__ import annotations

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

from jaxcl.errors import RequestError
from jaxcl.models.cache import extend, prefill
from jaxcl.models.decoder import decoder
from jaxcl.models.layout import axes, layout
from jaxcl.models.rope import rates
from jaxcl.models.spec import QKV, SITES, DecoderSpec, RopeScaling, tiny
from jaxcl.models.stacking import restack
from jaxcl.models.taps import tap_names
from jaxcl.surgery.adapters import add_lora

SIZES = {"vocab": 40, "width": 16, "heads": 4, "kv_heads": 2, "head_dim": 6, "mlp": 24, "context": 64}
LOCAL, GLOBAL = "local", "block"
GEMMA = tiny(
    **SIZES,
    layers=4,
    norms="both",
    qk_norm="head",
    activation="gelu_tanh",
    embed_scale=4.0,
    attn_scale=0.3,
    window=3,
    local_theta=50.0,
    rope_scaling=RopeScaling("linear", 4.0),
    segments=(((LOCAL, GLOBAL, LOCAL, GLOBAL), 1),),
)
SPECS = {
    "gemma": GEMMA,
    "olmo": tiny(**SIZES, layers=2, norms="post", qk_norm="width", tied=False),
    "qwen": tiny(**SIZES, layers=3, biases=SITES, rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 20)),
    "mistral": tiny(**SIZES, layers=2, window=4, segments=(((LOCAL,) * 2, 1),)),
}
STACKS = {
    "gemma": (((LOCAL, GLOBAL), 2),),
    "olmo": (((GLOBAL,), 2),),
    "qwen": (((GLOBAL,), 2), ((GLOBAL,), 1)),
    "mistral": (((LOCAL,), 2),),
}
MODEL = decoder(GEMMA)
TOKENS = 12


@functools.cache
def weights(name: str) -> dict[str, np.ndarray]:
    """Random weights in which no norm is one and no bias zero."""
    rng = np.random.default_rng(3)
    table = layout(SPECS[name])
    drawn = {k: rng.normal(0, 0.3, leaf.shape) + (k.endswith("/scale")) for k, leaf in table.items()}
    return {k: v.astype(np.float32) for k, v in drawn.items()}


run = jax.jit(MODEL.apply, static_argnums=0, static_argnames=("taps",))
run_prefill = jax.jit(functools.partial(prefill, MODEL.apply), static_argnums=(0, 3))
run_extend = jax.jit(functools.partial(extend, MODEL.apply), static_argnums=(0, 4))


def block(tokens: np.ndarray, start: int = 0) -> dict[str, np.ndarray]:
    positions = np.tile(np.arange(start, start + tokens.shape[1], dtype=np.int32), (len(tokens), 1))
    return {"tokens": tokens, "segments": np.ones_like(tokens), "positions": positions}


def random_tokens(seed: int = 0, rows: int = 2) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, SIZES["vocab"], (rows, TOKENS)).astype(np.int32)


def reference(spec: DecoderSpec, params: dict, tokens: np.ndarray) -> np.ndarray:
    """Hidden states of one sequence, position by position, in float64, from the papers' formulas."""
    p = {k: np.asarray(v, np.float64) for k, v in params.items()}
    n, dh = len(tokens), spec.head_dim

    def norm(x, path, built=True):
        if not built:
            return x
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + spec.norm_eps) * p[path]

    def dense(x, site):
        return x @ p[f"{site}/kernel"] + p.get(f"{site}/bias", 0.0)

    def angle(kind, i):
        if kind == LOCAL and spec.local_theta:
            return spec.local_theta ** (-2 * i / dh)
        rate, how = spec.rope_theta ** (-2 * i / dh), spec.rope_scaling
        if how is None:
            return rate
        if how.kind == "linear":
            return rate / how.factor
        wavelength = 2 * np.pi / rate
        if wavelength < how.original / how.high:
            return rate
        if wavelength > how.original / how.low:
            return rate / how.factor
        smooth = (how.original / wavelength - how.low) / (how.high - how.low)
        return (1 - smooth) * rate / how.factor + smooth * rate

    def turn(x, kind):
        out = np.empty_like(x)
        for t in range(n):
            for i in range(dh // 2):
                c, s = np.cos(t * angle(kind, i)), np.sin(t * angle(kind, i))
                a, b = x[t, :, i], x[t, :, i + dh // 2]
                out[t, :, i], out[t, :, i + dh // 2] = a * c - b * s, b * c + a * s
        return out

    def queries(x, name, at):
        y = dense(x, f"{at}/attn/{name}")
        if spec.qk_norm == "width" and name != "v":
            y = norm(y, f"{at}/attn/{name}_norm/scale")
        y = y.reshape(n, -1, dh)
        return norm(y, f"{at}/attn/{name}_norm/scale", spec.qk_norm == "head" and name != "v")

    pre, post = spec.norms in ("pre", "both"), spec.norms in ("post", "both")
    x = p["embed/kernel"][tokens] * spec.embed_scale
    for layer, kind in enumerate(spec.kinds):
        at = f"layers/{layer}"
        h = norm(x, f"{at}/attn_norm/scale", pre)
        q, k, v = turn(queries(h, "q", at), kind), turn(queries(h, "k", at), kind), queries(h, "v", at)
        mixed = np.zeros_like(q)
        for head in range(spec.heads):
            shared = head // (spec.heads // spec.kv_heads)
            for t in range(n):
                first = max(0, t - spec.window + 1) if kind == LOCAL else 0
                scores = k[first : t + 1, shared] @ q[t, head] * (spec.attn_scale or dh**-0.5)
                e = np.exp(scores - scores.max())
                mixed[t, head] = (e / e.sum()) @ v[first : t + 1, shared]
        x = x + norm(dense(mixed.reshape(n, -1), f"{at}/attn/o"), f"{at}/attn_post_norm/scale", post)
        h = norm(x, f"{at}/mlp_norm/scale", pre)
        gate = dense(h, f"{at}/mlp/gate")
        if spec.activation == "silu":
            gate = gate / (1 + np.exp(-gate))
        else:
            gate = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
        y = dense(gate * dense(h, f"{at}/mlp/up"), f"{at}/mlp/down")
        x = x + norm(y, f"{at}/mlp_post_norm/scale", post)
    return norm(x, "final_norm/scale")


@pytest.mark.parametrize("name", SPECS)
def test_forward_equals_numpy(name):
    tokens = random_tokens()
    got = run(SPECS[name], weights(name), block(tokens)).hidden
    for row in range(len(tokens)):
        np.testing.assert_allclose(got[row], reference(SPECS[name], weights(name), tokens[row]), atol=3e-5)


@pytest.mark.parametrize("factor", [2.0, 8.0, 32.0])
def test_rotary_scaling_in_numpy(factor):
    """Linear divides every rate; Llama 3.1's leaves quick pairs, slows slow ones, and mixes between."""
    plain = 500000.0 ** (-np.arange(0, 64, 2) / 64)
    np.testing.assert_allclose(rates(64, 5e5), plain, rtol=1e-5)
    np.testing.assert_allclose(rates(64, 5e5, RopeScaling("linear", factor)), plain / factor, rtol=1e-5)
    got = np.asarray(rates(64, 5e5, RopeScaling("llama3", factor)))
    turns = 8192 * plain / (2 * np.pi)
    kept, slowed = turns > 4, turns < 1
    assert kept.any() and slowed.any() and kept.sum() + slowed.sum() < 32
    np.testing.assert_allclose(got[kept], plain[kept], rtol=1e-5)
    np.testing.assert_allclose(got[slowed], plain[slowed] / factor, rtol=1e-5)
    between = ~kept & ~slowed
    share = (turns[between] - 1) / 3
    np.testing.assert_allclose(got[between], plain[between] * (share + (1 - share) / factor), rtol=1e-4)


@pytest.mark.parametrize(("name", "stacked"), [("gemma", False), ("gemma", True), ("mistral", True)])
def test_a_cache_gives_what_the_whole_sequence_gives(name, stacked):
    """Windows reach back into the cache from single tokens, from blocks, and from the prompt itself."""
    spec, params = SPECS[name], weights(name)
    if stacked:
        params, spec = restack(params, spec, STACKS[name])
    tokens = random_tokens(1)
    whole = run(SPECS[name], weights(name), block(tokens)).hidden
    first = run_prefill(spec, params, block(tokens[:, :5]), 16)
    np.testing.assert_allclose(first.hidden, whole[:, :5], atol=3e-5)
    cache = first.cache
    for start, stop in ((5, 6), (6, 10), (10, 11), (11, 12)):
        part = block(tokens[:, start:stop], start)
        out = run_extend(spec, params, part, cache, True)
        np.testing.assert_allclose(out.hidden, whole[:, start:stop], atol=3e-5)
        if stop == 10:  # what is not written is seen all the same
            assert np.array_equal(out.hidden, run_extend(spec, params, part, cache, False).hidden)
        cache = out.cache


def test_labels_after_a_prompt_see_their_window():
    """Two labels in one block, each from the prompt's last token on, are as the prompt and each label alone."""
    spec, params, prompt = GEMMA, weights("gemma"), random_tokens(2, 1)[:, :6]
    labels = ([7, 8, 9, 10], [11, 12])
    tokens, segments, positions = (np.zeros((1, 10), np.int32) for _ in range(3))
    for l, label in enumerate(labels):
        here = slice(5 * l, 5 * l + 1 + len(label))
        tokens[0, here], segments[0, here] = [prompt[0, -1], *label], l + 1
        positions[0, here] = np.arange(5, 6 + len(label))
    cache = run_prefill(spec, params, block(prompt), 8).cache
    got = run_extend(spec, params, {"tokens": tokens, "segments": segments, "positions": positions}, cache, False)
    for l, label in enumerate(labels):
        want = reference(spec, params, np.array([*prompt[0], *label]))[5:]
        np.testing.assert_allclose(got.hidden[0, 5 * l : 5 * l + 1 + len(label)], want, atol=3e-5)


@pytest.mark.parametrize("name", SPECS)
def test_packed_rows_equal_separate_rows(name):
    tokens, spec, params = random_tokens(3, 1), SPECS[name], weights(name)
    segments = np.array([[1] * 5 + [2] * 6 + [0]], np.int32)
    positions = np.array([[*range(5), *range(6), 0]], np.int32)
    out = run(spec, params, {"tokens": tokens, "segments": segments, "positions": positions})
    for part in (slice(0, 5), slice(5, 11)):
        np.testing.assert_allclose(out.hidden[0, part], reference(spec, params, tokens[0, part]), atol=3e-5)


def test_a_window_hides_what_lies_before_it():
    """Two local layers of window 4 pass on what is up to 6 tokens away, and not a token more."""
    spec = SPECS["mistral"]
    tokens = random_tokens(4, 1)
    other = tokens.copy()
    other[0, 0] = (other[0, 0] + 1) % SIZES["vocab"]
    a, b = (np.asarray(run(spec, weights("mistral"), block(t)).hidden[0]) for t in (tokens, other))
    assert np.array_equal(a[7:], b[7:]) and all(np.abs(a[t] - b[t]).max() > 1e-6 for t in range(7))


@pytest.mark.parametrize("name", ["gemma", "olmo", "qwen"])
def test_stacked_equals_unstacked_and_everything_has_a_gradient(name):
    spec, params, batch = SPECS[name], weights(name), block(random_tokens(5))
    batch["segments"][1, 9:] = 0

    def grads(spec, params):
        return jax.jit(jax.grad(lambda p: MODEL.apply(spec, p, batch).nll.sum()))(params)

    plain = grads(spec, params)
    assert all(np.isfinite(v).all() for v in plain.values())
    silent = {k for k, v in plain.items() if np.abs(v).max() == 0}
    assert not silent
    stacked, again = restack(params, spec, STACKS[name])
    got = grads(again, stacked)
    for key, want in restack(plain, spec, STACKS[name])[0].items():
        np.testing.assert_allclose(got[key], want, atol=2e-4, rtol=1e-3, err_msg=key)
    drawn = jax.eval_shape(functools.partial(MODEL.init, spec), jax.random.key(0))
    assert {k: v.shape for k, v in drawn.items()} == {k: v.shape for k, v in params.items()}


def test_adapters_taps_and_axes_know_the_new_sites():
    """A LoRA at a site with a bias adds its product and leaves the bias alone."""
    spec, params = SPECS["qwen"], weights("qwen")
    site, tap = "layers/1/attn/q", "layers/1/attn/q:in"
    rich = add_lora(params, [site], 2, 0.5, jax.random.key(0))
    rich[f"{site}/lora_b"] = np.random.default_rng(0).normal(size=(24, 2)).astype(np.float32)
    added = 0.5 * (rich[f"{site}/lora_b"] @ rich[f"{site}/lora_a"]).T
    merged = {**params, f"{site}/kernel": params[f"{site}/kernel"] + added}
    batch = block(random_tokens(6))
    a, b = run(spec, rich, batch, taps=(tap,)), run(spec, merged, batch)
    np.testing.assert_allclose(a.hidden, b.hidden, atol=3e-5)
    assert a.taps[tap].shape == (2, TOKENS, 16)
    assert not np.allclose(a.hidden, run(spec, params, batch).hidden, atol=1e-2)
    assert all("norm" not in name and "bias" not in name for name in tap_names(GEMMA))
    table = axes(spec, rich)
    assert table["layers/0/attn/k/bias"] == ("kv",) and table["layers/0/mlp/up/bias"] == ("mlp",)
    stacked = restack(weights("olmo"), SPECS["olmo"], STACKS["olmo"])[0]
    assert axes(SPECS["olmo"], stacked)["layers/0:2:1/attn/q_norm/scale"] == (None, "heads")
    assert axes(GEMMA, weights("gemma"))["layers/0/attn/q_norm/scale"] == (None,)


def test_bfloat16_rounds_the_embeddings_scale():
    """sqrt(640) is 25.25 in bfloat16, as transformers has it."""
    spec = dataclasses.replace(GEMMA, embed_scale=640**0.5, dtype="bfloat16", layers=1, segments=(((LOCAL,), 1),))
    params = {k: v for k, v in weights("gemma").items() if not k.startswith(("layers/1", "layers/2", "layers/3"))}
    params |= {k: np.zeros_like(v) for k, v in params.items() if "post_norm" in k}  # the layer adds nothing
    tokens = random_tokens(7)
    out = run(spec, params, block(tokens), taps=("layers/0:out",)).taps["layers/0:out"]
    rows = params["embed/kernel"][tokens].astype(jax.numpy.bfloat16)
    assert np.array_equal(np.asarray(out), rows * jax.numpy.bfloat16(25.25))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"window": None}, "window is None"),
        ({"window": 0}, "window is 0"),
        ({"segments": (((GLOBAL,) * 4, 1),)}, "window is 3; accepted: a whole number where"),
        ({"segments": (((GLOBAL,) * 4, 1),), "window": None}, "local_theta is 50.0"),
        ({"norms": "prae"}, "did you mean 'pre'"),
        ({"qk_norm": "heads"}, "did you mean 'head'"),
        ({"activation": "relu"}, "accepted: gelu_tanh, silu"),
        ({"biases": ("attn/w",)}, "did you mean 'attn/"),
        ({"embed_scale": 0.0}, "embed_scale is 0.0"),
        ({"attn_scale": -1.0}, "attn_scale is -1.0"),
        ({"rope_scaling": ("yarn", 4.0)}, "'yarn'"),
        ({"rope_scaling": ("llama3", 4.0, 4.0, 1.0)}, "low < high"),
    ],
)
def test_options_that_do_not_fit_are_refused(change, says):
    with pytest.raises(RequestError, match=says):
        dataclasses.replace(GEMMA, **change)


def test_restack_keeps_the_kinds_of_layers():
    with pytest.raises(RequestError, match="change the kinds of layers"):
        restack(weights("gemma"), GEMMA, (((LOCAL,), 4),))


@pytest.mark.parametrize("name", SPECS)
def test_a_spec_survives_json(name):
    """A run's journal holds it so."""
    again = DecoderSpec(**json.loads(json.dumps(dataclasses.asdict(SPECS[name]))))
    assert again == SPECS[name] and hash(again) == hash(SPECS[name])
    assert tiny(biases=QKV[::-1]).biases == QKV


def test_biases_start_at_zero():
    drawn = MODEL.init(tiny(**SIZES, layers=1, biases=("mlp/up",)), jax.random.key(0))
    assert drawn["layers/0/mlp/up/bias"].shape == (24,) and not np.any(drawn["layers/0/mlp/up/bias"])
