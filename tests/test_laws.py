"""The laws between phases: order, votes, ownership, budgets; and what is refused, with the names of those at fault."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import Answers, experiment, run, same, stages, to_numpy, weights

from jaxcl.core import compose, journal
from jaxcl.core.between import Between
from jaxcl.core.checkpoint import Store
from jaxcl.core.types import ALL, NOTHING, Budget, Method, Phase, Stream, weighted_nll
from jaxcl.data.stage import Stage
from jaxcl.errors import RequestError, RunFailed
from jaxcl.methods.lora import lora
from jaxcl.methods.replay import replay


def between(*methods: Method, **kw) -> Between:
    return Between(experiment(list(methods), **kw), lambda: None)


def freezing(name: str, *parts: str) -> Method:
    return Method(name=name, mask=lambda world, own: {k: not any(p in k for p in parts) for k in world.params})


# votes and ownership


def test_a_base_key_trains_only_if_nobody_freezes_it():
    b = between(freezing("a", "embed"), Method(name="indifferent"), freezing("b", "mlp"))
    b.begin(0)
    assert b.world.trained == {k for k in weights() if "embed" not in k and "mlp" not in k}


def test_a_method_alone_decides_about_its_own_keys():
    def begin(world, own):
        made = {"mine/hot": jnp.ones(3), "mine/cold": jnp.ones(3)}
        return world._replace(params={**world.params, **made}), {"host": {"begun": 1}}

    mine = Method(name="mine", begin=begin, mask=lambda world, own: {"mine/cold": False})
    everything = Method(name="all", mask=lambda world, own: dict.fromkeys(world.params, False) | {"mine/cold": True})
    for methods in ((mine, everything), (everything, mine)):
        b = between(*methods)
        b.begin(0)
        assert b.world.trained == {"mine/hot"}
        assert b.owner == {"mine/hot": "mine", "mine/cold": "mine"}


def test_nothing_to_train_is_refused_with_the_voters_names(tmp_path):
    methods = [freezing("first", "layers"), freezing("idle", "nothing"), freezing("second", "embed", "final")]
    with pytest.raises(RequestError) as error:
        run(methods, tmp_path / "out")
    assert "first, second" in str(error.value) and "idle" not in str(error.value)
    assert not (tmp_path / "out").exists(), "nothing is written"


def test_a_phase_that_trains_nothing_is_refused():
    phase = Phase("heads", 1, (Stream(0, np.arange(4)),), train=("head/*",))
    with pytest.raises(RequestError, match=r"phase 'heads' trains .*head"):
        compose.narrow(frozenset(weights()), phase)
    narrowed = compose.narrow(frozenset(weights()), dataclasses.replace(phase, train=("attn/q/kernel",)))
    assert narrowed == {"layers/0/attn/q/kernel", "layers/1/attn/q/kernel"}


# order


def spy(name: str, said: list[str]) -> Method:
    def begin(world, own):
        said.append(f"begin {name}")
        return world._replace(notes={**world.notes, name: sorted(world.notes)}), own or {"host": {"n": 0}}

    def plan(world, own, phases):
        return [dataclasses.replace(p, name=p.name + name) for p in phases]

    def end(world, own):
        said.append(f"end {name}")
        return world, {"host": {"n": own["host"]["n"] + 1}}

    return Method(name=name, begin=begin, plan=plan, end=end)


def test_begin_and_plan_fold_in_list_order_and_end_goes_back():
    said: list[str] = []
    b = between(*(spy(n, said) for n in "abc"))
    b.begin(0)
    assert [p.name for p in b.plan(0)] == ["trainabc"]
    b.end()
    assert said == ["begin a", "begin b", "begin c", "end c", "end b", "end a"]
    assert b.world.notes == {"a": [], "b": ["a"], "c": ["a", "b"]}, "each sees what its predecessor left"
    assert {n: b.owns[n]["host"]["n"] for n in "abc"} == dict.fromkeys("abc", 1)


def test_random_numbers_between_phases_repeat_and_differ_by_method_slot_and_stage():
    seen = []

    def begin(world, own):
        seen.append(jax.random.key_data(world.key).tobytes())
        return world, own or {}

    def end(world, own):
        return begin(world, own)

    for _ in range(2):
        b = between(Method(name="a", begin=begin, end=end), Method(name="b", begin=begin, end=end))
        for stage in range(2):
            b.begin(stage)
            b.end()
    assert seen[:8] == seen[8:] and len(set(seen)) == 8


def test_init_is_for_those_without_memory_and_sees_the_trained_keys():
    calls = []

    def init(world):
        calls.append((world.stage, world.trained))
        return {"fixed": {"zeros": {k: jnp.zeros(2) for k in world.trained}}}

    b = between(Method(name="late", init=init), freezing("a", "mlp"))
    for stage in range(3):
        b.begin(stage)
        b.end()
    assert calls == [(0, b.world.trained)] and not any("mlp" in k for k in b.world.trained)


# objectives and budgets


def objective(name: str, fn) -> Method:
    return Method(name=name, plan=lambda w, o, phases: [dataclasses.replace(p, objective=fn) for p in phases])


def test_two_objectives_are_refused_with_both_names():
    twice = lambda ctx: 2 * weighted_nll(ctx)  # noqa: E731
    b = between(objective("rho", twice), replay(), objective("cppo", lambda ctx: weighted_nll(ctx)))
    b.begin(0)
    with pytest.raises(RequestError, match="'rho' and 'cppo' both set the objective of phase 'train'"):
        b.plan(0)
    b = between(objective("rho", twice), objective("back", weighted_nll))
    b.begin(0)
    with pytest.raises(RequestError, match="'rho' and 'back' both set"):
        b.plan(0)
    b = between(objective("rho", twice), Method(name="other", plan=lambda w, o, phases: phases))
    b.begin(0)
    assert b.plan(0)[0].objective is twice


def reads(name: str, stage: int, rows: int, keeps: Budget = NOTHING) -> Method:
    def plan(world, own, phases):
        extra = Stream(stage, np.arange(rows, dtype=np.int64))
        return [dataclasses.replace(p, streams=(*p.streams, extra)) for p in phases] if world.stage else phases

    return Method(name=name, keeps=keeps, plan=plan)


def second_plan(*methods: Method):
    b = between(*methods)
    b.begin(0)
    b.plan(0)
    b.end()
    b.begin(1)
    return b.plan(0)


@pytest.mark.parametrize("keeps", [NOTHING, Budget(examples=5), Budget(bytes=100)])
def test_past_rows_beyond_what_a_method_keeps_are_refused(keeps):
    with pytest.raises(RequestError) as error:
        second_plan(reads("thief", 0, 6, keeps))
    assert "'thief' reads 6 rows" in str(error.value) and f"keeps {keeps}" in str(error.value)


@pytest.mark.parametrize("keeps", [Budget(examples=6), ALL])
def test_past_rows_within_the_budget_are_read(keeps):
    assert len(second_plan(reads("honest", 0, 6, keeps))[0].streams) == 2


def test_a_budget_is_each_methods_own():
    """Rows that one method may read do not excuse another's."""
    with pytest.raises(RequestError, match="'thief'"):
        second_plan(reads("rich", 0, 16, ALL), reads("thief", 0, 1))


