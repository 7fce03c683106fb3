"""How the rows of generative replay come about: what stands in front, sampling, labelling, sifting, selection."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxcl.core.host_rng import host_rng
from jaxcl.core.processes import host
from jaxcl.core.types import World
from jaxcl.data import pseudo
from jaxcl.data.pseudo import Item
from jaxcl.errors import RequestError
from jaxcl.methods.sampling import Fields, How, write

Host = Mapping[str, Any]


class Recipe(NamedTuple):
    """The arguments of `generative_replay` that say how rows are written."""

    condition: str
    labeller: str
    top_k: int
    top_p: float
    temperature: float
    repetition_penalty: float
    max_new: int | None
    labels: bool
    clusters: int
    oversample: float
    kept: int
    prefix: int
    shots: int
    eos: int | None
    seed: int


class Shape(NamedTuple):
    """Tokens of a window, targets of a row, rows of a batch; whether rows are told their task (`jaxcl.core.til`)."""

    window: int
    targets: int
    rows: int
    told: bool = False

    def fields(self, stage: int) -> dict[str, int]:
        """What a row of this stage has beside its ids."""
        return {"task_id": stage} if self.told else {}


def shape_of(world: World) -> Shape:
    """The shape of the stage's rows. RequestError for rows that have no answer of their own."""
    batch = next(iter(world.tools.batches(world.stage, 1)))
    if "targets_at" not in batch:
        raise RequestError(f"stage {world.stage} has rows of plain text; accepted: rows of a prompt and an answer")
    window, targets = batch["tokens"].shape[1], batch["targets_at"].shape[1]
    return Shape(window, targets, len(batch["tokens"]), "task_id" in batch)


def front_width(recipe: Recipe, window: int) -> int:
    """Ids that stand in front of what is written, at most."""
    return 1 + {"prefix": recipe.prefix, "demos": recipe.shots * (window + 2)}.get(recipe.condition, 0)


def check_context(world: World, recipe: Recipe | None, shape: Shape) -> None:
    """RequestError where the written form, or (with a recipe) what is sampled, is longer than the model's context."""
    need = shape.window + 2
    if recipe is not None:
        need = max(need, front_width(recipe, shape.window) + (recipe.max_new or shape.window + 1))
        need = max(need, shape.window + shape.targets) if recipe.labeller == "relabel" else need
    context = getattr(world.spec, "context", need)
    if need > context:
        raise RequestError(f"a window of {shape.window} tokens needs a context of {need} to write it; it is {context}")


def keep(world: World, recipe: Recipe, mark: int) -> dict[str, np.ndarray]:
    """What a condition or a filter needs of the current stage later: {'rows_<stage>': kept ids, 'labels_<stage>': its
    label set}, both i32[N,W] filled up with -1."""
    kept: dict[str, np.ndarray] = {}
    rows = [i for batch in world.tools.batches(world.stage, recipe.kept) for i in pseudo.rows_of(batch)]
    if recipe.condition == "prefix":
        kept[f"rows_{world.stage}"] = pseudo.padded([i.prompt[: recipe.prefix] for i in rows])
    if recipe.condition == "demos":
        kept[f"rows_{world.stage}"] = pseudo.padded([(*i.prompt, mark, *i.answer) for i in rows])
    if recipe.labels:
        every = (i for batch in world.tools.batches(world.stage) for i in pseudo.rows_of(batch))
        answers = sorted({i.answer for i in every})
        if len(answers) <= pseudo.MOST_LABELS:
            kept[f"labels_{world.stage}"] = pseudo.padded(answers)
    return kept


def rows_written(
    world: World, host: Host, tokens: Sequence[int], recipe: Recipe, each: int, shape: Shape
) -> dict[str, Any]:
    """{'pseudo': {old stage: packed items}, 'counts': {new stage: {old stage: counts}}}, ``each`` rows of each.

    tokens: MARK, then the START of all stages or of each.
    """
    seen = [i for batch in world.tools.batches(world.stage, shape.rows) for i in pseudo.rows_of(batch)]
    end = end_mark(seen) if recipe.eos is None else recipe.eos
    first = opening(seen, end)
    found: dict[str, Any] = {}
    counted: dict[str, Any] = {}
    for s in range(world.stage):
        key = jax.random.fold_in(world.key, s)
        start = tokens[1 + (s if recipe.condition == "task" else 0)]
        asked = math.ceil(each * recipe.oversample)
        more = shape.fields(s)
        items = sampled(world, host.get(f"rows_{s}"), [start, *first], tokens[0], end, recipe, asked, shape, key, more)
        # One START for all says nothing of the stage: then a row's answer may be any old stage's.
        labels = label_set(host, range(world.stage) if recipe.condition == "gen" else [s])
        good, counts = pseudo.sift(items, shape.window, shape.targets, labels)
        found[str(s)], counted[str(s)] = pseudo.pack(selected(world, good, recipe, each)), counts
    return {"pseudo": found, "counts": {**host["counts"], str(world.stage): counted}}


