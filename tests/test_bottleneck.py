"""Bottleneck adapters: the formula, what they cost, tasks of their own, and the router that reads the prompt."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import MODEL, SPEC, STACK, WINDOW, Answers, experiment, forward, run, stages, to_numpy, weights
from told import check_past_tasks, watched

from jaxcl.core.between import Between
from jaxcl.core.til import NO_TASK
from jaxcl.data.encode import encode_text
from jaxcl.data.pipeline import batches
from jaxcl.data.stage import Stage
from jaxcl.errors import RequestError
from jaxcl.methods.bottleneck import NAMES, bottleneck
from jaxcl.methods.lora import lora
from jaxcl.methods.tasks import live
from jaxcl.models.cache import prefill
from jaxcl.models.export_hf import merged
from jaxcl.models.layout import axes
from jaxcl.surgery.bottlenecks import PLACES

RNG = np.random.default_rng(0)
BOTH = dataclasses.replace(SPEC, norms="both")


def begun(method, spec=SPEC, n=2, **kw) -> Between:
    between = Between(experiment([method], spec=spec, n=n, **kw), lambda: None)
    between.begin(0)
    return between


def filled(params: dict) -> dict:
    keys = live(params, NAMES)
    return params | {k: jnp.asarray(0.3 * RNG.normal(size=params[k].shape), jnp.float32) for k in keys}


@pytest.fixture(scope="module")
def batch():
    return next(batches(Answers("s", 4, seed=1), None, 4))


@pytest.mark.parametrize("style", PLACES)
def test_a_fresh_adapter_changes_no_bit_and_has_the_size_of_the_card(style, batch):
    world = begun(bottleneck(width=3, style=style)).world
    sites = len(PLACES[style]) * SPEC.layers
    assert sum(world.params[k].size for k in world.trained) == sites * (2 * 3 * SPEC.width + 3 + SPEC.width)
    got, want = forward(SPEC, world.params, batch), forward(SPEC, weights(), batch)
    assert np.array_equal(got.hidden, want.hidden) and np.array_equal(got.nll, want.nll)
    down = np.asarray(world.params[f"layers/0/{PLACES[style][-1]}_down"])
    assert 0.005 < down.std() < 0.0125 and np.abs(down).max() <= 0.02


@pytest.mark.parametrize("style", ["houlsby", "pfeiffer"])
def test_adapters_after_a_sub_layer_against_its_output_changed_by_hand(style, batch):
    """The sub-layers end in `attn/o` and `mlp/down`; in this model a norm follows them."""
    params = filled(begun(bottleneck(width=3, style=style), BOTH).world.params)
    p = to_numpy(params)

    def by_hand(place):
        down, b, up, c = (p[f"{place}_{part}"] for part in ("down", "down_bias", "up", "up_bias"))
        return lambda x, y: (y + jnp.maximum(y @ down + b, 0) @ up + c, {})

    last = {"attn": "o", "mlp": "down"}
    places = [f"layers/{i}/{place}" for i in range(2) for place in PLACES[style]]
    inject = {f"{q.rpartition('/')[0]}/{last[q.split('/')[2]]}": by_hand(q) for q in places}
    want = MODEL.apply(BOTH, weights(BOTH), batch, inject=inject)
    np.testing.assert_allclose(forward(BOTH, params, batch).nll, want.nll, atol=2e-5)
    assert np.abs(want.nll - forward(BOTH, weights(BOTH), batch).nll).max() > 0.05


def test_a_parallel_adapter_reads_what_the_mlp_reads(batch):
    params = filled(begun(bottleneck(width=3, style="parallel", scale=1.5)).world.params)
    params |= {k: params[k] * 0 for k in live(params, NAMES) if k.startswith("layers/0/")}
    p, read = to_numpy(params), "layers/1/mlp/gate:in"
    x = forward(SPEC, weights(), batch, taps=(read,)).taps[read]
    down, b, up, c = (p[f"layers/1/mlp/parallel_{part}"] for part in ("down", "down_bias", "up", "up_bias"))
    more = 1.5 * (np.maximum(x @ down + b, 0) @ up + c)
    want = MODEL.apply(SPEC, weights(), batch, inject={"layers/1/mlp/down": lambda x, y: (y + more, {})})
    np.testing.assert_allclose(forward(SPEC, params, batch).nll, want.nll, atol=2e-5)


def test_norms_train_as_a_change_of_their_scale(batch):
    params = begun(bottleneck(width=3, norms=True)).world.params
    keys = [k for k in params if k.endswith("/scale_delta")]
    assert len(keys) == 2 * SPEC.layers + 1
    moved = params | {k: jnp.asarray(RNG.normal(size=params[k].shape), jnp.float32) for k in keys}
    scales = {k.removesuffix("_delta"): weights()[k.removesuffix("_delta")] + moved[k] for k in keys}
    want = forward(SPEC, weights() | scales, batch).nll
    np.testing.assert_allclose(forward(SPEC, moved, batch).nll, want, atol=1e-5)


def test_axes_and_stacks():
    spec = dataclasses.replace(SPEC, segments=STACK)
    params = begun(bottleneck(width=3, norms=True, per_task=True, max_stages=2), spec).world.params
    named = axes(spec, params)
    assert named["layers/0:2:1/mlp/adapter_down"] == (None, "embed", None)
    assert named["layers/0:2:1/attn/adapter_up_bank"] == (None, None, None, "embed")
    assert named["final_norm/scale_delta_bank"] == (None, "embed")
    alone = begun(bottleneck(width=3)).world.params
    for i in range(2):
        assert np.array_equal(params["layers/0:2:1/mlp/adapter_down"][i], alone[f"layers/{i}/mlp/adapter_down"])


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """Three tasks, norms included, room for two."""
    method = bottleneck(width=3, norms=True, per_task=True, max_stages=2)
    return watched([method], tmp_path_factory.mktemp("told") / "out")


def test_outputs_of_past_tasks_are_bit_identical_while_the_bank_has_room(told):
    check_past_tasks(told, close=1e-4)
    done, _ = told
    assert done.params["final_norm/scale_delta"].any() and done.params["final_norm/scale_delta_bank"][:2].any()


def test_rows_of_one_batch_have_their_own_adapters(told):
    done, _ = told
    world, own = done.loop.now.world, done.loop.now.owns["bottleneck"]
    batch = next(batches(Answers("x", 4, seed=9), None, 4))
    tasks = np.array([1, NO_TASK, 2, 0], np.int32)
    model = bottleneck(per_task=True).wrap(MODEL.apply, own, None)
    got = model(world.spec, world.params, {**batch, "task_id": tasks}).nll
    for row, task in enumerate(tasks):
        slots = {k: [*done.params[k + "_bank"][:2], done.params[k]] for k in live(done.params, NAMES)}
        adapter = {k: found[task] for k, found in slots.items()} if task >= 0 else {}
        one = {k: v[row : row + 1] for k, v in batch.items()}
        np.testing.assert_allclose(got[row : row + 1], forward(SPEC, weights() | adapter, one).nll, atol=2e-5)


class Letters:
    """Text of eight tokens out of the stage's own eight."""

    def __init__(self, stage: int, n: int = 32, seed: int = 0):
        self.name, self.n, self.packs = f"s{stage}", n, False
        self.ids = 8 * stage + np.random.default_rng([seed, stage]).integers(0, 8, (n, 8))

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int):
        return encode_text(self.ids[i].tolist(), WINDOW, row=i)

    def label(self, i: int) -> str:
        return self.name

    def record(self, i: int) -> dict:
        return {"id": self.id(i)}

    def id(self, i: int) -> str:
        return f"{self.name}/{i}"


