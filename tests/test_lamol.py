"""The invariants of card cft/lamol: two views of a row, quotas, start tokens, real samples, new vocabulary."""

from __future__ import annotations

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import SPEC, WINDOW, run, same, weights
from test_methods_common import DECAY
from written import EOS, TARGETS, Echo, echoes, learned, parameters

from jaxcl.core.types import Clock, Ctx, Outputs
from jaxcl.data import pseudo
from jaxcl.data.encode import encode
from jaxcl.data.pipeline import masked, stack
from jaxcl.errors import RequestError
from jaxcl.evaluate.endings import block_arrays, ending_nll, prompt_arrays, stacked
from jaxcl.losses.lm_view import lm_loss, lm_view
from jaxcl.methods import sampling
from jaxcl.methods.ewc import ewc
from jaxcl.methods.finetune import finetune
from jaxcl.methods.lamol import lamol
from jaxcl.methods.replay import replay
from jaxcl.models.decoder import decoder
from jaxcl.models.generate import generate
from jaxcl.surgery.vocabulary import BIAS, CLOSED

START, MARK = 40, 50


def views(batch) -> list[list[int]]:
    """START prompt MARK answer of every row, as lists."""
    out = []
    for tokens, at in zip(batch["tokens"], batch["targets_at"], strict=True):
        places = at[at > 0].tolist()
        out.append([START, *tokens[: places[0]].tolist(), MARK, *tokens[places].tolist()] if places else [])
    return out


@pytest.fixture(scope="module")
def batch():
    """A short row, one that fills the window, a masked one."""
    full = encode(list(range(1, WINDOW - 2)), [20, 21, EOS], WINDOW, TARGETS)
    return stack([encode([7, 8], [9, EOS], WINDOW, TARGETS), full, masked(full)])


def test_the_view_is_start_prompt_mark_answer_also_of_a_row_that_fills_its_window(batch):
    view = lm_view(batch, jnp.array([START, START, START]), jnp.int32(MARK))
    assert view["tokens"].shape == (3, WINDOW + 2) and "targets_at" not in view and "weight" not in view
    for row, want in enumerate(views(batch)):
        n = len(want)
        assert view["tokens"][row, :n].tolist() == want
        assert view["segments"][row].tolist() == [1] * n + [0] * (WINDOW + 2 - n)
        assert view["positions"][row].tolist() == [*range(n)] + [0] * (WINDOW + 2 - n)
    assert len(views(batch)[1]) == WINDOW + 2


def test_the_language_model_loss_covers_every_token_but_start_and_padding(batch):
    """The gradient in each token's nll is its weight over the sum: 5 for MARK, 1 for the others."""
    view = lm_view(batch, jnp.full(3, START), jnp.int32(MARK))
    slope = jax.grad(lambda nll: lm_loss(nll, view, jnp.int32(MARK), 5.0))
    want = np.zeros((3, WINDOW + 2))
    for row, ids in enumerate(views(batch)):
        want[row, 1 : len(ids)] = [5.0 if t == MARK else 1.0 for t in ids[1:]]
    np.testing.assert_allclose(slope(jnp.zeros((3, WINDOW + 2))), want / want.sum(), rtol=1e-6)


@pytest.fixture(scope="module")
def first_step(tmp_path_factory):
    """One step on all eight rows of a stage, from the start, and the grown weights it started from."""
    runs = {}
    for name, method in (("plain", finetune()), ("lamol", lamol(strength=2.0, max_stages=3))):
        out = tmp_path_factory.mktemp("first") / name
        runs[name] = run([method], out, stages=echoes(1, 8), tx=DECAY)
    return runs, parameters(runs["lamol"].out, "stages/000/00-train/begun")


def test_the_answers_loss_is_that_of_fine_tuning_whatever_the_other_view_does(first_step):
    """Context tokens are targets of the language model's view alone: the objective knows nothing of it."""
    runs, _ = first_step
    plain, one = (runs[k].log[0] for k in ("plain", "lamol"))
    assert np.isclose(one["objective"], plain["objective"], rtol=1e-6)
    assert one["lamol/generator"] > 0 and one["weight"] == plain["weight"] == 16


