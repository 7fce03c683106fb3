"""The invariants of card cft/generative-replay: quotas, filters, counters, seeds, the oracle, conditions, labellers."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest
from support import SPEC, experiment, run, same
from test_methods_common import DECAY
from written import EOS, TARGETS, Echo, echoes, greedy, learned, parameters, saved

from jaxcl.core import journal
from jaxcl.core.between import Between
from jaxcl.data import pseudo
from jaxcl.data.pseudo import Item
from jaxcl.data.stage import Stage
from jaxcl.errors import RequestError
from jaxcl.methods.generative_replay import generative_replay
from jaxcl.methods.lwf import lwf
from jaxcl.methods.replay import replay
from jaxcl.models.decoder import decoder

MARK, END = 50, 51


@pytest.mark.parametrize("tasks", [1, 2, 3, 7])
@pytest.mark.parametrize("gamma", [0.0, 0.05, 0.2, 0.29, 1.0])
@pytest.mark.parametrize("rows", [1, 16, 100, 999])
def test_quotas_are_equal_and_sum_to_gamma_times_the_rows_rounded_to_a_multiple(tasks, gamma, rows):
    whole = (round(gamma * 100) * rows) // 100  # in integers: floor(gamma * rows)
    each = pseudo.quota(rows, tasks, gamma)
    assert each * tasks == whole - whole % tasks


def test_quotas_without_old_tasks_and_by_count():
    assert pseudo.quota(100, 0, 0.5) == 0 == pseudo.quota(100, 0, None, 5)
    assert pseudo.quota(100, 3, None, 200) == 200


def test_a_text_has_exactly_one_mark_and_an_end():
    assert pseudo.separate([1, 2, MARK, 3], True, MARK, END) == Item((1, 2), (3, END))
    for ids, ended in (([1, 2, 3], True), ([1, MARK, 2, MARK, 3], True), ([1, MARK, 2], False)):
        assert pseudo.separate(ids, ended, MARK, END) is None


@pytest.mark.parametrize(
    "item,labels,want",
    [
        (Item((1,), (2, END)), None, "accepted"),
        (Item((1, 2, 3), (2, 3, END)), None, "accepted"),
        (Item((1, 2, 3, 4), (2, 3, END)), None, "length"),
        (Item((1,), (2, 3, 4, END)), None, "length"),
        (Item((), (2, END)), None, "length"),
        (Item((1,), (END,)), None, "length"),
        (None, None, "boundary"),
        (Item((1,), (2, END)), frozenset({(2, END)}), "accepted"),
        (Item((1,), (2, END)), frozenset({(3, END)}), "labels"),
    ],
)
def test_the_filters_predicate(item, labels, want):
    """A window of six, three targets."""
    assert pseudo.verdict(item, 6, 3, labels) == want
    good, counts = pseudo.sift([item, None], 6, 3, labels)
    assert counts["requested"] == 2 == counts["accepted"] + sum(counts[r] for r in pseudo.REASONS)
    assert good == ([item] if want == "accepted" else [])


def test_selection_takes_the_nearest_of_every_cluster_in_turn():
    """Three clouds far apart: the mean of each is its centroid, and distances to it say who is taken."""
    rng = np.random.default_rng(0)
    clouds = np.repeat(np.array([[0.0, 0], [100, 0], [0, 100]]), [20, 6, 2], axis=0) + rng.normal(size=(28, 2))
    label = np.repeat([0, 1, 2], [20, 6, 2])
    want = []
    for c in range(3):
        members = np.flatnonzero(label == c)
        distance = np.linalg.norm(clouds[members] - clouds[members].mean(0), axis=1)
        want += members[np.argsort(distance)][: {0: 5, 1: 5, 2: 2}[c]].tolist()
    assert pseudo.diverse(clouds, 3, 12, seed=1).tolist() == sorted(want)
    assert pseudo.diverse(clouds, 3, 40, seed=1).tolist() == list(range(28))


def test_packing_is_exact():
    items = [Item((1, 2, 3), (4, END)), Item((0,), (9, 9, END))]
    assert pseudo.unpack(pseudo.pack(items)) == items and pseudo.pack([]) == {} and pseudo.unpack({}) == []
    one, _ = pseudo.examples(items, 8, 3, {"task_id": 2})
    assert one["tokens"].tolist() == [1, 2, 3, 4, END, 0, 0, 0] and one["targets_at"].tolist() == [3, 4, 0]
    assert one["row"] == -1 and one["task_id"] == 2 and one["task_id"].dtype == np.int32


@pytest.fixture(scope="module")
def relabelled(tmp_path_factory):
    """Two stages; prompts go on from prefixes of kept ones, the most diverse half of them is taken and relabelled."""
    method = generative_replay(
        gamma=0.5, condition="prefix", prefix=1, labeller="relabel", labels=True, kept=8, oversample=2.0, clusters=4
    )
    return learned(method, tmp_path_factory.mktemp("relabelled") / "out")


def test_accepted_and_refused_are_what_was_asked_for(relabelled):
    own = relabelled.loop.now.owns["generative_replay"]["host"]
    counts, items = own["counts"]["1"]["0"], pseudo.unpack(own["pseudo"]["0"])
    assert counts["requested"] == 32 and 16 <= counts["accepted"] <= 32 and len(items) == 16
    assert counts["accepted"] + sum(counts[r] for r in pseudo.REASONS) == 32
    assert all(pseudo.verdict(i, 12, TARGETS, frozenset({(24, EOS), (25, EOS)})) == "accepted" for i in items)
    starts = {Echo(0).pair(i)[0][0] for i in range(32)}
    assert {i.prompt[0] for i in items} <= starts, "every prompt goes on from a kept one's first token"


def test_what_is_held_of_the_past_is_declared_and_counted(relabelled):
    own = relabelled.loop.now.owns["generative_replay"]["host"]
    assert own["rows_0"].shape == (8, 1) and own["labels_0"].tolist() == [[24, EOS], [25, EOS]]
    kept = json.loads((relabelled.out / "metrics.json").read_text())["accounting"]["kept"]["generative_replay"]
    assert kept["examples"] == 16
    made = generative_replay(condition="prefix", kept=8)
    assert str(made.keeps) == "128 examples (inputs only)"
    assert str(generative_replay(condition="demos", kept=2, max_stages=4).keeps) == "8 examples"
    assert str(generative_replay().keeps) == "nothing" == str(generative_replay(gamma=0.0, condition="demos").keeps)
    assert not generative_replay().packs and generative_replay(strength=0.0, oracle=True).packs


def test_a_relabelled_answer_is_the_greedy_one_of_the_model_before(relabelled):
    items = pseudo.unpack(relabelled.loop.now.owns["generative_replay"]["host"]["pseudo"]["0"])
    params, spec = parameters(relabelled.out, "stages/000/done"), relabelled.loop.now.world.spec
    apply = jax.jit(decoder(spec).apply, static_argnums=0)
    for item in items[:6]:
        assert list(item.answer) == greedy(apply, spec, params, list(item.prompt), TARGETS, SPEC.vocab)


def test_the_rows_are_in_the_journal_and_can_be_read(relabelled):
    arrays = saved(relabelled.out, "stages/001/done")
    host = journal.nest(arrays, "own/generative_replay/host")["pseudo"]

    class Letters:
        def decode(self, ids):
            return " ".join(map(str, ids))

    read = pseudo.texts(host, Letters())
    items = pseudo.unpack(relabelled.loop.now.owns["generative_replay"]["host"]["pseudo"]["0"])
    assert read[3] == {
        "stage": 0, "prompt": " ".join(map(str, items[3].prompt)), "answer": " ".join(map(str, items[3].answer)),
    }  # fmt: skip
    assert len(read) == len(items) == 16


def test_a_seed_writes_the_same_rows_and_another_seed_others(tmp_path):
    method = lambda: generative_replay(count=64, temperature=2.0, eos=EOS)  # noqa: E731
    runs = [learned(method(), tmp_path / str(i), epochs=8, seed=s) for i, s in enumerate((1, 1, 2))]
    hosts = [r.loop.now.owns["generative_replay"]["host"] for r in runs]
    rows = [pseudo.unpack(h["pseudo"]["0"]) for h in hosts]
    assert rows[0] and rows[0] == rows[1] != rows[2] and hosts[0]["counts"] == hosts[1]["counts"]
    assert same(runs[0].params, runs[1].params)


def test_an_oracle_is_replay_bit_for_bit(tmp_path):
    """Stored rows, the same number, the same order, three stages; and nothing of a vocabulary or another loss."""
    runs = [
        run([m], tmp_path / m.name, tx=DECAY)
        for m in (generative_replay(count=4, oracle=True, strength=0.0, capacity=20), replay(count=4, capacity=20))
    ]
    assert same(runs[0].params, runs[1].params) and np.array_equal(runs[0].losses(), runs[1].losses())
    assert len(runs[0].log) == 2 + 3 + 3


def test_soft_targets_come_from_distillation_on_old_rows(tmp_path):
    """`lwf` on old rows alone: its term is there exactly in the steps that hold a written row."""
    method = generative_replay(count=3, eos=EOS)
    done = learned(method, tmp_path / "out", lwf(rows="old"), epochs=24)
    written = len(pseudo.unpack(done.loop.now.owns["generative_replay"]["host"]["pseudo"]["0"]))
    steps = [r["lwf/distillation"] for r in done.log if r["stage"] == 1]
    drawn = written * 24
    assert 0 < drawn < len(steps), "spread evenly, at most one a step; teacher and student are one in the first"
    assert sum(x > 0 for x in steps) in (drawn - 1, drawn)
    assert all(r["lwf/distillation"] == 0 for r in done.log if r["stage"] == 0)


def test_demonstrations_stand_before_the_start_token_and_the_streams_behind_the_first(tmp_path, monkeypatch):
    from jaxcl.methods import writing

    asked = []

    def write(world, prompts, *_):
        asked.extend(prompts)
        return [([], True)] * len(prompts)

    monkeypatch.setattr(writing, "write", write)
    method = generative_replay(count=5, condition="demos", kept=3, shots=2, eos=EOS)
    between = Between(experiment([method, replay(count=2)], stages=echoes(2)), lambda: None)
    between.begin(0)
    between.end()
    between.begin(1)
    mark, start = np.asarray(between.owns["generative_replay"]["fixed"]["tokens"]).tolist()
    real = [[*p, mark, *a] for p, a in (Echo(0).pair(i) for i in range(32))]
    assert len(asked) == 5
    for ids in asked:
        assert ids[0] == ids[-1] == start and ids.count(start) == 3
        second = ids.index(start, 1)
        assert ids[1:second] in real and ids[second + 1 : -1] in real
    (phase,) = between.plan(0)
    assert [(s.stage, len(s.rows)) for s in phase.streams] == [(1, 32), (0, 0), (0, 32)]


class Opened(Echo):
    """Prompts that begin with what ends answers, as where one token marks both ends of a text."""

    def pair(self, i: int) -> tuple[list[int], list[int]]:
        prompt, answer = super().pair(i)
        return [EOS, *prompt], answer


@pytest.mark.parametrize("condition,opened", [("gen", [EOS]), ("demos", [EOS]), ("prefix", [])])
def test_an_end_mark_that_begins_every_prompt_is_given_and_not_written(condition, opened, monkeypatch):
    from jaxcl.methods import writing

    asked = []

    def write(world, prompts, width, rows, how, *_):
        asked.extend(prompts)
        assert max(map(len, prompts)) <= width and how.most == 12 + 1 - len(opened)
        return [([3, 3, how.say, 24], True)] * len(prompts)

    monkeypatch.setattr(writing, "write", write)
    method = generative_replay(count=5, condition=condition, prefix=2, kept=3)
    stages = [Stage(f"s{s}", Opened(s)) for s in range(2)]
    between = Between(experiment([method], stages=stages), lambda: None)
    between.begin(0)
    between.end()
    between.begin(1)
    own = between.owns["generative_replay"]
    start = int(own["fixed"]["tokens"][1])
    assert all(ids[-1 - len(opened) :] == [start, *opened] for ids in asked) or condition == "prefix"
    items = pseudo.unpack(own["host"]["pseudo"]["0"])
    assert len(items) == 5 and all(i.prompt[0] == EOS and i.prompt.count(EOS) == 1 for i in items)


def test_prompts_that_hold_the_end_mark_inside_are_refused():
    from jaxcl.methods.writing import opening

    inside, bare = Item((1, EOS, 2), (3, EOS)), Item((1, 2), (3, EOS))
    with pytest.raises(RequestError, match=f"all prompts hold {EOS}, which ends answers"):
        opening([inside, inside], EOS)
    assert opening([inside, bare], EOS) == [] == opening([bare, Item((EOS, 2), (3, EOS))], EOS)


def test_rows_without_answers_no_common_end_and_no_room_are_refused(tmp_path):
    with pytest.raises(RequestError, match="answers end with different ids"):
        run([generative_replay(gamma=0.5)], tmp_path / "ends", n=2)
    with pytest.raises(RequestError, match="a window of 12 tokens needs a context of 14"):
        run([generative_replay()], tmp_path / "room", spec=dataclasses.replace(SPEC, context=13))
    assert not (tmp_path / "room").exists()


@pytest.mark.parametrize(
    "arguments,words",
    [
        ({"gamma": 0.1, "count": 3}, "not both"),
        ({"gamma": -0.1}, "gamma is -0.1"),
        ({"count": -1}, "count -1"),
        ({"condition": "tasks"}, "did you mean 'task'"),
        ({"labeller": "relable"}, "did you mean 'relabel'"),
        ({"special": 0.0}, "special 0.0"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"kept": 0}, "kept is 0"),
        ({"oversample": 0.5}, "oversample 0.5"),
    ],
)
def test_bad_arguments(arguments, words):
    with pytest.raises(RequestError, match=words):
        generative_replay(**arguments)
