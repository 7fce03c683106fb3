"""Streams whose answers are written: translation and named entities, on small folders and on the real data."""

import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from jaxcl.core.types import NOTHING, Budget
from jaxcl.data.ner import ner_rows, only, sliced, types_of
from jaxcl.data.translation import directed
from jaxcl.errors import RequestError
from jaxcl.evaluate.answers import Answer, How
from jaxcl.models.tokenizer import ByteTokenizer
from jaxcl.scenarios import STREAMS, open_stream
from jaxcl.scenarios.ner import DOMAINS, TYPES

BYTES = ByteTokenizer()
DATA = os.environ.get("JAXCL_DATA", "")
needs_data = pytest.mark.skipif(not DATA, reason="JAXCL_DATA names no data directory")


def write(path: Path, rows: list) -> None:
    import gzip

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))


def sentences(split: str, n: int) -> list[dict]:
    return [{"id": f"{split}-{i}"} | {lang: f"{lang} {split} {i}" for lang in ("en", "de", "fr")} for i in range(n)]


@pytest.fixture
def captions(tmp_path):
    for split, n in (("train", 20), ("test", 4)):
        write(tmp_path / "translation" / "multi30k" / f"{split}.jsonl.gz", sentences(split, n))
    return tmp_path


def test_a_direction_asks_one_side_for_the_other():
    row = directed(sentences("train", 1), "de-fr")[0]
    assert (row["input"], row["target"], row["id"]) == ("de train 0", "fr train 0", "train-0")
    assert row["instruction"] == "Translate from German to French.\n"
    for wrong in ("en-en", "en", "en-xx"):
        with pytest.raises(RequestError, match=f"direction '{wrong}'; accepted: two of en, de, fr"):
            directed([], wrong)


@pytest.mark.parametrize("name, taught", [("multi30k", 2), ("multi30k_6", 6)])
def test_every_direction_is_measured_seen_or_not(captions, name, taught):
    made = open_stream(f"translation/{name}", BYTES, data_dir=captions, window=128)
    roles = {e.id: e.role for e in made.evals}
    assert len(roles) == 12 and list(roles.values()) == ["task"] * 2 * taught + ["probe"] * 2 * (6 - taught)
    assert [s.evals for s in made.stages] == [(f"{s.name}/bleu", f"{s.name}/chrf") for s in made.stages]
    assert {(e.metric, e.pool) for e in made.evals} == {("bleu", "bleu"), ("chrf", "chrf")}
    assert made.keeps == Budget(examples=2 * taught)
    assert {s.train[0]["targets_at"].shape for s in made.stages} == {made.stages[0].train[0]["targets_at"].shape}
    again = open_stream(f"translation/{name}", BYTES, data_dir=captions, window=128, rows=5, options={"keep": 0})
    assert again.keeps == NOTHING and [len(s.train) for s in again.stages] == [5] * taught
    assert len({tuple(s.train.id(i) for i in range(5)) for s in again.stages}) == 1
    seen = open_stream(f"translation/{name}", BYTES, data_dir=captions, window=128, options={"zero_shot": False})
    assert len(seen.evals) == 2 * taught


def test_what_translation_refuses(captions):
    with pytest.raises(RequestError, match="option zero_shot is 'no'; accepted: True, False"):
        open_stream("translation/multi30k", BYTES, data_dir=captions, options={"zero_shot": "no"})
    path = captions / "translation" / "multi30k" / "train.jsonl.gz"
    write(path, [*sentences("train", 3), {"id": "leak", "en": "x", "de": "De test 3!", "fr": "y"}])
    with pytest.raises(RequestError, match="leak 'test-in-train': 1 found: 'test-3' of 'test' is 'leak' of 'train'"):
        open_stream("translation/multi30k", BYTES, data_dir=captions)
    write(path, [{"id": "a", "en": "x", "de": "y"}])
    with pytest.raises(RequestError, match=r"train\.jsonl\.gz:1: field 'fr' is missing"):
        open_stream("translation/multi30k", BYTES, data_dir=captions)


def tagged(name: str, *types: str) -> dict:
    """A sentence with one entity of two words for each type."""
    tokens = [word for t in types for word in ("the", f"{t}1", f"{t}2")] + ["."]
    tags = [tag for t in types for tag in ("O", f"B-{t}", f"I-{t}")] + ["O"]
    return {"task": "d", "id": name, "tokens": [f"{name}{i}{t}" for i, t in enumerate(tokens)], "tags": tags}


