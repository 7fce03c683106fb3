"""Plans: HLO text and jaxprs against numbers made by hand, shapes against a real run, and one small slice."""

from __future__ import annotations

import dataclasses
import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import MODEL, SPEC, STACK, experiment, weights

from jaxcl.cli import main
from jaxcl.core.between import Between
from jaxcl.core.progress import Reporter
from jaxcl.core.rows import keep_rows, rows_at
from jaxcl.core.run import train
from jaxcl.core.sharding import make_mesh
from jaxcl.core.step import make_step
from jaxcl.core.types import Clock, Fixed, Phase, State
from jaxcl.errors import RequestError, RunFailed
from jaxcl.methods.ewc import ewc
from jaxcl.methods.finetune import finetune
from jaxcl.methods.olora import olora
from jaxcl.plan import chips, hlo
from jaxcl.plan.advice import CHANGES, advice, changed, helps
from jaxcl.plan.command import planned
from jaxcl.plan.draft import draft
from jaxcl.plan.flops import flops
from jaxcl.plan.report import mesh_on, per_chip, plan, shortage, work_of
from jaxcl.plan.traffic import traffic

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install 'jaxcl[tpu]'"
)

# A loop of five trips that gathers a layer in two fused steps of one channel, and sums over pairs; then one permute.
TEXT = """HloModule step, is_scheduled=true

%gather.1 (p.1: bf16[8,4]) -> bf16[16,4] {
  %p.1 = bf16[8,4]{1,0} parameter(0)
  ROOT %all-gather.1 = bf16[16,4]{1,0} all-gather(%p.1), channel_id=7, replica_groups=[2,2]<=[4], dimensions={0}
}

%gather.2 (p.2: bf16[8,4]) -> bf16[16,4] {
  %p.2 = bf16[8,4]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[16,4]{1,0} all-gather(%p.2), channel_id=7, replica_groups=[2,2]<=[4], dimensions={0}
}

%row (p.3: f32[5,100], p.4: s32[]) -> f32[100] {
  %p.3 = f32[5,100]{1,0} parameter(0)
  %p.4 = s32[] parameter(1)
  ROOT %dynamic-slice.1 = f32[1,100]{1,0} dynamic-slice(%p.3, %p.4, %p.4), dynamic_slice_sizes={1,100}
}

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%body (arg: (s32[], bf16[8,4], f32[5,100])) -> (s32[], bf16[8,4], f32[5,100]) {
  %arg = (s32[], bf16[8,4]{1,0}, /*index=2*/f32[5,100]{1,0:T(8,128)}) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %part = bf16[8,4]{1,0} get-tuple-element(%arg), index=1
  %rows = f32[5,100]{1,0} get-tuple-element(%arg), index=2
  %whole.1 = bf16[16,4]{1,0} fusion(%part), kind=kCustom, calls=%gather.1
  %whole.2 = bf16[16,4]{1,0} fusion(%part), kind=kCustom, calls=%gather.2
  %mine = f32[1,100]{1,0:T(8,128)S(1)} fusion(%rows, %i), kind=kLoop, calls=%row
  %pair = f32[1,100]{1,0} all-reduce(%mine), channel_id=8, replica_groups={{0,2},{1,3}}, to_apply=%add
  %one = s32[] constant(1)
  %next = s32[]{:T(128)} add(%i, %one)
  ROOT %out = (s32[], bf16[8,4]{1,0}, f32[5,100]{1,0}) tuple(%next, %part, %rows)
}

%cond (arg.1: (s32[], bf16[8,4], f32[5,100])) -> pred[] {
  %arg.1 = (s32[], bf16[8,4]{1,0}, f32[5,100]{1,0}) parameter(0)
  %n = s32[]{:T(128)} constant(7)
  %j = s32[] get-tuple-element(%arg.1), index=0
  ROOT %lt = pred[] compare(%j, %n), direction=LT
}

ENTRY %main (a: bf16[8,4], b: f32[5,100]) -> bf16[8,4] {
  %a = bf16[8,4]{1,0} parameter(0)
  %b = f32[5,100]{1,0} parameter(1)
  %two = s32[] constant(2)
  %start = (s32[], bf16[8,4]{1,0}, f32[5,100]{1,0}) tuple(%two, %a, %b)
  %loop = (s32[], bf16[8,4]{1,0}, f32[5,100]{1,0}) while(%start), condition=%cond, body=%body
  %end = bf16[8,4]{1,0} get-tuple-element(%loop), index=1
  %go = (bf16[8,4]{1,0}, bf16[8,4]{1,0}) collective-permute-start(%end), channel_id=9, source_target_pairs={{0,1}}
  ROOT %came = bf16[8,4]{1,0} collective-permute-done(%go)
}
"""


