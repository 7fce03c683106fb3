"""Runs on one device and on eight emulated ones; called as a process of its own by the tests of meshes.

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
from jaxcl.methods.ewc import ewc
from jaxcl.methods.olora import olora
from jaxcl.methods.replay import replay
from jaxcl.models.decoder import decoder
from jaxcl.transforms.mofo import scale_by_mofo

MESHES = {"one": {"data": 1}, "many": {"data": 4, "model": 2}}
SETS = {
    "olora+replay": lambda: [olora(rank=2, alpha=4.0, dropout=0.0, max_stages=2), replay(ratio=0.5)],
    "ewc": lambda: [ewc(strength=50.0, rows=8)],
}
TX = optax.sgd(0.05, momentum=0.9)


def both(out: Path, found: dict) -> None:
    """Each set of methods on each mesh, over two stages."""
    for name, methods in SETS.items():
        for mesh, shape in MESHES.items():
            done = run(methods(), out / f"{name}-{mesh}", n=2, mesh=shape, tx=TX)
            keep(found, f"{name}/{mesh}", done)
            spread = [k for k, v in done.loop.now.world.params.items() if not v.sharding.is_fully_replicated]
            found[f"{name}/{mesh}/spread"] = np.array([len(spread), len(done.params)])


def keep(found: dict, name: str, done) -> None:
    found |= {f"{name}/params/{k}": v for k, v in done.params.items()}
    found[f"{name}/losses"] = done.losses()


def moved(out: Path, found: dict) -> None:
    """Starts on one mesh, is interrupted in the second stage, and goes on on the other."""
    for first, second in (("one", "many"), ("many", "one")):
        where = out / f"moved-{first}"
        with interrupted_after(5):
            try:
                run(SETS["ewc"](), where, n=2, mesh=MESHES[first], tx=TX, rows=32)
            except Interrupted:
                pass
            else:
                raise AssertionError("the run was not interrupted")
        keep(found, f"moved/{second}", run(SETS["ewc"](), where, n=2, mesh=MESHES[second], tx=TX, rows=32))
    keep(found, "moved/unbroken", run(SETS["ewc"](), out / "unbroken", n=2, mesh=MESHES["one"], tx=TX, rows=32))


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
    both(out, results)
    moved(out, results)
    mofo(results)
    np.savez(out / "found.npz", **{k.replace("/", "|"): v for k, v in results.items()})
    print(json.dumps({"devices": jax.device_count()}))
