"""Edits, refinement and preferences as streams: what a stage is, what is asked, what may be kept, what is refused."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxcl.core.types import Budget, Clock
from jaxcl.core.view import View
from jaxcl.data.preference import chosen_source, chosen_that_fit
from jaxcl.errors import RequestError
from jaxcl.metrics.cmr import refinement
from jaxcl.models.decoder import decoder
from jaxcl.models.spec import tiny
from jaxcl.models.tokenizer import ByteTokenizer
from jaxcl.scenarios import open_stream
from jaxcl.scenarios.refinement import _measured
from jaxcl.scenarios.refinement_log import refined

WORDS = ByteTokenizer()
NO_COUNT = lambda done, total: None  # noqa: E731


def write(folder: Path, file: str, rows: list[dict[str, Any]]) -> None:
    path = folder / file
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)


def edit(n: int, **more: Any) -> dict[str, Any]:
    base = {"id": f"e{n}", "subject": "s", "prompt": f"Fact {n} is", "target": f"new {n}", "target_true": f"old {n}"}
    near = {"locality_prompt": f"Other {n} is", "locality_target": f"true {n}", "rephrases": [f"Say fact {n}:"]}
    return base | near | more


@pytest.fixture(scope="module")
def edits(tmp_path_factory) -> Path:
    """Seven edits; a rephrasing and a locality prompt are other edits' prompts, one edit is long."""
    folder = tmp_path_factory.mktemp("edits")
    rows = [edit(n) for n in range(5)]
    rows += [edit(5, rephrases=["fact 0 is", "Fact 5!"], locality_prompt="FACT 1 IS"), edit(6, target="x" * 200)]
    upstream = [edit(n, prompt=f"Known {n} is") for n in range(9)] + [edit(99, prompt="Fact 3 is")]
    for name, split in (("zsre", "train"), ("counterfact", "dev")):
        write(folder, f"editing/{name}/edit.jsonl.gz", rows)
        write(folder, f"editing/{name}/{split}.jsonl.gz", upstream)
    for name in ("hallucination", "temporal_ood"):
        write(folder, f"editing/{name}/edit.jsonl.gz", rows)
    return folder


def test_edits_are_one_stage_asked_in_both_readings(edits):
    stream = open_stream("edits/zsre", WORDS, data_dir=edits, window=64)
    [stage] = stream.stages
    assert [stage.train.id(i) for i in range(len(stage.train))] == [f"e{n}" for n in range(6)]
    assert stage.evals == ("reliability_token",)
    sizes = {e.id: (e.n, e.role) for e in stream.evals}
    assert sizes == {
        "reliability_token": (6, "task"), "reliability_exact": (6, "probe"),
        "generality_token": (6, "probe"), "generality_exact": (6, "probe"),
        "upstream_nll": (9, "general"), "upstream_token": (9, "general"),
    }  # fmt: skip
    assert stream.keeps == Budget(examples=6)
    assert stream.notes == {
        "left out: questions that are trained on": {"rephrase": 1, "locality": 1}, "left out: longer than the window": 1
    }  # fmt: skip


def test_locality_is_asked_against_the_model_as_it_was_given(edits):
    stream = open_stream("edits/zsre", WORDS, data_dir=edits, window=64)
    model = decoder(tiny(layers=1, width=16))
    params = model.init(model.spec, jax.random.key(0))
    exp = stream.experiment(model=model, params=params, methods=[], tx=None)
    by_id = {e.id: e for e in exp.evals}
    assert (by_id["locality_token"].n, by_id["locality_exact"].role) == (5, "general")
    view = View(model).at(model.spec, params, {}, {}, Clock.at())
    assert [i["score"] for i in by_id["locality_token"].run(view, NO_COUNT)] == [1.0] * 5
    assert exp.keeps == stream.keeps and exp.source["stream"] == "edits/zsre"


def test_batches_of_edits_have_evals_of_their_own(edits):
    settings = {"data_dir": edits, "window": 64, "options": {"batch": 4, "readings": ["exact"]}}
    stream = open_stream("edits/zsre", WORDS, **settings)
    assert [(s.name, len(s.train), s.evals) for s in stream.stages] == [
        ("edits_1", 4, ("reliability_exact/edits_1",)), ("edits_2", 2, ("reliability_exact/edits_2",))
    ]  # fmt: skip
    assert [e.role for e in stream.evals if e.id.startswith("reliability")] == ["task", "task"]
    assert len({s.train[0]["targets_at"].shape for s in stream.stages}) == 1
    drawn = [[s.name for s in open_stream("edits/zsre", WORDS, order="random", seed=n, **settings).stages]
             for n in range(6)]  # fmt: skip
    assert {tuple(sorted(names)) for names in drawn} == {("edits_1", "edits_2")} and len(set(map(tuple, drawn))) == 2