def test_collectives_count_trips_and_channels():
    found = hlo.collectives(hlo.parse(TEXT), devices=4)
    # From 2 to below 7: five trips. A part is 64 bytes, a row 400; groups of two send (n-1) parts, 2 (n-1)/n rows.
    assert found == {
        "all-gather": hlo.Moved(5, 5 * 64),
        "all-reduce": hlo.Moved(5, 5 * 400),
        "collective-permute": hlo.Moved(1, 64),
    }


def test_an_all_reduce_of_which_a_slice_is_taken_is_a_reduce_scatter():
    text = """ENTRY %main (a: f32[8,4], i: s32[]) -> f32[2,4] {
  %a = f32[8,4]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %sum = f32[8,4]{1,0} all-reduce(%a), channel_id=1, replica_groups={}, to_apply=%add
  ROOT %mine = f32[2,4]{1,0} dynamic-slice(%sum, %i, %i), dynamic_slice_sizes={2,4}
}"""
    assert hlo.collectives(hlo.parse(text), devices=4) == {"reduce-scatter": hlo.Moved(1, 96)}


def test_traffic_counts_slices_and_leaves_out_what_stays_on_the_chip():
    gathers = 5 * 2 * (64 + 128)  # each takes a part and gives the whole
    rows = 5 * (400 + 4)  # of five rows one, and its number; the result stays on the chip
    sums = 5 * 400  # which is summed from there into memory
    counters = 5 * (4 + 4 + 4)
    permuted = 2 * 64 + 64  # the start names what it takes and gives
    assert traffic(hlo.parse(TEXT)) == gathers + rows + sums + counters + permuted


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{{0,1,2,3}}", 4),
        ("[16,8]<=[8,16]T(1,0)", 8),
        ("mesh['a'=4,'b'=2] {'a'}", 4),
        ("mesh['a'=4,'b'=2] {'a','b'}", 8),
        ("mesh['a'=8] {'a':(2)4}", 4),
        ("{}", 16),
    ],
)
def test_groups_in_all_notations(groups, size):
    op = hlo.Op("x", "f32[]", "all-reduce", "", f", replica_groups={groups}, to_apply=%add")
    assert hlo.group(op, devices=16) == size


@pytest.mark.parametrize(
    ("kind", "parts"), [("all-gather", 3), ("all-reduce", 1.5), ("reduce-scatter", 0.75), ("all-to-all", 0.75)]
)
def test_what_a_ring_sends(kind, parts):
    assert hlo.sent(kind, 400, 4) == parts * 400


def test_flops_of_products_loops_and_branches():
    a, b = jnp.zeros((3, 4, 5)), jnp.zeros((3, 5, 7))
    product = 2 * 3 * 4 * 5 * 7
    count = lambda f, *xs: flops(jax.make_jaxpr(f)(*xs))  # noqa: E731
    assert count(jnp.matmul, a, b) == product
    assert count(lambda a, b: jax.lax.scan(lambda c, _: (c, a @ b), 0, length=6)[1], a, b) == 6 * product
    assert count(lambda a, b: jax.lax.cond(a[0, 0, 0] > 0, lambda: (a @ b).sum(), lambda: 0.0), a, b) == product
    assert count(jax.grad(lambda a, b: jnp.sum(a @ b), argnums=(0, 1)), a, b) == 3 * product
    image, kernel = jnp.zeros((2, 3, 8, 8)), jnp.zeros((5, 3, 3, 3))
    padded = lambda x, k: jax.lax.conv(x, k, (1, 1), "SAME")  # noqa: E731
    assert count(padded, image, kernel) == 2 * (2 * 5 * 8 * 8) * (3 * 3 * 3)


