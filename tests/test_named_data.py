"""Data by name: tfds: through TFDS's mock and from a data set prepared here, hf: from folders and the cache, paths;
labels, ids and leaks; every bad name is one line that says what would be accepted."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxcl.cli import main
from jaxcl.data import named
from jaxcl.data.columns import KNOWN, Columns
from jaxcl.data.named import iter_rows, load_rows, train_and_test
from jaxcl.data.named_stages import answer_stages, stage_name
from jaxcl.errors import RequestError
from jaxcl.models.tokenizer import ByteTokenizer
from jaxcl.scenarios.pretraining import stream_data

tfds = pytest.importorskip("tensorflow_datasets")

# TensorFlow Datasets


class JaxclLittle(tfds.core.GeneratorBasedBuilder):
    """Twenty and six reviews; registered with TFDS, as a user's own data set would be."""

    VERSION = tfds.core.Version("1.2.0")

    def _info(self):
        features = {
            "review": tfds.features.Text(),
            "mood": tfds.features.ClassLabel(names=["bad", "good"]),
            "stars": tfds.features.Scalar(np.int64),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, manager):
        return {"train": self._generate_examples("train", 20), "test": self._generate_examples("test", 6)}

    def _generate_examples(self, split, n):
        for i in range(n):
            yield i, {"review": f"{split} ü {i}", "mood": i % 2, "stars": i % 5}


