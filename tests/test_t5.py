"""T5 against numpy written out here, and against itself: packed rows, stacked layers, the cache."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from t5_models import MOST, SPECS, STACK, WINDOW, batch, drawn, logits, prompts, reference, texts, whole

from jaxcl.core.types import Outputs
from jaxcl.data.packing import merge
from jaxcl.errors import RequestError
from jaxcl.models.cache import extend, prefill
from jaxcl.models.generate import generate
from jaxcl.models.stacking import restack
from jaxcl.models.t5 import apply, head
from jaxcl.models.t5_positions import bucket_of, bucket_table
from jaxcl.models.t5_rows import sides
from jaxcl.models.t5_spec import T5Spec, axes, layout, tap_names, tiny_t5

SPEC = SPECS["v1.1"]


@pytest.fixture(scope="module")
def params() -> dict[str, jax.Array]:
    return drawn(SPEC, jax.random.key(0))


@pytest.fixture(scope="module")
def out(params) -> Outputs:
    return whole(SPEC, params, batch(texts()))


def test_buckets_by_the_formula():
    """The T5 code's own: half exact, then floor of a logarithm, in float64 away from its borders."""
    for buckets, distance in ((32, 128), (8, 20), (16, 100)):
        exact = buckets // 2
        table = bucket_table(buckets, distance)
        assert table[:exact].tolist() == list(range(exact)) and table[-1] == buckets - 1
        for n in range(exact, distance + 1):
            value = exact + math.log(n / exact) / math.log(distance / exact) * (buckets - exact)
            near = round(value)
            expected = near if abs(value - near) < 1e-9 else math.floor(value)
            assert table[n] == min(expected, buckets - 1)
    relative = jnp.arange(-40, 41)
    one = np.asarray(bucket_of(relative, both=False, buckets=8, distance=20))
    assert (one[40:] == 0).all() and one[0] == 7
    two = np.asarray(bucket_of(relative, both=True, buckets=8, distance=20))
    assert two[40] == 0 and (two[:41] < 4).all() and (two[41:] >= 4).all()
    assert (two[:40][::-1] + 4 == two[41:]).all()


def test_a_row_is_cut_where_its_answer_begins():
    rows = texts()
    source, target = sides({k: jnp.asarray(v) for k, v in batch(rows).items()}, start=0, end=1)
    for i, (prompt, answer) in enumerate(rows):
        n, k = len(prompt) + 1, len(answer)
        assert source.tokens[i, :n].tolist() == [*prompt, 1]
        assert source.segments[i].tolist() == [1] * n + [0] * (WINDOW - n)
        assert target.tokens[i, :k].tolist() == [0, *answer[:-1]]
        assert target.segments[i].tolist() == [1] * k + [0] * (MOST - k)


def test_logits_and_nll_of_numpy(params, out):
    p = {k: np.asarray(v, np.float64) for k, v in params.items()}
    at = batch(texts())["targets_at"]
    got = logits(SPEC, params, out.hidden, np.maximum(at - 1, 0))
    for i, (source, target) in enumerate(texts()):
        want = reference(SPEC, p, [*source, 1], [0, *target[:-1]])
        np.testing.assert_allclose(got[i, : len(target)], want, atol=1e-4)
        nll = np.log(np.exp(want).sum(-1)) - want[np.arange(len(target)), target]
        np.testing.assert_allclose(out.nll[i, : len(target)], nll, atol=1e-4)
        assert not np.any(out.nll[i, len(target) :])


def test_packed_rows_are_rows_alone(params, out):
    single = batch(texts(), WINDOW)
    alone = [{k: single[k][i] for k in single} | {"row": np.int32(i)} for i in range(3)]
    room = 70  # of all three, which stand in one row of it
    wide = []
    for one in alone:
        grown = {k: np.pad(one[k], (0, room - WINDOW)) for k in ("tokens", "segments", "positions")}
        wide.append(one | grown | {"weight": np.ones(MOST, np.float32)})
    packed = merge(wide, 3)
    found = whole(SPEC, params, {k: packed[k][None] for k in ("tokens", "segments", "positions", "targets_at")})
    np.testing.assert_allclose(found.nll.reshape(3, MOST), out.nll, atol=2e-5)


