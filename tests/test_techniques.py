"""The table of techniques: enough text of every kind, every row can begin, and a small run becomes a line."""

from __future__ import annotations

import importlib.util
import json
import sys

import pytest

from jaxcl import experiment_files
from jaxcl.core.between import Between
from jaxcl.core.progress import Reporter
from jaxcl.core.run import train
from jaxcl.registry import METHODS

FOLDER = experiment_files.packaged() / "techniques"
SMALL = {"rows": 16, "epochs": 1.0, "base_steps": 2, "width": 16, "test_rows": 2}


@pytest.fixture(scope="module")
def module():
    return experiment_files.load("techniques")


@pytest.fixture
def table(module, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location("techniques_table", FOLDER / "table.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def test_every_kind_has_text_enough_and_none_is_of_two_parts(module):
    cfg = module.Config()
    for name, read in module.kinds.ALL.items():
        dealt = module.text.deal(read())
        for documents, count in ((dealt.base, module.PIECES), (dealt.train, cfg.rows), (dealt.test, cfg.test_rows)):
            assert len(module.text.excerpts(documents, cfg.window - 1, count)) == count, name
        assert not set(dealt.test) & {*dealt.train, *dealt.base}


def test_the_rows_are_the_taxonomy_and_ten_compositions(module):
    choices = module.choices.CHOICES
    made = {name: [m.name for m in choice.make()] for name, choice in choices.items()}
    alone = {methods[0] for name, methods in made.items() if len(methods) == 1} | {"mofo"}
    taxonomy = {"replay", "mir", "der", "generative_replay", "lamol", "l2_sp", "ewc", "si", "mas", "feature_reg", "lwf"}
    taxonomy |= {"agem", "gem", "ogd", "mofo", "lora", "inclora", "olora", "inflora", "lora_experts", "bottleneck"}
    taxonomy |= {"ia3", "prompt_tuning", "prefix_tuning", "progressive_prompts", "hat", "llama_pro"}
    assert taxonomy <= alone and taxonomy <= METHODS.keys()
    assert sum(choice.group == "compositions" for choice in choices.values()) == 10
    assert len(module.kinds.KINDS) == 8


def test_a_small_run_is_a_line_of_the_table(module, table, tmp_path, monkeypatch):
    monkeypatch.setenv("JAXCL_CACHE", str(tmp_path / "cache"))
    for row in ("finetune", "olora + replay"):
        cfg = module.Config(row=row, order="reversed", **SMALL)
        path = table.runs(tmp_path, row)[0, "reversed"]
        train(module.build(cfg), path, reporter=Reporter(quiet=True))
        (path.parent / "step.json").write_text('{"ratio": 1.5}')
    lines = {row: table.line(tmp_path, row, 1000, 128.0) for row in ("finetune", "olora + replay")}
    found = json.loads((table.runs(tmp_path, "olora + replay")[0, "reversed"] / "metrics.json").read_text())
    cells = dict(zip(table.HEAD, lines["olora + replay"], strict=True))
    assert cells["AA `aa`"] == f"{found['metrics']['aa']['value']:.3f}" and float(cells["AA `aa`"]) < 0
    assert float(cells["passes"]) > float(dict(zip(table.HEAD, lines["finetune"], strict=True))["passes"]) == 1.0
    assert cells["stored"].endswith("KiB") and cells["extra parameters"] != "0" and cells["step"] == "1.50"


def test_means_have_students_intervals(table):
    assert table.mean([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == f"3.500 ± {2.571 * 3.5**0.5 / 6**0.5:.3f}"
    assert table.mean([2.0]) == "2.000" and sys.modules["choices"].STAGES == 8


@pytest.mark.slow
def test_every_row_can_begin(module, tmp_path, monkeypatch):
    monkeypatch.setenv("JAXCL_CACHE", str(tmp_path))
    for row in module.choices.CHOICES:
        between = Between(module.build(module.Config(row=row, **SMALL | {"width": 64})), lambda: None)
        between.begin(0)
        between.plan(0)
