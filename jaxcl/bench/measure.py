"""`jaxcl bench`: from names of methods to a table of ratios."""

from __future__ import annotations

import dataclasses
import os
import resource
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax

from jaxcl.bench import sides
from jaxcl.bench.running import Looking, Running
from jaxcl.bench.sides import Setting, Side
from jaxcl.bench.turns import in_turn, summary
from jaxcl.core import compile_cache
from jaxcl.core.compiled import StepCache
from jaxcl.core.experiment import Experiment
from jaxcl.errors import RequestError
from jaxcl.models.stacking import LAYER


def setting(model: str, layers: int | None, rows: int, window: int, targets: int) -> Setting:
    """The model by name, ``tiny`` or one that `jaxcl.models.fetch.load` knows, cut off after ``layers``.

    RequestError for counts that do not fit.
    """
    for name, value in (("rows", rows), ("targets", targets), ("layers", 1 if layers is None else layers)):
        if value < 1:
            raise RequestError(f"--{name} is {value}; accepted: a whole number of at least 1")
    if window <= targets:
        raise RequestError(f"--window is {window}; accepted: more than the {targets} answer tokens of a row")
    compile_cache.enable()
    if model == "tiny":
        from jaxcl.models.decoder import decoder
        from jaxcl.models.spec import tiny

        made = decoder(tiny())
        params = made.init(made.spec, jax.random.key(0))
    else:
        from jaxcl.models.fetch import load

        made, params, _, _ = load(model)
    context = getattr(made.spec, "context", window)  # a T5 has none
    if window > context:
        raise RequestError(f"--window is {window}; accepted: up to {context}, the model's context")
    if layers is not None and layers < made.spec.layers:
        made = made._replace(spec=dataclasses.replace(made.spec, layers=layers, segments=()))
        params = {k: v for k, v in params.items() if (found := LAYER.match(k)) is None or int(found["at"]) < layers}
    return Setting(made, params, rows, window, targets)


def document(model: str, at: Setting, rounds: int, warm: int) -> dict[str, Any]:
    """What all sides of a report share."""
    device = jax.devices()[0]
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    return {
        "model": model, "layers": at.model.spec.layers, "rows": at.rows, "window": at.window, "targets": at.targets,
        "dtype": at.model.spec.dtype, "rounds": rounds, "warm": warm, "jax": jax.__version__,
        "device": device.device_kind, "cores": cores,
    }  # fmt: skip


def measured(wanted: list[Side], at: Setting, rounds: int, warm: int, say: Callable[[str], None]) -> Iterator[dict]:
    """One record a side, as soon as it is known; a base is built once for the sides that follow each other on it."""
    built: dict[tuple, Any] = {}
    for number, side in enumerate(sorted(wanted, key=lambda s: (s.forward, s.base)), 1):
        say(f"{number} of {len(wanted)}: {side.name}")
        key = (side.base, side.forward)
        if key not in built:
            built.clear()
            built[key] = base_of(side, at, rounds + warm, len(wanted))
        yield record(side, at, built[key], rounds, warm)


def base_of(side: Side, at: Setting, rounds: int, times: int) -> Any:
    exp = sides.plain(side.base, at, side.forward)
    return Looking(exp, 0) if side.forward else running(exp, 0, rounds * times)[0]


def running(exp: Experiment, stage: int, steps: int, cache: StepCache | None = None) -> tuple[Running, StepCache]:
    cache = cache or StepCache(exp)
    return Running(exp, stage, cache, steps), cache


def record(side: Side, at: Setting, base: Any, rounds: int, warm: int) -> dict[str, Any]:
    """Time, compilations of the step over its stages, and memory of one side beside its base."""
    exp, total = sides.of(side, at), rounds + warm
    if side.forward:
        it: Any = Looking(exp, side.stage, sides.filled)
        counted = {}
    else:
        it, cache = running(exp, side.stage, total)
        if side.first:
            base, _ = running(exp, 0, total, cache)
        counted = {"compilations": cache.compilations.by_name.get("train_step", 0)}
        cache.compilations.close()
    times = summary(in_turn(base, it, rounds, warm))
    memory = {"bytes": step_bytes(it.program), "base_bytes": step_bytes(base.program)} if it.program else {}
    what = {"side": side.name, "method": side.method, "base": side.base, "stage": side.stage}
    against = f"{side.method}, stage 1" if side.first else "plain"
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {**what, "against": against, **times, **counted, **memory, "rss_peak_bytes": rss}


def step_bytes(program: Any) -> dict[str, int]:
    """Of a compiled step: arguments, temporaries, and the peak as the compiler has planned it."""
    plan = program.memory_analysis()
    new = plan.output_size_in_bytes - plan.alias_size_in_bytes
    return {
        "arguments": plan.argument_size_in_bytes,
        "temporary": plan.temp_size_in_bytes,
        "peak": plan.argument_size_in_bytes + plan.temp_size_in_bytes + new,
    }