def test_stacked_layers_remat_and_the_gradient_of_every_tensor(params, out):
    rows = batch(texts())
    spec = dataclasses.replace(SPEC, segments=STACK, remat="block")
    stacked, _ = restack(params, SPEC, STACK)
    assert "encoder/layers/0:2:1/attn/q/kernel" in stacked and "decoder/layers/0:2:1/cross/attn/q/kernel" in stacked

    @functools.partial(jax.jit, static_argnums=0)
    def slope(spec, params):
        return jax.value_and_grad(lambda p: jnp.sum(apply(spec, p, rows).nll))(params)

    loss, grad = slope(spec, stacked)
    plain, wanted = slope(SPEC, params)
    np.testing.assert_allclose(loss, plain, rtol=1e-5)
    back, _ = restack(grad, spec, SPEC.segments)
    for path, g in wanted.items():
        np.testing.assert_allclose(back[path], g, atol=1e-3 * float(jnp.abs(g).max()) + 1e-6, err_msg=path)
        assert float(jnp.abs(g).max()) > 0, path
    step, table = 1e-2, "encoder/relative/table"  # the bias has a backward pass of its own
    move = jax.random.normal(jax.random.key(1), params[table].shape)
    ends = [whole(SPEC, {**params, table: params[table] + s * step * move}, rows).nll.sum() for s in (1, -1)]
    np.testing.assert_allclose((ends[0] - ends[1]) / (2 * step), jnp.sum(wanted[table] * move), rtol=2e-2)


def test_the_cache_gives_what_the_whole_row_gives(params, out):
    """Prompts first, then the targets in a block; then as endings side by side, as label ranking runs them."""
    rows = texts()
    width = max(len(s) for s, _ in rows)
    ids, lengths = prompts(rows, width)
    place = np.tile(np.arange(width, dtype=np.int32), (3, 1))
    first = {"tokens": ids, "segments": (place < lengths[:, None]).astype(np.int32), "positions": place}
    made = jax.jit(functools.partial(prefill, apply), static_argnums=(0, 3))(SPEC, params, first, width + MOST)
    assert made.nll is None
    begin = np.stack([out.hidden[i, n - 1] for i, n in enumerate(lengths)])
    np.testing.assert_allclose(np.take_along_axis(made.hidden, lengths[:, None, None] - 1, 1)[:, 0], begin, atol=2e-5)
    tokens, segments, positions = (np.zeros((3, 2 * MOST), np.int32) for _ in range(3))
    for i, (source, target) in enumerate(rows):
        for number in (0, 1):  # twice the same ending, begun with the prompt's last token again
            cut = slice(number * MOST, number * MOST + len(target))
            tokens[i, cut], segments[i, cut] = [source[-1], *target[:-1]], number + 1
            positions[i, cut] = len(source) - 1 + np.arange(len(target))
    block = {"tokens": tokens, "segments": segments, "positions": positions}
    run = jax.jit(functools.partial(extend, apply), static_argnums=(0, 4))
    found = run(SPEC, params, block, made.cache, False)
    for i, (source, target) in enumerate(rows):
        want = out.hidden[i, len(source) - 1 : len(source) - 1 + len(target)]
        for number in (0, 1):
            np.testing.assert_allclose(found.hidden[i, number * MOST :][: len(target)], want, atol=2e-5)


@pytest.mark.parametrize("stacked", [False, True])
def test_greedy_generation_is_that_of_whole_rows(params, stacked):
    rows, new = texts(), 4
    spec = dataclasses.replace(SPEC, segments=STACK) if stacked else SPEC
    ids, lengths = prompts(rows, 32)
    weights = restack(params, SPEC, STACK)[0] if stacked else params
    run = jax.jit(functools.partial(generate, apply, head, spec, max_new=new, stop_ids=()))
    made, count = run(weights, ids, lengths)
    assert count.tolist() == [new] * 3
    grown: list[list[int]] = [[] for _ in rows]
    for _ in range(new):
        at = batch([(s, [*g, 2]) for (s, _), g in zip(rows, grown)])
        scores = logits(SPEC, params, whole(SPEC, params, at).hidden, np.maximum(at["targets_at"] - 1, 0))
        for i, g in enumerate(grown):
            g.append(int(np.argmax(scores[i, len(g)])))
    assert made.tolist() == grown


