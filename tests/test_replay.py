"""Reservoirs against their theory, and what experience replay puts into a stage."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats
from support import experiment, run, same

from jaxcl.core.between import Between
from jaxcl.data.reservoir import Memory, class_balanced, reservoir
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


def planned(method, stages: int = 3, rows: int = 16):
    """Phases of every stage, without training."""
    between = Between(experiment([method], n=stages, rows=rows), lambda: None)
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
    ],
)
def test_bad_arguments(arguments, words):
    with pytest.raises(RequestError, match=words):
        replay(**arguments)
