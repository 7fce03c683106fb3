"""Mixing, packing and the grain iterator: counts by hand, exact resume, processes, no way to test rows."""

from __future__ import annotations

import collections

import grain
import numpy as np
import pytest

from jaxcl.core.types import Phase, Stream
from jaxcl.data.encode import encode, encode_text
from jaxcl.data.mixture import interleave, passes, scaled
from jaxcl.data.packing import first_fit, merge
from jaxcl.data.pipeline import phase_steps, pipeline
from jaxcl.data.stage import Rows, Stage
from jaxcl.errors import RequestError

WINDOW, K = 16, 3


def source(name: str, n: int, offset: int = 0) -> Rows:
    """Row i has i % 5 + 2 prompt tokens that all say offset + i, and two targets."""
    records = [{"id": f"{name}-{i}", "label": "ab"[i % 2]} for i in range(n)]

    def encode_row(i: int) -> dict:
        return encode([offset + i] * (i % 5 + 2), [7, 8], WINDOW, K, row=i)

    return Rows(name, records, encode_row, lambda r: r["label"])


@pytest.fixture(scope="module")
def sources() -> list[Rows]:
    return [source("old", 20, 100), source("new", 33, 200)]


def rows_of(stage: int, n: int, **kw) -> Stream:
    return Stream(stage, np.arange(n, dtype=np.int64), **kw)


def drawn(batches: list[dict], number: int) -> collections.Counter:
    pairs = [(s, r) for b in batches for s, r in zip(b["source"].tolist(), b["row"].tolist())]
    return collections.Counter(r for s, r in pairs if s == number)


def same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for key in a:
        same(a[key], b[key]) if isinstance(a[key], dict) else np.testing.assert_array_equal(a[key], b[key])


