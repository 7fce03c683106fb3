"""Prompt tuning: how prompts begin, are trained through a network, kept by task, and refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from support import MODEL, SPEC, Answers, experiment, forward, run, stages, to_numpy, weights
from told import check_past_tasks, watched

from jaxcl.core.between import Between
from jaxcl.core.til import NO_TASK
from jaxcl.data.pipeline import batches
from jaxcl.errors import RequestError
from jaxcl.methods.lora import lora
from jaxcl.methods.prompt_tuning import prompt_tuning
from jaxcl.models.export_hf import merged
from jaxcl.models.prompt import ROWS


def begun(method, n=2, **kw) -> Between:
    between = Between(experiment([method], n=n, **kw), lambda: None)
    between.begin(0)
    return between


@pytest.fixture(scope="module")
def batch():
    return next(batches(Answers("s", 4, seed=1), None, 4))


def test_a_prompt_begins_as_embeddings_of_words_and_alone_trains():
    world = begun(prompt_tuning(length=6, words=[3, 9])).world
    table, rows = np.asarray(world.params["embed/kernel"]), np.asarray(world.params[ROWS])
    assert world.trained == {ROWS} and rows.shape == (6, SPEC.width)
    assert np.array_equal(rows[:2], table[[3, 9]])
    found = [int(np.flatnonzero((table == row).all(1))[0]) for row in rows]
    assert len(set(found[2:])) == 4
    other = begun(prompt_tuning(length=6), seed=1).world.params[ROWS]
    assert not np.array_equal(other, begun(prompt_tuning(length=6)).world.params[ROWS])


@pytest.fixture(scope="module")
def through(tmp_path_factory):
    """Two stages through a network, one prompt for both."""
    return run([prompt_tuning(length=3, hidden=5)], tmp_path_factory.mktemp("net") / "out", n=2)


def test_what_the_network_makes_is_the_prompt_when_a_stage_ends(through, batch):
    net = through.params
    assert through.loop.now.world.trained == {k for k in net if k.startswith("prompt/")}
    assert not net["prompt/mlp_scale"].any() and not net["prompt/mlp_bias"].any() and net["prompt/mlp_in"].any()
    alone = {k: v for k, v in net.items() if not k.startswith("prompt/mlp_")}
    want = forward(SPEC, alone, batch).nll
    np.testing.assert_allclose(forward(SPEC, net, batch).nll, want, atol=1e-6)
    assert through.compilations == 1


def test_collapsing_keeps_the_function_and_the_next_network_starts_from_it(batch):
    between = begun(prompt_tuning(length=3, hidden=5))
    before = forward(SPEC, between.world.params, batch).nll
    net, rows = between.world.params["prompt/mlp_in"], between.world.params[ROWS]
    between.end()
    np.testing.assert_allclose(forward(SPEC, between.world.params, batch).nll, before, atol=1e-6)
    assert np.abs(between.world.params[ROWS] - rows).max() > 0.1, "through the network"
    between.begin(1)
    np.testing.assert_allclose(forward(SPEC, between.world.params, batch).nll, before, atol=1e-6)
    assert not np.array_equal(between.world.params["prompt/mlp_in"], net), "a network of its own"


@pytest.fixture(scope="module", params=[0, 5], ids=["rows", "network"])
def told(request, tmp_path_factory):
    method = prompt_tuning(length=3, hidden=request.param, per_task=True, max_stages=2)
    return watched([method], tmp_path_factory.mktemp("told") / "out")


def test_outputs_of_past_tasks_are_bit_identical_while_the_bank_has_room(told):
    check_past_tasks(told)
    bank = told[0].params[ROWS + "_bank"]
    assert bank.shape == (4, 3, SPEC.width) and not bank[2:].any()


def test_rows_of_one_batch_have_their_own_prompts_and_the_wrong_one_costs(told):
    done, _ = told
    world, own = done.loop.now.world, done.loop.now.owns["prompt_tuning"]
    batch = next(batches(Answers("x", 4, seed=9), None, 4))
    tasks = np.array([1, NO_TASK, 2, 0], np.int32)
    model = prompt_tuning(per_task=True).wrap(MODEL.apply, own, None)
    got = np.asarray(model(world.spec, world.params, {**batch, "task_id": tasks}).nll)
    slots = [*done.params[ROWS + "_bank"][:2], done.params[ROWS]]
    for row, task in enumerate(tasks):
        prompt = {ROWS: slots[task]} if task >= 0 else {}
        one = {k: v[row : row + 1] for k, v in batch.items()}
        np.testing.assert_allclose(got[row : row + 1], forward(SPEC, weights() | prompt, one).nll, atol=1e-5)
    wrong = model(world.spec, world.params, {**batch, "task_id": (tasks + 1) % 3}).nll
    assert np.abs(wrong - got).max() > 1e-3


def test_a_task_may_begin_with_the_prompt_of_the_one_before():
    for start, kept in (("previous", True), ("vocabulary", False)):
        between = begun(prompt_tuning(length=3, per_task=True, start=start))
        rows = between.world.params[ROWS]
        between.end()
        between.begin(1)
        assert np.array_equal(between.world.params[ROWS], rows) == kept
        assert np.array_equal(between.world.params[ROWS + "_bank"][0], rows)


def test_it_goes_beside_lora_and_packed_rows(tmp_path):
    done = run([lora(rank=2, alpha=4.0, dropout=0.1), prompt_tuning(length=3)], tmp_path / "out", n=1, pack=2)
    free = done.loop.now.world.trained
    assert {k.rpartition("/")[2] for k in free} == {"lora_a", "lora_b", "rows"} and np.isfinite(done.losses()).all()
    start = to_numpy(begun(prompt_tuning(length=3)).world.params[ROWS])
    assert not np.array_equal(done.params[ROWS], start)


def test_no_hugging_face_model_holds_a_prompt():
    with pytest.raises(RequestError, match="'prompt/rows', which no Hugging Face model of this kind holds"):
        merged(SPEC, to_numpy(begun(prompt_tuning(length=3)).world.params))


@pytest.mark.parametrize(
    "arguments,words",
    [
        ({"length": 0}, "length is 0; accepted: a whole number of at least 1"),
        ({"length": 53}, r"a prompt of 53 before rows of 12 tokens; accepted: up to 52 \(context 64\)"),
        ({"start": "previos"}, "unknown start 'previos' in prompt_tuning; did you mean 'previous'"),
        ({"words": [1, 32]}, "token 32 is not in the vocabulary; accepted: 0 to 31"),
        ({"hidden": -1}, r"hidden is -1; accepted: 0 \(no network\) or more"),
        ({"max_stages": 0}, "max_stages is 0"),
    ],
)
def test_bad_arguments(arguments, words):
    with pytest.raises(RequestError, match=words):
        begun(prompt_tuning(**{"length": 3} | arguments))


def test_one_prompt_a_model_and_told_tasks_that_fit():
    with pytest.raises(RequestError, match="'prompt_tuning' and 'again' do not go together"):
        begun_two = [prompt_tuning(length=3), prompt_tuning(length=3, name="again")]
        Between(experiment(begun_two), lambda: None).begin(0)
    untold = dataclasses.replace(experiment([prompt_tuning(length=3, per_task=True)]), stages=stages(2))
    with pytest.raises(RequestError, match="needs to be told the task"):
        Between(untold, lambda: None).begin(0)
    between = begun(prompt_tuning(length=3, per_task=True, max_stages=1, grow=False))
    with pytest.raises(RequestError, match="task 2 exceeds max_stages=1"):
        between.begin(1)
