"""Runs on one device and on eight emulated ones; called as a process of its own by the tests of meshes.

    mesh_runs.py OUT                what is run always: a few sets of methods, moves between meshes, MoFO
    mesh_runs.py OUT matrix NAME    one row of test_methods_common.ROWS on every mesh

Eight devices must be asked for before jax starts, and would slow every other test down.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
from support import SPEC, STACK, run, weights

from jaxcl.core.loop import Loop
from jaxcl.core.sharding import Placement, make_mesh
from jaxcl.errors import Interrupted
from jaxcl.methods.agem import agem
from jaxcl.methods.ewc import ewc
from jaxcl.methods.lwf import lwf
from jaxcl.methods.olora import olora
from jaxcl.methods.replay import replay
from jaxcl.methods.si import si
from jaxcl.models.decoder import decoder
from jaxcl.transforms.mofo import scale_by_mofo

MESHES = {"one": {"data": 1}, "many": {"data": 2, "fsdp": 2, "model": 2}}
EVERY = {"one": {"data": 1}, "data": {"data": 8}, "fsdp": {"fsdp": 8}, "tensor": {"data": 2, "model": 4}}
SETS = {
    "olora+replay": lambda: [olora(rank=2, alpha=4.0, dropout=0.1, max_stages=2), replay(ratio=0.5)],
    "ewc+si+lwf+agem": lambda: [ewc(strength=50.0, rows=8), si(strength=1.0), lwf(), agem(capacity=8)],
}
TX = optax.sgd(0.05, momentum=0.9)
LARGE = SPEC.width * SPEC.mlp * 4 // 2  # bytes, half an MLP's kernel: nothing of this size may be on every device


def compared(out: Path, found: dict, sets: dict, meshes: dict) -> None:
    """Each set of methods on each mesh, over two stages."""
    for name, methods in sets.items():
        for mesh, shape in meshes.items():
            done = run(methods(), out / f"{name}-{mesh}", n=2, mesh=shape, tx=TX)
            keep(found, f"{name}/{mesh}", done)


def keep(found: dict, name: str, done) -> None:
    found |= {f"{name}/params/{k}": v for k, v in done.params.items()}
    found[f"{name}/losses"] = done.losses()
    arrays = jax.tree_util.tree_leaves_with_path((done.loop.now.world.params, done.loop.now.owns))
    held = [
        jax.tree_util.keystr(path) for path, x in arrays
        if isinstance(x, jax.Array) and x.nbytes >= LARGE and x.sharding.num_devices > 1 and x.is_fully_replicated
    ]  # fmt: skip
    found[f"{name}/replicated"] = np.array([*held, *done.loop.compiled.replicated(LARGE)], np.str_)
    spread = [k for k, v in done.loop.now.world.params.items() if not v.sharding.is_fully_replicated]
    found[f"{name}/spread"] = np.array([len(spread), len(done.params)])


def moved(out: Path, found: dict) -> None:
    """Starts on one mesh, is interrupted in the second stage, and goes on on the other."""
    method = lambda: [ewc(strength=50.0, rows=8)]  # noqa: E731
    for first, second in (("one", "many"), ("many", "one")):
        where = out / f"moved-{first}"
        with interrupted_after(5):
            try:
                run(method(), where, n=2, mesh=MESHES[first], tx=TX, rows=32)
            except Interrupted:
                pass
            else:
                raise AssertionError("the run was not interrupted")
        keep(found, f"moved/{second}", run(method(), where, n=2, mesh=MESHES[second], tx=TX, rows=32))
    keep(found, "moved/unbroken", run(method(), out / "unbroken", n=2, mesh=MESHES["one"], tx=TX, rows=32))


class interrupted_after:
    """As if SIGTERM came while this step was logged."""

    def __init__(self, steps: int):
        self.steps, self.log = steps, Loop._log

    def __enter__(self) -> None:
        def log(loop, pending, i, phase):
            self.log(loop, pending, i, phase)
            if loop.step + (pending[0] if pending else 0) >= self.steps:
                loop.stop.requested = "SIGTERM"

        Loop._log = log

    def __exit__(self, *_) -> None:
        Loop._log = self.log


def mofo(found: dict) -> None:
    """One update from the same gradients, with many ties: placed on one device and spread over eight."""
    spec = dataclasses.replace(SPEC, segments=STACK)
    params = weights(spec)
    rng = np.random.default_rng(0)
    grads = {k: jnp.asarray(rng.integers(-4, 5, v.shape), jnp.float32) for k, v in params.items()}
    tx = scale_by_mofo(fraction=0.1)
    for name, shape in MESHES.items():
        place = Placement(make_mesh(shape), decoder(spec).axes(spec, params))
        p, g = place.put(params), place.put(grads)
        state = jax.jit(tx.init, out_shardings=place.tree(jax.eval_shape(tx.init, p)))(p)
        updates, _ = jax.jit(tx.update, out_shardings=(place.tree(p), place.tree(state)))(g, state, p)
        found |= {f"mofo/{name}/params/{k}": np.asarray(v) for k, v in updates.items()}
    found |= {f"mofo/spread/{k}": np.array(not v.sharding.is_fully_replicated) for k, v in updates.items()}


if __name__ == "__main__":
    out, results = Path(sys.argv[1]), {}
    if sys.argv[2:3] == ["matrix"]:
        from test_methods_common import ROWS

        compared(out, results, {"row": lambda: [ROWS[sys.argv[3]]()]}, EVERY)
    else:
        compared(out, results, SETS, MESHES)
        moved(out, results)
        mofo(results)
    np.savez(out / "found.npz", **{k.replace("/", "|"): v for k, v in results.items()})
    print(json.dumps({"devices": jax.device_count()}))
