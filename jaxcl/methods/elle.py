"""ELLE: the model grows with every domain, recovers on a memory of the old ones, and replays where it pays.

Card cpt/elle. Qin et al., Findings of ACL 2022, arXiv 2203.06311: width growth that keeps the function, depth growth
by copies, a recovery phase before the new domain, replay in proportion to progress.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl.core.host_rng import host_rng
from jaxcl.core.processes import host
from jaxcl.core.types import Batch, Budget, Method, Own, Params, Phase, Stream, World, method
from jaxcl.errors import RequestError, unknown
from jaxcl.methods import memory
from jaxcl.models.spec import DecoderSpec
from jaxcl.surgery.depth import Layer, deepen
from jaxcl.surgery.width import Sizes, noisy, sizes, widen

PAPER = ({"layers": 2, "heads": 2}, {"layers": 2, "heads": 2}, {"layers": 1, "heads": 1}, {"layers": 1, "heads": 1})
GROWS = ("layers", "heads", "width", "mlp")
HELD_OUT = 10  # every tenth row of a domain in memory is for measuring progress and never trained on


@method
def elle(
    growth: Sequence[Mapping[str, int]] = PAPER,
    capacity: int = 4096,
    recover: int = 5000,
    share: float = 0.1,
    segments: int = 4,
    noise: float = 0.01,
    even: bool = False,
    policy: str = "reservoir",
    seed: int = 0,
    name: str = "elle",
) -> Method:
    """From the second stage on: growth, ``recover`` steps on the memory of earlier stages, then the new stage in
    ``segments`` phases in which a ``share`` of the rows comes from memory.

    growth: what the second, third, ... stage adds: layers (copies, each directly after its layer, all layers equally
    often), heads, width (default: what the heads need), mlp (default: in proportion to the width). capacity: rows
    held over all stages, a tenth of them for measuring. Replayed domains are drawn by how much their held-out loss fell
    per replayed row in the segment before; without progress a domain counts like the best in the first half of a
    stage, and not at all in the second. noise: std of what is added to copied entries. even: units are copied in
    turn, which is exact where the width is multiplied. List it behind methods that add streams. Defaults:
    BERT_L6_D384 of the paper; 1000 recovery steps for its larger model. The domain prompts of the paper are no part of
    this. One compilation per growth and phase.
    Raises RequestError for negative counts, a share outside [0, 1), growth that the model's sizes do not allow.
    """
    memory.check("elle", policy, capacity=capacity, recover=recover)
    if not 0 <= share < 1 or segments < 1 or noise < 0:
        wanted = "accepted: share in [0, 1), segments of at least 1, noise of 0 or more"
        raise RequestError(f"elle: share {share}, segments {segments}, noise {noise}; {wanted}")
    for step in growth:
        for key in step:
            if key not in GROWS:
                raise unknown("growth", key, GROWS, where="elle")

    def begin(world: World, own: Own | None) -> tuple[World, Own]:
        if not own:
            if any(any(step.values()) for step in growth):
                growable(world.spec)  # said before the first stage, not before the second
            return world, {"host": {**memory.empty(world)["host"], "candidates": [], "progress": {}, "grown": []}}
        host = {**own["host"], "progress": {}}
        step = dict(growth[world.stage - 1]) if 0 < world.stage <= len(growth) else {}
        if any(step.values()):
            world, host["candidates"] = grown(world, step, host["candidates"], even, noise)
            exact = all(edit.exact for edit in world.edits) and not noise
            host["grown"] = [*host["grown"], {"stage": world.stage, **step, "exact": exact}]
        return world, {"host": host}

    def plan(world: World, own: Own, phases: list[Phase]) -> list[Phase]:
        held = {s: split(rows)[0] for s, rows in memory.by_stage(own["host"]).items()}
        if not held:
            return phases
        old = tuple(Stream(s, rows) for s, rows in held.items())
        first = [Phase("recover", recover, old, after=measured({}))] if recover else []
        return [*first, *(part for p in phases for part in segmented(p, world, own["host"], held))]

    def segmented(phase: Phase, world: World, host: dict[str, Any], held: dict[int, np.ndarray]) -> list[Phase]:
        """A phase as ``segments`` of them, with replay by the progress as of now."""
        rows = draws(phase, world)
        parts = np.array_split(rows, min(segments, len(rows)))
        others = [dataclasses.replace(s, share=s.share * phase.epochs / len(parts)) for s in rest(phase, world)]
        out = []
        for i, part in enumerate(parts):
            old = replayed(part, i < len(parts) / 2, host, held)
            out.append(
                dataclasses.replace(
                    phase,
                    name=f"{phase.name}-{i}" if len(parts) > 1 else phase.name,
                    streams=(Stream(world.stage, part), *others, *old),
                    epochs=1.0,
                    steps=None if phase.steps is None else len(range(i, phase.steps, len(parts))),
                    reset_opt=phase.reset_opt and i == 0,
                    after=measured({s.stage: s.share * len(s.rows) for s in old}),
                )
            )
        return out

    def replayed(part: np.ndarray, early: bool, host: dict[str, Any], held: dict[int, np.ndarray]) -> list[Stream]:
        chance = chances({s: host["progress"].get(str(s), {}).get("gain", 0.0) for s in held}, early)
        wanted = share / (1 - share) * len(part)
        return [Stream(s, held[s], share=p * wanted / len(held[s])) for s, p in chance.items() if p * wanted]

    def measured(seen: Mapping[int, float]) -> Callable[[World, Own], tuple[World, Own]]:
        """Held-out loss of every old domain, and what it fell by per row of it that was ``seen``."""

        def after(world: World, own: Own) -> tuple[World, Own]:
            progress = {}
            for s, rows in memory.by_stage(own["host"]).items():
                loss = mean_nll(world, s, split(rows)[1])
                last = own["host"]["progress"].get(str(s), {"loss": loss, "best": loss, "gain": 0.0})
                gain = (last["loss"] - loss) / seen[s] if seen.get(s) else last["gain"]
                progress[str(s)] = {"loss": loss, "best": min(loss, last["best"]), "gain": gain}
            return world, {"host": {**own["host"], "progress": progress}}

        return after

    def end(world: World, own: Own) -> tuple[World, Own]:
        kept = {k: own["host"][k] for k in ("candidates", "progress", "grown")}
        return world, {"host": {**memory.remember(world, own, policy, capacity, seed)["host"], **kept}}

    return Method(name=name, keeps=Budget(examples=capacity), begin=begin, plan=plan, end=end)


def grown(
    world: World, step: Mapping[str, int], candidates: list[int], even: bool, noise: float
) -> tuple[World, list[int]]:
    """(the grown world, layers not copied yet in this round): width first, then depth. RequestError: `sizes_after`."""
    seed = int(jax.random.bits(world.key) >> 1)

    def shaken(world: World, n: int) -> World:
        key = jax.random.fold_in(world.key, n)
        return world._replace(params=noisy(world.params, world.edits[-1], key, noise)) if noise else world

    to = sizes_after(world.spec, step)
    if to != sizes(world.spec):
        world = shaken(widen(world, to, even=even, seed=seed), 0)
    order, candidates = picked(world.spec.layers, step.get("layers", 0), candidates, np.random.default_rng([seed, 3]))
    if len(order) > world.spec.layers:
        world = shaken(deepen(world, order, silent=False), 1)
    return world, candidates


def sizes_after(spec: DecoderSpec, step: Mapping[str, int]) -> Sizes:
    """Sizes of a decoder after a step of growth. RequestError where heads are no multiple of a group's query heads."""
    growable(spec)
    per_group, heads = spec.heads // spec.kv_heads, step.get("heads", 0)
    if heads % per_group:
        raise RequestError(f"elle: {heads} more heads in groups of {per_group}; accepted: multiples of {per_group}")
    width = spec.width + step.get("width", heads * spec.head_dim)
    mlp = spec.mlp + step.get("mlp", round(spec.mlp * width / spec.width) - spec.mlp)
    return Sizes(width, spec.kv_heads + heads // per_group, mlp)


def growable(spec: Any) -> None:
    """RequestError for another model than a decoder."""
    if not isinstance(spec, DecoderSpec):
        raise RequestError(f"elle cannot grow a {type(spec).__name__}; accepted: a DecoderSpec")


def picked(
    layers: int, more: int, candidates: list[int], rng: np.random.Generator
) -> tuple[list[Layer], list[int]]:
    """(order of layers with ``more`` copies, layers that wait for theirs). Layers are drawn without replacement until
    all had their turn; numbers of those that wait are in the deeper model."""
    waiting, chosen = list(candidates), []
    for _ in range(more):
        waiting = waiting or [i for i in range(layers) if i not in chosen] or list(range(layers))
        chosen.append(waiting.pop(int(rng.integers(len(waiting)))))
    order = [layer for i in range(layers) for layer in [Layer(i), *[Layer(i, copy=True)] * chosen.count(i)]]
    now = {layer.source: j for j, layer in enumerate(order) if not layer.copy}
    return order, [now[i] for i in waiting]


def chances(gain: Mapping[int, float], early: bool) -> dict[int, float]:
    """{domain: probability}, in proportion to gains; one without gain counts like the largest when ``early``, else 0.
    Without any gain all are alike. They sum to 1."""
    most = max(gain.values(), default=0.0)
    if most <= 0:
        return {s: 1 / len(gain) for s in gain}
    weight = {s: g if g > 0 else most * early for s, g in gain.items()}
    return {s: w / sum(weight.values()) for s, w in weight.items()}


def split(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(rows to replay, rows to measure by): of a single row both are that one."""
    held = rows[HELD_OUT - 1 :: HELD_OUT] if len(rows) >= HELD_OUT else rows[-1:]
    return (rows[~np.isin(rows, held)] if len(rows) > 1 else rows), held


def rest(phase: Phase, world: World) -> list[Stream]:
    """The streams of a phase that are not its new rows."""
    new = lambda s: s.stage == world.stage and s.into == "main" and isinstance(s.rows, np.ndarray)  # noqa: E731
    return [s for s in phase.streams if not new(s)]


def draws(phase: Phase, world: World) -> np.ndarray:
    """The new rows of a phase in the order of their draws, every epoch in another one."""
    new = np.concatenate([s.rows for s in phase.streams if not any(s is r for r in rest(phase, world))])
    rng = host_rng(world.key)
    count = round(len(new) * phase.epochs)
    return np.concatenate([rng.permutation(new) for _ in range(-(-count // len(new)))])[:count]


def mean_nll(world: World, stage: int, rows: np.ndarray) -> float:
    """Loss per target on past rows, in nats."""
    sums = np.zeros(2)
    for batch in world.tools.kept(stage, rows.tolist()):
        sums += host(world.tools.call(nll_sums, batch, world.key)).astype(np.float64)
    return float(sums[0] / max(sums[1], 1.0))


def nll_sums(forward: Any, train: Params, batch: Batch, key: jax.Array) -> jax.Array:
    """f32[2]: weighted nll and weight of a batch."""
    return jnp.array([jnp.sum(forward(train, batch).nll * batch["weight"]), jnp.sum(batch["weight"])])