def batch_of(b: int, t: int) -> dict[str, jax.Array]:
    ones = jnp.ones((b, t), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(t), (b, t))
    return {"tokens": ones, "segments": ones, "positions": positions, "weight": jnp.ones((b, t)),
            "row": jnp.arange(b), "stage": jnp.zeros(b, jnp.int32)}  # fmt: skip


@pytest.mark.parametrize("segments", [(), STACK])
def test_flops_of_a_model_are_the_closed_form(segments):
    b, t, s = 3, 10, dataclasses.replace(SPEC, segments=segments)
    shapes = jax.eval_shape(lambda: MODEL.init(s, jax.random.key(0)))
    forward = flops(jax.make_jaxpr(lambda p, x: MODEL.apply(s, p, x).nll)(shapes, batch_of(b, t)))
    kernels = sum(v.size for k, v in shapes.items() if k.endswith("/kernel"))  # the embedding is the head
    attention = s.layers * 2 * (2 * b * t * t * s.heads * s.head_dim)  # scores and their sum over values
    assert forward == 2 * b * t * kernels + attention


def step_flops(segments: tuple, remat: str) -> int:
    spec = dataclasses.replace(SPEC, segments=segments, remat=remat)
    exp = experiment([finetune()], spec=spec, params={})
    shapes = jax.eval_shape(lambda: MODEL.init(spec, jax.random.key(0)))
    step = make_step(exp.model.apply, spec, exp.methods, exp.tx, Phase("train", 1, ()), 1, exp.model.head)
    state = State(Clock.at(), shapes, jax.eval_shape(exp.tx.init, shapes), {})
    return flops(jax.make_jaxpr(step)(state, Fixed({}, {}), batch_of(2, 8), np.uint32(0)))


def test_flops_of_a_step_do_not_depend_on_stacking_and_remat_adds_the_blocks():
    single, stacked = (step_flops(s, "none") for s in ((), STACK))
    assert stacked == single
    again = step_flops(STACK, "block") - stacked
    kernels = sum(v.size for k, v in weights().items() if k.startswith("layers/") and k.endswith("/kernel"))
    last = SPEC.layers * SPEC.mlp * SPEC.width  # a block's last product is not needed again
    attention = SPEC.layers * 2 * (2 * 2 * 8 * 8 * SPEC.heads * SPEC.head_dim)
    assert 2 * 16 * (kernels - last) + attention <= again <= 2 * 16 * kernels + attention


METHODS = {"olora": lambda: olora(rank=2, max_stages=3), "ewc": lambda: ewc(rows=8), "finetune": finetune}


@pytest.mark.parametrize("name", METHODS)
def test_a_draft_has_the_shapes_of_a_run(name):
    exp = experiment([METHODS[name]()])
    real = Between(exp, lambda: None)
    real.begin(0)
    real.plan(0)
    real.end()
    real.begin(1)
    drawn = draft(lambda: experiment([METHODS[name]()]), lambda e: make_mesh(e.mesh), 1)
    shape = lambda tree: jax.tree.map(lambda x: (tuple(x.shape), str(x.dtype)), tree)  # noqa: E731
    assert shape({**drawn.fixed.frozen, **drawn.state.train}) == shape(real.world.params)
    assert set(drawn.state.train) == real.world.trained
    assert shape(drawn.fixed.own) == shape(real.device("fixed"))
    assert drawn.batch["tokens"].shape == (exp.batch_size, 12)


