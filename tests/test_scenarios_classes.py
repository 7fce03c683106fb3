"""Streams of classes and of products: what their cards ask, on small folders and on the real data."""

import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from jaxcl.core.types import Budget
from jaxcl.data.relations import marked
from jaxcl.errors import RequestError
from jaxcl.evaluate.base import Eval
from jaxcl.evaluate.macro_f1 import counts, with_macro_f1
from jaxcl.metrics.pooling import POOLS
from jaxcl.models.tokenizer import ByteTokenizer
from jaxcl.scenarios import STREAMS, open_stream
from jaxcl.scenarios.classes import grouped, of_group, seen
from jaxcl.scenarios.intents import DOMAINS
from jaxcl.scenarios.reviews import PRODUCTS

BYTES = ByteTokenizer()
INTENTS = {domain: [f"{domain}_wish_{i}" for i in range(15)] for domain in DOMAINS}
RELATIONS = [[f"relation {g}{i}" for i in range(10)] for g in "abcdefgh"]


def write(path: Path, rows: list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def clinc(tmp_path_factory):
    root = tmp_path_factory.mktemp("clinc")
    for split, n in (("train", 3), ("test", 2)):
        rows = [
            {"task": d, "id": f"{split}-{name}-{i}", "instruction": "?", "input": f"{split} {name} {i}", "target": name}
            for d, names in INTENTS.items()
            for name in names
            for i in range(n)
        ]
        write(root / "intent" / "clinc150" / f"{split}.jsonl.gz".removesuffix(".gz"), rows)
        _zip(root / "intent" / "clinc150" / f"{split}.jsonl")
    (root / "intent" / "clinc150" / "domains.json").write_text(json.dumps(INTENTS))
    return root


def _zip(path: Path) -> None:
    import gzip

    path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))


@pytest.fixture(scope="module")
def fewrel(tmp_path_factory):
    root = tmp_path_factory.mktemp("fewrel")
    folder = root / "relation_extraction" / "fewrel"
    shots = {"train_union": (4, 4), "train_fewshot5": (6, 2), "train_fewshot10": (6, 3), "test": (2, 2)}
    for split, (base, rest) in shots.items():
        rows = [
            _relation(f"{split}-{name}-{i}", name, [split, "a", "of", name.replace(" ", ""), "b", str(i)])
            for g, names in enumerate(RELATIONS)
            for name in names
            for i in range(rest if g else base)
        ]
        write(folder / f"{split}.jsonl", rows)
        _zip(folder / f"{split}.jsonl")
    names = [{"name": name} for names in RELATIONS for name in names]
    (folder / "relations.json").write_text(json.dumps({"relations": names, "task_clusters": RELATIONS}))
    return root


def _relation(name: str, relation: str, tokens: list[str]) -> dict:
    ends = {"head": {"text": "b", "span": [4, 5]}, "tail": {"text": "a", "span": [1, 2]}}
    return {"task": "fewrel", "id": name, "relation": relation, "relation_id": 1, "tokens": tokens, **ends}


@pytest.fixture
def ranked(monkeypatch):
    """What the evals were made of: {id: (rows, labels_at, stage)}."""
    import jaxcl.evaluate.ranking as ranking

    real, found = ranking.label_ranking, {}

    def spy(eval_id, rows, tokenizer, **how):
        found[eval_id] = (rows, how["labels_at"], how["stage"])
        return real(eval_id, rows, tokenizer, **how)

    monkeypatch.setattr(ranking, "label_ranking", spy)
    return found


def test_groups_are_a_bijection_of_a_seed():
    names, classes = ["a", "b", "c"], [f"c{i}" for i in range(12)]
    one, same, other = (grouped(names, classes, seed) for seed in (0, 0, 1))
    assert one == same != other
    assert all(len(g) == 4 for g in one.values()) and sorted(sum(one.values(), ())) == sorted(classes)
    assert [seen(one, t) for t in range(3)] == [list(sum(list(one.values())[: t + 1], ())) for t in range(3)]
    with pytest.raises(RequestError, match="13 classes cannot be cut into 3 groups"):
        grouped(names, [*classes, "c12"], 0)


