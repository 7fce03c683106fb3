"""The stage loop where nothing else tests it: several phases, an optimizer carried on, accounting."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import optax
from support import SPEC, experiment, weights
from support import run as support_run

from jaxcl.core.progress import Reporter
from jaxcl.core.run import train
from jaxcl.core.types import Method, Phase, Stream
from jaxcl.methods.lora import lora


def phases(*resets: bool) -> list[Phase]:
    rows = Stream(0, np.arange(16, dtype=np.int64))
    return [Phase(f"p{i}", 2, (rows,), reset_opt=reset) for i, reset in enumerate(resets)]


def run(tmp_path, *resets: bool) -> list[int]:
    """Adam's update count after every phase: each phase's own `after` cannot see it, a counting transform can."""
    seen: list[int] = []

    def counted() -> optax.GradientTransformation:
        def update(updates, state, params=None, **_):
            jax.debug.callback(lambda n: seen.append(int(n)), state + 1)
            return updates, state + 1

        return optax.GradientTransformationExtraArgs(lambda _: jax.numpy.int32(0), update)

    exp = experiment([], n=1, phases=phases(*resets), tx=optax.chain(optax.sgd(1e-2), counted()))
    train(exp, tmp_path / "run", reporter=Reporter(quiet=True))
    jax.effects_barrier()
    return sorted(seen)


def test_a_phase_may_carry_the_optimizer_on(tmp_path):
    assert run(tmp_path, True, False) == [1, 2, 3, 4]


def test_a_phase_starts_with_a_fresh_optimizer_by_default(tmp_path):
    assert run(tmp_path, True, True) == [1, 1, 2, 2]


def test_phases_are_planned_again_at_each_start(tmp_path):
    """A plan that reads what the first phase did: feedback mixing."""
    asked = []

    def plan(world, own, planned):
        asked.append(world.phase)
        return planned + ([dataclasses.replace(planned[0], name="extra", steps=1)] if world.phase else [])

    exp = experiment([Method(name="feedback", plan=plan)], n=1, phases=phases(True, True))
    train(exp, tmp_path / "run", reporter=Reporter(quiet=True))
    names = [json.loads(line)["phase"] for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert names == ["p0", "p0", "p1", "p1", "extra"]
    assert asked == [0, 0, 1, 2, 3]


def test_accounting_counts_steps_and_parameters(tmp_path):
    exp = experiment([], n=2)
    train(exp, tmp_path / "run", reporter=Reporter(quiet=True))
    account = json.loads((tmp_path / "run/metrics.json").read_text())["accounting"]
    size = sum(int(np.size(v)) for v in exp.params.values())
    assert account["steps"] == 2 * 2  # two stages of 16 rows in batches of 8
    assert account["forward_passes"] == account["backward_passes"] == 32
    assert account["parameters"] == {"base": size, "extra": 0, "trained": size}


def test_a_relative_run_directory_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(experiment([], n=1), Path("here/run"), reporter=Reporter(quiet=True))
    assert (tmp_path / "here/run/checkpoints/stages/000/done").is_dir()


def test_events_hold_what_the_log_holds(tmp_path):
    """Read back with protobuf through tensorboardX, not with what wrote them."""
    from tensorboardX.proto.event_pb2 import Event

    train(experiment([], n=1), tmp_path / "run", reporter=Reporter(quiet=True))
    (file,) = (tmp_path / "run/events").iterdir()
    raw, at, seen = file.read_bytes(), 0, {}
    while at < len(raw):  # records: length u64, crc u32, bytes, crc u32
        size = int.from_bytes(raw[at : at + 8], "little")
        event = Event.FromString(raw[at + 12 : at + 12 + size])
        seen |= {(v.tag, event.step): v.simple_value for v in event.summary.value}
        at += 16 + size
    for line in (tmp_path / "run/log.jsonl").read_text().splitlines():
        record = json.loads(line)
        assert seen["train/loss", record["step"]] == np.float32(record["loss"])


def test_moments_start_anew_with_a_merged_adapter(tmp_path):
    """LoRA merged at the end of a stage, the optimizer kept: momentum of the old adapter must not move the new one."""
    tx = optax.trace(decay=0.9)
    merged = lora(rank=2, alpha=4.0, dropout=0.0, merged=True)
    loop = train(experiment([merged], n=1, tx=optax.chain(tx, optax.scale(-0.1)), reset_opt=False), tmp_path / "run")
    assert loop is not None and loop.opt, "the optimizer's state is carried on"
    assert not any(np.any(v) for v in loop.opt.values())


def test_masters_are_float32_where_the_blocks_compute_in_bfloat16(tmp_path):
    """A rate of 1e-5 moves weights by less than bfloat16 tells apart from 1: masters keep what a cast would lose."""
    given = {"n": 1, "tx": optax.adam(1e-5)}
    half = support_run([], tmp_path / "half", spec=dataclasses.replace(SPEC, dtype="bfloat16"), **given)
    full = support_run([], tmp_path / "full", **given)
    assert {w.dtype for w in half.params.values()} == {np.dtype(np.float32)}
    assert {x.dtype for x in jax.tree.leaves(half.loop.opt) if x.ndim} <= {np.dtype(np.float32)}
    start = weights()
    for name in ("final_norm/scale", "layers/0/attn_norm/scale"):  # ones, whose neighbours in bfloat16 are 2^-8 away
        moved, wanted = half.params[name] - start[name], full.params[name] - start[name]
        assert 0 < np.abs(moved).max() < 2**-9 and np.corrcoef(moved, wanted)[0, 1] > 0.9
    np.testing.assert_allclose(half.losses(), full.losses(), rtol=0.02)
