"""GRACE: a stream of edits in a codebook beside one frozen layer. Card refine-align/grace.

Hartvigsen et al., NeurIPS 2023, arXiv 2211.11031. A stage is a stream of edits. A row that the model gets wrong makes,
widens or splits a ball in the space of one layer's input and trains the value that replaces the layer's output for
prompts inside it. Nothing else is trained.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxcl.core.types import Apply, Batch, Clock, Ctx, Method, Outputs, Own, Params, Phase, World, method
from jaxcl.errors import RequestError, RunFailed, unknown
from jaxcl.methods.inner import Upper, descend
from jaxcl.methods.router import REPLACED, Router, routed
from jaxcl.models.spec import DecoderSpec
from jaxcl.models.taps import tap_names
from jaxcl.surgery.codebook import Codebook, Rules, edited, empty, grown, lookup
from jaxcl.surgery.stacks import apart

VALUES = ("cold", "warm")
EXPANSIONS = ("coverage", "moving_average")


@method
def grace(
    site: str | None = None,
    eps_init: float = 1.0,
    n_iter: int = 100,
    lr: float = 1.0,
    stop_below: float | None = None,
    replace: str = "last",
    value: str = "cold",
    expand: str = "coverage",
    shrink: bool = False,
    copies: int = 1,
    capacity: int = 256,
    seed: int = 0,
    name: str = "grace",
) -> Method:
    """Edits the model row by row, without touching what lies outside the edits' balls.

    site: the dense layer that is wrapped; default ``layers/<27/32 of the depth>/mlp/down``, that of Llama-2-7B's edits.
    The query is its input at the prompt's last token. eps_init: radius of a new ball. n_iter steps of Adam at ``lr``
    train a value, fewer where the loss falls below ``stop_below``. replace: the tokens whose output becomes the value,
    the ``last`` of the prompt, the ``prompt`` before it, or ``all``. value: a new one starts uniform in [0, 1)
    (``cold``) or as the layer's output (``warm``). expand, shrink: see `jaxcl.surgery.codebook.Rules`. copies: the loss
    while training is the mean over as many copies of the value, all but the first with Gaussian noise of std 1 (8 in
    the reference's ``adv``). capacity: keys to begin with, doubled before a stage that could fill it.

    A row is edited if the most likely tokens after its prompt are not its target. Of two rows with one prompt and two
    answers the later gets a ball of radius 0, as the rule says. Raises RequestError for values outside these, a model
    without the site, plain text, a batch in micro-batches; RunFailed where the codebook was full after all, which
    takes more passes over a stage than one.
    """
    if eps_init <= 0 or lr <= 0 or min(n_iter, copies, capacity) < 1:
        found = f"eps_init {eps_init}, lr {lr}, n_iter {n_iter}, copies {copies}, capacity {capacity}"
        raise RequestError(f"grace: {found}; accepted: eps_init and lr > 0, the others at least 1")
    options = (("replace", replace, REPLACED), ("value", value, VALUES), ("expand", expand, EXPANSIONS))
    for what, chosen, known in options:
        if chosen not in known:
            raise unknown(f"{what} of grace", chosen, known)
    rules = Rules(eps_init, expand == "moving_average", shrink)

    def begin(world: World, own: Own | None) -> tuple[World, Own]:
        """The site's layer under a key of its own, and room for every row of the stage."""
        here = located(world.spec, site)
        world = apart(world, layer_of(here))
        batch = next(world.tools.batches(world.stage, 1))
        if "targets_at" not in batch:
            raise RequestError("grace edits answers: its rows need a prompt and a target, not plain text")
        longest = batch["targets_at"].shape[1]
        if own is None:
            inputs, outputs = world.params[f"{here}/kernel"].shape
            count = {"made": jnp.zeros(3, jnp.int32), "refused": jnp.zeros((), jnp.int32)}
            own = {
                "live": {"book": empty(capacity, inputs, outputs, longest), **count},
                "host": {"site": here, "layers": world.spec.layers},
            }
        book = grown(own["live"]["book"], world.tools.size(world.stage), longest)
        return world, {**own, "live": {**own["live"], "book": book}}

    def plan(world: World, own: Own, phases: list[Phase]) -> list[Phase]:
        """Nothing to add, but what the edits stand on must stay as it is."""
        for path in sorted(world.trained):
            trains = world.owner.get(path, "another method")
            why = f"edits hold in a frozen model, and {path!r} is trained"
            raise RequestError(f"methods {name!r} and {trains!r} do not go together: {why}")
        book, kernel = own["live"]["book"], world.params.get(f"{own['host']['site']}/kernel")
        widths = (book["keys"].shape[1], book["values"].shape[1])
        if kernel is None or kernel.shape != widths or world.spec.layers != own["host"]["layers"]:
            why = f"its keys and values are of {own['host']['site']} as that was"
            others = [e.by for e in world.edits if e.by != name] or ["another method"]
            raise RequestError(f"methods {name!r} and {others[0]!r} do not go together: the model grows, and {why}")
        return phases

    def mask(world: World, own: Own) -> dict[str, bool]:
        return dict.fromkeys(world.params, False)

    def wrap(apply: Apply, own: Own, clock: Clock) -> Apply:
        if not own["live"]:
            return apply

        def call(spec: Any, params: Params, batch: Batch, *, taps: tuple[str, ...] = (), **rest: Any) -> Outputs:
            # What is under the method's name in params goes before its memory: so an edit tries a value.
            book = {part: params.get(f"{name}/{part}", held) for part, held in own["live"]["book"].items()}
            tried = params.get(f"{name}/tried")
            here = located(spec, site)
            if tried is None:
                router = Router(name, here, replace, lambda q: lookup(book, q), lambda slot: book["values"][slot])
            else:
                router = Router(name, here, replace, lambda q: jnp.zeros(len(q), jnp.int32), lambda slot: tried)
            stream = () if rest.get("start") else stream_below(here)
            return routed(apply, router, spec, params, batch, taps=(*taps, *stream), **rest)

        return call

    def observe(ctx: Ctx, grads: Params, updates: Params, params: Params) -> Own:
        here = located(ctx.spec, site)
        upper = Upper(ctx, name, layer_of(here), short=replace == "last")
        rows = upper.rows(ctx.out.aux[here], stream_below(here))
        return jax.lax.scan(lambda live, row: (one(upper, live, row), None), ctx.own["live"], rows)[0]

    def one(upper: Upper, live: Own, row: Batch) -> Own:
        """The memory after a row: edited where the model errs on it."""
        book = live["book"]
        wrong, cache = upper.test(named(name, book), row)
        room = book["n"] < len(book["eps"])
        live = {**live, "refused": live["refused"] + (wrong & ~room)}
        return jax.lax.cond(wrong & room, lambda: edit(upper, live, row, cache), lambda: live)

    def edit(upper: Upper, live: Own, row: Batch, cache: Any) -> Own:
        book = live["book"]
        # Drawn by the number of the edit: edits in one batch and one by one are the same.
        draw, noise = jax.random.split(jax.random.fold_in(jax.random.key(seed), jnp.sum(live["made"])))
        output = row["output"].astype(jnp.float32)
        first = output if value == "warm" else jax.random.uniform(draw, output.shape)
        label, length = label_of(row, book["label"].shape[1])
        book, used, rule = edited(book, row["query"], first, label, length, rules)
        jitter = jax.random.normal(noise, (copies, *output.shape)).at[0].set(0.0)
        loss = upper.loss(row, cache, copies)
        trained = descend(lambda v: loss({f"{name}/tried": v + jitter}), book["values"][used], n_iter, lr, stop_below)
        book = {**book, "values": book["values"].at[used].set(trained)}
        return {**live, "book": book, "made": live["made"].at[rule].add(1)}

    def end(world: World, own: Own) -> tuple[World, Own]:
        refused, size = int(own["live"]["refused"]), len(own["live"]["book"]["eps"])
        if refused:
            raise RunFailed(f"grace: {refused} edits found all {size} keys in use; give it a larger capacity")
        made = dict(zip(("added", "expanded", "split"), own["live"]["made"].tolist()))
        return world._replace(notes={**world.notes, name: {"keys": int(own["live"]["book"]["n"]), **made}}), own

    return Method(name=name, packs=False, begin=begin, mask=mask, plan=plan, wrap=wrap, observe=observe, end=end)


def located(spec: Any, site: str | None) -> str:
    """The dense site in a model of this spec. RequestError where it has none of that name."""
    if not isinstance(spec, DecoderSpec):
        raise RequestError(f"grace needs the dense sites of jaxcl's decoder; {type(spec).__name__} has none")
    found = site or f"layers/{spec.layers * 27 // 32}/mlp/down"
    known = [tap.removesuffix(":in") for tap in tap_names(spec) if tap.endswith(":in")]
    if found not in known:
        raise unknown("site", found, known, where="grace")
    return found


def layer_of(site: str) -> int:
    return int(site.split("/")[1])


def stream_below(site: str) -> tuple[str, ...]:
    """The tap of what goes into the site's layer; none for the first one, whose input is the embedding."""
    return (f"layers/{layer_of(site) - 1}:out",) if layer_of(site) else ()


def named(name: str, book: Codebook) -> Params:
    """The codebook as parameters that go before the one in the method's memory."""
    return {f"{name}/{part}": value for part, value in book.items()}


def label_of(row: Batch, width: int) -> tuple[jax.Array, jax.Array]:
    """(target ids i32[width] with zeros behind, their number) of one row without a batch axis."""
    at = row["targets_at"]
    ids = jnp.where(at > 0, row["tokens"][at], 0)
    return jnp.pad(ids, (0, width - len(ids))), jnp.sum(at > 0)