def test_edits_and_questions_are_drawn_by_seed(edits):
    def ids(seed: int) -> tuple[str, ...]:
        train = open_stream("edits/zsre", WORDS, data_dir=edits, window=64, rows=3, seed=seed).stages[0].train
        return tuple(train.id(i) for i in range(len(train)))

    assert ids(0) == ids(0) and len({ids(n) for n in range(5)}) > 1 and all(len(ids(n)) == 3 for n in range(5))
    stream = open_stream("edits/zsre", WORDS, data_dir=edits, window=64, test_rows=2)
    assert {e.n for e in stream.evals} == {2}


def test_a_leak_of_edit_prompts_is_kept_where_it_is_allowed(edits):
    stream = open_stream("edits/zsre", WORDS, data_dir=edits, window=64, allow=("edit-prompts",))
    assert {e.id: e.n for e in stream.evals}["generality_token"] == 7
    leak = stream.notes["leaks"]["edit-prompts"]
    assert leak["count"] == 2 and leak["first"][0] == "'e5/0' of 'rephrase' is 'e0' of 'edits'"


def test_counterfact_compares_new_and_old_answers(edits):
    stream = open_stream("edits/counterfact", WORDS, data_dir=edits, window=64)
    sizes = {e.id: (e.n, e.role) for e in stream.evals if e.metric == "answer_preferred"}
    assert sizes == {"edit_success": (6, "probe"), "paraphrase_success": (6, "probe"),
                     "neighbourhood_success": (5, "general")}  # fmt: skip


def test_hallucination_is_measured_by_perplexity_and_temporal_edits_far_away(edits):
    made = {e.id: e for e in open_stream("edits/hallucination", WORDS, data_dir=edits, window=64).evals}
    assert made["reliability_ppl"].pool == "exp_ratio" and "reliability_token" not in made
    assert made["upstream_nll"].n == 5, "its locality texts"
    assert "generality_ood" in {e.id for e in open_stream("edits/temporal", WORDS, data_dir=edits, window=64).evals}


@pytest.mark.parametrize(
    ("kw", "says"),
    [
        ({"order": "random"}, "the edits are one stage; accepted: order=given, or batches"),
        ({"order": "similarity"}, "has no texts to order by similarity; accepted: given, random"),
        ({"options": {"batch": 0}}, "option batch is 0; accepted: a whole number of at least 1"),
        ({"options": {"readings": ["tokens"]}}, "unknown reading of an edit's score 'tokens'; did you mean 'token'"),
        ({"options": {"bach": 1}}, "unknown option 'bach' in stream 'edits/zsre'; did you mean 'batch'"),
        ({"window": 8}, "none of 7 edits fits into 8 tokens"),
    ],
)
def test_what_edits_cannot_do_is_refused(edits, kw, says):
    with pytest.raises(RequestError, match=says):
        open_stream("edits/zsre", WORDS, **{"data_dir": edits, "window": 64} | kw)


# refinement


def question(name: str, n: int, split: str) -> dict[str, Any]:
    row = {"task": name, "id": f"{split}-{n}", "instruction": "Is it so?\n", "input": f"{name} {split} {n}"}
    return row | {"target": "yes" if n % 2 else "no", "labels": ["yes", "no"]}


