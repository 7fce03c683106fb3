"""Generative replay: rows that the model of the stage before writes stand in for those of old stages.

Card cft/generative-replay. Shin et al., NeurIPS 2017; one language model as generator and solver: Sun et al., ICLR 2020
(LAMOL). Rows are written once, as a stage begins, by the model that the stage before left, and kept as ids, so that a
resumed run trains on the same ones. A written row is no kept example; `jaxcl.data.pseudo.texts` makes it readable.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxcl.core.types import NOTHING, Budget, Ctx, Method, Own, Phase, Stream, World, method
from jaxcl.data import pseudo
from jaxcl.errors import RequestError, unknown
from jaxcl.losses.lm_view import lm_loss, lm_view
from jaxcl.methods import memory
from jaxcl.methods.decoder_only import decoder_only
from jaxcl.methods.writing import Recipe, check_context, keep, rows_written, shape_of
from jaxcl.surgery.vocabulary import BIAS, grow, opened

CONDITIONS = ("gen", "task", "prefix", "demos")
LABELLERS = ("same", "relabel")


@method
def generative_replay(
    gamma: float | None = None,
    count: int | None = None,
    strength: float = 0.25,
    special: float = 5.0,
    condition: str = "gen",
    labeller: str = "same",
    top_k: int = 20,
    top_p: float = 1.0,
    temperature: float = 1.0,
    repetition_penalty: float = 1.0,
    max_new: int | None = None,
    labels: bool = False,
    clusters: int = 0,
    oversample: float = 1.0,
    kept: int = 16,
    prefix: int = 4,
    shots: int = 2,
    oracle: bool = False,
    capacity: int = 4096,
    max_stages: int = 16,
    eos: int | None = None,
    seed: int = 0,
    name: str = "generative_replay",
) -> Method:
    """Mixes rows written by the model of the stage before into every phase, and trains it to write (L_gen).

    The written form is ``START prompt MARK answer EOS``. START and MARK are new rows of the vocabulary that only this
    form can say: the objective, ranking and decoding see the old vocabulary. L_gen is strength * mean nll of all its
    tokens (MARK weighs ``special``) on the rows of the batch, at one more forward pass, two tokens longer than the
    window. Under a frozen embedding (LoRA) the new rows stay as they were drawn and the adapters learn to use them.

    gamma: rows asked for as a share of the new stage's (default 0.2), in equal parts of the old stages; count: or of
    each. condition: START is one for all stages (``gen``) or each stage's own (``task``); ``prefix``: behind it stand
    the first ``prefix`` ids of a kept prompt; ``demos``: before it ``shots`` kept rows. For these ``kept`` rows a stage
    are held, and declared. labeller: the ``same`` sample, or ``relabel`` greedily by the same model; for soft targets
    add `lwf(rows='old')`. Sampling: top_k, top_p, temperature, repetition_penalty, max_new tokens (None: window + 1);
    LFPT5 has 64, 1, 1, 2.5; SSR 0, 0.6, 0.9, 1.2. Refused and counted: what has not one MARK and an end, what does not
    fit, with ``labels`` an answer outside the label set. clusters: of ``oversample`` times the rows, those nearest to
    the centroids of k-means are taken. oracle: stored rows instead (``capacity`` in all), as `replay` does. max_stages:
    START tokens made at once. eos: the id that ends answers; None: the one that ends all rows seen.
    Raises RequestError for values outside these, rows without answers, a context without room.
    """
    gamma = 0.2 if gamma is None and count is None else gamma
    _check(name, gamma, count, strength, special, condition, labeller)
    recipe = Recipe(
        condition, labeller, top_k, top_p, temperature, repetition_penalty, max_new, labels, clusters, oversample,
        kept, prefix, shots, eos, seed,
    )  # fmt: skip
    _check_recipe(name, recipe, capacity, max_stages)
    asks = bool(gamma or count)
    samples, tasks = asks and not oracle, condition == "task"

    def begin(world: World, own: Own | None) -> tuple[World, Own]:
        if own is None:
            host = memory.empty(world)["host"] if asks and oracle else {"counts": {}}
            own = {"fixed": {}, "host": host}
        if not strength and not samples:
            return world, own
        decoder_only(world.spec, name, "does not write prompts")
        shape = shape_of(world)
        check_context(world, recipe if samples else None, shape)
        world, own = _with_tokens(world, own, max_stages if tasks else 1, world.stage if tasks else 0)
        each = _each(world) if samples else 0
        if not each:
            return world, {**own, "host": {k: v for k, v in own["host"].items() if k != "pseudo"}}
        tokens = [int(t) for t in np.asarray(own["fixed"]["tokens"])]
        written = rows_written(world, own["host"], tokens, recipe, each, shape)
        return world, {**own, "host": {**own["host"], **written}}

    def _each(world: World) -> int:
        return pseudo.quota(world.tools.size(world.stage), world.stage, gamma, count)

    def mask(world: World, own: Own) -> dict[str, bool]:
        return {BIAS: False}

    def plan(world: World, own: Own, phases: list[Phase]) -> list[Phase]:
        if not world.stage:
            return phases
        rows = memory.by_stage(own["host"]) if asks and oracle else {}
        old = tuple(_stream(world, own, s, rows.get(s)) for s in range(world.stage))
        return [dataclasses.replace(p, streams=(*p.streams, *old)) for p in phases]

    def _stream(world: World, own: Own, stage: int, stored: np.ndarray | None) -> Stream:
        if stored is not None:
            return Stream(stage, stored, share=_each(world) / len(stored))
        items = pseudo.unpack(own["host"].get("pseudo", {}).get(str(stage), {}))
        if not items:
            return Stream(stage, ())
        shape = shape_of(world)
        return Stream(stage, pseudo.examples(items, shape.window, shape.targets, shape.fields(stage)))

    def end(world: World, own: Own) -> tuple[World, Own]:
        if oracle:
            stored = memory.remember(world, own, "reservoir", capacity, seed)
            return world, {**own, "host": {**own["host"], **stored["host"]}}
        return world, {**own, "host": {**own["host"], **keep(world, recipe, int(own["fixed"]["tokens"][0]))}}

    def loss(ctx: Ctx) -> dict[str, jax.Array]:
        tokens, stage = ctx.own["fixed"]["tokens"], ctx.batch["stage"]
        start = tokens[1 + jnp.clip(stage, 0, len(tokens) - 2)] if tasks else jnp.broadcast_to(tokens[1], stage.shape)
        view = lm_view(ctx.batch, start, tokens[0])
        out = ctx.model(ctx.spec, opened(ctx.params, tokens[0]), view, train=True, key=ctx.key)
        return {"generator": strength * lm_loss(out.nll, view, tokens[0], special)}

    parts: dict = {"begin": begin} if strength or asks else {}
    if strength or samples:
        parts["mask"] = mask
    if strength:
        parts["loss"] = loss
    if strength or asks:
        parts["plan"] = plan
    if asks and (oracle or labels or condition in ("prefix", "demos")):
        parts["end"] = end
    return Method(
        name=name, keeps=_keeps(recipe, samples, oracle and asks, capacity, max_stages), packs=not strength,
        hparams={"gamma": gamma}, **parts,
    )  # fmt: skip


def _with_tokens(world: World, own: Own, new: int, last: int) -> tuple[World, Own]:
    """MARK and ``new`` START rows in the vocabulary, and as many again where START number ``last`` has none yet."""
    tokens = [int(t) for t in np.asarray(own["fixed"].get("tokens", ()))]
    if len(tokens) >= 2 + last:
        return world, own
    first, more = world.spec.vocab, new + (not tokens)
    tokens += range(first, first + more)
    return grow(world, more), {**own, "fixed": {**own["fixed"], "tokens": jnp.array(tokens, jnp.int32)}}


def _keeps(recipe: Recipe, samples: bool, oracle: bool, capacity: int, max_stages: int) -> Budget:
    if oracle:
        return Budget(examples=capacity)
    if samples and recipe.condition in ("prefix", "demos"):
        return Budget(examples=recipe.kept * max_stages, inputs=recipe.condition == "prefix")
    return NOTHING


def _check(
    name: str, gamma: float | None, count: int | None, strength: float, special: float, condition: str, labeller: str
) -> None:
    if gamma is not None and count is not None:
        raise RequestError(f"{name} takes gamma or count, not both (gamma={gamma}, count={count})")
    if not 0 <= (gamma or 0) <= 1 or (count or 0) < 0:
        raise RequestError(f"{name}: gamma is {gamma}, count {count}; accepted: gamma 0 to 1, or count 0 or more")
    if strength < 0 or special <= 0:
        raise RequestError(f"{name}: strength {strength}, special {special}; accepted: strength >= 0, special > 0")
    for value, known, what in ((condition, CONDITIONS, "condition"), (labeller, LABELLERS, "labeller")):
        if value not in known:
            raise unknown(what, value, known, where=name)


def _check_recipe(name: str, recipe: Recipe, capacity: int, max_stages: int) -> None:
    memory.check(name, "reservoir", capacity=capacity, top_k=recipe.top_k, clusters=recipe.clusters)
    whole = {"kept": recipe.kept, "prefix": recipe.prefix, "shots": recipe.shots, "max_stages": max_stages}
    for key, value in {**whole, "max_new": 1 if recipe.max_new is None else recipe.max_new}.items():
        if value < 1:
            raise RequestError(f"{name}: {key} is {value}; accepted: a whole number of at least 1")
    for key, number in (("temperature", recipe.temperature), ("repetition_penalty", recipe.repetition_penalty)):
        if number <= 0:
            raise RequestError(f"{name}: {key} is {number}; accepted: above 0")
    if not 0 < recipe.top_p <= 1 or recipe.oversample < 1:
        wanted = "accepted: top_p above 0 up to 1, oversample 1 or more"
        raise RequestError(f"{name}: top_p is {recipe.top_p}, oversample {recipe.oversample}; {wanted}")