def sampled(
    world: World, kept: np.ndarray | None, start: list[int], mark: int, end: int,
    recipe: Recipe, asked: int, shape: Shape, key: jax.Array, more: Fields,
) -> list[Item | None]:  # fmt: skip
    """One item per row asked for; None where it has not the written form. start: START and, where all prompts begin
    with it, the end mark, which could not be written."""
    rng = host_rng(key)
    fronts = [front(kept, start, recipe, rng) for _ in range(asked)]
    stops = (end,) if recipe.labeller == "same" else (end, mark)
    given = 0 if recipe.condition == "prefix" else len(start) - 1
    how = How(
        (recipe.max_new or shape.window + 1) - given, stops, recipe.temperature, recipe.top_k, recipe.top_p,
        recipe.repetition_penalty, mark,
    )  # fmt: skip
    made = write(world, fronts, front_width(recipe, shape.window) + given, shape.rows, how, key, more)
    begun = [f[1:] if recipe.condition == "prefix" else start[1:] for f in fronts]
    texts = [([*b, *ids], ended) for b, (ids, ended) in zip(begun, made, strict=True)]
    if recipe.labeller == "same":
        return [pseudo.separate(ids, ended, mark, end) for ids, ended in texts]
    return relabelled(world, texts, end, shape, key, more)


def front(kept: np.ndarray | None, start: list[int], recipe: Recipe, rng: np.random.Generator) -> list[int]:
    """START, with the prefix of a kept prompt behind it or with kept rows, each behind a START, before it."""
    if recipe.condition not in ("prefix", "demos"):
        return start
    assert kept is not None
    n = 1 if recipe.condition == "prefix" else recipe.shots
    chosen = pseudo.ragged(kept[rng.permutation(len(kept))[:n]])
    if recipe.condition == "prefix":
        return [start[0], *chosen[0]]
    return [*(i for row in chosen for i in (start[0], *row)), *start]


def relabelled(
    world: World, texts: Sequence[tuple[list[int], bool]], end: int, shape: Shape, key: jax.Array, more: Fields
) -> list[Item | None]:
    """Prompts with the answer that the model itself, greedily and without the new tokens, gives them."""
    asked = [i for i, (ids, ended) in enumerate(texts) if ended and 0 < len(ids) < shape.window]
    prompts = [texts[i][0] for i in asked]
    answers = write(world, prompts, shape.window, shape.rows, How(shape.targets, (end,)), key, more)
    items: list[Item | None] = [None] * len(texts)
    for i, prompt, (ids, ended) in zip(asked, prompts, answers, strict=True):
        items[i] = Item(tuple(prompt), (*ids, end)) if ended else None
    return items


def label_set(host: Host, stages: Sequence[int]) -> frozenset | None:
    """Answers of these old stages; None where one has no label set."""
    names = [f"labels_{s}" for s in stages]
    if not all(name in host for name in names):
        return None
    return frozenset(tuple(row) for name in names for row in pseudo.ragged(host[name]))


def selected(world: World, items: list[Item], recipe: Recipe, each: int) -> list[Item]:
    """At most ``each`` items: the first, or with ``clusters`` the most diverse by mean embedding of their prompts."""
    if not recipe.clusters or len(items) <= each:
        return items[:each]
    table = host(world.params["embed/kernel"]).astype(np.float32)
    means = np.stack([table[list(i.prompt)].mean(0) for i in items])
    return [items[i] for i in pseudo.diverse(means, recipe.clusters, each, recipe.seed)]


def end_mark(items: Sequence[Item]) -> int:
    """The id that ends the answers of these rows. RequestError where they differ."""
    ends = sorted({i.answer[-1] for i in items})
    if len(ends) != 1:
        shown = ", ".join(map(str, ends[:4]))
        raise RequestError(f"answers end with different ids ({shown}); give the id of their end mark as eos")
    return ends[0]


def opening(items: Sequence[Item], end: int) -> list[int]:
    """The end mark, where all prompts of these rows begin with it (one token for both ends of a text, as in GPT-2),
    else nothing. RequestError where all hold it further inside: writing would always end there."""
    if all(end in i.prompt[1:] for i in items):
        raise RequestError(f"all prompts hold {end}, which ends answers, so none can be written; accepted: another eos")
    return [end] if all(i.prompt[:1] == (end,) for i in items) else []
