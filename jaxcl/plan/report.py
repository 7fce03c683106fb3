"""One plan: the step compiled for a topology, and what it says about memory, work, messages and time.

All bytes and seconds are of one chip and one step. The time is a roofline (Williams et al. 2009): the longest part
hides the others, and nothing waits, so it is the least that a step can take. `FORMULAS` travel with every plan.
"""

from __future__ import annotations

import dataclasses
import math
import re
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.errors import JaxRuntimeError
from jax.sharding import Mesh

from jaxcl.core.compiled import jitted_step
from jaxcl.core.experiment import Experiment
from jaxcl.core.sharding import mesh_sizes
from jaxcl.errors import RequestError, RunFailed
from jaxcl.plan import chips, hlo
from jaxcl.plan.draft import Draft, draft
from jaxcl.plan.flops import flops
from jaxcl.plan.traffic import traffic

MODULE = "train_step"
"""In the name of the step's module."""
CROSS = ("cross/attn/k/kernel", "cross/attn/v/kernel")  # of a T5's decoder: they read the source
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
FORMULAS = {
    "compute_s": "flops.per_chip / peak.flops",
    "memory_s": "bytes that the program reads and writes (hbm_bytes) / peak.bandwidth",
    "collectives_s": "bytes that a chip sends (sent_bytes) / peak.ici",
    "step_s": "max(compute_s, memory_s, collectives_s)",
    "mfu": "flops.useful / (step_s * devices * peak.flops)",
    "flops.useful": "sum over kernels of (6 if trained, 4 if frozen) * size * tokens that meet it",
}
_NEEDS = re.compile(r"\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)")
_USED = re.compile(r"Used ([\d.]+)([KMGT]?)i?B? of ([\d.]+)([KMGT]?)i?B? hbm")
Plan = dict[str, Any]


def plan(build: Callable[[], Experiment], topology: str, stage: int | None = None) -> Plan:
    """The plan of an experiment's step on a topology such as ``v5e:4x4``; `chips.prepare` must have been called before
    jax was imported. stage: whose first phase (from 0); None is the second, where memories of a first one exist, or
    the first where there is no other or a method's host code needs the numbers of arrays to get there.

    RequestError: an unknown topology, a mesh with another number of chips, see `draft`. RunFailed: XLA fails otherwise
    than for want of memory.
    """
    chip, sizes = chips.parsed(topology)
    devices = chips.devices(topology)
    chip = shared(chip, len(devices) // math.prod(sizes))
    started = time.monotonic()
    drawn, note = drafted(build, lambda exp: mesh_on(exp, devices, topology), stage)
    traced = jitted_step(
        drawn.exp, drawn.state, drawn.fixed, drawn.batch, drawn.phase, drawn.spec, drawn.placement
    ).trace(drawn.state, drawn.fixed, drawn.batch, np.uint32(0))
    found: Plan = {
        "topology": topology,
        "chip": chip.name,
        "peak": {k: getattr(chip, k) for k in ("hbm", "flops", "bandwidth", "ici")},
        "devices": len(devices),
        "mesh": dict(drawn.placement.mesh.shape),
        "stage": int(drawn.stage),
        "phase": drawn.phase.name,
        "batch": batch_of(drawn),
        "notes": note,
        "state": parts_of(drawn),
        "largest": largest(drawn),
        "flops": work_of(drawn, flops(traced.jaxpr), len(devices)),
    }
    try:
        compiled, text = compile_with_text(traced)
    except JaxRuntimeError as e:
        return found | {"fits": False, "memory": shortage(e, chip), "seconds": round(time.monotonic() - started, 1)}
    program = hlo.parse(text)
    found["memory"] = memory_of(compiled, chip)
    found["fits"] = found["memory"]["total"] <= chip.hbm
    found["collectives"] = {k: v._asdict() for k, v in hlo.collectives(program, len(devices)).items()}
    found["roofline"] = roofline(found, traffic(program), chip)
    return found | {"seconds": round(time.monotonic() - started, 1)}


def compile_with_text(traced: Any) -> tuple[Any, str]:
    """(the compiled step, its optimized HLO). The text is what the compiler itself writes down: for newer chips it has
    operations that cannot be read back from the executable, which is what ``as_text`` does."""
    with tempfile.TemporaryDirectory(prefix="jaxcl-plan-") as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True, "xla_dump_hlo_module_re": MODULE}
        compiled = traced.lower().compile(compiler_options=options)
        written = [f.read_text(encoding="utf-8") for f in Path(folder).glob(f"*{MODULE}*.after_optimizations.txt")]
        return compiled, written[0] if written else compiled.as_text()  # nothing: it came from a cache


def drafted(
    build: Callable[[], Experiment], mesh_of: Callable[[Experiment], Mesh], stage: int | None
) -> tuple[Draft, list[str]]:
    """The draft of the stage that was asked for, or of the latest of the first two that can be had; and what to say."""
    if stage is not None:
        return draft(build, mesh_of, stage), []
    try:
        return draft(build, mesh_of, 1), []
    except RequestError as e:
        try:
            first = draft(build, mesh_of, 0)
        except RequestError:
            raise e from None
        return first, [f"the first stage is planned: {e}"]


def mesh_on(exp: Experiment, devices: list[Any], topology: str) -> Mesh:
    """The experiment's mesh over the topology's devices. RequestError where it has another number of them."""
    shape = mesh_sizes(exp.mesh, len(devices))
    if math.prod(shape.values()) != len(devices):
        raise RequestError(
            f"the mesh {shape} has {math.prod(shape.values())} devices, {topology} has {len(devices)}; "
            "accepted: sizes whose product is that, one of them may be -1"
        )
    axes = (jax.sharding.AxisType.Auto,) * len(shape)
    return jax.make_mesh(tuple(shape.values()), tuple(shape), axis_types=axes, devices=devices)