@pytest.fixture(scope="module")
def routed(tmp_path_factory):
    """Three stages of disjoint letters; nothing is told."""
    made = [Stage(f"s{t}", Letters(t)) for t in range(3)]
    method = bottleneck(width=4, per_task=True, router="perplexity", max_stages=4)
    out = tmp_path_factory.mktemp("routed") / "out"
    return method, run([method], out, stages=made, tx=optax.adam(0.02), epochs=6)


def prompts(seed: int = 5) -> tuple[dict, np.ndarray]:
    """Four new texts of each stage, without a word about it, and whose they are."""
    found = [next(batches(Letters(t, 4, seed=seed), None, 4)) for t in range(3)]
    kept = ("tokens", "segments", "positions")
    return {k: np.concatenate([b[k] for b in found]) for k in kept}, np.repeat(np.arange(3), 4)


def test_the_router_finds_whose_letters_these_are_and_the_cache_holds_it(routed):
    method, done = routed
    world, own = done.loop.now.world, done.loop.now.owns["bottleneck"]
    model = method.wrap(MODEL.apply, own, None)
    batch, whose = prompts()
    cache = prefill(model, world.spec, world.params, batch, 16).cache
    assert np.array_equal(cache["router/bottleneck/task"], whose)
    told = bottleneck(width=4, per_task=True, max_stages=4).wrap(MODEL.apply, own, None)
    want = told(world.spec, world.params, {**batch, "task_id": whose}).nll
    np.testing.assert_allclose(model(world.spec, world.params, batch).nll, want, atol=1e-5)
    step = {"tokens": batch["tokens"][:, :1], "segments": np.ones((12, 1), np.int32), "positions": np.full((12, 1), 8)}
    held = {**cache, "router/bottleneck/task": np.zeros(12, np.int32)}
    first, other = (model(world.spec, world.params, step, cache=c).hidden for c in (held, cache))
    np.testing.assert_allclose(first[:4], other[:4], atol=1e-6)
    assert np.abs(first[4:] - other[4:]).max() > 1e-3, "what is held is obeyed"