LITTLE = Columns("review", "mood", instruction="How is it?\n")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A data directory in which `jaxcl fetch` has prepared the little data set: ArrayRecord files on disk."""
    place = tmp_path_factory.mktemp("tfds")
    patch = pytest.MonkeyPatch()
    patch.setenv("TFDS_DATA_DIR", str(place))
    try:
        assert main(["fetch", "tfds:jaxcl_little"]) == 0
    finally:
        patch.undo()
    assert list(place.glob("jaxcl_little/1.2.0/*train.array_record*"))
    return place


@pytest.fixture
def there(prepared, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared))


@pytest.mark.parametrize("name", ["tfds:ag_news_subset", "tfds:glue/sst2", "tfds:imdb_reviews"])
@pytest.mark.parametrize("schema", ["instruct", "text"])
def test_the_known_data_sets_through_tfds_mock(name, schema, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))  # nothing is prepared there
    with tfds.testing.mock_data(num_examples=9):
        raw = list(tfds.data_source(name.removeprefix("tfds:"), split="train"))
        classes = tfds.builder(name.removeprefix("tfds:"), try_gcs=False).info.features["label"].names
        rows = load_rows(f"{name}:train[2:]", schema=schema)
    assert "tensorflow" not in sys.modules
    assert [r["id"] for r in rows] == [f"train-{i}" for i in range(2, 9)]
    for row, before in zip(rows, raw[2:], strict=True):
        plain = {"tfds:glue/sst2": "sentence", "tfds:imdb_reviews": "text"}.get(name)
        title = "title: {title}\ndescription: {description}\n".format(**before) if plain is None else before[plain]
        assert row["input" if schema == "instruct" else "text"] == title
        if schema == "instruct":
            assert row["target"] == classes[int(before["label"])] and row["labels"] == classes
            assert row["instruction"] == KNOWN[name].instruction and row["task"] == name.split(":")[1].split("/")[-1]


def test_a_prepared_data_set_is_read_without_tensorflow(there):
    rows = load_rows("tfds:jaxcl_little:1.2.0:test", columns=LITTLE)
    assert "tensorflow" not in sys.modules
    assert {(r["input"], r["target"]) for r in rows} == {(f"test ü {i}", ["bad", "good"][i % 2]) for i in range(6)}
    assert [r["id"] for r in rows] == [f"test-{i}" for i in range(6)]
    assert rows[0] | {"input": "", "target": ""} == {
        "id": "test-0", "task": "jaxcl_little", "instruction": "How is it?\n", "input": "", "target": "",
        "labels": ["bad", "good"],
    }  # fmt: skip
    half = load_rows("tfds:jaxcl_little:train[50%:]+test", schema="text", columns=LITTLE)
    assert len(half) == 16 and len({r["text"] for r in half}) == 16 and set(half[0]) == {"id", "text"}
    assert half[:10] == load_rows("tfds:jaxcl_little", schema="text", columns=LITTLE)[10:]
    renamed = load_rows("tfds:jaxcl_little", columns=Columns("review", "mood", ("no", "yes"), task="t"))
    assert {(r["target"], r["task"]) for r in renamed} == {("no", "t"), ("yes", "t")}
    high = load_rows("tfds:jaxcl_little/stars=3..4/mood=1", columns=LITTLE)
    assert sorted(r["input"] for r in high) == sorted(f"train ü {i}" for i in range(20) if i % 5 > 2 and i % 2)


@pytest.mark.parametrize(
    ("name", "columns", "words"),
    [
        ("tfds:jaxcl_litle", LITTLE, "no data set 'tfds:jaxcl_litle'; did you mean 'jaxcl_little'"),
        ("tfds:ag_news", None, "no data set 'tfds:ag_news'; did you mean 'ag_news_subset'"),
        ("tfds:glue/sst3", None, "no data set 'tfds:glue/sst3'; did you mean 'glue/sst2'"),
        ("tfds:jaxcl_little:9.9.9", LITTLE, "no data set 'tfds:jaxcl_little:9.9.9'"),
        ("tfds:imdb_reviews", None, "run: jaxcl fetch tfds:imdb_reviews"),
        ("tfds:glue/sst2:validation", None, "run: jaxcl fetch tfds:glue/sst2"),
        ("tfds:jaxcl_little:trian", LITTLE, "has no split 'trian'; did you mean 'train'"),
        ("tfds:jaxcl_little", None, "which column is what: Columns(text=..., label=...); it has "),
        ("tfds:jaxcl_little", Columns("reveiw", "mood"), "unknown column 'reveiw' in tfds:jaxcl_little; did you"),
        ("tfds:jaxcl_little", Columns("review"), "Columns(label=...) is needed for answers"),
        ("tfds:jaxcl_little", Columns("stars", "mood"), "row train-0: column 'stars' holds"),
        ("tfds:jaxcl_little", Columns("review", "stars"), "name the classes by labels=(...)"),
        ("tfds:jaxcl_little", Columns("review", "mood", ("a", "b", "c")), "3 labels are given for the 2 classes bad"),
        ("tfds:jaxcl_little", Columns("review", "stars", ("a", "b")), "is no class (0 to 1)"),
        ("tfds:jaxcl_little/star=3", LITTLE, "unknown column 'star' in tfds:jaxcl_little/star=...; did you"),
        ("tfds:jaxcl_little/stars=9", LITTLE, "no rows; a stage needs at least one"),
    ],
)
def test_what_tfds_has_not_is_one_line(there, name, columns, words):
    with pytest.raises(RequestError) as caught:
        load_rows(name, columns=columns)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_data_in_a_format_for_tensorflow_is_named(prepared, tmp_path, monkeypatch):
    whole = prepared / "jaxcl_little" / "1.2.0"
    other = tmp_path / "jaxcl_little" / "1.2.0"
    other.mkdir(parents=True)
    for file in whole.iterdir():
        (other / file.name.replace("array_record", "tfrecord")).write_bytes(
            file.read_bytes().replace(b"array_record", b"tfrecord")
        )
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(RequestError, match=r"as tfrecord, which only TensorFlow reads; point TFDS_DATA_DIR elsewhere"):
        load_rows("tfds:jaxcl_little", columns=LITTLE)


# Hugging Face


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Folders as `datasets` writes and reads them; the second one is also in its cache, as if it had been fetched."""
    datasets = pytest.importorskip("datasets", reason="hf: names need the extra hf")
    place = tmp_path_factory.mktemp("hf")
    features = datasets.Features(
        {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["negative", "positive"])}
    )
    made = {
        split: datasets.Dataset.from_dict(
            {"sentence": [f"{split} ü {i}" for i in range(n)], "label": [i % 2 for i in range(n)]}, features=features
        )
        for split, n in (("train", 20), ("validation", 6))
    }
    made["test"] = datasets.Dataset.from_dict({"sentence": ["no label"], "label": [-1]}, features=features)
    datasets.DatasetDict(made).save_to_disk(str(place / "saved"))
    made["train"].save_to_disk(str(place / "single"))
    (place / "little_csv").mkdir()
    (place / "empty").mkdir()
    for split, n in (("train", 4), ("test", 2)):
        lines = "".join(f'"{split}, row {i}",{"yes" if i else "no"}\n' for i in range(n))
        (place / "little_csv" / f"{split}.csv").write_text("question,answer\n" + lines, encoding="utf-8")
    patch = pytest.MonkeyPatch()
    patch.setattr("datasets.config.HF_DATASETS_CACHE", place / "cache")
    datasets.load_dataset(str(place / "little_csv"))
    yield place
    patch.undo()


