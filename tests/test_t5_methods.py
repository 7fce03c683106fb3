"""Every method on a tiny T5: it trains two stages, or is refused in one line before anything is written."""

from __future__ import annotations

import dataclasses
import gzip
import json

import jax
import numpy as np
import pytest
from support import experiment, run, to_numpy
from t5_models import SPECS, drawn, write_base
from test_methods_common import ADAPTERS, DECAY, ROWS

from jaxcl import experiment_files
from jaxcl.core.between import Between
from jaxcl.core.paths import sites
from jaxcl.core.progress import Reporter
from jaxcl.core.run import train
from jaxcl.core.view import View
from jaxcl.data.stage import instruct_source
from jaxcl.errors import RequestError
from jaxcl.evaluate.base import Eval
from jaxcl.evaluate.generation import exact_match
from jaxcl.evaluate.nll import text_nll
from jaxcl.evaluate.ranking import label_ranking
from jaxcl.models.names import is_flipped
from jaxcl.models.t5 import t5
from jaxcl.models.t5_hf import foreign_name, t5_config
from jaxcl.models.t5_spec import T5Spec, tiny_t5
from jaxcl.models.tokenizer import ByteTokenizer

SPEC = T5Spec(vocab=32, width=16, layers=1, heads=2, head_dim=8, mlp=32, gated=True, tied=False)
REFUSED = {
    "generative replay": "a model with an encoder does not write prompts",
    "lamol": "a model with an encoder does not write prompts",
    "inflora": "other tokens in each stack",
    "bottleneck routed": "gives prompts no perplexity",
    "llama_pro": "the layers of a T5Spec cannot be copied",
    "grace": "T5Spec has none",
    "elle": "elle cannot grow a T5Spec",
}
QUICK = ("olora", "replay", "ewc", "grpo", "progressive_prompts")
TRAINED = [name for name in ROWS if name not in REFUSED]


@pytest.mark.parametrize("name", REFUSED)
def test_what_t5_cannot_do_is_refused_before_the_first_step(name):
    between = Between(experiment([make_smaller(name)], spec=SPEC, params=start_of(SPEC)), lambda: None)
    with pytest.raises(RequestError, match=REFUSED[name]):
        between.begin(0)


def start_of(spec: T5Spec) -> dict:
    return drawn(spec, jax.random.key(0))


def make_smaller(name: str):
    """The method of the table; LLaMA Pro for a single layer."""
    from jaxcl.methods.llama_pro import llama_pro

    return llama_pro(groups=1) if name == "llama_pro" else ROWS[name]()


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in TRAINED])
def test_two_stages_of_every_other_method(name, tmp_path):
    done = run([ROWS[name]()], tmp_path / "out", n=2, spec=SPEC, params=start_of(SPEC), tx=DECAY)
    assert np.isfinite(done.losses()).all() and done.losses().size >= 4
    assert done.compilations == len({record["phase"] for record in done.log})
    start, free = to_numpy(start_of(SPEC)), done.loop.now.world.trained
    assert any(not np.array_equal(done.params[k], start.get(k)) for k in free)
    if name not in ADAPTERS:
        return
    sites = {k.removesuffix("/lora_a") for k in free if k.endswith("/lora_a")}
    stacks = ("encoder/layers/0/attn", "decoder/layers/0/attn", "decoder/layers/0/cross/attn")
    assert sites == {f"{at}/{n}" for at in stacks for n in "qv"}, "q and v of all attentions"
    if name != "lora merged":
        assert all(np.array_equal(done.params[k], v) for k, v in start.items()), "the base is as it was"


@pytest.mark.slow
def test_stacked_layers_train_as_single_ones(tmp_path):
    spec = dataclasses.replace(SPEC, layers=2, segments=())
    stacked = dataclasses.replace(spec, segments=((("block",), 2),))
    runs = []
    for i, s in enumerate((spec, stacked)):
        runs.append(run([ROWS["olora"]()], tmp_path / str(i), n=2, spec=s, params=start_of(s), tx=DECAY))
    assert any("/0:2:1/" in k for k in runs[1].params)
    np.testing.assert_allclose(runs[0].losses(), runs[1].losses(), rtol=2e-5)


ITEMS = [
    {"id": str(i), "task": "t", "instruction": "Say it: ", "input": "abcdefgh"[i % 8] * (1 + i % 5), "target": word,
     "labels": ["yes", "no"]}
    for i, word in enumerate(["yes", "no", "no"])
]  # fmt: skip


@pytest.fixture(scope="module")
def view() -> View:
    spec = tiny_t5(layers=1, width=16, heads=2)
    model = t5(spec)
    made = View(model)
    return made.at(spec, start_of(spec), {}, {}, made.clock)