def test_a_draft_holds_no_weights_and_counts_the_parts_of_a_chip():
    big = dataclasses.replace(SPEC, vocab=2**17, width=2**14, mlp=2**16, layers=64, heads=64, kv_heads=8, head_dim=256,
                              segments=((("block",), 64),))  # fmt: skip
    made = lambda: experiment([finetune()], spec=big, n=2)  # noqa: E731
    drawn = draft(made, lambda e: make_mesh(e.mesh), 1)
    held = sum(map(per_chip, drawn.state.train.values()))
    layer = big.width * (2 * 64 * 256 + 2 * 8 * 256 + 3 * big.mlp + 2)
    assert held == 4 * (big.vocab * big.width + 64 * layer + big.width) > 900e9
    useful = work_of(drawn, 0, 1)["useful"]
    kernels = 64 * (layer - 2 * big.width)
    assert useful == 6 * (kernels * 8 * 12 + big.vocab * big.width * 8 * 3)


def test_an_experiment_that_trains_as_it_is_built_is_refused_before_anything_is_written(tmp_path):
    out = tmp_path / "base"

    def build():
        train(experiment([finetune()]), out, reporter=Reporter(quiet=True))
        return experiment([finetune()])

    with pytest.raises(RequestError, match="has to be trained first; run it, then plan"):
        draft(build, lambda e: make_mesh(e.mesh), 1)
    assert not out.exists()