def test_other_types_are_no_entities():
    row = tagged("a", "person", "city")
    assert only(row, ["city"])["tags"] == ["O"] * 4 + ["B-city", "I-city", "O"]
    assert only(row, [])["tags"] == ["O"] * 7 and only(row, ["city", "person"]) == row
    assert types_of([row]) == ["city", "person"]


def test_slices_are_disjoint_whole_and_even():
    kinds = [("a",), ("b",), ("a", "b"), ("b", "c"), ("a", "b", "c"), ()]
    rows = [tagged(f"r{i}", *kinds[i % 6]) for i in range(60)]
    groups = {"first": ["a"], "second": ["b"], "third": ["c"]}
    found = sliced(rows, groups, seed=0)
    assert found == sliced(rows, groups, seed=0) != sliced(rows, groups, seed=1)
    ids = Counter(row["id"] for part in found.values() for row in part)
    assert set(ids) == {row["id"] for row in rows} and set(ids.values()) == {1}
    for stage, part in found.items():
        assert all(set(types_of([row])) & set(groups[stage]) or not types_of([row]) for row in part)
        assert part == [row for row in rows if row in part]
    assert max(map(len, found.values())) - min(map(len, found.values())) <= 1


class Said:
    """Stands for `written`: a model that says the same whatever it is asked, and counts how often."""

    how, times = How(8), 0

    def __init__(self, *texts: str):
        self.texts = texts

    def __call__(self, view, progress):
        self.times += 1
        return [Answer(text, []) for text in self.texts]


def test_each_group_and_all_that_were_seen_are_counted_from_one_pass(monkeypatch):
    from jaxcl.evaluate import span_groups
    from jaxcl.metrics.pooling import POOLS

    sentences = [("Ann is in Rome .", "B-person O O B-city O"), ("Bob likes Ann", "B-person O B-person")]
    rows = [{"id": t, "tokens": t.split(), "tags": tags.split()} for t, tags in sentences]
    said = Said("person: Ann; river: Rome", "person: Bob; city: Ann")
    monkeypatch.setattr(span_groups, "written", lambda *_, **__: said)
    groups = {"first": ["person"], "then": ["city", "river"]}
    evals = span_groups.span_f1_by_group(rows, BYTES, window=64, groups=groups)
    assert [(e.id, e.metric, e.role, e.pool) for e in evals] == [
        ("first", "span_f1_micro", "task", "f1_micro"),
        ("then", "span_f1_micro", "task", "f1_micro"),
        ("seen/f1_micro", "span_f1_micro", "probe", "f1_micro"),
        ("seen/f1_macro", "span_f1_macro", "probe", "f1_macro"),
    ]

    def scores(stage: int) -> list:
        view = type("View", (), {"stamp": stage, "task": None, "clock": type("Clock", (), {"stage": stage})})()
        found = [np.sum([item["parts"] for item in e.run(view, lambda *_: None)], axis=0) for e in evals]
        return [(f.tolist(), float(POOLS[e.pool](f))) for e, f in zip(evals, found)]

    person, rest = [2.0, 0.0, 1.0], [0.0, 2.0, 1.0]  # right, wrong, missed
    first = scores(0)
    assert first[0] == (person, 0.8) and first[1] == (rest, 0.0) and first[2] == (person, 0.8)
    assert first[3] == ([*person, 0, 0, 0, 0, 0, 0], 0.8)
    second = scores(1)
    assert second[:2] == first[:2] and second[2][0] == [2, 2, 2] and second[2][1] == pytest.approx(0.5)
    assert second[3][0] == [*person, 0, 1, 1, 0, 1, 0] and second[3][1] == pytest.approx(0.8 / 3)
    assert said.times == 2


@pytest.fixture
def entities(tmp_path):
    """Domains of sentences with known types; the real ones' names."""
    for domain in DOMAINS:
        kinds = [t for stage in dict(TYPES.values()).get(domain, ("city", "person")) for t in stage.split("-")]
        for split, n in (("train", 24), ("test", 6)):
            chosen = [[t for j, t in enumerate(kinds) if (i >> j % 4) & 1] for i in range(n)]
            write(tmp_path / "ner" / domain / f"{split}.jsonl.gz",
                  [tagged(f"{domain}{split}{i}x", *types) for i, types in enumerate(chosen)])  # fmt: skip
    return tmp_path