def test_rows_of_the_future_are_refused():
    with pytest.raises(RequestError, match="'prophet' reads stage 2 while stage 1 is trained"):
        second_plan(reads("prophet", 2, 1, ALL))


@pytest.mark.parametrize("ask", [lambda tools: next(tools.batches(0, 2)), lambda tools: tools.labels(0)])
def test_tools_do_not_open_past_stages(ask):
    def begin(world, own):
        if world.stage:
            ask(world.tools)
        return world, own or {}

    b = between(Method(name="curious", begin=begin, keeps=ALL))
    b.begin(0)
    with pytest.raises(RequestError, match="rows of stage 0 asked for in stage 1"):
        b.begin(1)


def test_tools_read_the_stages_own_rows():
    b = between(rows=11)
    b.begin(0)
    tools, source = b.given(0, 0).tools, Answers("s0", 11, seed=0)
    found = {int(r): t for batch in tools.batches(0, None) for r, t in zip(batch["row"], batch["tokens"]) if r >= 0}
    assert found.keys() == set(range(11))
    assert all(np.array_equal(found[i], source[i]["tokens"]) for i in found)
    assert tools.size(2) == 11 and tools.labels(0).tolist() == [source.label(i) for i in range(11)]
    some = [int(r) for batch in tools.batches(0, 5) for r in batch["row"] if r >= 0]
    assert len(some) == len(set(some)) == 5


