"""Progressive prompts: the order, what trains, what stays, and the two ends: prompt tuning and independent prompts."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from support import MODEL, SPEC, Answers, experiment, forward, run, stages, weights
from told import same, watched

from jaxcl.core.between import Between
from jaxcl.core.til import NO_TASK
from jaxcl.data.pipeline import batches
from jaxcl.errors import RequestError
from jaxcl.methods.progressive_prompts import chain, progressive_prompts
from jaxcl.methods.prompt_tuning import prompt_tuning
from jaxcl.models.prompt import ROWS

SMALL = {"length": 3, "hidden": 5}
BANK = ROWS + "_bank"


def begun(method, n=2, **kw) -> Between:
    between = Between(experiment([method], n=n, **kw), lambda: None)
    between.begin(0)
    return between


def test_the_chain_is_newest_first_and_ends_with_the_first_task():
    prompts = np.arange(4 * 2 * 3, dtype=np.float32).reshape(4, 2, 3)
    task = np.array([2, 0, 1, 3, NO_TASK])
    rows, there = (np.asarray(x) for x in chain(jnp.asarray(prompts), jnp.asarray(task), jnp.int32(3), True))
    assert rows.shape == (5, 8, 3) and there.shape == (5, 8)
    for row, order in enumerate([[2, 1, 0], [0], [1, 0], [], []]):
        want = prompts[order].reshape(-1, 3)
        assert np.array_equal(rows[row][there[row]], want) and there[row].sum() == len(want)
        assert not there[row][len(want) :].any()
    alone = np.asarray(chain(jnp.asarray(prompts), jnp.asarray(task), jnp.int32(3), False)[1])
    assert alone.sum(axis=1).tolist() == [2, 2, 2, 0, 0]


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """Three tasks, room for two."""
    return watched([progressive_prompts(**SMALL, max_stages=2)], tmp_path_factory.mktemp("chain") / "out")


def test_outputs_of_past_tasks_are_bit_identical_while_there_is_room(three):
    done, seen = three
    assert same(seen[0][1], seen[0][2])
    np.testing.assert_allclose(seen[0][3][0], seen[0][1][0], atol=1e-5)  # another program: the bank doubled
    np.testing.assert_allclose(seen[1][3][0], seen[1][2][0], atol=1e-5)
    for task in range(3):
        first, *after = seen[task]
        for stage in range(task):
            np.testing.assert_allclose(after[stage][0], first[0], atol=1e-5, err_msg="not learned: the bare model")
        assert np.abs(after[task][0] - first[0]).max() > 1e-3, "learned"
    assert done.compilations == 2, "one for each capacity"


def test_every_row_is_asked_behind_its_tasks_prompts(three):
    """Row by row against the concatenation written by hand."""
    done, _ = three
    world, own = done.loop.now.world, done.loop.now.owns["progressive_prompts"]
    prompts = [*done.params[BANK][:2], done.params[ROWS]]
    assert done.params[BANK].shape == (4, 3, SPEC.width) and not done.params[BANK][2:].any()
    assert len(np.concatenate(prompts)) == 3 * SMALL["length"]
    batch = next(batches(Answers("x", 4, seed=9), None, 4))
    tasks = np.array([1, NO_TASK, 2, 0], np.int32)
    model = progressive_prompts(**SMALL).wrap(MODEL.apply, own, None)
    got = model(world.spec, world.params, {**batch, "task_id": tasks}).nll
    untold = progressive_prompts(**SMALL, told=False).wrap(MODEL.apply, own, None)
    every = untold(world.spec, world.params, batch).nll
    for row, task in enumerate(tasks):
        one = {k: v[row : row + 1] for k, v in batch.items()}
        for nll, last in ((got, task), (every, 2)):
            before = {ROWS: np.concatenate(prompts[last::-1])} if last >= 0 else {}
            np.testing.assert_allclose(nll[row : row + 1], forward(SPEC, weights() | before, one).nll, atol=1e-5)


def test_only_the_newest_prompt_and_its_network_train(three):
    done, _ = three
    net = {k for k in done.params if k.startswith("prompt/mlp_")}
    assert done.loop.now.world.trained == {ROWS, *net} and len(net) == 6
    assert not done.params["prompt/mlp_scale"].any(), "what it made is the prompt"


def test_the_bank_gets_what_the_network_made():
    between = begun(progressive_prompts(**SMALL))
    before = np.asarray(between.world.params[ROWS])
    between.end()
    made, net = between.world.params[ROWS], between.world.params["prompt/mlp_in"]
    between.begin(1)
    now = between.world.params
    assert np.array_equal(now[BANK][0], made) and not np.array_equal(made, before)
    assert not np.array_equal(now["prompt/mlp_in"], net) and not np.array_equal(now[ROWS], made)


@pytest.fixture(scope="module")
def by_task(tmp_path_factory):
    """Prompt tuning by task, two tasks."""
    return run([prompt_tuning(**SMALL, per_task=True, max_stages=2)], tmp_path_factory.mktemp("alone") / "out", n=2)


def test_the_first_task_is_prompt_tuning_and_without_a_past_so_are_all(by_task, tmp_path):
    one = run([progressive_prompts(**SMALL, max_stages=2)], tmp_path / "one", n=2)
    first = [r["stage"] == 0 for r in one.log]
    np.testing.assert_allclose(one.losses(0), by_task.losses(0), rtol=1e-5)
    assert any(first) and np.abs(one.losses(1) - by_task.losses(1)).max() > 1e-3, "the past is felt"
    alone = run([progressive_prompts(**SMALL, max_stages=2, past=False)], tmp_path / "alone", n=2)
    np.testing.assert_allclose(alone.losses(), by_task.losses(), rtol=1e-5)


@pytest.mark.parametrize(
    "arguments,words",
    [
        ({"length": 0}, "length is 0; accepted: a whole number of at least 1"),
        ({"length": 20}, r"a prompt of 60 before rows of 12 tokens; accepted: up to 52 \(context 64\)"),
        ({"words": [32]}, "token 32 is not in the vocabulary"),
        ({"hidden": -1}, r"hidden is -1; accepted: 0 \(no network\) or more"),
        ({"max_stages": 0}, "max_stages is 0"),
    ],
)
def test_bad_arguments(arguments, words):
    with pytest.raises(RequestError, match=words):
        begun(progressive_prompts(**{"length": 3, "max_stages": 3} | arguments))


def test_what_does_not_fit_is_refused():
    with pytest.raises(RequestError, match="'prompt_tuning' and 'progressive_prompts' do not go together"):
        two = [prompt_tuning(length=3), progressive_prompts(**SMALL)]
        Between(experiment(two), lambda: None).begin(0)
    untold = dataclasses.replace(experiment([progressive_prompts(**SMALL, max_stages=3)]), stages=stages(2))
    with pytest.raises(RequestError, match="needs to be told the task"):
        Between(untold, lambda: None).begin(0)
    between = begun(progressive_prompts(**SMALL, max_stages=1, grow=False))
    with pytest.raises(RequestError, match="task 2 exceeds max_stages=1"):
        between.begin(1)
    between = begun(progressive_prompts(length=30, hidden=0, max_stages=1))
    with pytest.raises(RequestError, match="a prompt of 60 before rows of 12 tokens; accepted: up to 52"):
        between.begin(1)
