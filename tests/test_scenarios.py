"""What all streams have in common: facts that are whole, absent data that is named, one way to open them."""

import json
import os

import pytest

from jaxcl.cli import main
from jaxcl.errors import RequestError
from jaxcl.metrics.matrix_file import ROLES
from jaxcl.models.tokenizer import ByteTokenizer
from jaxcl.scenarios import SCENARIOS, STREAMS, Settings, open_stream
from jaxcl.scenarios.base import REGIMES

WORDS = ByteTokenizer()
needs_data = pytest.mark.skipif(not os.environ.get("JAXCL_DATA"), reason="JAXCL_DATA names no data directory")


@pytest.mark.parametrize("name", STREAMS)
def test_the_facts_of_a_stream_are_whole(name):
    info = STREAMS[name]
    assert info.name == name and info.scenario in SCENARIOS and info.regime in REGIMES
    assert len(set(info.stages)) == len(info.stages) > 0
    assert all((info.metric, info.card, info.doc, info.unit, info.keeps, info.protocol)) and info.data


def test_data_that_is_absent_is_named_with_its_public_source(tmp_path, monkeypatch):
    monkeypatch.delenv("JAXCL_DATA", raising=False)
    with pytest.raises(RequestError, match=r"'olora/order_1': no data directory; .* that holds olora_benchmark/"):
        open_stream("olora/order_1", WORDS)
    with pytest.raises(RequestError, match=r"'text/peps': no .*/text_dated/peps; .* that holds text_dated/peps/"):
        open_stream("text/peps", WORDS, data_dir=tmp_path)
    with pytest.raises(RequestError, match="unknown stream 'olora/order_9'; did you mean"):
        open_stream("olora/order_9", WORDS)


@needs_data
@pytest.mark.parametrize("name", [n for n in STREAMS if not n.startswith(("text/", "olora/"))])  # theirs: own tests
def test_every_stream_opens_with_a_few_rows(name):
    """Every stage teaches evals that are there, its rows are arrays of one shape for the whole stream."""
    info = STREAMS[name]
    stream = open_stream(name, WORDS, Settings(window=1024, rows=6, test_rows=4))
    ids = [e.id for e in stream.evals]
    assert len(set(ids)) == len(ids) and len(stream.stages) == len(info.stages)
    shapes = set()
    for stage in stream.stages:
        assert set(stage.evals) <= set(ids) and len(stage.train) > 0
        shapes.add(json.dumps({k: v.shape for k, v in stage.train[0].items()}))
    assert len(shapes) == 1
    assert all(e.n > 0 and e.role in ROLES for e in stream.evals)


@pytest.mark.slow
@needs_data
@pytest.mark.parametrize("name", STREAMS)
def test_every_stream_runs(name, tmp_path):
    """Two steps a stage by an untrained byte decoder, and everything measured before and after."""
    sets = {"stream": name, "model": "tiny", "rows": 4, "test_rows": 2, "window": 768, "batch_size": 2}
    if name.startswith("refinement/"):
        sets["settings"] = '{"steps": 3, "eval_every": 1}'
    out = tmp_path / "out"
    words = [w for k, v in sets.items() for w in ("--set", f"{k}={v}")]
    assert main(["run", "scenario", *words, "--out", str(out)]) == 0
    matrix = json.loads((out / "matrix.json").read_text())
    last = set(matrix["stages"][-1]["evals"])  # a stream of queries asks those of its last step alone
    asked = [v for e, v in zip(matrix["evals"], matrix["rows"][-1]) if e["id"] in last or e["role"] != "task"]
    assert len(matrix["rows"]) == len(matrix["stages"]) and None not in asked
