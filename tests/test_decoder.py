"""The decoder against a reference written out in numpy, and the promises of its layout."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxcl.errors import RequestError
from jaxcl.models.attention import Part, attend
from jaxcl.models.blocks import bank
from jaxcl.models.decoder import decoder
from jaxcl.models.layout import axes
from jaxcl.models.nll import chunked_nll
from jaxcl.models.spec import DecoderSpec, tiny
from jaxcl.models.stacking import restack, restack_tree

SPEC = tiny(vocab=50)
MODEL = decoder(SPEC)
STACKS = {
    "one stack": ((("block",), 4),),
    "two stacks": ((("block",), 2), (("block",), 2)),
    "pattern of two": ((("block", "block"), 2),),
    "stack and tail": ((("block",), 3), (("block",), 1)),
}


def batch_of(seed: int = 0, rows: int = 3, width: int = 12) -> dict:
    """Row 0 whole, row 1 padded, row 2 two packed sequences."""
    rng = np.random.default_rng(seed)
    segments = np.ones((rows, width), np.int32)
    segments[1, 8:] = 0
    segments[2, 5:] = 2
    positions = np.where(segments == 2, np.arange(width) - 5, np.arange(width)).astype(np.int32)
    tokens = rng.integers(0, SPEC.vocab, (rows, width)).astype(np.int32)
    return {"tokens": tokens, "segments": segments, "positions": positions}


@functools.cache
def jitted(spec: DecoderSpec, taps: tuple[str, ...] = ()):
    return jax.jit(functools.partial(MODEL.apply, spec, taps=taps))


@pytest.fixture(scope="module")
def params() -> dict[str, np.ndarray]:
    return {k: np.asarray(v) for k, v in MODEL.init(SPEC, jax.random.key(0)).items()}


def reference(spec: DecoderSpec, params: dict, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """One unpadded sequence, position by position, in float64: the textbook's Llama."""
    p = {k: np.asarray(v, np.float64) for k, v in params.items()}
    n, dh = len(tokens), spec.head_dim

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + spec.norm_eps) * scale

    def turn(x):  # [n, heads, dh]
        out = np.empty_like(x)
        for pos in range(n):
            for i in range(dh // 2):
                angle = pos * spec.rope_theta ** (-2 * i / dh)
                a, b = x[pos, :, i], x[pos, :, i + dh // 2]
                out[pos, :, i] = a * np.cos(angle) - b * np.sin(angle)
                out[pos, :, i + dh // 2] = b * np.cos(angle) + a * np.sin(angle)
        return out

    x, seen = p["embed/kernel"][tokens], {}
    for layer in range(spec.layers):
        w = {k.removeprefix(f"layers/{layer}/"): v for k, v in p.items() if k.startswith(f"layers/{layer}/")}
        h = norm(x, w["attn_norm/scale"])
        seen[f"layers/{layer}/attn/q:in"] = h
        q, k, v = ((h @ w[f"attn/{s}/kernel"]).reshape(n, -1, dh) for s in "qkv")
        q, k = turn(q), turn(k)
        mixed = np.zeros_like(q)
        for head in range(spec.heads):
            shared = head // (spec.heads // spec.kv_heads)
            for t in range(n):
                s = q[t, head] @ k[: t + 1, shared].T / np.sqrt(dh)
                e = np.exp(s - s.max())
                mixed[t, head] = (e / e.sum()) @ v[: t + 1, shared]
        x = x + mixed.reshape(n, -1) @ w["attn/o/kernel"]
        h = norm(x, w["mlp_norm/scale"])
        gate = h @ w["mlp/gate/kernel"]
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w["mlp/up/kernel"])) @ w["mlp/down/kernel"]
        seen[f"layers/{layer}:out"] = x
    hidden = norm(x, p["final_norm/scale"])
    logits = hidden @ (p["embed/kernel"].T if spec.tied else p["head/kernel"])
    top = logits.max(-1, keepdims=True)
    logp = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
    nll = np.concatenate([[0.0], -logp[np.arange(n - 1), tokens[1:]]])
    return {"hidden": hidden, "logits": logits, "nll": nll, **seen}


@pytest.mark.parametrize("tied", [True, False])
def test_forward_equals_numpy(tied):
    spec = tiny(vocab=50, tied=tied, head_dim=6, rope_theta=500.0)
    params = MODEL.init(spec, jax.random.key(1))
    batch = batch_of()
    taps = ("layers/2/attn/q:in", "layers/3:out")
    out = jitted(spec, taps)(params, batch)
    at = np.tile(np.arange(12), (3, 1))
    logits = MODEL.head(spec, params, out.hidden, at)
    for row, part in ((0, slice(0, 12)), (1, slice(0, 8)), (2, slice(0, 5)), (2, slice(5, 12))):
        want = reference(spec, params, batch["tokens"][row, part])
        np.testing.assert_allclose(out.hidden[row, part], want["hidden"], atol=2e-5)
        np.testing.assert_allclose(logits[row, part], want["logits"], atol=2e-5)
        np.testing.assert_allclose(out.nll[row, part], want["nll"], atol=2e-5)
        for tap in taps:
            np.testing.assert_allclose(out.taps[tap][row, part], want[tap], atol=2e-5)
    assert np.all(np.asarray(out.nll)[1, 8:] == 0), "padding has no loss"


def test_targets_at_picks_the_tokens_asked_for(params):
    batch = batch_of()
    whole = np.asarray(jitted(SPEC)(params, batch).nll)
    at = np.array([[3, 11, 0], [2, 7, -1], [4, 8, 0]], np.int32)
    out = jitted(SPEC)(params, {**batch, "targets_at": at})
    want = np.where(at > 0, np.take_along_axis(whole, np.maximum(at, 0), axis=1), 0.0)
    np.testing.assert_allclose(out.nll, want, atol=1e-6)
    assert np.all(np.asarray(out.nll)[at <= 0] == 0)


@pytest.mark.parametrize("chunk", [1, 4, 7, 30, 1000])
def test_nll_in_chunks(chunk):
    rng = np.random.default_rng(2)
    hidden, kernel = rng.normal(size=(3, 9, 5)), rng.normal(size=(5, 11))
    at, labels = rng.integers(0, 9, (3, 7)), rng.integers(0, 11, (3, 7))

    def total(hidden):
        return chunked_nll(lambda h: h @ kernel, hidden, jnp.array(at), jnp.array(labels), chunk)

    scores = np.take_along_axis(hidden, at[..., None], 1) @ kernel
    prob = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    want = -np.log(np.take_along_axis(prob, labels[..., None], -1)[..., 0])
    np.testing.assert_allclose(total(hidden.astype(np.float32)), want, rtol=1e-5)
    grad = jax.grad(lambda h: total(h).sum())(jnp.array(hidden, jnp.float32))
    slope = np.zeros_like(hidden)
    for b in range(3):
        for k in range(7):
            slope[b, at[b, k]] += (prob[b, k] - np.eye(11)[labels[b, k]]) @ kernel.T
    np.testing.assert_allclose(grad, slope, atol=1e-5)


def test_long_causal_attention_in_blocks(length=515):
    """Grouped queries, a bias, padding, a prefix: against one softmax over all keys, values and gradients."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, length, h, 4)), jnp.float32) for h in (4, 2, 2))
    own, more = (jnp.asarray(rng.normal(size=(2, 3, 2, 4)), jnp.float32) for _ in range(2))
    bias = jnp.asarray(rng.normal(size=(1, 4, length, length)), jnp.float32)
    mask = np.tril(np.ones((2, length, length), bool))
    mask[1, :, 300:] = False
    mask[0, 200:, :200] = False  # two segments

    def ours(q, k, v, bias):
        prefix = Part(own, more, jnp.ones((2, length, 3), bool))
        return attend(q, [Part(k, v, jnp.asarray(mask), bias, causal=True), prefix])

    def plain(q, k, v, bias):
        keys, values = (jnp.repeat(jnp.concatenate(pair, 1), 2, axis=2) for pair in ((k, own), (v, more)))
        scores = jnp.einsum("bthd,bshd->bhts", q, keys) / 2 + jnp.pad(bias, ((0, 0),) * 3 + ((0, 3),))
        scores = jnp.where(np.pad(mask, ((0, 0), (0, 0), (0, 3)), constant_values=True)[:, None], scores, -jnp.inf)
        return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), values)

    np.testing.assert_allclose(ours(q, k, v, bias), plain(q, k, v, bias), atol=1e-5)
    down = jnp.asarray(rng.normal(size=q.shape), jnp.float32)
    slopes = [jax.grad(lambda *x, f=f: jnp.sum(down * f(*x)), argnums=(0, 1, 2, 3)) for f in (ours, plain)]
    for a, b in zip(*(slope(q, k, v, bias) for slope in slopes), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_logits_of_all_targets_never_exist(params):
    """With chunks of 4 targets no array of the gradient's program holds the vocabulary for all 36 of them."""
    spec = dataclasses.replace(SPEC, vocab=997, nll_chunk=4)
    shapes = jax.eval_shape(lambda: MODEL.init(spec, jax.random.key(0)))
    small = tuple(k for k in shapes if "norm" in k)

    def loss(train, rest, batch):
        return MODEL.apply(spec, {**rest, **train}, batch).nll.sum()

    train = {k: shapes[k] for k in small}
    rest = {k: v for k, v in shapes.items() if k not in small}
    jaxpr = jax.make_jaxpr(jax.grad(loss))(train, rest, batch_of())
    sizes = [v.aval.size for eqn in equations(jaxpr.jaxpr) for v in eqn.outvars if 997 in v.aval.shape]
    assert max(s for s in sizes if s != 997 * SPEC.width) <= 4 * 997


def equations(jaxpr):
    """All equations, those of inner programs too."""
    for eqn in jaxpr.eqns:
        yield eqn
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda v: hasattr(v, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def with_adapters(params: dict, seed: int = 3, rank: int = 2, slots: int = 3) -> dict:
    """Random live adapters on q, random banks on v, of every layer."""
    rng, out = np.random.default_rng(seed), dict(params)
    for i in range(SPEC.layers):
        for site, shapes in (("q", ("lora", (rank,), 32)), ("v", ("bank", (slots, rank), 16))):
            name, front, width = shapes
            at = f"layers/{i}/attn/{site}/{name}"
            out[f"{at}_a"] = rng.normal(size=(*front, 32)).astype(np.float32) * 0.2
            out[f"{at}_b"] = rng.normal(size=(*front[:-1], width, rank)).astype(np.float32) * 0.2
            out[f"{at}_scale"] = np.float32(0.5 + i)
    return out


def test_adapters_and_banks_equal_merged_weights(params):
    """Scaled A^T B^T added to the kernels gives the same model; so does a bank with one weight per row."""
    batch, rich = batch_of(), with_adapters(params)
    for row, weight in enumerate(np.array([[1.0, 0.0, 2.0], [0.0, 0.0, 0.0], [0.5, -1.0, 1.0]], np.float32)):
        merged = dict(params)
        for i in range(SPEC.layers):
            at = f"layers/{i}/attn"
            one = rich[f"{at}/q/lora_scale"] * rich[f"{at}/q/lora_a"].T @ rich[f"{at}/q/lora_b"].T
            many = np.einsum("s,sri,sor->io", weight, rich[f"{at}/v/bank_a"], rich[f"{at}/v/bank_b"])
            merged[f"{at}/q/kernel"] = params[f"{at}/q/kernel"] + one
            merged[f"{at}/v/kernel"] = params[f"{at}/v/kernel"] + rich[f"{at}/v/bank_scale"] * many
        got = jitted(SPEC)(rich, {**batch, "bank_weight": np.tile(weight, (3, 1))})
        want = jitted(SPEC)(merged, batch)
        np.testing.assert_allclose(got.hidden[row], want.hidden[row], atol=3e-5)
    ones = jitted(SPEC)(rich, {**batch, "bank_weight": np.ones((3, 3), np.float32)})
    np.testing.assert_allclose(jitted(SPEC)(rich, batch).nll, ones.nll, atol=1e-6)
    assert not np.allclose(ones.nll, jitted(SPEC)(params, batch).nll, atol=1e-3), "the adapters do something"


def test_bank_in_numpy():
    rng = np.random.default_rng(4)
    x, a, b = rng.normal(size=(2, 3, 5)), rng.normal(size=(4, 2, 5)), rng.normal(size=(4, 7, 2))
    weight = rng.normal(size=(2, 4))
    want = sum(0.3 * weight[:, s, None, None] * (x @ a[s].T @ b[s].T) for s in range(4))
    np.testing.assert_allclose(bank(x, a, b, np.float32(0.3), weight), want, rtol=1e-5, atol=1e-5)
    ones = sum(0.3 * (x @ a[s].T @ b[s].T) for s in range(4))
    np.testing.assert_allclose(bank(x, a, b, np.float32(0.3), None), ones, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("segments", STACKS.values(), ids=STACKS.keys())
def test_stacked_equals_unstacked(params, segments):
    """Same numbers from init, forward, taps, gradients and dropout; restack there and back is exact."""
    taps, batch = ("layers/1:out", "layers/3/mlp/down:in"), batch_of()
    rich = with_adapters(params)
    stacked, spec = restack(rich, SPEC, segments)
    assert all((":" in k) == (v.ndim > rich_ndim(k)) for k, v in stacked.items())
    drawn = MODEL.init(spec, jax.random.key(0))
    assert all(np.array_equal(drawn[k], stacked[k]) for k in drawn)
    back, _ = restack(stacked, spec, SPEC.segments)
    assert back.keys() == rich.keys() and all(np.array_equal(back[k], rich[k]) for k in rich)
    a, b = jitted(SPEC, taps)(rich, batch), jitted(spec, taps)(stacked, batch)
    np.testing.assert_allclose(b.nll, a.nll, atol=1e-5)
    for tap in taps:
        np.testing.assert_allclose(b.taps[tap], a.taps[tap], atol=1e-5)
    want = restack(dropped_grad(rich, SPEC), SPEC, segments)[0]
    got = dropped_grad(stacked, spec)
    for key in want:
        np.testing.assert_allclose(got[key], want[key], atol=2e-4, err_msg=key)


@functools.partial(jax.jit, static_argnums=1)
@jax.grad
def dropped_grad(params, spec):
    spec = dataclasses.replace(spec, adapter_dropout=0.3)
    return MODEL.apply(spec, params, batch_of(), train=True, key=jax.random.key(7)).nll.sum()


def rich_ndim(path: str) -> int:
    name = path.rpartition("/")[2]
    return {"scale": 1, "lora_scale": 0, "bank_scale": 0, "bank_a": 3, "bank_b": 3}.get(name, 2)


def test_restack_reaches_into_optimizer_states(params):
    segments = STACKS["pattern of two"]
    tx = optax.masked(optax.adam(1e-3), {k: "embed" not in k for k in params})
    state = tx.init(params)
    _, state = tx.update({k: jnp.asarray(v) + 1 for k, v in params.items()}, state, params)
    got = restack_tree({"opt": state, "note": 3}, SPEC, segments)
    mu = got["opt"].inner_state[0].mu
    want = 0.1 * (np.stack([params[f"layers/{i}/mlp/up/kernel"] for i in (1, 3)]) + 1)
    np.testing.assert_allclose(mu["layers/1:4:2/mlp/up/kernel"], want, rtol=1e-5)
    assert isinstance(mu["embed/kernel"], optax.MaskedNode) and got["note"] == 3
    assert not any(k.startswith("layers/1/") for k in mu)


def test_half_a_stack_is_refused(params):
    some = {k: v for k, v in params.items() if not k.startswith("layers/2/")}
    with pytest.raises(RequestError, match="layers/2/"):
        restack(some, SPEC, STACKS["one stack"])


@pytest.mark.parametrize("segments", [(), *STACKS.values()], ids=["unstacked", *STACKS.keys()])
def test_frozen_weight_gradients_are_not_computed(params, segments):
    """Training adapters on q costs the forward products, those of the input's gradient, and four small ones;
    training all costs one more for every kernel."""
    rich = with_adapters(params)
    if segments:
        rich, spec = restack(rich, SPEC, segments)
    else:
        spec = SPEC

    def count(trained) -> int:
        train = {k: v for k, v in rich.items() if trained(k)}
        rest = {k: v for k, v in rich.items() if not trained(k)}
        grad = jax.grad(lambda train: MODEL.apply(spec, {**rest, **train}, batch_of()).nll.sum())
        jaxpr = jax.make_jaxpr(grad)(train).jaxpr
        bodies = [e for e in equations(jaxpr) if e.primitive.name == "dot_general"]
        kernels = {v.shape[-2:] for k, v in rich.items() if k.startswith("layers") and "kernel" in k}
        flipped = {s[::-1] for s in kernels}
        return sum(tuple(e.outvars[0].aval.shape) in kernels | flipped for e in bodies)

    sites = sum(k.endswith("kernel") and k.startswith("layers") for k in rich)
    assert count(lambda k: "lora" in k) == 0, "no product has the shape of a kernel"
    assert count(lambda k: True) >= sites, "and all of them do when everything is trained"


def test_remat_and_bfloat16(params):
    batch = batch_of()

    def grads(spec, params):
        return jax.jit(jax.grad(lambda p: MODEL.apply(spec, p, batch).nll.sum()))(params)

    plain = grads(SPEC, params)
    for remat in ("block", "dots"):
        again = grads(dataclasses.replace(SPEC, remat=remat), params)
        for key in plain:
            np.testing.assert_allclose(again[key], plain[key], rtol=1e-4, atol=1e-5)
    spec = dataclasses.replace(SPEC, dtype="bfloat16", param_dtype="bfloat16")
    half = {k: jnp.asarray(v, jnp.bfloat16) for k, v in params.items()}
    out = jitted(spec)(half, batch)
    assert out.hidden.dtype == jnp.bfloat16 and out.nll.dtype == jnp.float32
    np.testing.assert_allclose(out.nll, jitted(SPEC)(params, batch).nll, atol=0.15)
    mixed = grads(dataclasses.replace(spec, param_dtype="float32"), params)
    assert {g.dtype for g in mixed.values()} == {jnp.dtype("float32")}


def test_what_is_computed_again_in_the_backward_pass(params):
    """Products with weights and between tokens under ``block``, those between tokens alone under ``dots``."""

    def count(remat: str) -> int:
        spec = dataclasses.replace(SPEC, remat=remat)
        grad = jax.grad(lambda p: MODEL.apply(spec, p, batch_of()).nll.sum())
        return sum(e.primitive.name == "dot_general" for e in equations(jax.make_jaxpr(grad)(params).jaxpr))

    none, block, dots = map(count, ("none", "block", "dots"))
    assert dots - none <= 2 * SPEC.layers, "scores, and values by them"
    assert block - dots >= 6 * SPEC.layers, "and six kernels; the last one's output is nobody's input"


def test_adapter_dropout_is_unbiased_and_only_in_training(params):
    spec, batch, rich = dataclasses.replace(SPEC, adapter_dropout=0.5), batch_of(), with_adapters(params)
    assert np.array_equal(jitted(spec)(rich, batch).nll, jitted(SPEC)(rich, batch).nll)
    tap = "layers/0/attn/q:in"
    one = {k: v for k, v in rich.items() if "layers/0/attn/q" in k or ("lora" not in k and "bank" not in k)}

    def after(key):
        return MODEL.apply(spec, one, batch, train=True, key=key, taps=("layers/0:out", tap))

    runs = jax.jit(jax.vmap(after))(jax.random.split(jax.random.key(0), 2))
    assert not np.allclose(runs.taps["layers/0:out"][0], runs.taps["layers/0:out"][1], atol=1e-4)
    assert np.array_equal(runs.taps[tap][0], runs.taps[tap][1]), "what the base kernel sees is not dropped"
    with pytest.raises(RequestError, match="key"):
        MODEL.apply(spec, rich, batch, train=True)


def test_axes_cover_every_dimension(params):
    table = axes(SPEC, with_adapters(params))
    assert table["embed/kernel"] == ("vocab", "embed")
    assert table["layers/1/attn/q/kernel"] == ("embed", "heads")
    assert table["layers/1/attn/q/lora_a"] == (None, "embed")
    assert table["layers/1/attn/q/lora_b"] == ("heads", None)
    assert table["layers/1/attn/v/bank_b"] == (None, "kv", None)
    assert table["layers/1/attn/q/lora_scale"] == ()
    stacked, spec = restack(with_adapters(params), SPEC, STACKS["one stack"])
    table = axes(spec, stacked)
    assert table["layers/0:4:1/attn/o/kernel"] == (None, "heads", "embed")
    assert table["layers/0:4:1/attn/v/bank_a"] == (None, None, None, "embed")
    assert table["layers/0:4:1/attn/q/lora_scale"] == (None,)
    assert all(len(table[k]) == v.ndim for k, v in stacked.items())


def test_sequences_in_a_row_do_not_see_each_other(params):
    """Changing one packed sequence leaves the other's outputs bit-identical."""
    batch = batch_of()
    other = {**batch, "tokens": batch["tokens"].copy()}
    other["tokens"][2, :5] = (other["tokens"][2, :5] + 1) % SPEC.vocab
    a, b = jitted(SPEC)(params, batch), jitted(SPEC)(params, other)
    assert np.array_equal(a.hidden[2, 5:], b.hidden[2, 5:])
    assert not np.allclose(a.hidden[2, :5], b.hidden[2, :5])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"heads": 3}, "kv_heads is 2"),
        ({"head_dim": 5}, "head_dim is 5"),
        ({"width": 0}, "width is 0"),
        ({"dtype": "float31"}, "did you mean 'float32'"),
        ({"adapter_dropout": 1.0}, "adapter_dropout is 1.0"),
        ({"segments": ((("block",), 3),)}, "exactly 4"),
        ({"segments": ((("blok",), 4),)}, "did you mean 'block'"),
        ({"remat": "all"}, "remat"),
    ],
)
def test_a_spec_that_does_not_fit_is_refused(change, says):
    with pytest.raises(RequestError, match=says):
        dataclasses.replace(SPEC, **change)


def test_unknown_tap_and_long_sequence(params):
    with pytest.raises(RequestError, match="did you mean 'layers/1/attn/q:in'"):
        MODEL.apply(SPEC, params, batch_of(), taps=("layers/1/attn/q:inn",))
    with pytest.raises(RequestError, match="context"):
        MODEL.apply(dataclasses.replace(SPEC, context=8), params, batch_of())