@pytest.mark.parametrize("epochs", [1, 3])
@pytest.mark.parametrize("batch_size", [4, 11])
def test_every_current_row_is_seen_exactly_epochs_times(sources, epochs, batch_size):
    streams = (rows_of(1, 33), rows_of(0, 20, share=0.5))
    phase = Phase("train", None, streams, epochs=epochs)
    steps = phase_steps(phase, sources, batch_size)
    assert steps == -(-(33 + 10) * epochs // batch_size)  # replayed rows add steps
    batches = list(
        pipeline(sources, streams, stage=1, batch_size=batch_size, steps=steps, seed=3, epochs=epochs)
    )
    assert len(batches) == steps
    assert drawn(batches, 0) == dict.fromkeys(range(33), epochs)
    replayed = drawn(batches, 1)
    assert sum(replayed.values()) == 10 * epochs
    assert max(replayed.values()) - min(replayed[i] for i in range(20)) <= 1
    rest = steps * batch_size - 43 * epochs
    assert sum(int((b["row"] == -1).sum()) for b in batches) == rest
    for b in batches:
        assert b["weight"].sum() == 2 * (b["row"] >= 0).sum()
        assert not b["targets_at"][b["row"] < 0].any()


def test_batches_hold_the_rows_they_name(sources):
    streams = (rows_of(1, 33), rows_of(0, 20))
    for b in pipeline(sources, streams, stage=1, batch_size=5, steps=10, seed=0):
        for i, (s, r) in enumerate(zip(b["source"], b["row"])):
            length = r % 5 + 2
            assert b["stage"][i] == (1, 0)[s]
            assert (b["tokens"][i, :length] == (200, 100)[s] + r).all()
            np.testing.assert_array_equal(b["targets_at"][i], [length, length + 1, 0])
            np.testing.assert_array_equal(b["segments"][i], np.arange(WINDOW) < length + 2)
        assert {k: v.dtype for k, v in b.items()} == {
            **dict.fromkeys(("tokens", "segments", "positions", "targets_at", "source", "stage", "row"), np.int32),
            "weight": np.float32,
        }


def test_given_steps_keep_the_proportions(sources):
    streams = (rows_of(1, 33, share=2.0), rows_of(0, 20, share=0.5))  # 66 to 10
    batches = list(pipeline(sources, streams, stage=1, batch_size=4, steps=57, seed=0))
    assert sum(drawn(batches, 0).values()) == 198
    assert sum(drawn(batches, 1).values()) == 30
    for start in range(0, 57, 19):  # evenly spread, not one block after the other
        assert abs(sum(drawn(batches[start : start + 19], 1).values()) - 10) <= 1


def test_passes_differ_and_depend_on_the_seed_only(sources):
    def rows(**kw):
        how = {"stage": 1, "batch_size": 33, "steps": 2, "seed": 0, **kw}
        made = pipeline(sources, (rows_of(1, 33),), **how)
        return [b["row"].tolist() for b in made]

    first, second = rows()
    assert sorted(first) == sorted(second) == list(range(33))
    assert first != second != list(range(33))
    assert rows() == [first, second]
    others = [rows(seed=1), rows(stage=0), rows(phase=1)]
    assert all(o[0] != first for o in others) and len({tuple(o[0]) for o in others}) == 3
    assert rows(shuffle=False) == [list(range(33))] * 2


def test_other_streams_nest_and_an_empty_one_is_a_masked_row(sources):
    none = Stream(0, np.zeros(0, np.int64), into="ref")
    full = (rows_of(1, 33), rows_of(0, 3, into="ref"))
    empty = list(pipeline(sources, (rows_of(1, 33), none), stage=1, batch_size=4, steps=9, seed=0))
    filled = list(pipeline(sources, full, stage=1, batch_size=4, steps=9, seed=0))
    for a, b in zip(empty, filled):
        same({k: v for k, v in a.items() if k != "ref"}, {k: v for k, v in b.items() if k != "ref"})
        assert {k: v.shape for k, v in a["ref"].items()} == {k: v.shape for k, v in b["ref"].items()}
        assert not a["ref"]["weight"].any() and (a["ref"]["row"] == -1).all()
        assert (b["ref"]["source"] == 1).all() and set(b["ref"]["row"]) <= {0, 1, 2}
    assert sum((b["ref"]["row"] == 0).sum() for b in filled) == 12  # 36 draws over three rows
    in_main = (rows_of(1, 33), Stream(0, np.zeros(0, np.int64)))
    same(
        next(pipeline(sources, in_main, stage=1, batch_size=4, steps=9, seed=0)),
        {k: v for k, v in filled[0].items() if k != "ref"},
    )
    with pytest.raises(RequestError, match="all streams are empty"):
        pipeline(sources, (none,), stage=1, batch_size=4, steps=9, seed=0)
    with pytest.raises(RequestError, match="hold no rows"):
        phase_steps(Phase("train", None, (none,)), sources, 4)


def test_records_are_streams_too(sources):
    kept = tuple(sources[0][i] for i in (4, 9))
    made = encode([50], [51], WINDOW, K)  # generated: no row of a stage
    streams = (rows_of(1, 3), Stream(0, (*kept, made)))
    (b,) = pipeline(sources, streams, stage=1, batch_size=6, steps=1, seed=0)
    assert sorted(b["row"][b["source"] == 1]) == [-1, 4, 9]
    assert (b["weight"].sum(-1) > 0).all()
    with pytest.raises(RequestError, match=r"stream 1 .* examples of"):
        short = encode([50], [51], WINDOW, K + 1)
        pipeline(sources, (rows_of(1, 3), Stream(0, (short,))), stage=1, batch_size=6, steps=1, seed=0)


@pytest.mark.parametrize(
    ("stream", "words"),
    [
        (Stream(1, np.array([0, 33])), "row 33 is not in stage 'new'; accepted: 0..32"),
        (Stream(2, np.array([0])), "no stage 2; accepted: 0..1"),
    ],
)
def test_streams_outside_the_stages_are_refused(sources, stream, words):
    with pytest.raises(RequestError, match=words):
        pipeline(sources, (stream,), stage=1, batch_size=6, steps=1, seed=0)


@pytest.mark.parametrize("pack", [1, 4])
def test_resume_in_mid_phase_equals_the_unbroken_run(sources, pack):
    streams = (rows_of(1, 33), rows_of(0, 20, share=0.3), rows_of(0, 5, into="ref"))

    def fresh():
        return pipeline(sources, streams, stage=1, batch_size=4, steps=9, seed=5, epochs=1, pack=pack)

    whole = list(fresh())
    for stop in range(10):
        first = fresh()
        for _ in range(stop):
            next(first)
        state = first.get_state()
        assert len(str(state)) < 200
        second = fresh()
        second.set_state(state)
        rest = list(second)
        assert len(rest) == 9 - stop
        for a, b in zip(rest, whole[stop:]):
            same(a, b)


def test_grain_checks_the_iterator(sources):
    class Made:
        def __iter__(self):
            return pipeline(sources, (rows_of(1, 33),), stage=1, batch_size=4, steps=9, seed=5)

    grain.experimental.assert_equal_output_after_checkpoint(Made())


def test_the_iterator_is_saved_and_restored_by_orbax(sources, tmp_path):
    from orbax.checkpoint import v1 as ocp

    def fresh():
        return pipeline(sources, (rows_of(1, 33),), stage=1, batch_size=4, steps=9, seed=5)

    first = fresh()
    for _ in range(3):
        next(first)
    ocp.save_checkpointables(tmp_path / "saved", {"data": first})
    second = fresh()
    ocp.load_checkpointables(tmp_path / "saved", {"data": second})
    for a, b in zip(first, second, strict=True):
        same(a, b)


@pytest.mark.parametrize("pack", [1, 3])
def test_processes_share_the_global_batch_without_overlap(sources, pack):
    streams = (rows_of(1, 33), rows_of(0, 20, into="ref"))
    how = {"stage": 1, "batch_size": 8, "steps": 5, "seed": 5, "pack": pack}
    whole = list(pipeline(sources, streams, **how))
    parts = [list(pipeline(sources, streams, **how, local=range(2 * p, 2 * p + 2))) for p in range(4)]

    def join(*trees):
        first = trees[0]
        return {
            k: join(*(t[k] for t in trees))
            if isinstance(first[k], dict)
            else np.concatenate([t[k] for t in trees])
            for k in first
        }

    for step, expected in enumerate(whole):
        same(join(*(p[step] for p in parts)), expected)
    with pytest.raises(RequestError, match=r"batch_size=8, rows \[7, 8\] of it; accepted: 0..7"):
        pipeline(sources, streams, **how, local=[7, 8])


def test_packing_holds_every_row_once_and_whole(sources):
    streams = (rows_of(1, 33),)
    phase = Phase("train", None, streams, epochs=2)
    steps = phase_steps(phase, sources, 4, pack=3, seed=(5, 1, 0))
    assert steps < phase_steps(phase, sources, 4)
    made = list(pipeline(sources, streams, stage=1, batch_size=4, steps=steps, seed=5, epochs=2, pack=3))
    seen = collections.Counter(r for b in made for r in b["rows"].ravel().tolist() if r >= 0)
    assert seen == dict.fromkeys(range(33), 2)
    for b in made:
        assert b["targets_at"].shape == (4, 3 * K) == b["weight"].shape
        for i in range(4):
            for slot, row in enumerate(b["rows"][i]):
                if row < 0:
                    assert not b["weight"][i, slot * K : (slot + 1) * K].any()
                    continue
                alone = sources[1][row]
                inside = b["segments"][i] == slot + 1
                used = alone["segments"] == 1
                np.testing.assert_array_equal(b["tokens"][i][inside], alone["tokens"][used])
                np.testing.assert_array_equal(b["positions"][i][inside], alone["positions"][used])
                at = b["targets_at"][i, slot * K : slot * K + 2]
                np.testing.assert_array_equal(b["tokens"][i][at], [7, 8])


def test_packed_text_keeps_its_weights():
    a, b = encode_text([1, 2, 3], 8), encode_text([4, 5], 8)
    packed = merge([a, b], 2)
    np.testing.assert_array_equal(packed["tokens"], [1, 2, 3, 4, 5, 0, 0, 0])
    np.testing.assert_array_equal(packed["segments"], [1, 1, 1, 2, 2, 0, 0, 0])
    np.testing.assert_array_equal(packed["positions"], [0, 1, 2, 0, 1, 0, 0, 0])
    np.testing.assert_array_equal(packed["weight"], [0, 1, 1, 0, 1, 0, 0, 0])


def test_counting_by_hand():
    np.testing.assert_array_equal(scaled(np.array([2, 1, 1]), 7), [3, 2, 2])
    np.testing.assert_array_equal(scaled(np.array([1, 0]), 5), [5, 0])
    np.testing.assert_array_equal(interleave(np.array([4, 2])), [0, 1, 0, 0, 1, 0])
    np.testing.assert_array_equal(interleave(np.array([1, 0, 3])), [2, 0, 2, 2])
    counts = np.bincount(passes(7, 17, (1, 2)), minlength=7)
    assert counts.sum() == 17 and set(counts) == {2, 3}
    assert first_fit([5, 4, 3, 4, 8], 8, 9) == [[0, 2], [1, 3], [4]]
    assert first_fit([1, 1, 1], 8, 2) == [[0, 1], [2]]


def test_a_stage_has_no_test_rows_to_reach(sources):
    stage = Stage("new", sources[1], ("new/test",))
    assert vars(stage) == {"name": "new", "train": sources[1], "evals": ("new/test",)}
    assert not any("test" in name for name in dir(stage.train))
    with pytest.raises(RequestError, match="stage 'none' has no training rows"):
        Stage("none", Rows("none", [], lambda i: {}, str))
    with pytest.raises(RequestError, match="id 'x' occurs twice"):
        Rows("twice", [{"id": "x"}, {"id": "x"}], lambda i: {}, str)
