"""Rho-1: exact selection, a reference that leaves no trace, and gradients only where they belong."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import MODEL, SPEC, Answers, experiment, relative, run, same, stages, to_numpy, weights

from jaxcl.core import compose
from jaxcl.core.between import Between
from jaxcl.core.types import Clock, Ctx, Method, Phase, Stream, weighted_nll
from jaxcl.data.encode import encode_text
from jaxcl.data.pipeline import batches
from jaxcl.data.stage import Stage, text_source
from jaxcl.errors import RequestError
from jaxcl.losses.selection import top_share
from jaxcl.methods.elle import elle
from jaxcl.methods.replay import replay
from jaxcl.methods.rho1 import rho1
from jaxcl.models.decoder import decoder
from jaxcl.models.tokenizer import ByteTokenizer

RNG = np.random.default_rng(0)
APPLY = jax.jit(MODEL.apply, static_argnums=0)  # one program, not one an operation


# the mask


def by_hand(score: np.ndarray, valid: np.ndarray, share: float) -> np.ndarray:
    """Sorted as Python sorts: by score, then by place."""
    places = [i for i in range(score.size) if valid.flat[i]]
    places.sort(key=lambda i: (-score.flat[i], i))
    mask = np.zeros(score.size, bool)
    mask[places[: round(share * len(places))]] = True
    return mask.reshape(score.shape)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.6, 0.7, 1.0])
def test_the_count_is_exact_and_only_valid_entries_are_chosen(share):
    top = jax.jit(top_share, static_argnums=2)
    for n in range(0, 48, 3):
        valid = np.zeros(48, bool)
        valid[RNG.permutation(48)[:n]] = True
        valid = valid.reshape(6, 8)
        for score in (RNG.normal(size=(6, 8)), RNG.integers(0, 3, (6, 8)), np.full((6, 8), -np.inf), np.zeros((6, 8))):
            got = np.asarray(top(jnp.asarray(score, jnp.float32), jnp.asarray(valid), share))
            assert got.sum() == round(share * n) and not (got & ~valid).any()
            np.testing.assert_array_equal(got, by_hand(score, valid, share))


def test_the_batch_is_ranked_together_not_row_by_row():
    score = jnp.stack([jnp.arange(10.0) + 100, jnp.arange(10.0)])
    assert np.asarray(top_share(score, jnp.ones((2, 10), bool), 0.5)).sum(axis=1).tolist() == [10, 0]


# the step


def context(batch: dict, params: dict, own: dict, spec=SPEC) -> Ctx:
    out = APPLY(spec, params, batch)
    return Ctx(params, own, batch, batch["weight"], out, Clock.at(), jax.random.key(1), APPLY, spec, MODEL.head)


def some_batch(rows: int = 8, **fields) -> dict:
    return {**next(batches(Answers("x", rows, seed=4), None, rows)), "stage": np.zeros(rows, np.int32), **fields}


def other_weights(seed: int = 7, spec=SPEC) -> dict:
    return decoder(spec).init(spec, jax.random.key(seed))


def test_a_constant_added_to_the_reference_changes_nothing():
    batch, params = some_batch(), weights()
    table = RNG.integers(0, 64, (8, 3)) / 16
    chosen = [
        rho1(dtype="float32").weigh(context(batch, params, {"fixed": {"nll": jnp.asarray(table + c, jnp.float32)}}))
        for c in (0.0, 4.0, -2.0)
    ]
    assert np.array_equal(chosen[0], chosen[1]) and np.array_equal(chosen[0], chosen[2])
    assert 0 < np.asarray(chosen[0]).sum() < (batch["weight"] > 0).sum()


def test_with_the_model_as_its_own_reference_the_count_is_still_exact():
    batch, params = some_batch(), weights()
    got = rho1(scores="live", share=0.6).weigh(context(batch, params, {"fixed": {"model": params}}))
    targets = np.flatnonzero(batch["weight"] > 0)
    assert np.flatnonzero(got).tolist() == targets[: round(0.6 * len(targets))].tolist(), "ties go to the earlier"


@pytest.mark.parametrize("selection", ["excess", "loss", "random"])
def test_the_score_of_each_selection(selection):
    """The table is looked up by row, whatever the order of the batch."""
    batch = jax.tree.map(lambda x: x[::-1].copy(), some_batch())
    table = RNG.uniform(0, 6, (16, 3)).astype(np.float32)
    ctx = context(batch, weights(), {"fixed": {"nll": jnp.asarray(table)}})
    got, valid = np.asarray(rho1(selection=selection).weigh(ctx)), batch["weight"] > 0
    nll = np.asarray(ctx.out.nll)
    scores = {"excess": nll - table[batch["row"]], "loss": nll, "random": None}
    assert got.sum() == round(0.6 * valid.sum())
    if scores[selection] is not None:
        np.testing.assert_array_equal(got > 0, by_hand(scores[selection], valid, 0.6))
    else:
        again = np.asarray(rho1(selection=selection).weigh(ctx._replace(key=jax.random.key(2))))
        assert not np.array_equal(got, again)


def test_rows_of_past_stages_keep_their_weight_and_are_not_ranked():
    stage = np.array([0, 1, 0, 2, 0, -1, 0, 0], np.int32)
    batch = some_batch(stage=stage)
    got = np.asarray(rho1(selection="loss").weigh(context(batch, weights(), {})))
    new = stage == 0
    assert (got[~new] == 1).all()
    assert got[new].sum() == round(0.6 * (batch["weight"][new] > 0).sum())


def objective(method: Method, own: dict, batch: dict, spec=SPEC):
    def loss(params, shift=0.0):
        ctx = context(batch, params, own, spec)
        logits = MODEL.head(spec, params, ctx.out.hidden, jnp.maximum(batch["targets_at"] - 1, 0)) + shift
        target = jnp.take_along_axis(batch["tokens"], batch["targets_at"], axis=1)
        nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), target[..., None], axis=-1)[..., 0]
        ctx = ctx._replace(out=ctx.out._replace(nll=nll))
        ctx = ctx._replace(weight=compose.weights([method], ctx, {method.name: own}))
        return weighted_nll(ctx), ctx.weight

    return jax.jit(loss)


def test_all_tokens_give_the_plain_loss_and_gradient():
    batch, params, own = some_batch(), weights(), {"fixed": {"model": other_weights()}}
    loss = objective(rho1(share=1.0, scores="live"), own, batch)

    def plain(params):
        nll = APPLY(SPEC, params, batch).nll
        return jnp.sum(batch["weight"] * nll) / jnp.sum(batch["weight"])

    (value, _), grad = jax.value_and_grad(loss, has_aux=True)(params)
    want, want_grad = jax.jit(jax.value_and_grad(plain))(params)
    np.testing.assert_allclose(value, want, rtol=1e-6)
    for key in grad:
        np.testing.assert_allclose(grad[key], want_grad[key], atol=1e-6)


def test_the_loss_is_the_mean_over_selected_tokens():
    batch, params, own = some_batch(), weights(), {"fixed": {"model": other_weights()}}
    value, weight = objective(rho1(share=0.5, scores="live"), own, batch)(params)
    nll, chosen = np.asarray(APPLY(SPEC, params, batch).nll), np.asarray(weight) > 0
    assert float(value) == pytest.approx(nll[chosen].mean(), rel=1e-5)


def test_no_gradient_flows_through_the_excess_loss():
    """Autodiff against a slope measured on the loss itself, selection included, and with the mask held."""
    batch, params, own = some_batch(), weights(), {"fixed": {"model": other_weights()}}
    loss = objective(rho1(share=0.5, scores="live"), own, batch)
    grad, weight = jax.grad(loss, has_aux=True)(params)
    norm = optax.tree.norm(grad)
    step = jax.tree.map(lambda g: 1e-2 * g / norm, grad)
    ends = [loss(jax.tree.map(lambda p, d, s=s: p + s * d, params, step)) for s in (1, -1)]
    assert all(np.array_equal(weight, w) for _, w in ends), "the same tokens at both ends"
    np.testing.assert_allclose((ends[0][0] - ends[1][0]) / 2e-2, norm, rtol=1e-2)
    held = Method(name="held", weigh=lambda ctx: jnp.asarray(weight > 0, jnp.float32))
    for key, value in jax.grad(objective(held, {}, batch), has_aux=True)(params)[0].items():
        np.testing.assert_allclose(grad[key], value, atol=1e-7)


def test_unselected_tokens_have_no_gradient_at_their_logits_and_are_context_still():
    spec = dataclasses.replace(SPEC, tied=False)
    batch, params = some_batch(), decoder(spec).init(spec, jax.random.key(3))
    own = {"fixed": {"model": other_weights(spec=spec)}}
    loss = objective(rho1(share=0.4, scores="live"), own, batch, spec)
    shift = jnp.zeros((8, 3, SPEC.vocab))
    at_logits, weight = jax.grad(loss, argnums=1, has_aux=True)(params, shift)
    chosen = np.asarray(weight) > 0
    moved = np.abs(np.asarray(at_logits)).max(axis=-1)
    assert (moved[~chosen] == 0).all() and (moved[chosen] > 0).all()
    # The embedding of an unselected target that a selected one comes after, in a row of its own.
    row, k = next((b, k) for b in range(8) for k in range(2) if not chosen[b, k] and chosen[b, k + 1])
    alone = jax.tree.map(lambda x: x[row : row + 1], batch)
    held = Method(name="held", weigh=lambda ctx: jnp.asarray(weight[row : row + 1] > 0, jnp.float32))
    grads, _ = jax.grad(objective(held, {}, alone, spec), has_aux=True)(params)
    token = batch["tokens"][row, batch["targets_at"][row, k]]
    assert np.abs(grads["embed/kernel"][token]).max() > 0


# the reference


def spy(seen: dict) -> Method:
    """Keeps the weights as each phase of the first stage begins, and what was planned."""

    def plan(world, own, phases):
        if world.stage == 0:
            seen[world.phase] = (to_numpy(dict(world.params)), phases)
        return phases

    return Method(name="spy", plan=plan)


GOOD = [1, 3, 4, 9, 11, 15]


def test_a_reference_phase_learns_from_its_rows_scores_the_stage_and_leaves_no_trace(tmp_path):
    seen: dict = {}
    kept: dict = {}
    method = rho1(reference=GOOD, epochs=4, dtype="float32")
    assert method.end is not None

    def end(world, own):
        kept["nll"] = np.asarray(own["fixed"]["nll"])
        return method.end(world, own)

    tx = optax.sgd(0.3)
    done = run([dataclasses.replace(method, end=end), spy(seen)], tmp_path / "out", n=1, tx=tx)
    assert same(seen[0][0], to_numpy(weights())) and same(seen[1][0], seen[0][0]), "the weights are back"
    assert [p.name for p in seen[1][1]] == ["reference", "train"]
    learned = [r["objective"] for r in done.log if r["phase"] == "reference"]
    assert len(learned) == 3 and learned[-1] < learned[0]
    # the same phase as a run of its own gives the reference; the model at hand gives its loss of every row
    alone = [Phase("reference", None, (Stream(0, np.array(GOOD)),), epochs=4)]
    model = run([], tmp_path / "alone", n=1, tx=tx, phases=alone).params
    rows = next(batches(stages(1)[0].train, None, 16))
    np.testing.assert_allclose(kept["nll"], APPLY(SPEC, model, rows).nll, rtol=1e-4, atol=1e-4)
    valid = sum(int((rows["weight"][i] > 0).sum()) for i in range(16))
    total = sum(r["weight"] for r in done.log if r["phase"] == "train")
    assert abs(total - 0.6 * valid) <= 1, "two batches, each rounded"


def test_a_live_reference_selects_as_a_precomputed_one(tmp_path):
    runs = [
        run([rho1(reference=0.5, epochs=2, dtype="float32", scores=s)], tmp_path / s, n=2, tx=optax.sgd(0.3))
        for s in ("precomputed", "live")
    ]
    assert relative(runs[0].params, runs[1].params) < 1e-4
    assert [r["phase"] for r in runs[0].log] == ["reference", "reference", "train", "train"] * 2


def test_without_a_phase_the_reference_is_the_model_as_the_stage_begins(tmp_path):
    between = Between(experiment([rho1(reference=None, dtype="float32")]), lambda: None)
    between.begin(0)
    rows = next(batches(stages(1)[0].train, None, 16))
    want = APPLY(SPEC, weights(), rows).nll
    np.testing.assert_allclose(between.owns["rho1"]["fixed"]["nll"], want, rtol=1e-5, atol=1e-6)
    assert [p.name for p in between.plan(0)] == ["train"]


def test_replay_before_it_leaves_the_good_rows_alone(tmp_path):
    methods = [replay(ratio=0.5), rho1(reference=[0, 1])]
    between = Between(experiment(methods), lambda: None)
    between.begin(0)
    between.end()
    between.begin(1)
    first, second = between.plan(0)
    assert len(first.streams) == 1 and first.streams[0].rows.tolist() == [0, 1]
    assert len(second.streams) == 2


def test_behind_a_method_that_plans_phases_only_own_rows_are_ranked_and_before_it_is_refused(tmp_path):
    grows = elle(growth=(), capacity=12, recover=2, segments=1)
    between = Between(experiment([grows, rho1(reference=[0])]), lambda: None)
    between.begin(0)
    between.end()
    between.begin(1)
    first, recover, train = between.plan(0)
    assert (first.name, recover.name, train.name) == ("reference", "recover", "train")
    assert {s.stage for s in recover.streams} == {0}  # none of them is the stage's own: none is ranked
    assert train.streams[0].stage == 1 and first.after is not None
    with pytest.raises(RequestError, match="list 'rho1' behind methods that plan phases"):
        run([rho1(reference=[0]), grows], tmp_path / "out", n=2)


# plain text, and noise


def test_text_is_ranked_token_by_token_without_its_first_tokens_and_padding(tmp_path):
    spec = dataclasses.replace(SPEC, vocab=ByteTokenizer.vocab_size)
    words = [f"word {i} and then some more" for i in range(9)]
    stage = Stage("text", text_source("text", words, ByteTokenizer(), window=24))
    done = run([rho1(reference=[0, 2], epochs=1)], tmp_path / "out", stages=[stage], spec=spec)
    rows = next(batches(stage.train, None, len(stage.train)))
    chosen = [r["weight"] for r in done.log if r["phase"] == "train"]
    assert sum(chosen) == pytest.approx(0.6 * (rows["weight"] > 0).sum(), abs=len(chosen) / 2)
    batch = {**rows, "stage": np.zeros(len(stage.train), np.int32)}
    mask = np.asarray(rho1(selection="loss").weigh(context(batch, weights(spec), {}, spec)))
    assert (rows["segments"] == 0).any() and mask.shape == rows["tokens"].shape
    assert mask.sum() == round(0.6 * (rows["weight"] > 0).sum())
    assert not mask[(rows["positions"] == 0) | (rows["segments"] == 0)].any()


class Chain:
    """A `Source` of plain text: each token follows from the one before, but for a tenth that are noise."""

    name = "chain"

    def __init__(self, rows: int = 64, clean: int = 16, window: int = 24):
        rng = np.random.default_rng(5)
        follows = rng.permutation(SPEC.vocab)
        tokens = np.empty((rows, window), np.int64)
        tokens[:, 0] = rng.integers(0, SPEC.vocab, rows)
        for t in range(1, window):
            tokens[:, t] = follows[tokens[:, t - 1]]
        self.noise = rng.uniform(size=tokens.shape) < 0.1
        self.noise[:clean] = False
        self.noise[:, 0] = False
        self.tokens = np.where(self.noise, rng.integers(0, SPEC.vocab, tokens.shape), tokens)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, i: int) -> dict:
        return encode_text(self.tokens[i].tolist(), self.tokens.shape[1], row=i)

    def id(self, i: int) -> str:
        return str(i)

    def label(self, i: int) -> str:
        return self.name


def noise_share(method: Method, out, epochs: float) -> float:
    """Share of noise among the tokens that count, over the last half of a run on the chain."""
    source = Chain()

    def loss(ctx: Ctx):
        noisy = jnp.asarray(source.noise, jnp.float32)[ctx.batch["row"]]
        return {"noise": jax.lax.stop_gradient(jnp.sum(ctx.weight * noisy) / jnp.sum(ctx.weight))}

    watch = Method(name="watch", loss=loss)
    done = run([method, watch], out, stages=[Stage("chain", source)], tx=optax.adam(1e-2), epochs=epochs)
    shares = [r["watch/noise"] for r in done.log if r["phase"] == "train"]
    return float(np.mean(shares[len(shares) // 2 :]))


def test_a_good_reference_rejects_noise_and_the_loss_alone_seeks_it(tmp_path):
    noise = float(Chain().noise[:, 1:].mean())
    excess = noise_share(rho1(reference=list(range(16)), epochs=20), tmp_path / "excess", epochs=1)
    loss = noise_share(rho1(selection="loss"), tmp_path / "loss", epochs=12)
    assert excess < 0.5 * noise and loss > 1.25 * noise


# requests


@pytest.mark.parametrize(
    "bad",
    [{"share": 0.0}, {"share": 1.1}, {"epochs": 0}, {"selection": "los"}, {"scores": "live!"}, {"dtype": "int8"},
     {"reference": 0.0}, {"reference": 2}],
)  # fmt: skip
def test_bad_values_are_refused(bad):
    with pytest.raises(RequestError, match=r"rho1.*(accepted|did you mean)"):
        rho1(**bad)


@pytest.mark.parametrize(
    ("rows", "says"),
    [([3, 16], "row 16 for the reference of stage 1; accepted: 0 to 15"), ([], "no rows for the reference"),
     ([[1], [-2]], ""), ([[1]], "")],
)  # fmt: skip
def test_rows_that_are_not_in_the_stage_are_refused(rows, says):
    between = Between(experiment([rho1(reference=rows)]), lambda: None)
    between.begin(0)
    if says:
        with pytest.raises(RequestError, match=says):
            between.plan(0)
        return
    assert between.plan(0)[0].streams[0].rows.tolist() == [1]
    between.begin(1)
    with pytest.raises(RequestError, match=r"row -2 for the reference of stage 2|rows for 1 stages, this is stage 2"):
        between.plan(0)


def test_packed_rows_are_refused(tmp_path):
    with pytest.raises(RequestError, match="'rho1' works on whole sequences"):
        run([rho1()], tmp_path / "out", pack=2)
