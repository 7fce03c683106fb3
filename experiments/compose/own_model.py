"""A model of one's own under the stage loop: a causal mixer in Flax NNX, with EWC and replay, over three stages.

`from_flax` takes the module and a function that gives logits; methods, evaluation, checkpoints and resume then work as
they do for jaxcl's decoder. The trained weights go back into the module, which can be used without jaxcl.
"""

from __future__ import annotations

import tempfile
import unicodedata
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxcl import Experiment, Method, Stage, ewc, finetune, from_flax, into_flax, replay, train
from jaxcl.core.progress import Reporter
from jaxcl.data.stage import text_source
from jaxcl.evaluate.nll import text_nll
from jaxcl.metrics.matrix_file import read_matrix
from jaxcl.models.tokenizer import ByteTokenizer

WINDOW, WIDTH, WORDS = 48, 64, ByteTokenizer()
SCRIPTS = {"cyrillic": range(0x400, 0x500), "ethiopic": range(0x1200, 0x1380), "braille": range(0x2800, 0x2900)}


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


def experiment(module: Mixer, methods: list[Method]) -> Experiment:
    """Three stages: the names of the characters of three scripts, every eighth held out. Scores are nats a byte."""
    model, params = from_flax(module, logits=lambda mixer, batch: mixer(batch["tokens"]))
    stages, evals = [], []
    for script, codes in SCRIPTS.items():
        names = [n for n in (unicodedata.name(chr(c), "") for c in codes) if n]
        known, held_out = [n for i, n in enumerate(names) if i % 8], names[::8]
        stages.append(Stage(script, text_source(script, known, WORDS, window=WINDOW), (script,)))
        evals.append(text_nll(script, [{"id": n, "text": n} for n in held_out], WORDS, window=WINDOW))
    return Experiment(
        model=model, params=params, stages=stages, evals=evals, methods=methods, tx=optax.adam(3e-3), batch_size=16,
        epochs=6, save_every=0,
    )  # fmt: skip


def main() -> dict[str, tuple[Mixer, np.ndarray]]:
    """{run: (the trained module, losses f64[stages, evals] after each stage)}; prints the losses."""
    found = {}
    for name, methods in {"finetune": [finetune()], "ewc + replay": [ewc(strength=0.3), replay(ratio=0.25)]}.items():
        module = Mixer(nnx.Rngs(0))
        with tempfile.TemporaryDirectory() as out:
            loop = train(experiment(module, methods), Path(out), reporter=Reporter(quiet=True))
            losses = read_matrix(Path(out)).rows
        found[name] = (into_flax(module, loop.now.world.params), losses)
        print(f"{name:16}" + "".join(f"{script:>10}" for script in SCRIPTS))
        for script, row in zip(SCRIPTS, losses):
            print(f"after {script:10}" + "".join(f"{x:10.2f}" for x in row))
    return found


if __name__ == "__main__":
    main()
