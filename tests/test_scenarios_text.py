"""Streams of text: what is read, held out, kept and refused, on small folders; and that all open on the real data."""

import gzip
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest

from jaxcl.core.types import ALL, NOTHING, Budget
from jaxcl.data.corpora import documents
from jaxcl.errors import RequestError
from jaxcl.evaluate.held_out import held_out
from jaxcl.models.tokenizer import ByteTokenizer
from jaxcl.scenarios import STREAMS, open_stream
from jaxcl.scenarios.base import Settings
from jaxcl.scenarios.pretraining import check_dates

BYTES = ByteTokenizer()
DOMAINS = STREAMS["text/domains"].stages
SPEECHES = {"1945-1959": "1950", "1960-1974": "1960", "1975-1989": "1989", "1990-2002": "2002"}


def write(path: Path, rows: list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def told(stage: str, split: str, n: int) -> list[dict]:
    """Documents whose words nobody shares."""
    found = [(f"{stage}-{split}-{i}", f"{stage} {split} {i} " + f"w{i}{stage}{split} " * 6) for i in range(n)]
    return [{"id": name, "text": text} for name, text in found]


@pytest.fixture
def domains(tmp_path):
    for stage in DOMAINS:
        for split, n in (("train", 12), ("test", 5)):
            write(tmp_path / "text_domains" / stage / f"{split}.jsonl", told(stage, split, n))
    return tmp_path


@pytest.fixture
def speeches(tmp_path):
    for split, n in (("train", 4), ("test", 2)):
        rows = [row | {"date": year} for stage, year in SPEECHES.items() for row in told(stage, split, n)]
        write(tmp_path / "text_dated" / "state_union" / f"{split}.jsonl", rows)
    return tmp_path


def texts(stage) -> str:
    return "".join(stage.train.record(i)["text"] for i in range(len(stage.train)))


def test_documents_of_several_data_sets_are_one_text(tmp_path):
    write(tmp_path / "trace" / "FOMC" / "train.jsonl", [{"id": "f", "input": "rates rise", "target": "B"}])
    rows = [{"id": "p", "input": "sales fell"}, {"id": "blank", "input": " "}]
    write(tmp_path / "financial_phrasebank" / "train.jsonl", rows)
    found = documents("trace/FOMC + financial_phrasebank", "train", tmp_path)
    assert found == [{"id": "f", "text": "rates rise"}, {"id": "p", "text": "sales fell"}]
    write(tmp_path / "financial_phrasebank" / "train.jsonl", [{"id": "f", "input": "sales fell"}])
    with pytest.raises(RequestError, match="id 'f' occurs in two of its parts"):
        documents("trace/FOMC + financial_phrasebank", "train", tmp_path)


class OneNat:
    """A view in which every token costs one nat; it counts how often it is asked."""

    stamp, task, asked = 0, None, 0

    def call(self, fn, batch):
        self.asked += 1
        return np.ones(batch["tokens"].shape, np.float32)


def test_bits_and_nats_are_of_one_pass():
    rows = [{"id": "a", "text": "abcd"}, {"id": "b", "text": "ü" * 10}]
    bits, nats = held_out("de", rows, BYTES, window=8, batch_size=8, role="probe")
    assert [(e.id, e.metric, e.pool, e.role, e.higher_is_better) for e in (bits, nats)] == [
        ("de", "bits_per_byte", "ratio", "probe", False),
        ("de/nll", "nll", "ratio", "probe", False),
    ]
    view = OneNat()
    one, other = bits.run(view, lambda *_: None), nats.run(view, lambda *_: None)
    assert view.asked == 1
    assert [item["id"] for item in one] == ["a", "b"] == [item["id"] for item in other]
    assert [item["parts"] for item in other] == [[4.0, 4.0], [20.0, 20.0]]
    np.testing.assert_allclose([item["parts"] for item in one], [[4, 4 * math.log(2)], [20, 20 * math.log(2)]])
    np.testing.assert_allclose([item["score"] for item in one], 1 / math.log(2))
    view.stamp = 1
    nats.run(view, lambda *_: None)
    assert view.asked == 2


def test_domains_are_stages_of_blocks_with_their_share_to_keep(domains):
    made = open_stream("text/domains", BYTES, data_dir=domains, window=64)
    assert tuple(stage.name for stage in made.stages) == DOMAINS
    assert [e.id for e in made.evals] == [i for s in DOMAINS for i in (s, f"{s}/nll")]
    assert [stage.evals for stage in made.stages] == [(s, f"{s}/nll") for s in DOMAINS]
    assert all(e.n == 5 and e.role == "task" for e in made.evals)
    for stage in made.stages:
        assert all(f"{stage.name} train {i} " in texts(stage) for i in range(12)) and "test" not in texts(stage)
    rows = sum(len(stage.train) for stage in made.stages)
    assert made.keeps == Budget(examples=-(-rows // 10))
    for share, keeps in ((0, NOTHING), (1, Budget(examples=rows)), (0.25, Budget(examples=-(-rows // 4)))):
        options = {"keep": share}
        assert open_stream("text/domains", BYTES, data_dir=domains, window=64, options=options).keeps == keeps
    assert not ALL.within(made.keeps)
    with pytest.raises(RequestError, match=r"option keep is 1\.5; accepted: the share of all rows"):
        open_stream("text/domains", BYTES, data_dir=domains, options={"keep": 1.5})
    with pytest.raises(RequestError, match="unknown option 'keeps' in stream 'text/domains'; did you mean 'keep'"):
        open_stream("text/domains", BYTES, data_dir=domains, options={"keeps": 1})


def test_rows_are_drawn_by_seed_and_orders_are_bijections(domains):
    def read(**settings):
        made = open_stream("text/domains", BYTES, data_dir=domains, window=64, rows=3, test_rows=2, **settings)
        return {s.name: texts(s) for s in made.stages}, [e.n for e in made.evals]

    first, again, other = read(seed=0), read(seed=0), read(seed=1)
    assert first == again and first[0] != other[0] and first[1] == [2] * 10
    random = read(order="random", seed=3)[0]
    assert sorted(random) == sorted(DOMAINS) and list(random) != list(DOMAINS)
    assert read(order="random", seed=0)[0] == first[0]  # as mappings: the same text for every stage
    assert next(iter(read(order="similarity")[0])) == DOMAINS[0]


def test_leaks_that_are_known_are_dropped_counted_or_allowed_by_name(domains):
    path = domains / "text_domains" / "legal" / "train.jsonl"
    copied = {"id": "copy", "text": told("web", "test", 1)[0]["text"].upper() + "!"}
    write(path, [*told("legal", "train", 3), copied])
    made = open_stream("text/domains", BYTES, data_dir=domains, window=64)
    assert made.notes["dropped from training"] == {"leaks": ["test-in-train"], "rows": {"legal": 1}}
    assert "WEB" not in texts(made.stages[2])
    kept = open_stream("text/domains", BYTES, data_dir=domains, window=64, allow=("test-in-train",))
    assert "WEB" in texts(kept.stages[2]) and kept.notes["leaks allowed"]["test-in-train"]["count"] == 1


def test_time_goes_forward_and_no_document_is_of_the_future(speeches):
    made = open_stream("text/state_union", BYTES, data_dir=speeches, window=64)
    assert tuple(s.name for s in made.stages) == tuple(SPEECHES)
    for order in ("random", "similarity"):
        with pytest.raises(RequestError, match="goes forward in time; accepted: given"):
            open_stream("text/state_union", BYTES, data_dir=speeches, window=64, order=order)
    info, now = STREAMS["text/state_union"], Settings()
    rows = [{"id": "a", "date": "2021-03-01"}]
    check_dates(info, {"2020": [{"id": "a", "date": "2020"}], "2021-2022": rows}, now)
    for train in ({"2020": rows}, {"2022-2023": rows}, {"2021": [{"id": "a"}]}):
        with pytest.raises(RequestError, match=f"row 'a' is of .* not of stage '{next(iter(train))}'"):
            check_dates(info, train, now)
    for train in ({"2021": rows, "2020": []}, {"2020-2022": rows, "2022": []}, {"2022-2021": []}):
        with pytest.raises(RequestError, match="begins before"):
            check_dates(info, train, now)


def test_near_duplicates_over_time_slices_are_dropped(speeches):
    path = speeches / "text_dated" / "state_union" / "train.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    words = " ".join(f"word{i}" for i in range(60))
    rows += [{"id": "old", "text": words, "date": "1950"}, {"id": "again", "text": words + " end", "date": "1989"}]
    write(path, rows)
    made = open_stream("text/state_union", BYTES, data_dir=speeches, window=64)
    assert made.notes["dropped from training"] == {"leaks": ["near-duplicates"], "rows": {"1975-1989": 1}}
    assert "word59" in texts(made.stages[0]) and "word59" not in texts(made.stages[2])
    write(path.with_name("test.jsonl"), [{"id": f"t{y}", "text": f"{words} {y}", "date": y} for y in SPEECHES.values()])
    made = open_stream("text/state_union", BYTES, data_dir=speeches, window=64)
    assert made.notes["dropped from training"]["rows"] == {"1945-1959": 1, "1975-1989": 1}


YEARS = STREAMS["temporal/probes"].stages


@pytest.fixture
def news(tmp_path):
    """Twenty questions a year with news that answers them, one without; facts that stay, that do not, that changed."""
    root = tmp_path / "probes"
    for year in YEARS:
        rows = [
            {"id": f"{year}_{i}", "relation": "news", "prompt": f"who {i} in {year}?", "answers": [f"x{i}"],
             "date": f"{year}-0{1 + i % 9}-01", "evidence": " ".join(f"{year}w{i}n{j}" for j in range(9)) if i else ""}
            for i in range(21)
        ]  # fmt: skip
        _zip(root / "realtimeqa" / f"{year}.jsonl.gz", rows)
    fact = {"relation": "P1", "prompt": "a is in", "answers": ["b"]}
    facts = [fact | {"id": f"f{i}", "stable": i < 3} for i in range(5)]
    _zip(root / "lama_pararel" / "test.jsonl.gz", facts)
    _zip(root / "situatedqa_temp" / "updated_pairs.jsonl.gz", [fact | {"id": "u", "old_answers": ["c"]}])
    return tmp_path


def _zip(path: Path, rows: list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))


def test_news_is_learned_and_asked_about_year_by_year(news):
    made = open_stream("temporal/probes", BYTES, data_dir=news, window=64)
    assert tuple(s.name for s in made.stages) == YEARS
    roles = {e.id: (e.role, e.n) for e in made.evals}
    assert {i: n for i, (role, n) in roles.items() if role == "probe"} == {
        "invariant": 3, "updated": 1, **{f"new/{year}": 18 for year in YEARS}}  # fmt: skip
    assert {i for i, (role, _) in roles.items() if role == "task"} == {i for y in YEARS for i in (y, f"{y}/nll")}
    assert all(e.metric == "exact_match" and e.higher_is_better for e in made.evals if e.role == "probe")
    for stage in made.stages:
        learned = [i for i in range(21) if f"{stage.name}w{i}n0" in texts(stage)]
        assert len(learned) == 18 and 0 not in learned and roles[stage.name] == ("task", 2)
        assert not any(f"{year}w" in texts(stage) for year in YEARS if year != stage.name)
    other = open_stream("temporal/probes", BYTES, data_dir=news, window=64, seed=1)
    assert texts(other.stages[0]) != texts(made.stages[0])


def test_news_of_another_year_is_refused(news):
    path = news / "probes" / "realtimeqa" / "2021.jsonl.gz"
    rows = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    _zip(path, [row | {"date": "2022-01-01"} for row in rows])
    with pytest.raises(RequestError, match="is of '2022-01-01', not of stage '2021'"):
        open_stream("temporal/probes", BYTES, data_dir=news)
    _zip(path, rows[:2])
    with pytest.raises(RequestError, match=r"2021\.jsonl\.gz: 1 questions have evidence; accepted: two or more"):
        open_stream("temporal/probes", BYTES, data_dir=news)
    _zip(path, [rows[0] | {"answers": "x"}])
    with pytest.raises(RequestError, match=r"2021\.jsonl\.gz:1: field 'answers' must be a list of strings"):
        open_stream("temporal/probes", BYTES, data_dir=news)


def test_absent_and_malformed_data_is_one_line(domains, monkeypatch):
    with pytest.raises(RequestError, match=r"no \S+/text_languages/ud/en; .* in public it is github:Universal"):
        open_stream("text/language_shift", BYTES, data_dir=domains)
    monkeypatch.delenv("JAXCL_DATA", raising=False)
    with pytest.raises(RequestError, match=r"no data directory; .* that holds text_languages/ud/en/"):
        open_stream("text/language_shift", BYTES)
    path = domains / "text_domains" / "web" / "train.jsonl"
    write(path, [{"id": "a", "text": "fine"}, {"id": "b", "txt": "?"}])
    with pytest.raises(RequestError, match=r"web/train\.jsonl:2: field 'text' is missing; did you mean 'txt'"):
        open_stream("text/domains", BYTES, data_dir=domains)


DATA = os.environ.get("JAXCL_DATA", "")
needs_data = pytest.mark.skipif(not DATA, reason="JAXCL_DATA names no data directory")
MINE = [name for name, info in STREAMS.items() if info.scenario.endswith("domain")]


@needs_data
@pytest.mark.parametrize("name", MINE)
def test_the_real_streams_open(name):
    made = open_stream(name, BYTES, data_dir=DATA, window=256, rows=3, test_rows=2)
    assert tuple(stage.name for stage in made.stages) == STREAMS[name].stages
    assert [e.id for e in made.evals if e.role == "task"] == [i for s in made.stages for i in (s.name, f"{s.name}/nll")]
    assert all(e.n == 2 for e in made.evals)
    assert all(len(stage.train) == 3 and stage.train[0]["tokens"].shape == (256,) for stage in made.stages)
    assert made.keeps == Budget(examples=-(-3 * len(made.stages) // 10))


@needs_data
def test_the_parallel_manual_leaks_four_test_chunks_and_they_are_dropped():
    found = {}
    for stage in STREAMS["text/languages"].stages:
        place = Path(DATA, "text_languages/debian_guide", stage, "test.jsonl.gz")
        with gzip.open(place, "rt", encoding="utf-8") as file:
            tests = {"".join(filter(str.isalnum, json.loads(line)["text"].casefold())) for line in file}
        for other in STREAMS["text/languages"].stages:
            place = Path(DATA, "text_languages/debian_guide", other, "train.jsonl.gz")
            with gzip.open(place, "rt", encoding="utf-8") as file:
                rows = ["".join(filter(str.isalnum, json.loads(line)["text"].casefold())) for line in file]
            found.setdefault(other, set()).update(i for i, row in enumerate(rows) if row in tests)
    made = open_stream("text/languages", BYTES, data_dir=DATA, window=512, rows=2, test_rows=2)
    assert made.notes["dropped from training"]["rows"] == {s: len(rows) for s, rows in found.items() if rows}