@pytest.fixture(scope="module")
def nli(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("nli")
    for name in ("MNLI", "RTE", "CB"):
        for split, n in (("train", 20), ("test", 9)):
            rows = [question(name, i, split) for i in range(n)]
            write(folder, f"olora_benchmark/{name}/{split}.jsonl.gz", rows)
    leak = {**question("RTE", 3, "test"), "id": "train-leak"}
    write(folder, "olora_benchmark/RTE/train.jsonl.gz", [*(question("RTE", i, "train") for i in range(20)), leak])
    return folder


QUERIES = {"steps": 5, "batch": 8, "eval_every": 2, "okr": 6}


def nli_stream(folder: Path, **kw: Any) -> Any:
    return open_stream("refinement/cmr_nli", WORDS, **{"data_dir": folder, "window": 96, "options": QUERIES} | kw)


def test_a_step_is_a_stage_and_its_queries_are_its_rows_and_its_eval(nli):
    stream = nli_stream(nli)
    assert [s.name for s in stream.stages] == [f"step_{t:03}" for t in range(1, 6)]
    for stage in stream.stages:
        assert len(stage.train) == 8 and stage.evals == (f"queries/{stage.name}",)
    first = Counter(stream.stages[0].train.id(i).split("/")[0] for i in range(8))
    assert first == {"MNLI": 8}, "the first step is all upstream"
    assert [(e.id, e.n, e.role) for e in stream.evals[:3]] == [
        ("ukr", 9, "general"), ("okr", 6, "probe"), ("kg", 18, "probe")
    ]  # fmt: skip
    assert stream.keeps == Budget(examples=4) and len(stream.notes["major"]) == 5
    assert stream.notes["mix"] == {"batch": 8, "alpha": 0.9, "beta": 0.5, "gamma": 0.8}


def test_held_out_rows_are_never_queried_and_the_stream_is_its_seeds(nli):
    def ids(**kw: Any) -> list[str]:
        return [s.train.id(i) for s in nli_stream(nli, **kw).stages for i in range(len(s.train))]

    assert ids() == ids() != ids(seed=1)
    wide = {"options": {**QUERIES, "steps": 60, "alpha": 0}}
    assert "RTE/train-leak" not in ids(**wide) and all("/train-" in i for i in ids(**wide))
    assert not any(i.startswith("MNLI") for i in ids(**wide)), "alpha 0: nothing of upstream"


def test_held_out_sets_are_measured_at_the_start_of_some_steps_of_the_last_and_after_it():
    assert [done for done in range(11) if _measured(done, 10, 4)] == [0, 4, 8, 9, 10]


@pytest.mark.parametrize(
    ("kw", "says"),
    [
        ({"order": "random"}, "draws its order by seed; accepted: order=given"),
        ({"options": {**QUERIES, "beta": 2}}, "beta=2; accepted: a number from 0 to 1"),
        ({"options": {**QUERIES, "steps": 0}}, "option steps is 0; accepted: a whole number of at least 1"),
        ({"options": {**QUERIES, "batch": 64}}, "step 1 draws 64 queries of 'upstream', which has 20"),
    ],
)
def test_what_a_query_stream_cannot_be_is_refused(nli, kw, says):
    with pytest.raises(RequestError, match=says):
        nli_stream(nli, **kw)


def test_the_numbers_of_a_run_are_read_off_its_files(tmp_path):
    """Card metrics/cmr-metrics, worked: b 4, errors 1, 2, 3, 2 of which 1, 1, 3, 2 fixed, UKR, OKR and KG as there."""
    errors, fixed = [1, 2, 3, 2], [1, 1, 3, 2]
    known = {"ukr": [0.9, 0.85, 0.8, 0.8], "okr": [None, 0.75, 0.7, 0.75], "kg": [0.3, 0.35, 0.4, 0.45]}
    steps = [f"step_{t}" for t in range(1, 5)]
    evals = [*known, *(f"queries/{s}" for s in steps)]
    sizes = {"ukr": 20, "kg": 20, "okr": 20}
    table: list[list[float | None]] = [[None] * len(evals) for _ in range(5)]

    def put(name: str, row: int, right: int, n: int) -> None:
        table[row][evals.index(name)] = right / n
        items = [{"id": str(i), "prediction": "", "score": float(i < right)} for i in range(n)]
        write(tmp_path, f"predictions/{name.replace('/', '__')}.row{row}.jsonl.gz", items)

    for name, values in known.items():
        for row, value in enumerate([*values, values[-1]]):
            if value is not None:
                put(name, row, round(value * 20), 20)
    for t, name in enumerate(steps):
        put(f"queries/{name}", t, 4 - errors[t], 4)
        put(f"queries/{name}", t + 1, 4 - errors[t] + fixed[t], 4)
    described = [{"id": i, "metric": "m", "higher_is_better": True, "range": [0, 1], "n": sizes.get(i, 4),
                  "role": "probe" if i in known else "task"} for i in evals]  # fmt: skip
    stages = [{"name": s, "evals": [f"queries/{s}"]} for s in steps]
    matrix = {"schema": 1, "stages": stages, "evals": described, "row0": table[0], "rows": table[1:]}
    (tmp_path / "matrix.json").write_text(json.dumps(matrix))
    found = refined(tmp_path)
    numbers = {name: value for name, (value, _) in refinement(found.steps, found.after).items()}
    assert [(s.queries, s.errors, s.fixed) for s in found.steps] == [(4, e, f) for e, f in zip(errors, fixed)]
    assert [s.okr for s in found.steps] == known["okr"]
    assert (numbers["efr_mean"], numbers["csr"]) == (0.875, 0.5)
    assert numbers["oec"] == pytest.approx(np.mean([0.8, 0.75, 0.5, 0.45]))


# preferences


def pair(i: str, chosen: str, prompt: str = "Human: hi\n\nAssistant:") -> dict[str, Any]:
    return {"id": i, "prompt": prompt, "chosen": chosen, "rejected": "no"}


def test_chosen_answers_are_whole_and_dialogues_keep_their_end():
    long = pair("a", "fine", "Human: " + "old " * 50 + "new\n\nAssistant:")
    example = chosen_source("harmless", [long, pair("b", "ok")], WORDS, window=40, targets=9)[0]
    text = WORDS.decode([int(t) for t in example["tokens"][: int(example["segments"].sum())]])
    assert "new\n\nAssistant: fine" in text and "Human" not in text
    target = example["tokens"][example["targets_at"][: int(example["weight"].sum())]].tolist()
    assert WORDS.decode(target[:-1]) == " fine" and target[-1] == WORDS.eos_id


def test_chosen_answers_leave_a_quarter_of_the_window():
    rows = [pair(str(n), "y" * n) for n in range(1, 60)]  # a space and an end mark are tokens too
    assert max(len(r["chosen"]) for r in chosen_that_fit(rows, WORDS, 40)) == 28
    with pytest.raises(RequestError, match="no chosen answer of 1 fits into 3/4 of 8 tokens"):
        chosen_that_fit(rows[20:21], WORDS, 8)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    for name, n in (("hh_harmless", 8), ("helpful_en", 4)):
        rows = [pair(f"{name}-{i}", "yes " * (1 + i), f"Human: {name} {i}\n\nAssistant:") for i in range(n)]
        write(folder, f"preference/{name}/train.jsonl.gz", rows)
        write(folder, f"preference/{name}/test.jsonl.gz", [pair("t", "fine", f"Human: {name} 3\n\nAssistant: "), *(
            pair(f"u{i}", "sure", f"Human: {name} test {i}\n\nAssistant:") for i in range(2))])  # fmt: skip
    return folder


def test_alignment_learns_chosen_answers_and_measures_both_objectives(pairs):
    stream = open_stream("alignment/harmless_helpful", WORDS, data_dir=pairs, window=96)
    assert [(s.name, len(s.train), s.evals) for s in stream.stages] == [
        ("harmless", 7, ("harmless/accuracy",)), ("helpful", 3, ("helpful/accuracy",))
    ], "the training pair whose prompt is a test prompt is left out"  # fmt: skip
    assert {e.id: (e.n, e.role) for e in stream.evals} == {
        f"{name}/{metric}": (3, role) for name in ("harmless", "helpful")
        for metric, role in (("accuracy", "task"), ("accuracy_per_token", "probe"))
    }  # fmt: skip
    assert stream.keeps == Budget(examples=1)
    turned = [tuple(s.name for s in open_stream("alignment/harmless_helpful", WORDS, data_dir=pairs, window=96,
                                                order="random", seed=n).stages) for n in range(6)]  # fmt: skip
    assert set(turned) == {("harmless", "helpful"), ("helpful", "harmless")}


def test_the_reward_is_against_the_model_as_it_was_given(pairs):
    """Before training the implicit reward is zero for every pair: nothing has changed."""
    stream = open_stream("alignment/harmless_helpful", WORDS, data_dir=pairs, window=96, test_rows=2)
    model = decoder(tiny(layers=1, width=16))
    params = model.init(model.spec, jax.random.key(0))
    made = {e.id: e for e in stream.against(model, params)}
    assert set(made) == {f"{n}/reward/reward_{k}" for n in ("harmless", "helpful") for k in ("accuracy", "margin")}
    view = View(model).at(model.spec, params, {}, {}, Clock.at())
    margins = [i["score"] for i in made["harmless/reward/reward_margin"].run(view, NO_COUNT)]
    assert margins == pytest.approx([0.0, 0.0], abs=1e-6)
