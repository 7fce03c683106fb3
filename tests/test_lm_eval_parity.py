"""Multiple choice and perplexity on SmolLM2-135M-Instruct, item for item as lm-evaluation-harness has them.

The harness reads local task files, and the weights as `jaxcl` writes them for transformers; both sides get the same
rows. About four minutes on two cores.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from jaxcl.core.types import Clock
from jaxcl.core.view import View
from jaxcl.data.jsonl import data_folder, read_rows
from jaxcl.evaluate.choice import multiple_choice
from jaxcl.evaluate.general import Draw, choice_rows, mmlu_rows
from jaxcl.evaluate.nll import text_nll
from jaxcl.metrics.pooling import pooled
from jaxcl.models import fetch
from jaxcl.models.export_hf import write_hf

pytestmark = [pytest.mark.parity, pytest.mark.weights, pytest.mark.slow]
lm_eval = pytest.importorskip("lm_eval")
torch = pytest.importorskip("torch")

NAME, WINDOW, ITEMS, TEXTS = "smollm2-135m-instruct", 256, 40, 3
SETS = ("ARC-Challenge", "openbookqa", "mmlu")
CHOICE_TASK = """
task: {task}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{context}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
TEXT_TASK = """
task: {task}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: text
metric_list: [{{metric: word_perplexity}}, {{metric: byte_perplexity}}, {{metric: bits_per_byte}}]
"""


@pytest.fixture(scope="module")
def model():
    if not os.environ.get("JAXCL_DATA"):
        pytest.skip("JAXCL_DATA names no folder of data")
    if not fetch.find(NAME):
        pytest.skip(f"{NAME} is not in the cache: jaxcl fetch {NAME}")
    return fetch.load(NAME)


@pytest.fixture(scope="module")
def rows(model) -> dict[str, list[dict]]:
    words, draw = model[2], Draw(ITEMS, 0, 2)
    found = {}
    for name in SETS[:2]:
        path = data_folder("commonsense") / name / "test.jsonl.gz"
        found[name] = choice_rows(name, draw.some(read_rows(path)), str(path))
    test, dev = (read_rows(data_folder("mmlu") / f"{split}.jsonl.gz", "mcq") for split in ("test", "dev"))
    found["mmlu"] = mmlu_rows(draw.spread(test), dev, words, WINDOW, draw.shots)
    found["text"] = read_rows(data_folder("text_domains") / "wikipedia/test.jsonl.gz", "text")[:TEXTS]
    return found


@pytest.fixture(scope="module")
def theirs(model, rows, tmp_path_factory) -> dict[str, list[dict]]:
    """{task: the harness's samples in the rows' order}, and its numbers under ``results``."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    folder: Path = tmp_path_factory.mktemp("harness")
    given, params, words, _ = model
    (folder / "model").mkdir()
    write_hf(folder / "model", given.spec, params, words)
    for task, records in rows.items():
        file = folder / f"{task}.json"
        file.write_text("\n".join(map(json.dumps, records)))
        form = TEXT_TASK if task == "text" else CHOICE_TASK
        (folder / f"{task}.yaml").write_text(form.format(task=f"local_{task}", file=file))
    kw = {"dtype": "float32", "device": "cpu", "batch_size": 8, "max_length": WINDOW}
    side = HFLM(str(folder / "model"), **kw, prefix_token_id=words.eos_id)
    names = [f"local_{task}" for task in rows]
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    done = lm_eval.simple_evaluate(side, tasks=names, task_manager=manager, log_samples=True, bootstrap_iters=0)
    samples = {t: sorted(done["samples"][f"local_{t}"], key=lambda s: s["doc_id"]) for t in rows}
    return {**samples, "results": done["results"]}


@pytest.fixture(scope="module")
def view(model) -> View:
    given, params, _, _ = model
    return View(given).at(given.spec, params, {}, {}, Clock.at())


def quiet(done: int, total: int) -> None:
    pass


@pytest.mark.parametrize("task", SETS)
def test_every_item_is_as_the_harness_has_it(model, rows, theirs, view, task):
    made = multiple_choice(task, rows[task], model[2], window=WINDOW, batch_size=8)
    items = {e.metric: e.run(view, quiet) for e in made}
    logs = made[0].run.args[0](view, quiet)
    assert len(theirs[task]) == ITEMS == len(rows[task])
    for n, (row, sample) in enumerate(zip(rows[task], theirs[task])):
        assert sample["doc"]["id"] == row["id"]
        wanted = np.array([float(one[0]) for one in sample["filtered_resps"]])
        np.testing.assert_allclose(logs[n][0], wanted, atol=1e-3)
        sizes = np.array([len(choice) for choice in row["choices"]])
        for metric, letters in (("acc", np.ones_like(sizes)), ("acc_norm", sizes)):
            assert items[metric][n]["score"] == sample[metric]
            assert items[metric][n]["prediction"] == row["choices"][int(np.argmax(wanted / letters))]
    for metric, found in items.items():
        assert pooled(found) == pytest.approx(theirs["results"][f"local_{task}"][f"{metric},none"], abs=1e-12)
    assert len({i["prediction"] for i in items["acc"]}) > 1


def test_perplexity_is_the_harness_s(model, rows, theirs, view):
    """Windows of `WINDOW` tokens that are read; the last one is filled up from the front."""
    longest = max(len(model[2].encode(row["text"])) for row in rows["text"])
    assert longest > 2 * WINDOW
    kw = {"window": WINDOW + 1, "batch_size": 4, "fill_last": True}
    for metric in ("word_perplexity", "bits_per_byte"):
        e = text_nll("t", rows["text"], model[2], metric=metric, **kw)
        items = e.run(view, quiet)
        got, wanted = pooled(items, e.pool), theirs["results"]["local_text"][f"{metric},none"]
        # a perplexity is the exponential of six nats a word: float32 leaves it less sure than the nats are
        assert got == pytest.approx(wanted, rel=1e-4 if metric == "word_perplexity" else 1e-5)
        if metric == "bits_per_byte":
            own = [-float(s["filtered_resps"][0]) / np.log(2) / len(s["doc"]["text"].encode()) for s in theirs["text"]]
            np.testing.assert_allclose([i["score"] for i in items], own, rtol=1e-5)
            assert 2**got == pytest.approx(theirs["results"]["local_text"]["byte_perplexity,none"], rel=1e-5)
    plain = text_nll("t", rows["text"], model[2], metric="bits_per_byte", **kw | {"fill_last": False})
    assert pooled(plain.run(view, quiet), plain.pool) > got  # the last window had less to go by
