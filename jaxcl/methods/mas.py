"""Memory aware synapses: a quadratic penalty by the output's sensitivity, which needs no labels. Card cft/mas.

Aljundi, Babiloni, Elhoseiny, Rohrbach, Tuytelaars, ECCV 2018. The loss gets strength * sum Omega (theta - anchor)^2,
without a factor 1/2; Omega is the mean over rows of |d ||F(x)||^2 / d theta|, see `jaxcl.losses.sensitivity`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxcl.core.processes import host
from jaxcl.core.types import Ctx, Method, Own, Params, World, method
from jaxcl.errors import RequestError, unknown
from jaxcl.losses.penalties import quadratic
from jaxcl.losses.sensitivity import OUTPUTS
from jaxcl.methods.ewc import accumulate, none

MODES = ("mean", "sum")


@method
def mas(
    strength: float = 1.0, mode: str = "mean", output: str = "hidden", rows: int | None = 256, name: str = "mas"
) -> Method:
    """Protects what moves the model's output, on rows whose answers nobody needs to know.

    mode: ``mean`` of the stages' Omega, or their ``sum``. output: F, ``hidden`` (the residual stream behind the last
    layer at the last prompt token) or ``logits`` (before the targets; for models without taps). rows: of the stage, for
    the estimate (None: all). strength 1 is the paper's code; Omega has the scale of the output, so tune it: the mean of
    Omega after every stage is in metrics.json. Raises RequestError for a negative strength, rows below 1, an unknown
    mode or output.
    """
    if strength < 0:
        raise RequestError(f"mas: strength is {strength}; accepted: 0 or more")
    if rows is not None and rows < 1:
        raise RequestError(f"mas: rows is {rows}; accepted: a whole number of at least 1, or None for all")
    for what, value, known in (("mode", mode, MODES), ("output", output, tuple(OUTPUTS))):
        if value not in known:
            raise unknown(what, value, known, where="mas")

    def init(world: World) -> Own:
        anchor = {k: world.params[k] for k in sorted(world.trained)}
        return {"fixed": {"omega": {k: none(v) for k, v in anchor.items()}, "anchor": anchor}, "host": {"stages": 0}}

    def loss(ctx: Ctx) -> dict[str, jax.Array]:
        fixed = ctx.own["fixed"]
        return {"penalty": 2.0 * strength * quadratic(ctx.params, fixed["anchor"], fixed["omega"])}

    def end(world: World, own: Own) -> tuple[World, Own]:
        fresh, t = world.tools.mean(OUTPUTS[output], rows, world.key), own["host"]["stages"]
        law = "mean" if mode == "mean" else "online"
        old = own["fixed"]["omega"]
        omega = {k: accumulate(w, fresh.get(k, none(world.params[k])), law, 1.0, t) for k, w in old.items()}
        anchor = {k: world.params[k] for k in omega}
        return noted(world, name, omega), {"fixed": {"omega": omega, "anchor": anchor}, "host": {"stages": t + 1}}

    parts = {"init": init, "loss": loss, "end": end} if strength else {}
    return Method(name=name, kinds={"omega": "gradient", "anchor": "value"}, **parts)  # type: ignore[arg-type]


def noted(world: World, name: str, omega: Params) -> World:
    """The world with the mean of Omega over all protected parameters after every stage so far in its notes."""
    mean = sum(jnp.sum(w) for w in omega.values()) / sum(w.size for w in omega.values())
    if isinstance(mean, jax.core.Tracer):  # `jaxcl plan` has shapes alone
        return world
    means = [*world.notes.get(name, {}).get("mean_omega", []), float(host(mean))]
    return world._replace(notes={**world.notes, name: {"mean_omega": means}})
