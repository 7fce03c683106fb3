"""What the README shows runs, and its table names every method."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jaxcl.registry import METHODS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_twenty_lines_run(tmp_path):
    code, *_others = re.findall(r"```python\n(.*?)```", README, re.DOTALL)  # the others load an export in transformers
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    matrix = json.loads((tmp_path / "runs/two-methods/matrix.json").read_text())
    before, rows = matrix["row0"], matrix["rows"]
    assert len(rows) == 2
    assert rows[0][0] < before[0] and rows[1][1] < rows[0][1]  # nats: each stage learned something


def test_the_table_names_every_method():
    assert set(re.findall(r"^\| `(\w+)` \|", README, re.MULTILINE)) == set(METHODS)


BY_TASK = ("ia3", "prompt_tuning", "prefix_tuning", "bottleneck")


def test_the_table_names_the_slots_of_every_method():
    from jaxcl.registry import constructor

    for name, slots in re.findall(r"^\| `(\w+)` \| [^|]* \| ([^|]*) \|", README, re.MULTILINE):
        if METHODS[name]["kind"] == "transform":
            continue
        written = {"generative_replay": {"labels": True}, "lamol": {"labels": True}}
        more = {
            "lora": {"merged": True}, "ia3": {"merged": True}, "prompt_tuning": {"hidden": 8},
            "lwf": {"teacher": "topk"}, "ogd": {"exact": True}, "mir": {"score": "s2"},
            "l2_sp": {"form": "decoupled", "rate": 0.1, "anchor": "previous"}, "replay": {"mixing": "joint"}, **written,
        }  # fmt: skip
        options = [{}, more.get(name, {}), {"per_task": True} if name in BY_TASK else {}]
        filled = {slot for o in options for slot in constructor(name)(**o).slots}
        assert set(re.findall(r"`(\w+)`", slots)) == filled, name


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#:]+)\)", README))
def test_links_lead_somewhere(link):
    assert (ROOT / link).exists()
