"""Reservoirs against their theory, and what experience replay puts into a stage."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats
from support import MODEL, SPEC, Answers, experiment, relative, run, same, to_numpy, weights

from jaxcl.core.between import Between
from jaxcl.core.types import Budget, Clock, Ctx
from jaxcl.data.pipeline import batches
from jaxcl.data.reservoir import Memory, class_balanced, herd, herding, reservoir, ring
from jaxcl.errors import RequestError
from jaxcl.methods.joint import joint
from jaxcl.methods.memory import load, store
from jaxcl.methods.replay import replay

POLICIES = {"reservoir": reservoir, "class_balanced": class_balanced}


def stream(n: int, seed: int, classes: int = 4) -> list[str]:
    return [f"c{c}" for c in np.random.default_rng(seed).integers(0, classes, n)]


def test_every_row_of_a_reservoir_is_kept_with_probability_capacity_over_seen():
    """Chi-square over 3000 seeds at n = 5 B; a cell is binomial, cells sum to B, hence n - 1 degrees of freedom."""
    capacity, n, seeds = 12, 60, 3000
    hits = np.zeros(n)
    for seed in range(seeds):
        hits[reservoir(Memory.empty(), ["x"] * n, capacity, seed).items] += 1
    p = capacity / n
    statistic = np.sum((hits - seeds * p) ** 2) / (seeds * p * (1 - p)) * (n - 1) / n
    low, high = stats.chi2.ppf([0.0005, 0.9995], n - 1)
    assert low < statistic < high
    assert hits.sum() == capacity * seeds


def test_a_reservoir_is_algorithm_r():
    """Row by row with the same uniform numbers."""
    from jaxcl.data.reservoir import uniform

    want: list[int] = []
    for n in range(50):
        u = uniform(7, n, 1)[0, 0]
        slot = int(np.floor(u * (n + 1)))
        if n < 8:
            want.append(n)
        elif slot < 8:
            want[slot] = n
    assert reservoir(Memory.empty(), ["x"] * 50, 8, 7).items.tolist() == want
    assert np.all((uniform(7, 0, 100) >= 0) & (uniform(7, 0, 100) < 1))


@pytest.mark.parametrize("policy", POLICIES)
def test_writing_in_two_calls_equals_one_call_also_after_being_saved(policy):
    write, labels = POLICIES[policy], stream(70, 1)
    whole = write(Memory.empty(), labels, 9, 5)
    first = write(Memory.empty(), labels[:31], 9, 5)
    restored, starts = load(store(first, [0]))
    split = write(restored, labels[31:], 9, 5)
    assert starts == [0]
    assert split.items.tolist() == whole.items.tolist() and split.labels.tolist() == whole.labels.tolist()
    assert (split.seen, split.class_seen, split.full) == (whole.seen, whole.class_seen, whole.full)
    assert [labels[i] for i in whole.items] == whole.labels.tolist()
    other = write(Memory.empty(), labels, 9, 6)
    assert other.items.tolist() != whole.items.tolist(), "another seed, another memory"


@pytest.mark.parametrize("policy,capacity,n", itertools.product(POLICIES, (0, 1, 7, 100), (0, 5, 60)))
def test_a_memory_holds_distinct_rows_up_to_its_capacity(policy, capacity, n):
    memory = POLICIES[policy](Memory.empty(), stream(n, 2), capacity, 3)
    assert len(memory.items) == len(set(memory.items.tolist())) == min(n, capacity)
    assert memory.seen == n


def test_class_balanced_keeps_small_classes_whole():
    """A class with at most capacity / classes rows stays whole, wherever it comes in the stream."""
    rng = np.random.default_rng(0)
    for seed in range(200):
        labels = ["big"] * 80 + ["mid"] * 30 + ["small"] * 5
        rng.shuffle(labels)
        memory = class_balanced(Memory.empty(), labels, 15, seed)
        kept = {c: memory.labels.tolist().count(c) for c in ("big", "mid", "small")}
        assert kept["small"] == 5 and sum(kept.values()) == 15
        assert dict(memory.class_seen) == {"big": 80, "mid": 30, "small": 5}
        assert abs(kept["big"] - kept["mid"]) <= 1, "what filled the memory shares it"


def test_class_balanced_is_uniform_inside_a_full_class():
    hits = np.zeros(40)
    for seed in range(2000):
        hits[class_balanced(Memory.empty(), ["x"] * 40, 8, seed).items] += 1
    statistic = np.sum((hits - 400) ** 2) / (2000 * 0.2 * 0.8) * 39 / 40
    assert statistic < stats.chi2.ppf(0.9995, 39)


def test_a_ring_holds_the_last_rows_of_every_class_in_equal_shares():
    labels = stream(50, 4, classes=3)
    one = ring(Memory.empty(), labels, 10)
    for c in set(labels):
        want = [i for i, x in enumerate(labels) if x == c][-3:]
        assert sorted(one.items[one.labels == c].tolist()) == want, "10 // 3 of each"
    restored, _ = load(store(ring(Memory.empty(), labels[:20], 10), [0]))
    split = ring(restored, labels[20:], 10)
    assert split.items.tolist() == one.items.tolist() and split.seen == one.seen == 50
    grown = ring(one, ["new"] * 9, 10)
    assert [grown.labels.tolist().count(c) for c in ("c0", "c1", "c2", "new")] == [2, 2, 2, 2]
    assert len(ring(Memory.empty(), [f"c{i}" for i in range(30)], 4).items) == 4
    assert not len(ring(Memory.empty(), labels, 0).items)


def test_herding_follows_the_mean_of_every_class():
    """Greedily, against trying every row by hand; and the mean of those chosen is nearer than chance."""
    rng = np.random.default_rng(5)
    features = rng.normal(size=(40, 6)) + 2.0
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    chosen: list[int] = []
    for _ in range(8):
        left = [i for i in range(40) if i not in chosen]
        chosen.append(min(left, key=lambda i: np.linalg.norm(unit[[*chosen, i]].mean(0) - unit.mean(0))))
    assert herd(features, 8).tolist() == chosen
    away = lambda rows: np.linalg.norm(unit[rows].mean(0) - unit.mean(0))  # noqa: E731
    assert away(chosen) < np.quantile([away(rng.permutation(40)[:8]) for _ in range(200)], 0.1)
    assert sorted(herd(features, 40).tolist()) == list(range(40))


def test_herding_gives_up_the_last_chosen_as_classes_come():
    features = np.random.default_rng(6).normal(size=(20, 4))
    labels = ["a"] * 12 + ["b"] * 8
    first = herding(Memory.empty(), labels, 10, features)
    of_a = herd(features[:12], 5).tolist()
    assert first.items.tolist() == [*of_a, *(12 + herd(features[12:], 5)).tolist()]
    second = herding(first, ["c"] * 6, 10, features[:6])
    assert second.items[:3].tolist() == of_a[:3] and second.items[-3:].tolist() == (20 + herd(features[:6], 3)).tolist()
    assert second.labels.tolist() == ["a"] * 3 + ["b"] * 3 + ["c"] * 3


def test_herding_in_a_stage_asks_the_model_at_its_end():
    b = Between(experiment([replay(policy="herding", capacity=6)], n=2, rows=10), lambda: None)
    b.begin(0)
    b.end()
    source, params = b.sources[0], b.world.params
    ask = jax.jit(lambda p, batch: MODEL.apply(SPEC, p, batch).hidden)
    hidden = np.asarray(ask(params, jax.tree.map(lambda *x: np.stack(x), *(source[i] for i in range(10)))))
    features = np.stack([hidden[i, len(source.prompts[i]) - 1] for i in range(10)])
    labels = [source.label(i) for i in range(10)]
    want = {c: np.flatnonzero(np.array(labels) == c) for c in dict.fromkeys(labels)}
    most = 6 // len(want)
    chosen = [rows[herd(features[rows].astype(np.float64), min(most, len(rows)))] for rows in want.values()]
    assert sorted(b.owns["replay"]["host"]["rows"].tolist()) == sorted(np.concatenate(chosen).tolist())


def planned(method, stages: int = 3, rows: int = 16, **more):
    """The first phase of every stage, without training."""
    between = Between(experiment([method], n=stages, rows=rows, **more), lambda: None)
    for i in range(stages):
        between.begin(i)
        yield between.plan(0)[0]
        between.end()


def test_a_ratio_adds_rows_of_every_old_stage_and_drops_no_new_one():
    for i, phase in enumerate(planned(replay(ratio=0.5, capacity=12))):
        new, *old = phase.streams
        assert new.rows.tolist() == list(range(16)) and new.share == 1.0 and new.stage == i
        assert [s.stage for s in old] == list(range(i))
        assert sum(len(s.rows) for s in old) == (12 if i else 0)
        for s in old:
            assert s.share * len(s.rows) == pytest.approx(8)
            assert np.all((s.rows >= 0) & (s.rows < 16)) and len(set(s.rows.tolist())) == len(s.rows)


def test_a_count_is_a_number_of_rows():
    for phase in planned(replay(count=3, capacity=100)):
        assert all(s.share * len(s.rows) == pytest.approx(3) for s in phase.streams[1:])


def test_a_capacity_in_bytes_is_one_in_rows_and_its_budget_holds():
    row = sum(np.asarray(x).nbytes for x in experiment([]).stages[0].train[0].values())
    *_, phase = planned(replay(capacity=None, capacity_bytes=5 * row + 1))
    assert sum(len(s.rows) for s in phase.streams[1:]) == 5
    greedy = dataclasses.replace(replay(capacity=None, capacity_bytes=5 * row), keeps=Budget(bytes=5 * row - 1))
    with pytest.raises(RequestError, match=f"5 rows .{5 * row} bytes. of past stages in stage 1, but keeps"):
        list(planned(greedy))


def test_a_phase_of_old_rows_comes_behind_the_new_ones():
    b = Between(experiment([replay(count=4, mixing="after")], n=2), lambda: None)
    b.begin(0)
    assert [p.name for p in b.plan(0)] == ["train"]
    b.end()
    b.begin(1)
    new, old = b.plan(0)
    assert [s.stage for s in new.streams] == [1] and [s.stage for s in old.streams] == [0] and not old.reset_opt
    assert old.streams[0].share * len(old.streams[0].rows) == pytest.approx(4)


def test_bursts_of_old_rows_after_every_so_many_new_ones():
    """Sixteen rows, two epochs, a burst after every ten: three bursts, every row twice, the same plan asked again."""
    exp = experiment([replay(mixing="sparse", every=10, burst=4)], n=2, epochs=2)
    b = Between(exp, lambda: None)
    b.begin(0)
    assert [p.name for p in b.plan(0)] == ["train"]
    b.end()
    b.begin(1)
    phases = b.plan(0)
    assert [p.name for p in phases] == ["train", "replay"] * 3 + ["train"]
    assert [p.reset_opt for p in phases] == [True] + [False] * 6
    new = np.concatenate([p.streams[0].rows for p in phases[::2]])
    assert sorted(new.tolist()) == sorted([*range(16)] * 2)
    assert [len(p.streams[0].rows) for p in phases[::2]] == [10, 10, 10, 2]
    for p in phases[1::2]:
        assert sum(len(s.rows) * s.share for s in p.streams) == pytest.approx(4) and {s.stage for s in p.streams} == {0}
    again = [s.rows.tolist() for p in b.plan(3) for s in p.streams]
    assert again == [s.rows.tolist() for p in phases for s in p.streams]
    with pytest.raises(RequestError, match="give epochs, not steps"):
        list(planned(replay(mixing="sparse"), steps=3))


def test_a_loss_of_its_own_on_old_rows(tmp_path):
    """In every step of the second stage, logged by itself; its gradient is strength times that of the rows' mean."""
    done = run([replay(mixing="joint", strength=0.5, capacity=8)], tmp_path / "joint", n=2, tx=optax.sgd(0.1))
    seen = [r["replay/old"] for r in done.log]
    assert seen[:2] == [0, 0] and all(x > 0 for x in seen[2:]) and len(seen) == 4
    plain = run([], tmp_path / "plain", n=2, tx=optax.sgd(0.1))
    zero = run([replay(mixing="joint", strength=0.0)], tmp_path / "zero", n=2, tx=optax.sgd(0.1))
    assert same(zero.params, plain.params)
    batch, old = (next(batches(Answers("s", 4, seed=s), None, 4)) for s in (1, 2))
    params = weights()

    def term(params):
        both, key = batch | {"replay": old}, jax.random.key(0)
        ctx = Ctx(params, None, both, batch["weight"], None, Clock.at(), key, MODEL.apply, SPEC)
        return replay(mixing="joint", strength=0.5).loss(ctx)["old"]

    def mean(params):
        return jnp.sum(old["weight"] * MODEL.apply(SPEC, params, old).nll) / old["weight"].sum()

    want, got = (jax.jit(jax.grad(f))(params) for f in (mean, term))
    assert relative(to_numpy(got), to_numpy({k: 0.5 * v for k, v in want.items()})) < 1e-5


def test_everything_replayed_is_joint_training(tmp_path):
    runs = [run([m], tmp_path / m.name, n=2) for m in (replay(ratio=1.0, capacity=1000), joint())]
    assert same(runs[0].params, runs[1].params)
    assert len(runs[0].log) == 2 + 4


@pytest.mark.parametrize(
    "arguments,words",
    [
        ({"ratio": 1.5}, "ratio is 1.5"),
        ({"count": -1}, "count is -1"),
        ({"capacity": -2}, "capacity is -2"),
        ({"ratio": 0.1, "count": 3}, "not both"),
        ({"policy": "resevoir"}, "did you mean 'reservoir'"),
        ({"mixing": "spars"}, "did you mean 'sparse'"),
        ({"mixing": "joint", "ratio": 0.1}, "with mixing 'joint'"),
        ({"strength": -1.0}, "strength -1"),
        ({"every": 0}, "every 0"),
        ({"burst": -1}, "burst is -1"),
        ({"capacity_bytes": 100}, "one of them, the other None"),
        ({"capacity": None, "capacity_bytes": -1}, "bytes is -1"),
    ],
)
def test_bad_arguments(arguments, words):
    with pytest.raises(RequestError, match=words):
        replay(**arguments)