def test_taps_and_injections_by_their_stack(params):
    rows = batch(texts())
    names = ("encoder/layers/1/attn/q:in", "decoder/layers/0/cross/attn/k:in", "decoder/layers/1:out")
    assert set(names) <= set(tap_names(SPEC))
    twice = {"decoder/layers/0/mlp/down": lambda x, y: (2 * y, {"width": jnp.float32(x.shape[-1])})}
    found = jax.jit(lambda p: apply(SPEC, p, rows, taps=names, inject=twice))(params)
    shapes = [(3, WINDOW, 24), (3, WINDOW, 24), (3, MOST, 24)]
    assert {n: v.shape for n, v in found.taps.items()} == dict(zip(names, shapes))
    assert float(found.aux["decoder/layers/0/mlp/down"]["width"]) == SPEC.mlp
    doubled = params | {k: 2 * params[k] for k in ["decoder/layers/0/mlp/down/kernel"]}
    np.testing.assert_allclose(found.nll, whole(SPEC, doubled, rows).nll, atol=1e-5)
    with pytest.raises(RequestError, match="layers/9"):
        apply(SPEC, params, rows, taps=("decoder/layers/9:out",))


def test_the_models_own_dropout_is_where_the_t5_code_has_it(params, out, monkeypatch):
    """With nothing dropped every place doubles at a rate of a half, which kernels and scales can do as well."""
    spec, rows = dataclasses.replace(SPEC, dropout=0.5), batch(texts())
    draws = [apply(spec, params, rows, train=True, key=jax.random.key(i)).nll for i in (0, 0, 1)]
    assert np.array_equal(draws[0], draws[1]) and np.abs(draws[0] - draws[2]).max() > 0.05
    np.testing.assert_array_equal(whole(spec, params, rows).nll, out.nll)
    monkeypatch.setattr(jax.random, "bernoulli", lambda key, p, shape: jnp.ones(shape, bool))
    factors = {"embed/kernel": 2, "attn/o/kernel": 4, "mlp/down/kernel": 4, "final_norm/scale": 2}
    larger = {k: v * next((f for end, f in factors.items() if k.endswith(end)), 1) for k, v in params.items()}
    got = apply(spec, params, rows, train=True, key=jax.random.key(0))
    np.testing.assert_allclose(got.nll, whole(SPEC, larger, rows).nll, rtol=1e-4)
    with pytest.raises(RequestError, match=r"dropout is 0\.5 without a key"):
        apply(spec, params, rows, train=True)


def test_what_cannot_be_is_refused(params):
    rows = batch(texts())
    plain = {k: v for k, v in rows.items() if k != "targets_at"}
    with pytest.raises(RequestError, match="plain text has no source"):
        apply(SPEC, params, plain)
    with pytest.raises(RequestError, match="cannot start at a layer"):
        apply(SPEC, params, rows, start=(1, jnp.zeros((3, WINDOW, 24))))
    with pytest.raises(RequestError, match="prompts alone"):
        apply(SPEC, params, rows, cache={"valid": jnp.zeros((3, 50), bool)})
    with pytest.raises(RequestError, match="without a key"):
        apply(dataclasses.replace(SPEC, adapter_dropout=0.1), params, rows, train=True)
    with pytest.raises(RequestError, match=r"T5 has no 'decoder/layers/0/cross/attn/adapter_up'"):
        axes(SPEC, {**params, "decoder/layers/0/cross/attn/adapter_up": jnp.zeros(3)})
    for values, words in (({"buckets": 6}, "multiple of 4"), ({"end": 60}, "0 to 59 or None"), ({"mlp": 0}, "above 0")):
        with pytest.raises(RequestError, match=words):
            dataclasses.replace(SPEC, **values)


def test_axes_and_sizes_of_every_key(params):
    found = axes(SPEC, {**params, "decoder/layers/0/cross/attn/q/lora_a": jnp.zeros((2, 24))})
    assert all(len(found[k]) == v.ndim for k, v in params.items())
    assert found["decoder/layers/0/cross/attn/q/lora_a"] == (None, "embed")
    assert found["encoder/relative/table"] == (None, "heads")
    assert params.keys() == layout(SPEC).keys() and T5Spec(**{**vars(tiny_t5()), "segments": ()}).end == 257
