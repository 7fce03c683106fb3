"""Documents in blocks: nothing is lost or repeated, documents that must not see each other do not, big ones stream,
and the real text folders load. References are written here: concatenation in plain Python, nll of a document alone."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.core.types import Method, Stream
from jaxcl.data.blocks import text_source
from jaxcl.data.encode import encode_text
from jaxcl.data.named_stages import text_stages
from jaxcl.data.packing import merge
from jaxcl.data.pipeline import pipeline, stack
from jaxcl.data.stage import Stage
from jaxcl.errors import RequestError, RunFailed
from jaxcl.models.tokenizer import ByteTokenizer
from jaxcl.scenarios import STREAMS
from jaxcl.scenarios.pretraining import stream_data
from tests.support import MODEL, SPEC, experiment, weights

END = ByteTokenizer.eos_id
DOCUMENTS = ["abcdefg", "", "hijk", "ü世界 and more of it", "x", "lmnopqrstuvw", "yz"]


class Letters:
    """One token a letter, for a model of 32 words."""

    vocab_size, eos_id, pad_id = 32, 31, 0

    def encode(self, text: str) -> list[int]:
        return [ord(c) - 96 for c in text]

    def decode(self, ids) -> str:
        return "".join(chr(i + 96) for i in ids if i < 27)


def blocks(documents, window, **kw):
    return text_source("book", documents, kw.pop("tokenizer", ByteTokenizer()), window=window, **kw)


def used(source) -> list[list[int]]:
    return [one["tokens"][one["segments"] > 0].tolist() for one in (source[i] for i in range(len(source)))]


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("window", [1, 2, 5, 7, 16, 999])
def test_tokens_are_neither_lost_nor_repeated(window, separate):
    source = blocks(DOCUMENTS, window, separate=separate)
    whole = [t for d in DOCUMENTS for t in [*d.encode(), END]]
    rows = used(source)
    assert [t for row in rows for t in row] == whole
    assert sum(map(len, rows)) == sum(len(d.encode()) for d in DOCUMENTS) + len(DOCUMENTS)
    assert all(len(row) == window for row in rows[:-1]) and len(source) == -(-len(whole) // window)
    for i in range(len(source)):
        one = source[i]
        assert {k: v.dtype for k, v in one.items()} == {
            **dict.fromkeys(("tokens", "segments", "positions", "row"), np.int32), "weight": np.float32,
        }  # fmt: skip
        assert one["row"] == i and all(one[k].shape == (window,) for k in ("tokens", "segments", "weight"))


@pytest.mark.parametrize("window", [2, 5, 7, 16, 999])
def test_targets_segments_and_positions(window):
    """Joined: every token but a block's first is a target. Separate: every one but each document's first in a block."""
    whole = [(d, t) for d, text in enumerate(DOCUMENTS) for t in [*text.encode(), END]]
    for separate in (False, True):
        source = blocks(DOCUMENTS, window, separate=separate)
        for i in range(len(source)):
            one, part = source[i], whole[i * window : (i + 1) * window]
            segment, position, before = 0, 0, None
            for at, (document, token) in enumerate(part):
                new = before is None or (separate and document != before)
                segment, position = (segment + 1, 0) if new else (segment, position + 1)
                before = document
                found = [int(one[k][at]) for k in ("tokens", "segments", "positions", "weight")]
                assert found == [token, segment, position, not new]
            assert not one["segments"][len(part) :].any() and not one["weight"][len(part) :].any()
        if not separate:
            assert sum(source[i]["weight"].sum() for i in range(len(source))) == len(whole) - len(source)


def test_a_separate_document_scores_as_it_does_alone():
    texts = ["abcab", "zyx", "hello", "q", "mnopmnop", "abc"]
    source = blocks(texts, 32, tokenizer=Letters(), separate=True)
    joined = blocks(texts, 32, tokenizer=Letters())
    alone = [encode_text([*Letters().encode(t), Letters.eos_id], 32) for t in texts]
    params = weights()
    batch = stack([source[0], joined[0], *alone])
    nll = np.asarray(jax.jit(lambda p, b: MODEL.apply(SPEC, p, b).nll)(params, jax.tree.map(jnp.asarray, batch)))
    sums = (nll * batch["weight"]).sum(1)
    assert batch["weight"][0].sum() == batch["weight"][2:].sum() == sum(map(len, texts))
    np.testing.assert_allclose(sums[0], sums[2:].sum(), rtol=1e-5)
    for number, text in enumerate(texts):  # and token by token
        inside = source[0]["segments"] == number + 1
        np.testing.assert_allclose(nll[0][inside], nll[2 + number][: len(text) + 1], atol=1e-5)
    assert abs(sums[1] - sums[0]) > 1e-3  # joined documents do see each other


def test_blocks_of_documents_stay_apart_when_rows_are_packed():
    first, second = (blocks(t, 16, separate=True)[0] for t in (["ab", "cde"], ["f", "gh"]))
    packed = merge([first, second], 2)
    assert packed["tokens"][:12].tolist() == [*b"ab", END, *b"cde", END, *b"f", END, *b"gh", END]
    assert packed["segments"].tolist() == [1, 1, 1, 2, 2, 2, 2, 3, 3, 4, 4, 4, 0, 0, 0, 0]
    assert packed["positions"].tolist() == [0, 1, 2, 0, 1, 2, 3, 0, 1, 0, 1, 2, 0, 0, 0, 0]
    assert packed["weight"].tolist() == [0, 1, 1, 0, 1, 1, 1, 0, 1, 0, 1, 1, 0, 0, 0, 0]


def test_only_what_the_blocks_need_is_read():
    seen = []

    def documents():
        for i in range(1000):
            seen.append(i)
            yield {"text": "0123456789"[: 1 + i % 10]}

    source = blocks(documents(), 16, blocks=3)
    whole = [t for i in range(1000) for t in [*b"0123456789"[: 1 + i % 10], END]]
    assert [t for row in used(source) for t in row] == whole[:48] and len(source) == 3
    assert sum(2 + i % 10 for i in seen) >= 48 > sum(2 + i % 10 for i in seen[:-1])
    assert len(blocks(["ab"], 16, blocks=9)) == 1


def test_a_large_corpus_is_never_in_memory():
    """8 MB of text, 32 MB of tokens: what Python and numpy hold stays far below either."""
    document = "some words of a long document " * 4000
    tracemalloc.start()
    source = blocks((document for _ in range(70)), 128)
    one = source[len(source) // 2]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(source) * 128 >= 70 * len(document) > 8e6
    assert bytes(one["tokens"][:30].tolist()).decode() in document * 2
    assert peak < 6 * 4 * len(document)  # a document's tokens as Python's list and as an array


def test_records_labels_and_ids():
    source = blocks([{"id": "d", "text": "ab世cd"}, "ef"], 5)
    assert [source.id(i) for i in range(len(source))] == ["book-0", "book-1", "book-2"]
    assert source.label(1) == "book" and source.record(1) == {"id": "book-1", "task": "book", "text": "cdef"}
    assert source.id(-1) == "book-2" and (source[-1]["tokens"] == source[2]["tokens"]).all()
    for read in (source.id, source.record, source.__getitem__):
        with pytest.raises(IndexError):
            read(3)


def test_bad_requests_and_a_full_disk(monkeypatch):
    with pytest.raises(RequestError, match="stage 'book' has no training rows"):
        blocks([], 5)
    with pytest.raises(RequestError, match="stage 'book': blocks=0; accepted: a positive integer"):
        blocks(["a"], 5, blocks=0)
    with pytest.raises(RequestError, match="stage 'book': window=0"):
        blocks(["a"], 0)

    class Full:
        def write(self, data):
            raise OSError(28, "No space left on device")

        def __enter__(self):
            return self

        def __exit__(self, *problem):
            return None

    monkeypatch.setattr("jaxcl.data.blocks.tempfile.TemporaryFile", Full)
    with pytest.raises(RunFailed, match=r"tokens cannot be written to .*: No space left on device"):
        blocks(["a"], 5)


def test_methods_of_whole_sequences_refuse_separate_documents():
    whole = Method(name="whole", packs=False)
    for separate in (False, True):
        stage = Stage("s", blocks(["abc", "de"], 12, tokenizer=Letters(), separate=separate))
        asked = experiment([whole], stages=[stage])
        if separate:
            with pytest.raises(RequestError, match="'whole' works on whole sequences; stage 's' has several in a row"):
                asked.check()
        else:
            asked.check()
        dataclasses.replace(asked, methods=[Method(name="any")]).check()


# stages by name


def write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in rows).encode()))


@pytest.fixture
def folder(tmp_path) -> Path:
    for domain in ("law", "web"):
        for split, n in (("train", 12), ("test", 4)):
            rows = [{"id": f"{domain}-{split}-{i}", "text": f"{split} {domain} {i} " * 9} for i in range(n)]
            write(tmp_path / domain / f"{split}.jsonl.gz", rows)
    return tmp_path


def test_stages_and_evals_of_text(folder):
    stages, evals = text_stages(["law", "web"], ByteTokenizer(), window=32, data_dir=folder, test_rows=3)
    assert [(s.name, s.evals) for s in stages] == [("law", ("law",)), ("web", ("web",))]
    assert [(e.id, e.metric, e.n, e.higher_is_better) for e in evals] == [
        (name, "bits_per_byte", 3, False) for name in ("law", "web")
    ]
    sources = [s.train for s in stages]
    for t, domain in enumerate(("law", "web")):
        expected = [t for i in range(12) for t in [*(f"train {domain} {i} " * 9).encode(), END]]
        assert [t for row in used(sources[t]) for t in row] == expected
    everything = tuple(Stream(t, np.arange(len(s))) for t, s in enumerate(sources))
    steps = -(-sum(map(len, sources)) // 8)
    seen = [b["tokens"] for b in pipeline(sources, everything, stage=1, batch_size=8, steps=steps, seed=0)]
    text = b" ".join(bytes(t for t in row if t < 256) for tokens in seen for row in tokens.tolist())
    assert b"train law" in text and b"test" not in text
    with pytest.raises(RequestError, match=r"law: 'train\[:90%\]' and 'train' share rows of 'train'"):
        text_stages(["law"], ByteTokenizer(), window=32, data_dir=folder, train="train[:90%]", test="train")
    one, _ = text_stages({"a": "law", "b": "web"}, ByteTokenizer(), window=32, data_dir=folder, blocks=2, separate=True)
    assert [(s.name, len(s.train), s.train.packs) for s in one] == [("a", 2, True), ("b", 2, True)]


DATA = os.environ.get("JAXCL_DATA", "")
TEXTS = [name for name in STREAMS if name.startswith("text/") and not name.endswith(("_long", "programming"))]


@pytest.mark.skipif(not Path(DATA, "text_domains").is_dir(), reason="needs the text folders in JAXCL_DATA")
@pytest.mark.parametrize("stream", TEXTS)
def test_the_real_text_folders_load_whole(stream):
    data = stream_data(stream)
    stages, evals = text_stages(data, ByteTokenizer(), window=512)
    assert [s.name for s in stages] == list(STREAMS[stream].stages)
    for stage, held_out, name in zip(stages, evals, data.values(), strict=True):
        folder, _, years = name.partition("/date=")
        low, _, high = years.partition("..")
        counts = []
        for split in ("train", "test"):
            with gzip.open(Path(DATA, folder, f"{split}.jsonl.gz"), "rt", encoding="utf-8") as file:
                rows = [json.loads(line) for line in file]
            rows = [r for r in rows if not years or int(low) <= int(r["date"][:4]) <= int(high)]
            counts.append((len(rows), sum(len(r["text"].encode()) + 1 for r in rows)))
        assert held_out.n == counts[1][0] > 0
        assert -(-counts[0][1] // 512) == len(stage.train)
        last = stage.train[len(stage.train) - 1]
        assert (len(stage.train) - 1) * 512 + int((last["segments"] > 0).sum()) == counts[0][1]


@pytest.mark.skipif(not Path(DATA, "text_domains").is_dir(), reason="needs the text folders in JAXCL_DATA")
@pytest.mark.parametrize("stream", [s for s in TEXTS if "/date=" in STREAMS[s].data[0]])
def test_the_periods_hold_every_document_once(stream):
    from jaxcl.data.named import load_rows

    folder = STREAMS[stream].data[0].partition("/date=")[0]
    parts = [r["id"] for name in STREAMS[stream].data for r in load_rows(name, schema="text")]
    assert sorted(parts) == sorted(r["id"] for r in load_rows(folder, schema="text"))