@pytest.mark.parametrize("name", TYPES)
def test_no_old_or_future_entity_reaches_a_stage(entities, name):
    domain, stages = TYPES[name]
    every = {t for stage in stages for t in stage.split("-")}
    made = open_stream(name, BYTES, data_dir=entities, window=1024, order="random", seed=3)
    assert sorted(s.name for s in made.stages) == sorted(stages)
    ids = []
    for stage in made.stages:
        own, prompts = set(stage.name.split("-")), set()
        for i in range(len(stage.train)):
            record, row = stage.train.record(i), stage.train[i]
            ids.append(record["id"])
            answer = BYTES.decode(row["tokens"][row["targets_at"][row["weight"] > 0]].tolist())
            assert answer.startswith(" " + record["target"])
            said = set() if record["target"] == "none" else {e.split(":")[0] for e in record["target"].split("; ")}
            assert said == set(types_of([record])) <= own
            prompts.add(record["instruction"])
        assert prompts == {"List the named entities with their types.\n"}
        assert any(stage.train.record(i)["target"] != "none" for i in range(len(stage.train)))
    assert sorted(ids) == sorted(f"{domain}train{i}x" for i in range(24))
    assert {e.id: e.role for e in made.evals} == {s.name: "task" for s in made.stages} | {
        "seen/f1_micro": "probe", "seen/f1_macro": "probe"}  # fmt: skip
    assert all(e.n == 6 for e in made.evals) and made.keeps == Budget(examples=10 * len(every))


def test_domains_keep_all_their_types_and_say_them(entities):
    how = {"window": 1024, "rows": 5, "test_rows": 3}
    made = open_stream("ner/domains", BYTES, data_dir=entities, options={"per_class": 1}, **how)
    assert tuple(s.name for s in made.stages) == tuple(DOMAINS)
    assert all(s.evals == (f"{s.name}/f1_micro", f"{s.name}/f1_macro") and len(s.train) == 5 for s in made.stages)
    record = made.stages[2].train.record(4)
    assert record["instruction"] == "List the named entities of the types city, person.\n"
    assert made.keeps == Budget(examples=4 + 9 + 5 * 2) and all(e.n == 3 for e in made.evals)
    alike = open_stream("ner/domains", BYTES, data_dir=entities, order="similarity", **how)
    assert sorted(s.name for s in alike.stages) == sorted(DOMAINS) and alike.stages[0].name == DOMAINS[0]


def test_answers_that_do_not_fit_are_left_out_and_counted(entities, captions):
    path = entities / "ner" / "politics" / "train.jsonl.gz"
    kinds = [t for stage in TYPES["ner/types_politics"][1] for t in stage.split("-")]
    long = tagged("z" * 60, *kinds)
    write(path, [*[tagged(f"p{i}", kinds[i % 9]) for i in range(18)], long])
    made = open_stream("ner/domains", BYTES, data_dir=entities, window=512)
    assert made.notes["left out: answers longer than the window"] == {"politics": 1} and len(made.stages[1].train) == 18
    texts = captions / "translation" / "multi30k" / "train.jsonl.gz"
    write(texts, [*sentences("train", 3), {"id": "long", "en": "e", "de": "d", "fr": "f" * 200}])
    made = open_stream("translation/multi30k", BYTES, data_dir=captions, window=128)
    assert made.notes["left out: answers longer than the window"] == {"en-fr": 1}
    assert [len(stage.train) for stage in made.stages] == [4, 3]


def test_malformed_sentences_are_refused_by_file_and_line(entities):
    good, bad = tagged("a", "city"), tagged("b", "city")
    write(entities / "ner" / "politics" / "train.jsonl.gz", [good, bad | {"tags": bad["tags"][1:]}])
    with pytest.raises(RequestError, match=r"politics/train\.jsonl\.gz:2: field 'tags' has 3 entries for 4 tokens"):
        open_stream("ner/types_politics", BYTES, data_dir=entities)


WRITTEN = ("machine translation", "named entity recognition")


@needs_data
@pytest.mark.parametrize("name", [n for n, i in STREAMS.items() if i.scenario in WRITTEN])
def test_the_real_streams_open(name):
    made = open_stream(name, BYTES, data_dir=DATA, window=768, rows=2, test_rows=2)
    assert tuple(stage.name for stage in made.stages) == STREAMS[name].stages
    assert all(one.n == 2 for one in made.evals)


@needs_data
def test_the_real_sentences_are_sliced_whole():
    rows = ner_rows("conll2003", "train", DATA)
    found = sliced(rows, {t: [t] for t in ("person", "location", "organisation", "misc")}, seed=0)
    assert sum(map(len, found.values())) == len(rows) == 3000
    for name, part in found.items():
        assert len(part) == 750 and any(name in types_of([row]) for row in part)