def test_rows_of_no_group_or_of_two_are_refused():
    rows = [{"id": "1", "target": "x"}]
    with pytest.raises(RequestError, match="row '1' has the class 'x', which no stage has"):
        of_group(rows, {"a": ("y",)})
    with pytest.raises(RequestError, match="class 'x' is in the stages 'a' and 'b'"):
        of_group(rows, {"a": ("x",), "b": ("x",)})
    with pytest.raises(RequestError, match="stage 'b' has no rows of its classes: y"):
        of_group(rows, {"a": ("x",), "b": ("y",)})


def classes_of(made) -> list[set]:
    return [{stage.train.record(i)["target"] for i in range(len(stage.train))} for stage in made.stages]


@pytest.mark.parametrize("name, stages, size", [("clinc150", 15, 10), ("clinc150_domains", 10, 15)])
def test_intents_come_once_and_are_compared_with_all_that_came(clinc, ranked, name, stages, size):
    made = open_stream(f"intent/{name}", BYTES, data_dir=clinc, window=128, seed=2)
    own = classes_of(made)
    assert [len(c) for c in own] == [size] * stages
    assert set().union(*own) == {i.replace("_", " ") for names in INTENTS.values() for i in names}
    tested = [row["id"] for rows, _, _ in ranked.values() for row in rows]
    assert len(tested) == len(set(tested)) == 300
    for number, (stage, (rows, labels_at, at)) in enumerate(zip(made.stages, ranked.values(), strict=True)):
        assert stage.evals == (stage.name,) and at == number and {r["target"] for r in rows} == own[number]
        assert set(labels_at(number)) == set().union(*own[: number + 1])
        assert len(labels_at(number)) == size * (number + 1)
    labels = Counter(made.stages[0].train.label(i) for i in range(len(made.stages[0].train)))
    assert labels == dict.fromkeys(own[0], 3)
    shown = BYTES.decode(made.stages[0].train[0]["tokens"].tolist())
    assert "Option" not in shown and sum(intent in shown for intent in set().union(*own)) == 1
    assert made.keeps == Budget(examples=20 * 150)
    few = open_stream(f"intent/{name}", BYTES, data_dir=clinc, window=128, options={"per_class": 1})
    assert few.keeps == Budget(examples=150)


def test_the_class_order_is_the_seeds_and_orders_move_whole_stages(clinc):
    def read(**how):
        return open_stream("intent/clinc150", BYTES, data_dir=clinc, window=128, test_rows=2, **how)

    first, same, other = read(seed=0), read(seed=0), read(seed=1)
    assert classes_of(first) == classes_of(same) != classes_of(other)
    assert first.notes == same.notes
    random, alike = read(seed=0, order="random"), read(seed=0, order="similarity")
    for made in (random, alike):
        moved = dict(zip([s.name for s in made.stages], classes_of(made)))
        assert moved == dict(zip([s.name for s in first.stages], classes_of(first)))
    assert [s.name for s in random.stages] != [s.name for s in first.stages]
    assert list(random.notes["classes"]) == [s.name for s in random.stages]
    few, once_more = (read(seed=0, rows=4).stages for _ in range(2))
    assert all(len(stage.train) == 4 for stage in few)
    assert [few[0].train.id(i) for i in range(4)] == [once_more[0].train.id(i) for i in range(4)]


def test_what_intents_refuse(clinc, tmp_path):
    for options, message in (
        ({"per_class": -1}, "option per_class is -1; accepted: a whole number"),
        ({"shots": 5}, "unknown option 'shots' in stream 'intent/clinc150'"),
    ):
        with pytest.raises(RequestError, match=message):
            open_stream("intent/clinc150", BYTES, data_dir=clinc, options=options)
    with pytest.raises(RequestError, match=r"no \S+/intent/clinc150; .* it is hf:clinc/clinc_oos, tfds:"):
        open_stream("intent/clinc150", BYTES, data_dir=tmp_path)
    folder = tmp_path / "intent" / "clinc150"
    folder.mkdir(parents=True)
    with pytest.raises(RequestError, match=r"no data file .*domains\.json, which names the intents"):
        open_stream("intent/clinc150", BYTES, data_dir=tmp_path)
    (folder / "domains.json").write_text(json.dumps({"banking": 3}))
    with pytest.raises(RequestError, match=r"domains.json: expected \{domain: \[intents\]\} for banking"):
        open_stream("intent/clinc150", BYTES, data_dir=tmp_path)
    (folder / "domains.json").write_text(json.dumps(INTENTS))
    write(folder / "test.jsonl", [{"task": "a", "id": "1", "instruction": "?", "input": 3, "target": "x"}])
    _zip(folder / "test.jsonl")
    with pytest.raises(RequestError, match=r"test\.jsonl\.gz:1: field 'input' must be a string"):
        open_stream("intent/clinc150", BYTES, data_dir=tmp_path)


