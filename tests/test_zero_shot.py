"""`jaxcl evaluate` measures what `jaxcl run` measures before training, and nothing else."""

import json

import jax
import pytest
from support import Answers, experiment

from jaxcl.cli import main
from jaxcl.core.run import train
from jaxcl.core.zero_shot import evaluate
from jaxcl.data.stage import Stage
from jaxcl.errors import RequestError
from jaxcl.evaluate.nll import text_nll
from jaxcl.methods.replay import replay
from jaxcl.models.decoder import decoder
from jaxcl.models.spec import tiny
from jaxcl.models.tokenizer import ByteTokenizer

WORDS = ByteTokenizer()
SPEC = tiny(vocab=WORDS.vocab_size, layers=1, width=16, heads=2, kv_heads=1, mlp=32, context=64)


def made(**kw):
    texts = [{"id": str(i), "text": f"document {i} " * (i + 1)} for i in range(4)]
    stages = [Stage("s0", Answers("s0"), ("text",))]
    params = decoder(SPEC).init(SPEC, jax.random.key(0))
    evals = [text_nll("text", texts, WORDS, window=32)]
    return experiment([replay()], spec=SPEC, stages=stages, params=params, evals=evals, steps=1, **kw)


def test_row_0_is_that_of_a_run(tmp_path):
    evaluate(made(), tmp_path / "alone")
    train(made(), tmp_path / "run")
    alone, run = (json.loads((tmp_path / d / "matrix.json").read_text()) for d in ("alone", "run"))
    assert alone["row0"] == run["row0"] != [None] and alone["rows"] == [] and len(run["rows"]) == 1
    names = [p.name for p in (tmp_path / "alone" / "predictions").iterdir()]
    assert names == ["text.row0.jsonl.gz"]
    before, after = ((tmp_path / d / "predictions" / names[0]).read_bytes() for d in ("alone", "run"))
    assert before == after
    assert json.loads((tmp_path / "alone" / "metrics.json").read_text())["partial"]
    assert not (tmp_path / "alone" / "checkpoints").exists()


def test_a_second_call_says_that_it_is_finished_and_another_config_is_refused(tmp_path, capsys):
    evaluate(made(), tmp_path / "out", config={"a": 1})
    evaluate(made(), tmp_path / "out", config={"a": 1})
    assert "is finished" in capsys.readouterr().out
    with pytest.raises(RequestError, match=r"holds a run of another config: config.a is 1 there and 2 here"):
        evaluate(made(), tmp_path / "out", config={"a": 2})
    with pytest.raises(RequestError, match="has no evals"):
        evaluate(experiment([]), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_an_unknown_experiment_is_one_line(capsys):
    assert main(["evaluate", "scenari"]) == 2
    assert "unknown experiment 'scenari'; did you mean 'scenario'?" in capsys.readouterr().err
