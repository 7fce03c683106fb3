"""ELLE: growth by schedule, recovery before the new domain, replay in proportion to progress."""

from __future__ import annotations

import dataclasses

import numpy as np
import optax
import pytest
from support import SPEC, experiment, run

from jaxcl.core.between import Between
from jaxcl.core.types import Stream
from jaxcl.errors import RequestError
from jaxcl.methods.elle import HELD_OUT, chances, elle, picked, sizes_after, split
from jaxcl.methods.ewc import ewc
from jaxcl.models.layout import layout
from jaxcl.surgery.depth import Layer
from jaxcl.surgery.width import Sizes

STEPS = ({"layers": 1, "heads": 2}, {"mlp": 8, "width": 0})
SGD = optax.sgd(0.05)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    method = elle(growth=STEPS, capacity=24, recover=3, share=0.2, segments=2)
    return run([ewc(strength=1.0, rows=4), method], tmp_path_factory.mktemp("elle") / "out", tx=SGD, rows=20)


def phases(log, stage: int) -> list[str]:
    names = [r["phase"] for r in log if r["stage"] == stage]
    return list(dict.fromkeys(names))


def test_a_stage_grows_recovers_and_trains_in_segments(done):
    assert phases(done.log, 0) == ["train"]
    assert phases(done.log, 1) == phases(done.log, 2) == ["recover", "train-0", "train-1"]
    assert sum(r["phase"] == "recover" for r in done.log if r["stage"] == 1) == 3
    assert done.compilations == 3, "one per growth, shared by recovery and segments"
    assert np.isfinite(done.losses()).all()


def test_sizes_after_both_steps_and_what_the_memory_says(done):
    spec, host = done.loop.now.world.spec, done.loop.now.owns["elle"]["host"]
    assert (spec.layers, spec.heads, spec.kv_heads) == (3, 4, 2)
    assert spec.width == SPEC.width + 2 * SPEC.head_dim and spec.mlp == SPEC.mlp * 24 // 16 + 8
    assert {k: v.shape for k, v in done.params.items()} == {k: leaf.shape for k, leaf in layout(spec).items()}
    assert [g["stage"] for g in host["grown"]] == [1, 2] and not any(g["exact"] for g in host["grown"])
    assert set(host["progress"]) <= {"0", "1"} and all(np.isfinite(p["loss"]) for p in host["progress"].values())


def test_memories_of_others_grew_along(done):
    fisher = done.loop.now.owns["ewc"]["fixed"]["fisher"]
    assert {k: v.shape for k, v in fisher.items()} == {k: v.shape for k, v in done.params.items()}


def test_growth_without_noise_is_deterministic_and_exact_where_it_can_be(tmp_path):
    worlds = []
    for _ in range(2):
        now = Between(experiment([elle(growth=({"mlp": 8},), noise=0.0)]), lambda: None)
        now.begin(0)
        now.begin(1)
        worlds.append(now.world)
        assert now.owns["elle"]["host"]["grown"] == [{"stage": 1, "mlp": 8, "exact": True}]
    assert all(np.array_equal(worlds[0].params[k], worlds[1].params[k]) for k in worlds[0].params)


def test_the_share_of_replay(tmp_path):
    """Of the rows of a stage's own phases a tenth comes from memory, within a row a segment."""
    now = Between(experiment([elle(growth=(), capacity=400, recover=0)], rows=400, n=2), lambda: None)
    now.begin(0)
    now.end()
    now.begin(1)
    plan = now.plan(0)
    assert len(plan) == 4
    new = np.concatenate([s.rows for p in plan for s in p.streams if s.stage == 1])
    assert sorted(new.tolist()) == list(range(400)), "every new row once"
    old = sum(len(s.rows) * s.share for p in plan for s in p.streams if s.stage == 0)
    assert abs(old / (old + len(new)) - 0.1) < 1 / np.sqrt(400)
    held = split(np.concatenate([s.rows for s in plan[0].streams if s.stage == 0]))[1]
    assert len(held) < 400 and plan[0].reset_opt and not plan[1].reset_opt


def test_chances_follow_progress():
    assert chances({0: 3.0, 1: 1.0}, early=False) == {0: 0.75, 1: 0.25}
    assert chances({0: 2.0, 1: -1.0, 2: 2.0}, early=True) == {0: 1 / 3, 1: 1 / 3, 2: 1 / 3}
    assert chances({0: 2.0, 1: -1.0, 2: 2.0}, early=False) == {0: 0.5, 1: 0.0, 2: 0.5}
    assert chances({0: -1.0, 1: 0.0}, early=False) == {0: 0.5, 1: 0.5}
    rng = np.random.default_rng(0)
    for early in (True, False):
        assert np.isclose(sum(chances(dict(enumerate(rng.normal(size=5))), early).values()), 1.0)


def test_every_layer_is_copied_once_before_one_is_copied_twice():
    rng, waiting, layers, copied = np.random.default_rng(1), [], 6, []
    original = list(range(6))  # where the first six layers are now
    for more in (2, 2, 1, 1):
        order, waiting = picked(layers, more, waiting, rng)
        copied += [original.index(layer.source) for layer in order if layer.copy]
        assert all(order[i - 1].source == layer.source for i, layer in enumerate(order) if layer.copy), "right behind"
        original = [order.index(Layer(i)) for i in original]
        layers = len(order)
    assert sorted(copied) == list(range(6)) and layers == 12


def test_rows_for_measuring_are_never_replayed():
    replayed, held = split(np.arange(100, 135))
    assert len(held) == 35 // HELD_OUT and not set(replayed) & set(held) and len(replayed) + len(held) == 35
    assert [len(x) for x in split(np.arange(3))] == [2, 1] and [len(x) for x in split(np.arange(1))] == [1, 1]


def test_streams_of_other_methods_stay(tmp_path):
    now = Between(experiment([elle(growth=(), capacity=8, recover=0, segments=2)], n=2), lambda: None)
    now.begin(0)
    now.end()
    now.begin(1)
    extra = Stream(0, np.arange(4, dtype=np.int64), share=1.0)
    base = now.plan(0)[0]
    phase = dataclasses.replace(base, name="train", streams=(Stream(1, np.arange(16, dtype=np.int64)), extra))
    parts = now.methods[0].plan(now.given(0, 2), now.owns["elle"], [phase])
    assert [p.streams[1].share for p in parts] == [0.5, 0.5] and parts[0].streams[1].rows is extra.rows


def test_sizes_of_the_paper_and_bad_values():
    small = dataclasses.replace(SPEC, width=384, heads=6, kv_heads=6, head_dim=64, mlp=1536)
    assert sizes_after(small, {"layers": 2, "heads": 2}) == Sizes(512, 8, 2048)
    with pytest.raises(RequestError, match="3 more heads in groups of 2"):
        sizes_after(SPEC, {"heads": 3})
    for bad, says in (({"share": 1.0}, "share 1.0"), ({"segments": 0}, "segments 0"), ({"noise": -1}, "noise -1")):
        with pytest.raises(RequestError, match=says):
            elle(**bad)
    with pytest.raises(RequestError, match="did you mean 'layers'"):
        elle(growth=({"layer": 1},))
