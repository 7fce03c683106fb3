"""A model of one's own under the stage loop: a causal mixer in Flax NNX, with EWC and replay, over three stages.

`from_flax` takes the module and a function that gives logits; methods, evaluation, checkpoints and resume then work as
they do for jaxcl's decoder. The trained weights go back into the module, which can be used without jaxcl.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from unicode_names import WINDOW, held_out, show, stages

from jaxcl import Experiment, ewc, finetune, from_flax, into_flax, replay, train
from jaxcl.core.progress import Reporter
from jaxcl.metrics.matrix_file import read_matrix

WIDTH = 64


class Mixer(nnx.Module):
    """Two blocks; each mixes earlier positions by a learned lower triangle, then channels by a dense net."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(259, WIDTH, rngs=rngs)
        self.time = nnx.List([nnx.Param(0.1 * jax.random.normal(rngs.params(), (WINDOW, WINDOW))) for _ in range(2)])
        self.norm = nnx.List([nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(2)])
        self.up = nnx.List([nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs) for _ in range(2)])
        self.down = nnx.List([nnx.Linear(2 * WIDTH, WIDTH, rngs=rngs) for _ in range(2)])

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """i32[B,T] -> logits of the token after each position f32[B,T,V]."""
        x, length = self.embed(tokens), tokens.shape[1]
        for time, norm, up, down in zip(self.time, self.norm, self.up, self.down):
            x = x + jnp.einsum("ts,bsd->btd", jnp.tril(time[:length, :length]), x)
            x = x + down(nnx.gelu(up(norm(x))))
        return self.embed.attend(x)


def main() -> dict[str, tuple[Mixer, np.ndarray]]:
    """{run: (the trained module, losses f64[stages, evals] after each stage)}; prints the losses."""
    found = {}
    for name, methods in {"finetune": [finetune()], "ewc + replay": [ewc(strength=0.3), replay(ratio=0.25)]}.items():
        module = Mixer(nnx.Rngs(0))
        model, params = from_flax(module, logits=lambda mixer, batch: mixer(batch["tokens"]))
        exp = Experiment(
            model=model, params=params, stages=stages(range(1, 8)), evals=held_out([0]), methods=methods,
            tx=optax.adam(3e-3), batch_size=16, epochs=6, save_every=0,
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as out:
            loop = train(exp, Path(out), reporter=Reporter(quiet=True))
            losses = read_matrix(Path(out)).rows
        found[name] = (into_flax(module, loop.now.world.params), losses)
        show(name, losses)
    return found


if __name__ == "__main__":
    main()