def test_head_and_tail_are_marked_where_they_stand():
    row = _relation("r", "x", ["t", "a", "of", "x", "b", "."])
    assert marked(row) == "t [tail] a [/tail] of x [head] b [/head] ."
    whole = {"id": "r", "tokens": ["p", "q"], "head": {"span": [0, 1]}, "tail": {"span": [1, 2]}}
    assert marked(whole) == "[head] p [/head] [tail] q [/tail]"
    with pytest.raises(RequestError, match=r"row 'r': head \[0, 2\] and tail \[1, 2\] overlap"):
        marked(whole | {"head": {"span": [0, 2]}})


@pytest.mark.parametrize("name, stages, size", [("fewrel", 8, 10), ("fewrel_10x8", 10, 8), ("fewrel_fewshot", 8, 10)])
def test_relations_come_once_and_are_compared_with_all_that_came(fewrel, ranked, name, stages, size):
    made = open_stream(f"relations/{name}", BYTES, data_dir=fewrel, window=160, order="random", seed=4)
    own = classes_of(made)
    assert [len(c) for c in own] == [size] * stages and len(set().union(*own)) == 80
    for number, (rows, labels_at, at) in enumerate(ranked.values()):
        assert at == number and {r["target"] for r in rows} == own[number] and len(rows) == 2 * size
        assert set(labels_at(number)) == set().union(*own[: number + 1])
    assert made.keeps == Budget(examples=800) and not Budget(examples=801).within(made.keeps)
    if name == "fewrel":
        assert own[0] in [set(cluster) for cluster in RELATIONS]


@pytest.mark.parametrize("shots, rest", [(5, 2), (10, 3)])
def test_few_shots_follow_a_first_stage_with_more(fewrel, shots, rest):
    how = {"options": {"shots": shots}, "order": "random", "seed": 1}
    made = open_stream("relations/fewrel_fewshot", BYTES, data_dir=fewrel, window=160, **how)
    names = [stage.name for stage in made.stages]
    assert names[0] == "cluster_1" and names != sorted(names) and len(set(names)) == 8
    assert [len(stage.train) for stage in made.stages] == [60] + [10 * rest] * 7
    with pytest.raises(RequestError, match="option shots is 7; accepted: 5, 10"):
        open_stream("relations/fewrel_fewshot", BYTES, data_dir=fewrel, options={"shots": 7})


def test_clusters_that_are_not_the_relations_are_refused(tmp_path):
    folder = tmp_path / "relation_extraction" / "fewrel"
    folder.mkdir(parents=True)
    named = [{"name": name} for names in RELATIONS for name in names]
    for text, message in (
        ("{", "relations.json: expected relations with names"),
        (json.dumps({"relations": [{"name": "a"}], "task_clusters": [["b"]]}), "not eight groups of ten"),
        (json.dumps({"relations": named, "task_clusters": [*RELATIONS[:7], RELATIONS[0]]}), "not eight groups of ten"),
        (json.dumps({"relations": named[:70], "task_clusters": RELATIONS[:7]}), "not eight groups of ten"),
    ):
        (folder / "relations.json").write_text(text)
        with pytest.raises(RequestError, match=message):
            open_stream("relations/fewrel", BYTES, data_dir=tmp_path)


