"""A router at one dense site: decided where the prompt ends, held in the cache, obeyed by the tokens it names.

What GRACE needs of a model, and what other methods with a side memory do. Shapes: B rows, T tokens, I and O the widths
of the site's input and output.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcl.core.types import Apply, Batch, Inject, Outputs, Params

REPLACED = ("last", "prompt", "all")


class Router(NamedTuple):
    """choose(query f32[B,I]) -> i32[B], a slot or -1 for none; values(slot) -> [B,O], what replaces the site's output.
    replace: where, the ``last`` token of the prompt (the query's), the ``prompt`` before it, or ``all`` tokens."""

    name: str
    site: str
    replace: str
    choose: Callable[[jax.Array], jax.Array]
    values: Callable[[jax.Array], jax.Array]


def query_index(batch: Batch) -> jax.Array:
    """i32[B]: index of the prompt's last token, the one before the first target; without targets that of segment 1."""
    index = jnp.arange(batch["tokens"].shape[1])
    last = jnp.max(jnp.where(batch["segments"] == 1, index, 0), axis=1)
    if "targets_at" not in batch:
        return last
    at = batch["targets_at"]
    first = jnp.min(jnp.where(at > 0, at, len(index)), axis=1)
    return jnp.where(first < len(index), first - 1, last)


def routed(
    apply: Apply,
    router: Router,
    spec: Any,
    params: Params,
    batch: Batch,
    *,
    cache: Any = None,
    inject: dict[str, Inject] | None = None,
    **rest: Any,
) -> Outputs:
    """`apply` with the site's output replaced where the router chose a slot; other outputs are the same bit for bit.

    The choice is made at the prompt's last token. A prompt that fills a cache leaves it there, as
    ``router/<name>/slot`` and ``router/<name>/at`` (the query's position), and later tokens take it from there. Notes
    under ``aux[site]``: ``<name>/slot`` and, where the choice was made, ``<name>/query`` f32[B,I] and ``<name>/output``
    [B,O], the site's own output there.
    """
    held = {part: f"router/{router.name}/{part}" for part in ("slot", "at")}
    known = cache is not None and held["slot"] in cache

    def choice(x: jax.Array, y: jax.Array) -> dict[str, jax.Array]:
        if known:
            return {part: cache[key] for part, key in held.items()}
        index = query_index(batch)[:, None]
        query, output = (jnp.take_along_axis(z, index[..., None], axis=1)[:, 0] for z in (x, y))
        query = query.astype(jnp.float32)
        at = jnp.take_along_axis(batch["positions"], index, axis=1)[:, 0]
        return {"slot": router.choose(query), "at": at, "query": query, "output": output}

    def replaced(x: jax.Array, y: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        made = choice(x, y)
        positions, at = batch["positions"], made["at"][:, None]
        covered = {"last": positions == at, "prompt": positions < at, "all": positions >= 0}[router.replace]
        value = router.values(made["slot"])[:, None].astype(y.dtype)
        hit = (covered & (made["slot"] >= 0)[:, None])[..., None]
        return jnp.where(hit, value, y), {f"{router.name}/{part}": v for part, v in made.items()}

    inject = dict(inject or {})
    inject[router.site] = then(replaced, inject.get(router.site))
    out = apply(spec, params, batch, cache=cache, inject=inject, **rest)
    if cache is None or known:
        return out
    notes = out.aux[router.site]
    return out._replace(cache={**out.cache, **{key: notes[f"{router.name}/{part}"] for part, key in held.items()}})


def then(first: Inject, second: Inject | None) -> Inject:
    """Both at one site, the second on what the first made of the output."""
    if second is None:
        return first

    def both(x: jax.Array, y: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        y, left = first(x, y)
        y, more = second(x, y)
        return y, {**left, **more}

    return both