def test_the_language_model_loss_by_hand(first_step):
    """Texts put together by hand, log-softmax in float64 over the old vocabulary and MARK, weighted mean."""
    runs, params = first_step
    spec = runs["lamol"].loop.now.world.spec
    mark, start = 32, 33  # behind the 32 old rows: MARK, then the first task's token
    texts = [[start, *prompt, mark, *answer] for prompt, answer in (Echo(0).pair(i) for i in range(8))]
    tokens = np.array([ids + [0] * (WINDOW + 2 - len(ids)) for ids in texts], np.int32)
    place = np.tile(np.arange(WINDOW + 2, dtype=np.int32), (8, 1))
    rows = {"tokens": tokens, "segments": np.ones_like(tokens), "positions": place}
    hidden = np.asarray(jax.jit(decoder(spec).apply, static_argnums=0)(spec, params, rows).hidden, np.float64)
    logits = hidden @ params["embed/kernel"][:33].T.astype(np.float64)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    total = weight = 0.0
    for row, ids in enumerate(texts):
        for at in range(1, len(ids)):
            w = 5.0 if ids[at] == mark else 1.0
            total, weight = total - w * logp[row, at - 1, ids[at]], weight + w
    np.testing.assert_allclose(runs["lamol"].log[0]["lamol/generator"], 2.0 * total / weight, rtol=1e-5)


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """Three tasks, a quarter of rows written; rows enough that a START of each task is learned."""
    return learned(lamol(gamma=0.75, eos=EOS, labels=True), tmp_path_factory.mktemp("taught") / "out", n=3)


def test_quotas_are_equal_and_the_first_stage_never_writes(taught):
    counts = taught.loop.now.owns["lamol"]["host"]["counts"]
    asked = {stage: {old: c["requested"] for old, c in each.items()} for stage, each in counts.items()}
    assert asked == {"1": {"0": 24}, "2": {"0": 12, "1": 12}}
    assert sum(asked["2"].values()) == int(0.75 * 32)
    for each in counts.values():
        for c in each.values():
            assert c["accepted"] + sum(c[reason] for reason in pseudo.REASONS) == c["requested"]
    written = json.loads((taught.out / "metrics.json").read_text())["accounting"]["written"]
    assert written == {"lamol": counts}


def test_what_is_written_is_of_the_task_of_its_start_token(taught):
    """After enough training most samples are rows that the task's own source could have given."""
    host = taught.loop.now.owns["lamol"]["host"]
    kept = right = 0
    for s in (0, 1):
        real = {(tuple(p), tuple(a)) for p, a in (Echo(s).pair(i) for i in range(32))}
        items = pseudo.unpack(host["pseudo"][str(s)])
        kept, right = kept + len(items), right + sum((i.prompt, i.answer) in real for i in items)
        assert all(i.answer in {(24 + 2 * s, EOS), (25 + 2 * s, EOS)} for i in items), "the label set of the task"
    assert kept >= 12 and right / kept > 0.5, "24 were asked for; a guess would be right once in thousands"


def test_rows_of_an_old_stage_begin_with_its_start_token():
    """What the loss gives to the model, for a batch of the new stage and two old ones."""
    seen = []
    method, rows = lamol(max_stages=4), stack([encode([1, 2], [3, EOS], WINDOW, TARGETS)] * 4)
    params = {"embed/kernel": jnp.zeros((37, 4)), BIAS: jnp.full(37, CLOSED)}

    def model(spec, params, view, **kw):
        seen.append((view["tokens"][:, 0].tolist(), params[BIAS]))
        return Outputs(nll=jnp.ones(view["tokens"].shape) * jnp.array([1.0, 1.0, 1.0, 100.0])[:, None])

    own = {"fixed": {"tokens": jnp.arange(32, 37)}}
    ctx = Ctx(params, own, {**rows, "stage": jnp.array([2, 0, 1, 0])}, rows["weight"], None, Clock.at(stage=2),
              jax.random.key(0), model)  # fmt: skip
    loss = method.loss(ctx)["generator"]
    (starts, bias), *_ = seen
    assert starts == [35, 33, 34, 33] and float(loss) == 0.25 * 103 / 4
    assert bias[32] == 0 and np.all(bias[33:] == CLOSED), "only ANS can be said"
    shared = lamol(variant="gen").loss(ctx._replace(own={"fixed": {"tokens": jnp.arange(32, 34)}}))["generator"]
    assert seen[1][0] == [33] * 4 and float(shared) == float(loss)