def test_rows_keep_their_place_where_the_mesh_divides_them():
    mesh = jax.sharding.AbstractMesh((4,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp", None))

    def constraints(n: int) -> int:  # a new function each time: JAX keeps traces by function and shape
        return str(jax.make_jaxpr(lambda x: keep_rows(x))(jnp.zeros((n, 3, 2)))).count("sharding_constraint[")

    with rows_at(rows):
        assert [constraints(n) for n in (8, 6)] == [1, 0]
    assert constraints(8) == 0


def test_what_can_change_is_named_in_order():
    found = {
        "mesh": {"data": 4}, "batch": {"spread": 4}, "memory": {"capacity": 100},
        "state": {"trained": 1, "frozen": 9}, "devices": 4,
    }  # fmt: skip
    made = lambda: experiment([finetune()])  # noqa: E731
    names = [c["change"] for c in advice(made, found)]
    assert names == ["mesh={'fsdp': -1}", "param_dtype='bfloat16'", "remat='block'", "accumulate=2"]
    assert [c.state for c in CHANGES if helps(c, found | {"state": {"frozen": 101}})] == [True, True]
    exp, what = changed(made(), CHANGES, found)
    assert what == "accumulate=2" and exp.accumulate == 2 and exp.model.spec.remat == "block"
    assert {v.dtype for v in exp.params.values()} == {np.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("enough", [4, 64])
def test_changes_are_made_until_it_fits_and_the_plan_of_before_stays_beside_it(enough, monkeypatch):
    def compiled(build, topology, stage):
        exp = build()
        return {
            "fits": exp.accumulate >= enough, "mesh": {"fsdp": 4}, "batch": {"spread": 4}, "devices": 4,
            "memory": {"capacity": 100}, "state": {"trained": 9, "frozen": 1}, "accumulate": exp.accumulate,
        }  # fmt: skip

    monkeypatch.setattr("jaxcl.plan.command.plan", compiled)
    monkeypatch.setattr("jaxcl.plan.advice.plan", compiled)
    sets = ["model=tiny", "method=finetune", "batch_size=32", "window=16", "targets=4"]
    found = json.loads(json.dumps(planned("scale", sets, "v5e:2x2", try_changes=True)))
    assert found["fits"] is (enough == 4) and found["accumulate"] == min(enough, 8)
    assert [c["change"] for c in found["changes"]] == [f"accumulate={min(enough, 8)}"]
    assert found["unchanged"]["accumulate"] == 1 and not found["unchanged"]["fits"]
    assert ("least_chips" in found) is (enough == 64) and found["config"]["model"] == "tiny"


def test_once_the_state_fits_the_other_changes_are_tried_too(monkeypatch):
    """A frozen base larger than the chip, which half the bytes bring below it; only then micro-batches help."""

    def compiled(build, topology, stage):
        exp = build()
        small = exp.model.spec.param_dtype == "bfloat16"
        return {
            "fits": small and exp.accumulate >= 4, "mesh": {"fsdp": 4}, "batch": {"spread": 4}, "devices": 4,
            "memory": {"capacity": 100}, "state": {"trained": 1, "frozen": 75 if small else 150},
        }  # fmt: skip

    monkeypatch.setattr("jaxcl.plan.command.plan", compiled)
    monkeypatch.setattr("jaxcl.plan.advice.plan", compiled)
    sets = ["model=tiny", "method=lora", "batch_size=32", "window=16", "targets=4"]
    found = planned("scale", sets, "v5e:2x2", try_changes=True)
    assert found["fits"] and [c["change"] for c in found["changes"]] == ["param_dtype='bfloat16'", "accumulate=4"]


def test_xlas_words_for_too_little_memory():
    said = "RESOURCE_EXHAUSTED: the total memory required for HLO temporaries (30.50G) exceeds available HBM (15.75G)."
    found = shortage(jax.errors.JaxRuntimeError(said), chips.CHIPS["v5e"])
    assert (found["total"], found["available"], found["capacity"]) == (30.5 * 2**30, 15.75 * 2**30, 16 * 2**30)
    used = shortage(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Used 41.5G of 15.75G hbm."), chips.CHIPS["v5e"])
    assert used["total"] == 41.5 * 2**30
    with pytest.raises(RunFailed, match="INTERNAL"):
        shortage(jax.errors.JaxRuntimeError("INTERNAL: a bug"), chips.CHIPS["v5e"])


@pytest.mark.parametrize(
    ("topology", "accepted"),
    [("v9:2x2", "accepted: v4, v5e"), ("v5e", "v5e:4x4"), ("v5p:4x4", "v5p:4x4x4"), ("v5e:32x32", "1 to 256"),
     ("v5e:0x4", "1 to 256")],
)  # fmt: skip
def test_a_topology_that_is_none(topology, accepted, capsys):
    assert main(["plan", "demo", "--topology", topology]) == 2
    line = capsys.readouterr().err
    assert topology in line and accepted in line and line.count("\n") == 1


def test_without_libtpu_the_extra_is_named(monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "libtpu" else found(name, *a))
    assert main(["plan", "demo", "--topology", "v5e:2x2"]) == 2
    assert "pip install 'jaxcl[tpu]'" in capsys.readouterr().err


def test_a_mesh_of_another_size():
    exp = experiment([finetune()], mesh={"data": 3, "model": 2})
    with pytest.raises(RequestError, match="has 6 devices, v5e:2x2 has 4"):
        mesh_on(exp, [None] * 4, "v5e:2x2")
    with pytest.raises(RequestError, match="accepted: sizes of at least 1"):
        mesh_on(dataclasses.replace(exp, mesh={"data": 3, "model": -1}), [None] * 4, "v5e:2x2")


@needs_libtpu
def test_a_small_slice_is_planned():
    chips.prepare()
    spec = dataclasses.replace(SPEC, segments=STACK)
    made = lambda: experiment([ewc(rows=8)], spec=spec, n=2, mesh={"fsdp": 4})  # noqa: E731
    found = json.loads(json.dumps(plan(made, "v5e:2x2")))
    assert found["fits"] and found["devices"] == 4 and found["stage"] == 1 and found["batch"]["spread"] == 4
    # EWC on full fine-tuning: weights, two moments and Adam's count, Fisher and anchor, all split by four.
    size = sum(v.nbytes for v in weights(spec).values())
    state = found["state"]
    assert state["trained"] <= size / 3 and state["frozen"] == 0
    assert state["memories"] == 2 * state["trained"] and state["optimizer"] == 2 * state["trained"] + 4 * 1 + 0
    memory = found["memory"]
    assert memory["arguments"] >= sum(state.values()) and memory["aliased"] >= state["trained"] + state["optimizer"]
    assert found["collectives"]["all-gather"]["bytes"] > 0
    line = found["roofline"]
    assert line["step_s"] == max(line["compute_s"], line["memory_s"], line["collectives_s"]) > 0
    assert line["compute_s"] == found["flops"]["step"] // 4 / 197e12
    assert line["mfu"] == pytest.approx(found["flops"]["useful"] / (line["step_s"] * 4 * 197e12))