def shared(chip: chips.Chip, cores: int) -> chips.Chip:
    """What one device has of a chip that the topology reports as several (TPU v4 without its megacore)."""
    share = {k: getattr(chip, k) / cores for k in ("hbm", "flops", "bandwidth", "ici")}
    return chip if cores == 1 else dataclasses.replace(chip, name=f"{chip.name}, 1 of {cores} cores", **share)


def batch_of(drawn: Draft) -> dict[str, int]:
    """Rows, tokens and targets of a step over all chips; over how many chips the rows are spread."""
    rows, window = drawn.batch["tokens"].shape
    spread = rows // drawn.batch["tokens"].sharding.shard_shape((rows, window))[0]
    targets = drawn.batch["targets_at"].shape[1] if "targets_at" in drawn.batch else window
    sizes = {"rows": rows, "tokens": rows * window, "targets": rows * targets}
    return {**sizes, "spread": spread, "accumulate": drawn.exp.accumulate}


def per_chip(leaf: Any) -> int:
    """Bytes of an array's part on one chip, without the padding of its layout."""
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def parts_of(drawn: Draft) -> dict[str, int]:
    """Bytes per chip of what a step is given, by kind."""
    parts = {
        "trained": drawn.state.train,
        "optimizer": drawn.state.opt,
        "frozen": drawn.fixed.frozen,
        "memories": (drawn.state.live, drawn.fixed.own),
        "batch": drawn.batch,
    }
    return {name: sum(map(per_chip, jax.tree.leaves(tree))) for name, tree in parts.items()}


def largest(drawn: Draft, most: int = 8) -> list[dict[str, Any]]:
    """The arrays with the most bytes per chip."""
    named = {"train": drawn.state.train, "opt": drawn.state.opt, "live": drawn.state.live}
    named |= {"frozen": drawn.fixed.frozen, "own": drawn.fixed.own, "batch": drawn.batch}
    leaves = jax.tree_util.tree_leaves_with_path(named)
    top = sorted(leaves, key=lambda x: -per_chip(x[1]))[:most]
    return [
        {
            "name": jax.tree_util.keystr(path, simple=True, separator="/"),
            "shape": list(leaf.shape),
            "dtype": str(leaf.dtype),
            "spec": str(leaf.sharding.spec).removeprefix("PartitionSpec"),
            "bytes": per_chip(leaf),
        }
        for path, leaf in top
    ]


def work_of(drawn: Draft, total: int, devices: int) -> dict[str, int]:
    """FLOPs of a step over all chips, of one chip when they share them evenly, and the useful ones (see above)."""
    batch = batch_of(drawn)
    params: Mapping[str, Any] = {**drawn.fixed.frozen, **drawn.state.train}
    useful = 0
    for path, leaf in params.items():
        if not path.endswith("/kernel") or (path == "embed/kernel" and "head/kernel" in params):
            continue
        written = path.startswith("decoder/") and not path.endswith(CROSS)
        tokens = batch["targets" if written or path in ("embed/kernel", "head/kernel") else "tokens"]
        useful += (6 if path in drawn.state.train else 4) * leaf.size * tokens
    return {"step": total, "per_chip": total // devices, "useful": useful}


def memory_of(compiled: Any, chip: chips.Chip) -> dict[str, Any]:
    """Bytes per chip as XLA allots them; ``total`` counts what outputs share with arguments once."""
    m = compiled.memory_analysis()
    found = {
        "arguments": m.argument_size_in_bytes,
        "outputs": m.output_size_in_bytes,
        "aliased": m.alias_size_in_bytes,
        "temporaries": m.temp_size_in_bytes,
        "code": m.generated_code_size_in_bytes,
    }
    total = found["arguments"] + found["outputs"] - found["aliased"] + found["temporaries"] + found["code"]
    return {**found, "total": total, "capacity": int(chip.hbm)}


def shortage(e: JaxRuntimeError, chip: chips.Chip) -> dict[str, Any]:
    """What XLA says it would need, where it ran out of memory. RunFailed with its first line if it failed otherwise."""
    text = str(e)
    said = _USED.search(text) or _NEEDS.search(text)
    if said is None:
        if "RESOURCE_EXHAUSTED" not in text:
            raise RunFailed(f"XLA cannot compile the step: {text.splitlines()[0]}") from e
        return {"total": None, "capacity": int(chip.hbm), "says": text.splitlines()[0]}
    need, unit, available, other = said.groups()
    total, left = float(need) * UNITS[unit], float(available) * UNITS[other]
    return {"total": int(total), "available": int(left), "capacity": int(chip.hbm), "says": text.splitlines()[0]}


def roofline(found: Plan, moved: int, chip: chips.Chip) -> dict[str, Any]:
    """Seconds of a step by the formulas above, and which part decides."""
    sent = sum(v["bytes"] for v in found["collectives"].values())
    times = {
        "compute": found["flops"]["per_chip"] / chip.flops,
        "memory": moved / chip.bandwidth,
        "collectives": sent / chip.ici,
    }
    bound = max(times, key=lambda k: times[k])
    step = times[bound]
    useful = found["flops"]["useful"] / (step * found["devices"] * chip.flops)
    seconds = {f"{k}_s": v for k, v in times.items()}
    known = {"hbm_bytes": moved, "sent_bytes": sent, "formulas": FORMULAS}
    return {**seconds, "step_s": step, "bound": bound, "mfu": useful, **known}