SENTENCE = Columns("sentence", "label", instruction="Which?\n")


def test_saved_data_sets_of_hugging_face(hub):
    rows = load_rows(f"hf:{hub}/saved:validation[-4:]", columns=SENTENCE)
    assert rows == [
        {"id": f"validation-{i}", "task": "saved", "instruction": "Which?\n", "input": f"validation ü {i}",
         "target": ["negative", "positive"][i % 2], "labels": ["negative", "positive"]}
        for i in range(2, 6)
    ]  # fmt: skip
    assert len(load_rows(f"hf:{hub}/single", columns=SENTENCE)) == 20  # its only split
    assert load_rows(f"hf:{hub}/saved/label=1", schema="text", columns=SENTENCE)[0]["text"] == "train ü 1"


@pytest.mark.parametrize("name", ["hf:little_csv", "hf:{}/little_csv"])
def test_files_and_the_cache_give_the_same_rows(hub, name):
    rows = load_rows(name.format(hub) + ":test", columns=Columns("question", "answer"))
    common = {"task": "little_csv", "instruction": ""}
    assert rows == [
        common | {"id": "test-0", "input": "test, row 0", "target": "no"},
        common | {"id": "test-1", "input": "test, row 1", "target": "yes"},
    ]


@pytest.mark.parametrize(
    ("name", "columns", "words"),
    [
        ("hf:fancyzhx/ag_news", None, "is not in the cache (Couldn't find cache for fancyzhx/ag_news); run: "),
        ("hf:a/b/c/d", None, "accepted: hf:OWNER/NAME, hf:OWNER/NAME/CONFIG, or hf: and an existing folder"),
        ("hf:{}/saved:valid", SENTENCE, "unknown split 'valid'"),
        ("hf:{}/saved:test", SENTENCE, "row test-0: label -1 is no class (0 to 1); a split without labels"),
        ("hf:{}/saved", None, "say which column is what"),
        ("hf:{}/little_csv", Columns("question", "answer", ("maybe", "no")), "unknown label 'yes'"),
        ("hf:{}/empty", None, "is no data set that 'datasets' can read"),
    ],
)
def test_what_hugging_face_has_not_is_one_line(hub, name, columns, words):
    with pytest.raises(RequestError) as caught:
        load_rows(name.replace("{}", str(hub)), columns=columns)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(RequestError, match=r"needs the package 'datasets'; install it with: pip install 'jaxcl\[hf\]'"):
        load_rows("hf:fancyzhx/ag_news")


# paths


@pytest.fixture
def folder(tmp_path) -> Path:
    """A data directory with documents of two languages and three years, and questions with answers."""
    (tmp_path / "empty").mkdir()
    rows = [
        {"id": f"d{i}", "text": f"document {i}", "lang": ["en", "de", "deu"][i % 3], "date": f"{2000 + i // 4}-12-31"}
        for i in range(12)
    ]
    _write(tmp_path / "texts" / "all.jsonl.gz", rows)
    for split, n in (("train", 8), ("test", 3)):
        common = {"task": "t", "instruction": "Q\n", "labels": ["a", "b"]}
        asked = [common | {"id": f"{split}{i}", "input": f"{split} {i}", "target": "ab"[i % 2]} for i in range(n)]
        _write(tmp_path / "asked" / f"{split}.jsonl", asked)
    _write(tmp_path / "own.jsonl", [{"question": f"Is {i} odd?", "answer": ["no", "yes"][i % 2]} for i in range(4)])
    return tmp_path