def test_evaluators_ask_what_training_sees(view):
    """The ranking's best label is the one with the smallest nll as a training row; exact match writes an answer."""
    words = ByteTokenizer()
    ranking = label_ranking("r", ITEMS, words, window=48, batch_size=4)
    found = ranking.run(view, lambda done, total: None)
    for item, row in zip(found, ITEMS, strict=True):
        sums = {}
        for label in row["labels"]:
            source = instruct_source("s", [row | {"target": label}], words, window=48, k=6)
            one = {k: v[None] for k, v in source[0].items() if k != "row"}
            sums[label] = float(t5(view.spec).apply(view.spec, view.params, one).nll.sum())
        assert item["prediction"] == min(sums, key=sums.__getitem__)
    written: Eval = exact_match("e", ITEMS, words, window=48, batch_size=4)
    assert len(written.run(view, lambda done, total: None)) == 3


def test_held_out_plain_text_is_refused_in_one_line(view):
    plain = text_nll("n", [{"id": "1", "text": "some text"}], ByteTokenizer(), window=16)
    with pytest.raises(RequestError, match="plain text has no source"):
        plain.run(view, lambda done, total: None)


TASKS = ("dbpedia", "amazon", "yahoo", "agnews")


@pytest.fixture
def at_hand(tmp_path, monkeypatch):
    """A tiny T5's folder, with a little benchmark in JAXCL_DATA."""
    spec = dataclasses.replace(SPECS["v1.1"], vocab=128)
    flipped = {k: np.asarray(v.T if is_flipped(k) else v) for k, v in start_of(spec).items()}
    tensors = {foreign_name(spec, k): v for k, v in flipped.items()}
    for task in TASKS:
        (tmp_path / "olora_benchmark" / task).mkdir(parents=True)
        rows = [
            {"task": task, "id": f"{task}-{i}", "instruction": "Which?\n", "input": f"the cat sat on {i}",
             "target": ("hat", "dog")[i % 2], "labels": ["hat", "dog"]}
            for i in range(8)
        ]  # fmt: skip
        for split in ("train", "test"):
            lines = "\n".join(json.dumps(row | {"id": f"{row['id']}-{split}"}) for row in rows)
            (tmp_path / "olora_benchmark" / task / f"{split}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "olora_benchmark" / "tasks.json").write_text(json.dumps({t: {"category": "TC"} for t in TASKS}))
    monkeypatch.setenv("JAXCL_DATA", str(tmp_path))
    return write_base(tmp_path / "t5", t5_config(spec), tensors)


def test_order_1_on_t5_large_has_the_references_settings(at_hand):
    """Wang et al. 2023: the code's own for orders 1 to 3; on a tiny T5, sites and rows as T5-large would have them."""
    module = experiment_files.load("olora_t5_large")
    cfg = module.Config(model=str(at_hand), eval_batch=4)
    exp = module.build(cfg)
    (method,) = exp.methods
    named = {k: method.hparams[k] for k in ("rank", "alpha", "dropout", "strength", "norm_strength", "targets")}
    assert named == {
        "rank": 8, "alpha": 32.0, "dropout": 0.1, "strength": 0.5, "norm_strength": 0.0, "targets": ["attn/q", "attn/v"]
    }  # fmt: skip
    assert (exp.batch_size, exp.accumulate, exp.epochs, cfg.learning_rate) == (64, 4, 1.0, 1e-3)
    assert (cfg.rows, cfg.test_rows, cfg.window) == (None, None, 512 + 50)
    assert [s.name for s in exp.stages] == list(TASKS) and all(e.metric.startswith("exact_match") for e in exp.evals)
    assert exp.model.spec.remat == "block" and any("/0:2:1/" in k for k in exp.params)
    assert len(sites(exp.params, method.hparams["targets"])) == 6, "q and v of three stacked attentions"
    row = exp.stages[0].train[0]
    first = int(row["targets_at"][0])
    assert row["tokens"].shape == (562,) and first > 10
    text = exp.tokenizer.decode(row["tokens"][:first].tolist())
    assert "cat" in text and exp.tokenizer.decode(row["tokens"][first : first + 3].tolist()).startswith("hat")


@pytest.mark.slow
def test_order_1_runs_on_a_tiny_t5(at_hand, tmp_path):
    """All of it: four stages of O-LoRA in bfloat16, scanned layers, exact match after each."""
    module = experiment_files.load("olora_t5_large")
    cfg = module.Config(model=str(at_hand), eval_batch=4, batch_size=4, accumulate=2, window=96)
    exp = dataclasses.replace(module.build(cfg), mesh={"data": 1})
    loop = train(exp, tmp_path / "out", reporter=Reporter(quiet=True))
    scores = loop.measure.matrix()
    assert len(scores["rows"]) == 4 and all(0 <= v <= 1 for row in scores["rows"] for v in row)
