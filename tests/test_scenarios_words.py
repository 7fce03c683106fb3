"""Streams whose answers are written: translation and named entities, what their cards ask, on small folders and real data."""

import json
import os
from collections import Counter
from pathlib import Path

import pytest

from jaxcl.core.types import NOTHING, Budget
from jaxcl.data.ner import ner_rows, only, sliced, types_of
from jaxcl.data.translation import directed
from jaxcl.errors import RequestError
from jaxcl.models.tokenizer import ByteTokenizer
from jaxcl.scenarios import STREAMS, open_stream

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
    assert made.keeps == Budget(examples=2 * (taught - 1))
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


@needs_data
@pytest.mark.parametrize("name", [n for n, i in STREAMS.items() if i.scenario == "machine translation"])
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