def test_a_memory_with_an_array_of_size_zero_is_refused(tmp_path):
    empty = Method(name="hollow", init=lambda world: {"fixed": {"deep": {"none": jnp.zeros((0, 3))}}})
    with pytest.raises(RequestError, match=r"'hollow' holds an array of size 0 at .*deep.*none"):
        run([empty], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_plan_that_removes_every_phase_is_refused():
    b = between(Method(name="lazy", plan=lambda world, own, phases: []))
    b.begin(0)
    with pytest.raises(RequestError, match="no phase is left"):
        b.plan(0)


# memories in a run


def test_no_method_touches_anothers_memory(tmp_path):
    """A counter and a moving average beside each other, and alone: the same memories."""

    def counter() -> Method:
        init = lambda world: {"live": {"n": jnp.int32(0)}, "host": {"ends": 0}}  # noqa: E731
        end = lambda world, own: (world, {**own, "host": {"ends": own["host"]["ends"] + 1}})  # noqa: E731
        return Method(name="counter", init=init, end=end, observe=lambda ctx, g, u, p: {"n": ctx.own["live"]["n"] + 1})

    def average() -> Method:
        init = lambda world: {"live": {"mean": dict(world.params)}}  # noqa: E731
        observe = lambda ctx, g, u, p: {  # noqa: E731
            "mean": {k: 0.9 * v + 0.1 * p[k] for k, v in ctx.own["live"]["mean"].items()}
        }
        return Method(name="average", init=init, observe=observe)

    together = run([counter(), average()], tmp_path / "both")
    alone = run([average()], tmp_path / "one")
    assert int(together.loop.now.owns["counter"]["live"]["n"]) == len(together.log) == 6
    assert together.loop.now.owns["counter"]["host"] == {"ends": 3}
    mine, its = (d.loop.now.owns["average"]["live"]["mean"] for d in (together, alone))
    assert same(to_numpy(mine), to_numpy(its)) and same(together.params, alone.params)
    assert together.compilations == alone.compilations == 1


# what goes wrong while it runs


class Poisoned(Answers):
    """Row 5 weighs NaN."""

    def __getitem__(self, i: int):
        example = super().__getitem__(i)
        return example | {"weight": example["weight"] * np.float32("nan" if i == 5 else 1)}


def test_nan_ends_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    line = [*stages(1), Stage("bad", Poisoned("bad", 64, seed=1)), *stages(3)[2:]]
    with pytest.raises(RunFailed) as error:
        run([lora(rank=2)], tmp_path / "out", stages=line, save_every=1, batch_size=4)
    text = str(error.value)
    assert error.value.exit_code == 1 and "\n" not in text
    assert "loss=nan" in text and "stage 'bad'" in text and "phase 'train'" in text and "bad/5" in text
    step = int(text.split(", step ")[1].split(" ")[0])
    store = Store(tmp_path / "out" / "checkpoints")
    newest = journal.newest(store, lambda _: None)
    assert newest and newest.startswith("stages/001/") and journal.position(newest).step <= step
    single = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    arrays = store.load(newest, lambda *_: single, journal.flatten(weights(), "params"))
    trained = [v for k, v in arrays.items() if "train" in k or "params" in k]
    assert trained and all(np.isfinite(v).all() for v in trained)
    logged = [line for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines() if line]
    assert len(logged) == step, "every step before the bad one, and not that one"


def test_weights_that_are_nan_are_found_at_the_first_step(tmp_path):
    params = weights()
    params["final_norm/scale"] = params["final_norm/scale"].at[3].set(jnp.nan)
    with pytest.raises(RunFailed, match="stage 's0', phase 'train', step 0 "):
        run([], tmp_path / "out", params=params)