def test_without_gamma_nothing_is_written_and_without_strength_too_it_is_fine_tuning(tmp_path, monkeypatch):
    def never(*_):
        raise AssertionError("a generation call")

    monkeypatch.setattr(sampling, "_writer", never)
    auxiliary = run([lamol(gamma=0.0)], tmp_path / "auxiliary", n=2)
    assert all(r["lamol/generator"] > 0 for r in auxiliary.log) and len(auxiliary.log) == 4
    assert auxiliary.loop.now.owns["lamol"]["host"] == {"counts": {}}
    assert not lamol(gamma=0.0, strength=0.0).slots
    with pytest.raises(AssertionError, match="a generation call"):
        run([lamol(gamma=0.5, eos=EOS)], tmp_path / "some", n=2)


def test_real_samples_are_replay_of_the_same_rows_bit_for_bit(tmp_path):
    """Both views on both: experience replay beside the two losses, and the option of this method."""
    oracle = run([lamol(gamma=0.5, oracle=True, capacity=64, variant="gen")], tmp_path / "oracle", n=2)
    views = lamol(gamma=0.0, variant="gen")
    stored = run([views, replay(count=8, capacity=64)], tmp_path / "replay", n=2)
    assert same(oracle.params, stored.params) and np.array_equal(oracle.losses(), stored.losses())
    assert len(oracle.log) == 5 and str(lamol(oracle=True).keeps) == "4096 examples"
    kept = json.loads((oracle.out / "metrics.json").read_text())["accounting"]
    assert kept["kept"]["lamol"]["examples"] == 32 and kept["past_rows_read"] == 16


def test_ranking_and_decoding_do_not_notice_the_new_tokens(first_step):
    """The grown weights, before any training, against the old ones in the old vocabulary."""
    runs, params = first_step
    spec, old = runs["lamol"].loop.now.world.spec, weights()
    prompt = stacked([prompt_arrays([3, 3, 3], 0, 4)], 1)
    block = stacked([block_arrays(3, [[[24, EOS], [25, EOS]]], 2, 1, 2)], 1)
    both = [(decoder(s), s, p) for s, p in ((SPEC, old), (spec, params))]
    rank = jax.jit(ending_nll, static_argnums=(0, 1, 2))
    ranked = [rank(model.apply, model.head, s, p, prompt, block) for model, s, p in both]
    np.testing.assert_allclose(ranked[1], ranked[0], rtol=1e-6)
    prompts, lengths = np.array([[1, 2, 3], [9, 9, 9]], np.int32), np.array([3, 3], np.int32)
    write = jax.jit(functools.partial(generate, max_new=6, stop_ids=(EOS,)), static_argnums=(0, 1, 2))
    said = [write(model.apply, model.head, s, p, prompts, lengths)[0] for model, s, p in both]
    assert np.array_equal(*said)


def test_more_stages_than_start_tokens_grow_again_and_other_memories_follow(tmp_path):
    done = run([ewc(strength=5.0, rows=8), lamol(gamma=0.0, max_stages=1)], tmp_path / "out", n=2)
    own = done.loop.now.owns["lamol"]["fixed"]["tokens"]
    assert own.tolist() == [32, 33, 64] and done.compilations == 2
    assert done.params["embed/kernel"].shape == (128, 16) and done.loop.now.world.spec.vocab == 128
    fisher, anchor = (done.loop.now.owns["ewc"]["fixed"][k]["embed/kernel"] for k in ("fisher", "anchor"))
    assert fisher.shape == anchor.shape == (128, 16) and np.isfinite(done.losses()).all()


@pytest.mark.parametrize(
    "arguments,words",
    [({"variant": "tsk"}, "did you mean 'task'"), ({"gamma": 1.5}, "gamma is 1.5"), ({"strength": -1}, "strength -1")],
)
def test_bad_arguments(arguments, words):
    with pytest.raises(RequestError, match=words):
        lamol(**arguments)


def test_the_experiments_rows_are_trained_on_or_tested_never_both():
    from jaxcl import experiment_files

    module = experiment_files.load("lamol")
    for task in module.TASKS:
        train, test = module.rows(task)
        assert len(train) >= 320 and len(test) >= 64 and not {r["input"] for r in train} & {r["input"] for r in test}
        assert all(r["target"] in r["labels"] and len(r["input"]) <= module.LONGEST for r in train + test)
    assert [len(s.train) for s in module.build(module.Config(rows=40)).stages] == [40, 40, 40]
