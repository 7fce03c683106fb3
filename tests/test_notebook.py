"""experiments/colab.ipynb runs from top to bottom at small settings and without network; it is kept without outputs."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="no nbformat (pip install 'jaxcl[dev]')")
nbclient = pytest.importorskip("nbclient", reason="no nbclient (pip install 'jaxcl[dev]')")
pytest.importorskip("ipykernel", reason="no ipykernel (pip install 'jaxcl[dev]')")

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "experiments" / "colab.ipynb"


@pytest.fixture(scope="module")
def book():
    return nbformat.read(NOTEBOOK, as_version=4)


def test_it_is_valid_and_has_no_outputs(book):
    nbformat.validate(book)
    ran = [c for c in book.cells if c.cell_type == "code" and (c.outputs or c.execution_count)]
    assert ran == [] and len(book.cells) > 10


def test_it_runs_at_small_settings(book, tmp_path, monkeypatch):
    """The kernel must be this Python, whatever kernels the machine has; what is installed is not touched."""
    kernel = tmp_path / "kernels" / "kernels" / "python3"
    kernel.mkdir(parents=True)
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {"argv": argv, "display_name": "Python 3", "language": "python"}
    (kernel / "kernel.json").write_text(json.dumps(spec))
    work = tmp_path / "work"
    work.mkdir()
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    settings = {
        "JUPYTER_PATH": tmp_path / "kernels",
        "JUPYTER_RUNTIME_DIR": tmp_path / "runtime",
        "IPYTHONDIR": tmp_path / "ipython",
        "JAXCL_NOTEBOOK_SMALL": "1",
        "JAXCL_CACHE": tmp_path / "cache",
        "PYTHONPATH": os.pathsep.join(paths),
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.delenv("JAXCL_SOURCE", raising=False)
    client = nbclient.NotebookClient(
        book, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(work)}}
    )
    done = client.execute()
    said = "".join(o.get("text", "") for c in done.cells if c.cell_type == "code" for o in c.outputs)
    assert "runs/real is finished" in said and "report: runs/real-report/report.html" in said
    matrix = json.loads((work / "runs/real/matrix.json").read_text())
    assert [s["name"] for s in matrix["stages"]] == ["odd", "large"] and len(matrix["rows"]) == 2
    assert all(0 <= x <= 1 for row in (matrix["row0"], *matrix["rows"]) for x in row)
    demo = json.loads((work / "runs/demo/sequential/matrix.json").read_text())
    assert len(demo["rows"]) == 4 and demo["rows"][-1] != demo["row0"]
    shown = done.cells[-2].outputs[0]["data"]["text/html"]
    assert "<iframe" in shown and "odd" in shown
