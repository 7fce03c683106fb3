"""A soft prompt before T5's source, against the same rows as tokens of a larger vocabulary."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support
from t5_models import SPECS, VOCAB, batch, drawn, logits, prompts, texts, whole

from jaxcl.data.packing import merge
from jaxcl.errors import RequestError
from jaxcl.methods.progressive_prompts import progressive_prompts
from jaxcl.methods.prompt_tuning import prompt_tuning
from jaxcl.models.generate import generate
from jaxcl.models.prompt import ROWS, VALID
from jaxcl.models.t5 import apply, head

LENGTH = 4
SPEC = SPECS["v1.1"]  # its head is its own, so that new tokens have no logits
LARGER = dataclasses.replace(SPEC, vocab=VOCAB + LENGTH)
ROWS_OF = jnp.asarray(np.random.default_rng(5).normal(size=(LENGTH, SPEC.width)), jnp.float32)


@pytest.fixture(scope="module")
def params() -> dict[str, jax.Array]:
    return drawn(SPEC, jax.random.key(0))


def as_tokens(params: dict) -> dict:
    """The model with the prompt's rows as its last tokens, which the head never gives."""
    grown = {
        "embed/kernel": jnp.concatenate([params["embed/kernel"], ROWS_OF]),
        "head/kernel": jnp.pad(params["head/kernel"], ((0, 0), (0, LENGTH))),
        "vocab_bias": jnp.where(jnp.arange(VOCAB + LENGTH) < VOCAB, 0.0, -1e30),
    }
    return params | grown


def longer(rows: list) -> list:
    return [([*range(VOCAB, VOCAB + LENGTH), *source], target) for source, target in rows]


def test_a_prompt_is_what_its_rows_are_as_tokens(params):
    rows = texts()
    ours, theirs = batch(rows), batch(longer(rows))
    got, want = whole(SPEC, params | {ROWS: ROWS_OF}, ours), whole(LARGER, as_tokens(params), theirs)
    at = [np.maximum(b["targets_at"] - 1, 0) for b in (ours, theirs)]
    a, b = logits(SPEC, params, got.hidden, at[0]), logits(LARGER, as_tokens(params), want.hidden, at[1])
    used = ours["targets_at"] > 0
    np.testing.assert_allclose(np.asarray(a)[used], np.asarray(b)[used][:, :VOCAB], atol=2e-4)
    assert np.abs(np.asarray(got.nll - whole(SPEC, params, ours).nll)).max() > 0.05


def test_greedy_generation_behind_a_prompt(params):
    rows = texts()
    make = lambda spec: jax.jit(functools.partial(generate, apply, head, spec, max_new=6, stop_ids=()))  # noqa: E731
    got, _ = make(SPEC)(params | {ROWS: ROWS_OF}, *prompts(rows, 40))
    want, _ = make(LARGER)(as_tokens(params), *prompts(longer(rows), 40))
    assert np.array_equal(got, want) and not np.array_equal(got, make(SPEC)(params, *prompts(rows, 40))[0])


def test_rows_without_a_prompt_have_the_bare_model_and_taps_are_of_the_tokens(params):
    given, tap = batch(texts()), "encoder/layers/1:out"
    valid = jnp.asarray([[True] * LENGTH, [False] * LENGTH, [True, True, False, False]])
    asked = functools.partial(apply, SPEC, batch={k: jnp.asarray(v) for k, v in given.items()}, taps=(tap,))
    some = asked(params | {ROWS: ROWS_OF, VALID: valid})
    bare, every, two = (asked(params | more) for more in ({}, {ROWS: ROWS_OF}, {ROWS: ROWS_OF[:2]}))
    for row, want in enumerate((every, bare, two)):
        np.testing.assert_allclose(some.nll[row], want.nll[row], atol=2e-5)
        tokens = len(texts()[row][0]) + 1
        np.testing.assert_allclose(some.taps[tap][row, :tokens], want.taps[tap][row, :tokens], atol=2e-4)


def test_packed_rows_would_read_each_other(params):
    one = {k: v[0] for k, v in batch(texts()).items()} | {"row": np.int32(0), "weight": np.ones(6, np.float32)}
    packed = {k: v[None] for k, v in merge([one], 2).items()}
    with pytest.raises(RequestError, match="would read packed rows together through a soft prompt; accepted: pack 1"):
        apply(SPEC, params | {ROWS: ROWS_OF}, packed)


@pytest.mark.parametrize("method", [prompt_tuning(length=3), progressive_prompts(length=3, hidden=5, max_stages=2)])
def test_prompts_train_on_t5_and_nothing_else_does(method, tmp_path):
    start = drawn(SPEC, jax.random.key(0))
    done = support.run([method], tmp_path / "out", n=2, spec=SPEC, params=start)
    assert all(k.startswith("prompt/") for k in done.loop.now.world.trained)
    assert all(np.array_equal(done.params[k], v) for k, v in start.items())
    assert done.params[ROWS].shape == (3, SPEC.width)
