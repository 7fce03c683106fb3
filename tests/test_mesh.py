"""One device and eight emulated ones agree, for every method; a run moves from one mesh to another."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support import relative
from test_methods_common import ROWS

SCRIPT = Path(__file__).with_name("mesh_runs.py")


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, np.ndarray]:
    return runs(tmp_path_factory.mktemp("mesh"))


def runs(out: Path, *what: str) -> dict[str, np.ndarray]:
    """What a process with eight devices found, see mesh_runs.py."""
    above = [str(SCRIPT.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(above)}
    done = subprocess.run([sys.executable, str(SCRIPT), str(out), *what], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {"devices": 8}
    with np.load(out / "found.npz", allow_pickle=False) as file:
        return {k.replace("|", "/"): file[k] for k in file.files}


def params(found: dict, name: str) -> dict[str, np.ndarray]:
    start = f"{name}/params/"
    return {k.removeprefix(start): v for k, v in found.items() if k.startswith(start)}


def agree(found: dict, methods: str, mesh: str) -> None:
    one, many = f"{methods}/one", f"{methods}/{mesh}"
    # The absolute part is for GRPO, whose first loss is a sum of advantages that is 0 but for rounding.
    np.testing.assert_allclose(found[f"{many}/losses"], found[f"{one}/losses"], rtol=1e-5, atol=1e-6)
    assert relative(params(found, many), params(found, one)) < 1e-5


@pytest.mark.parametrize("methods", ["olora+replay", "ewc+si+lwf+agem"])
def test_one_device_and_eight_agree(found, methods):
    spread, keys = found[f"{methods}/many/spread"]
    assert spread > keys / 2, "weights are really spread over the mesh"
    assert found[f"{methods}/one/spread"][0] == 0
    agree(found, methods, "many")


@pytest.mark.parametrize("methods", ["olora+replay", "ewc+si+lwf+agem"])
def test_nothing_as_large_as_a_kernel_is_on_every_device(found, methods):
    """Neither in what the compiled steps take and give, nor among weights and memories afterwards."""
    assert found[f"{methods}/many/replicated"].tolist() == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_every_method_on_every_mesh(tmp_path, name):
    """Rows over eight devices, weights over eight (fsdp), rows over two by heads and hidden units over four."""
    found = runs(tmp_path, "matrix", name)
    for mesh in ("data", "fsdp", "tensor"):
        agree(found, "row", mesh)
    rows = "['book']"  # GRACE's memory: 64 rows here, more than a kernel of this tiny model, whatever the model's size
    assert [path for path in found["row/fsdp/replicated"] if rows not in path] == []
    assert len(found["row/data/replicated"]) > 0, "what is sharded by rows alone is on every device"


@pytest.mark.parametrize("onto", ["one", "many"])
def test_a_run_goes_on_on_another_mesh(found, onto):
    unbroken, moved = "moved/unbroken", f"moved/{onto}"
    assert len(found[f"{moved}/losses"]) == len(found[f"{unbroken}/losses"]) == 8
    np.testing.assert_allclose(found[f"{moved}/losses"], found[f"{unbroken}/losses"], rtol=1e-5)
    assert relative(params(found, moved), params(found, unbroken)) < 1e-5


def test_mofo_selects_the_same_entries_on_a_sharded_leaf(found):
    one, many = params(found, "mofo/one"), params(found, "mofo/many")
    spread = [k.removeprefix("mofo/spread/") for k, v in found.items() if k.startswith("mofo/spread/") and v]
    assert any(":" in k for k in spread) and any(":" not in k for k in spread)
    for k in one:
        assert np.array_equal(one[k], many[k]), k
    chosen = {k: np.count_nonzero(one[k]) for k in spread if k.endswith("kernel")}  # MoFO moves norms whole
    assert chosen and all(chosen[k] < one[k].size / 2 for k in chosen)