def test_macro_f1_is_of_the_same_pass_and_weighs_classes_alike():
    rows = [{"id": str(i), "target": t, "labels": ["good", "bad"]} for i, t in enumerate(["good"] * 4 + ["bad"])]
    passes = []

    def run(view, progress):
        passes.append(view)
        return [{"id": r["id"], "prediction": "good", "score": float(r["target"] == "good")} for r in rows]

    both = with_macro_f1(Eval("ipod", "accuracy", 5, run), rows)
    view = type("View", (), {"stamp": 0, "task": None})()
    plain, macro = (one.run(view, lambda *_: None) for one in both)
    assert len(passes) == 1 and [e.id for e in both] == ["ipod", "ipod/f1_macro"]
    assert np.mean([item["score"] for item in plain]) == 0.8
    good = 2 * 0.8 / 1.8  # precision 4/5, recall 1
    total = np.sum([item["parts"] for item in macro], axis=0)
    assert total.tolist() == [0, 0, 1, 4, 1, 0] and both[1].pool == "f1_macro"
    np.testing.assert_allclose(POOLS["f1_macro"](total), (good + 0) / 2)
    assert counts("a", "b", ["a", "b"]) == [0, 1, 0, 0, 0, 1]


def test_products_share_their_labels(tmp_path):
    for product in PRODUCTS:
        for split, n in (("train", 4), ("test", 3)):
            rows = [
                {"task": product, "id": f"{product}-{split}-{i}", "instruction": "Good?\n", "labels": ["good", "bad"],
                 "input": f"{product} {split} {i}", "target": ["good", "bad"][i % 2]}
                for i in range(n)
            ]  # fmt: skip
            write(tmp_path / "product_reviews" / product / f"{split}.jsonl", rows)
    made = open_stream("reviews/products", BYTES, data_dir=tmp_path, window=128, rows=3, order="similarity")
    assert sorted(s.name for s in made.stages) == sorted(PRODUCTS)
    assert all(s.evals == (s.name, f"{s.name}/f1_macro") and len(s.train) == 3 for s in made.stages)
    assert [e.metric for e in made.evals] == ["accuracy", "f1_macro"] * 11
    assert made.keeps == Budget(examples=40) and all(c == {"good", "bad"} for c in classes_of(made))
    copied = tmp_path / "product_reviews" / "ipod" / "train.jsonl"
    rows = [json.loads(line) for line in copied.read_text().splitlines()]
    write(copied, [*rows, rows[0] | {"id": "leak", "input": "Canon_G3, TEST 1."}])
    with pytest.raises(RequestError, match="leak 'test-in-train': 1 found: 'Canon_G3-test-1' of 'Canon_G3' is 'leak'"):
        open_stream("reviews/products", BYTES, data_dir=tmp_path, window=128)
    kept = open_stream("reviews/products", BYTES, data_dir=tmp_path, window=128, allow=("test-in-train",))
    assert kept.notes["leaks allowed"]["test-in-train"]["count"] == 1


DATA = os.environ.get("JAXCL_DATA", "")
SAME = ("olora/order_2", "olora/order_3", "olora/order_5")  # as others, in another order
MINE = [n for n, i in STREAMS.items() if i.scenario in ("text classification", "relation extraction") and n not in SAME]


@pytest.mark.skipif(not DATA, reason="JAXCL_DATA names no data directory")
@pytest.mark.parametrize("name", MINE)
def test_the_real_streams_open(name):
    made = open_stream(name, BYTES, data_dir=DATA, window=1024, rows=2, test_rows=2)
    assert tuple(stage.name for stage in made.stages) == STREAMS[name].stages
    assert {len(stage.train[0]["targets_at"]) for stage in made.stages} == {made.stages[0].train[0]["targets_at"].size}
    assert all(one.n == 2 for one in made.evals)
    assert [i for stage in made.stages for i in stage.evals] == [one.id for one in made.evals]


@pytest.mark.skipif(not DATA, reason="JAXCL_DATA names no data directory")
def test_the_real_relations_have_the_published_sizes():
    made = open_stream("relations/fewrel_fewshot", BYTES, data_dir=DATA, window=1024, test_rows=2)
    assert sum(len(stage.train) for stage in made.stages) == 1334 and len(made.stages[0].train) > 950
    assert all(46 <= len(stage.train) <= 50 for stage in made.stages[1:])