def test_the_router_looks_at_no_answer(routed):
    """The first two tokens are the prompt; what follows the first target may be anything."""
    method, done = routed
    world, own = done.loop.now.world, done.loop.now.owns["bottleneck"]
    model = jax.jit(method.wrap(MODEL.apply, own, None), static_argnums=0)
    batch, _ = prompts()
    at = np.tile(np.array([[2, 3]], np.int32), (12, 1))
    swapped = batch["tokens"].copy()
    swapped[:, 4:8] = swapped[::-1, 4:8]
    batch["targets_at"] = at
    nll = model(world.spec, world.params, batch).nll
    np.testing.assert_allclose(model(world.spec, world.params, {**batch, "tokens": swapped}).nll, nll, atol=1e-6)


def test_it_goes_beside_lora(tmp_path):
    done = run([lora(rank=2, alpha=4.0, dropout=0.1), bottleneck(width=3)], tmp_path / "out", n=1, pack=2)
    ends = {k.rpartition("/")[2] for k in done.loop.now.world.trained}
    assert ends == {"lora_a", "lora_b", "adapter_down", "adapter_down_bias", "adapter_up", "adapter_up_bias"}
    assert all(done.params[k].any() for k in done.loop.now.world.trained if not k.endswith("down_bias"))


@pytest.mark.parametrize(
    "arguments,words",
    [
        ({"width": 0}, "width is 0; accepted: 1 to 16, the model's own"),
        ({"width": 17}, "width is 17; accepted: 1 to 16"),
        ({"style": "houlsbi"}, "unknown style 'houlsbi' in bottleneck; did you mean 'houlsby'"),
        ({"router": "entropy", "per_task": True}, "unknown router 'entropy' in bottleneck; accepted: perplexity"),
        ({"router": "perplexity"}, "router 'perplexity' has one set to choose from; accepted: with per_task"),
        ({"scale": 0.0}, "scale is 0.0; accepted: above 0"),
        ({"max_stages": 0}, "max_stages is 0"),
    ],
)
def test_bad_arguments(arguments, words):
    with pytest.raises(RequestError, match=words):
        begun(bottleneck(**{"width": 3} | arguments))


def test_what_does_not_fit_is_refused():
    with pytest.raises(RequestError, match="'bottleneck' and 'again' do not go together"):
        two = [bottleneck(width=3), bottleneck(width=3, name="again")]
        Between(experiment(two), lambda: None).begin(0)
    untold = dataclasses.replace(experiment([bottleneck(width=3, per_task=True)]), stages=stages(2))
    with pytest.raises(RequestError, match="needs to be told the task"):
        Between(untold, lambda: None).begin(0)
    between = begun(bottleneck(width=3, per_task=True, max_stages=1, grow=False))
    with pytest.raises(RequestError, match="task 2 exceeds max_stages=1"):
        between.begin(1)
    with pytest.raises(RequestError, match="which no Hugging Face model of this kind holds"):
        merged(SPEC, to_numpy(begun(bottleneck(width=3)).world.params))