def _write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(r) + "\n" for r in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)


def test_paths_and_names_of_the_data_directory(folder, monkeypatch):
    rows = load_rows("asked", data_dir=folder)
    assert [r["id"] for r in rows] == [f"train{i}" for i in range(8)]
    assert load_rows(f"{folder}/asked") == rows == load_rows(f"{folder}/asked/train.jsonl")
    assert load_rows("asked/train", data_dir=folder) == rows
    monkeypatch.setenv("JAXCL_DATA", str(folder))
    assert load_rows("asked:test[:2]") == load_rows("asked", split="test")[:2]
    assert load_rows("own", columns=Columns("question", "answer"))[3] == {
        "id": "all-3", "task": "own", "instruction": "", "input": "Is 3 odd?", "target": "yes",
    }  # fmt: skip


def test_parts_of_a_name_choose_rows(folder):
    def ids(name: str) -> list[int]:
        return [int(r["id"][1:]) for r in iter_rows(name, schema="text", data_dir=folder)]

    assert ids("texts/lang=de") == [1, 4, 7, 10]  # not deu
    assert ids("texts/date=2001..2002") == list(range(4, 12)) and ids("texts/date=..2000") == list(range(4))
    assert ids("texts/date=2001../lang=en") == [6, 9]
    assert ids("texts/lang=de:all[:50%]") == [1, 4] and ids("texts/lang=de:all[50%:]") == [7, 10]
    assert ids("texts:all[3:5]") == [3, 4]
    own = Columns("text")
    numbers = [r["id"] for r in iter_rows("texts/lang=de:all[2:]", schema="text", columns=own, data_dir=folder)]
    assert numbers == ["all-7", "all-10"]  # a row has one number, however it is reached
    assert stage_name("texts/lang=de") == "texts-de" and stage_name("tfds:glue/sst2") == "sst2"
    assert stage_name("hf:a/b/date=2001..2002") == "b-2001..2002" and stage_name("x/own.jsonl.gz") == "own"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("askd", "no data set 'askd' in {}; did you mean 'asked'"),
        ("asked/tran", "no data set 'asked/tran' in {}; did you mean 'asked/train.jsonl'"),
        ("tdfs:ag_news", "no data set 'tdfs'; did you mean 'tfds:...'"),
        ("asked:tset", "unknown split 'tset' in asked; did you mean 'test'"),
        ("texts:train", "unknown split 'train' in texts; accepted: all"),
        ("empty", "has no train.jsonl or train.jsonl.gz for a split; it holds: nothing"),
        ("asked[:2]", "data name 'asked[:2]': accepted: tfds:NAME"),
        ("asked:1.0.0", "data name 'asked:1.0.0': accepted"),
        ("texts", "texts/all.jsonl.gz:1: field 'task' is missing"),
    ],
)
def test_what_is_not_on_disk_is_one_line(folder, name, words, monkeypatch):
    monkeypatch.chdir(folder)
    with pytest.raises(RequestError) as caught:
        load_rows(name, data_dir=folder)
    assert words.format(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_other_refusals(folder, monkeypatch):
    monkeypatch.delenv("JAXCL_DATA", raising=False)
    with pytest.raises(RequestError, match=r"no data directory; --data or JAXCL_DATA must name|no data directory; "):
        load_rows("asked")
    with pytest.raises(RequestError, match="unknown schema 'txt'; did you mean 'text'"):
        load_rows("asked", schema="txt", data_dir=folder)
    with pytest.raises(RequestError, match="the name has a split already; accepted: one of it and 'test'"):
        load_rows("asked:train", split="test", data_dir=folder)
    with pytest.raises(RequestError, match="'asked' lies on disk; accepted: tfds:NAME or hf:OWNER/NAME"):
        named.prepare("asked")
    with pytest.raises(RequestError, match="unknown stream of text 'text/domain'; did you mean 'text/domains'"):
        stream_data("text/domain")


# no test row is trained on


def test_test_rows_are_never_training_rows(folder):
    def parted(name: str, train: str, test: str, **kw):
        (both,) = train_and_test({"stage": name}, train, test, data_dir=folder, **kw).values()
        return both

    train, test = parted("asked", "train", "test")
    assert not {r["id"] for r in train} & {r["id"] for r in test}
    pairs = (("train", "train"), ("train", "train[6:]"), ("train[:80%]", "train[50%:]"), ("test+train", "test"))
    for one, other in pairs:
        with pytest.raises(RequestError, match=r"share rows of '\w+'; no test row may be trained on"):
            parted("asked", one, other)
    learned, held_out = parted("texts/lang=de", "all[:75%]", "all[75%:]", schema="text")
    assert [r["id"] for r in learned] == ["d1", "d4", "d7"] and [r["id"] for r in held_out] == ["d10"]
    with pytest.raises(RequestError, match="it has the split 'train'; train "):
        parted("asked:train", "train", "test")
    both = {"de": "texts/lang=de", "all": "texts"}
    halves = train_and_test(both, "all[:50%]", "all[50%:]", schema="text", data_dir=folder)
    assert len(list(halves["de"][0])) == 2
    two = {"en": "texts/lang=en", "de": "texts/lang=de"}
    apart = train_and_test(two, "all[:50%]", "all[50%:]", schema="text", data_dir=folder)
    assert [r["id"] for rows, _ in apart.values() for r in rows] == ["d0", "d3", "d1", "d4"]
    mixed = train_and_test({"late": "texts/date=2002..", "all": "texts"}, "all[50%:]", "all[:50%]", schema="text",
                           data_dir=folder)  # fmt: skip
    with pytest.raises(RequestError, match="stage 'all': row 'd8' of texts is a test row of stage 'late'"):
        list(mixed["all"][0])


def test_stages_and_evals_of_named_answers(folder, there):
    own = Columns("review", "mood", instruction="How is it?\n")
    stages, evals = answer_stages(
        {"films": "tfds:jaxcl_little"}, ByteTokenizer(), window=64, columns=own, rows=12, test_rows=5
    )
    assert [(s.name, len(s.train), s.evals) for s in stages] == [("films", 12, ("films",))]
    assert [(e.id, e.metric, e.n) for e in evals] == [("films", "accuracy", 5)]
    assert all("train" in stages[0].train.record(i)["input"] for i in range(12))
    with pytest.raises(RequestError, match=r"stage 'good': row 'train-\d+' of tfds:jaxcl_little is a test row of"):
        answer_stages(
            {"good": "tfds:jaxcl_little/mood=1", "any": "tfds:jaxcl_little"}, ByteTokenizer(), window=64, columns=own,
            train="train[:50%]", test="train[50%:]",
        )  # fmt: skip
    parts = {"good": "tfds:jaxcl_little/mood=1", "bad": "tfds:jaxcl_little/mood=0"}
    halves, _ = answer_stages(
        parts, ByteTokenizer(), window=64, columns=own, train="train[:50%]", test="train[50%:]"
    )
    assert [len(s.train) for s in halves] == [5, 5]
    with pytest.raises(RequestError, match="two stages would be named 'asked'"):
        answer_stages(["asked", f"{folder}/asked"], ByteTokenizer(), window=64, data_dir=folder)
    with pytest.raises(RequestError, match="is one name; accepted: a list"):
        answer_stages("asked", ByteTokenizer(), window=64, data_dir=folder)


def test_the_page_on_data_shows_what_happens(folder, monkeypatch, capsys):
    page = (Path(__file__).resolve().parents[1] / "docs" / "data.md").read_text(encoding="utf-8")
    for domain in ("law", "web"):
        for split in ("train", "test"):
            _write(folder / domain / f"{split}.jsonl", [{"id": "a", "text": f"{split} text"}])
    monkeypatch.chdir(folder)
    seen: dict = {}
    for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(code, seen)
    assert f"    {capsys.readouterr().out}" in page
    assert [(s.name, len(s.train)) for s in seen["stages"]] == [("law", 1), ("web", 1)]


def test_importing_jaxcl_imports_no_data_library():
    code = (
        "import sys, jaxcl, jaxcl.data.named, jaxcl.scenarios\n"
        "print([m for m in ('tensorflow_datasets', 'datasets', 'tensorflow', 'jax', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
