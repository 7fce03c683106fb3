"""The demo's base model: a byte decoder trained for a moment on a mix of all kinds, in a run directory of its own."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from text import excerpts

from jaxcl.core.config import as_json
from jaxcl.core.experiment import Experiment
from jaxcl.core.progress import Reporter
from jaxcl.core.run import train
from jaxcl.core.types import Own, Params, Phase, Stream, World
from jaxcl.data.encode import Example, encode_text
from jaxcl.data.stage import Rows, Stage
from jaxcl.errors import RequestError
from jaxcl.methods.finetune import finetune
from jaxcl.models.decoder import decoder
from jaxcl.models.fetch import sha256
from jaxcl.models.spec import DecoderSpec, tiny
from jaxcl.models.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()
KEYS = ("seed", "width", "layers", "window", "batch_size", "base_steps", "base_lr")
FILE = "weights.safetensors"
PIECES = 512  # of each kind in the mix; more steps than they fill read them again


def spec(cfg: Any) -> DecoderSpec:
    """Width and depth as the config says; all logits of a batch at once, they are small."""
    return tiny(width=cfg.width, layers=cfg.layers, context=cfg.window, nll_chunk=cfg.batch_size * cfg.window)


def optimizer(peak: float) -> optax.GradientTransformation:
    """Adam after a clip to norm 1, warmed up over 8 steps of each stage."""
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.linear_schedule(0.0, peak, 8), b2=0.99))


def rows(name: str, pieces: Sequence[str], window: int) -> Rows:
    """A training row a piece: the end-of-sequence token, then its bytes, fewer than ``window``."""
    records = [{"id": f"{name}-{i}", "text": piece} for i, piece in enumerate(pieces)]

    def encode(i: int) -> Example:
        return encode_text([TOKENIZER.eos_id, *TOKENIZER.encode(pieces[i])], window, pad=TOKENIZER.pad_id, row=i)

    return Rows(name, records, encode, lambda _: name)


def identity(cfg: Any) -> dict[str, Any]:
    """The part of the config that the base depends on."""
    return {key: value for key, value in as_json(cfg).items() if key in KEYS}


def weights(
    cfg: Any, texts: Sequence[Sequence[str]], folder: Path, reporter: Reporter | None = None, pieces: int = PIECES
) -> tuple[Params, str]:
    """(parameters, SHA-256 of their file) of the base in run directory ``folder``, trained now where it is absent.
    texts: the documents of each kind, ``pieces`` of which are in the mix.

    Raises RequestError when the file there is no safetensors file, or the run there had another config.
    """
    experiment = _experiment(cfg, texts, folder / FILE, pieces)
    train(experiment, folder, name="demo base", config=identity(cfg), reporter=reporter)
    return finished(folder)


def finished(folder: Path) -> tuple[Params, str]:
    """(parameters, SHA-256 of their file) of a base that is there. RequestError when it is no safetensors file."""
    file = folder / FILE
    try:
        return {k: jax.numpy.asarray(v) for k, v in load_file(file).items()}, sha256(file)
    except (OSError, SafetensorError) as e:
        raise RequestError(f"{file} holds no weights ({e}); remove {folder} and start again") from e


def _experiment(cfg: Any, texts: Sequence[Sequence[str]], file: Path, pieces: int) -> Experiment:
    model = decoder(spec(cfg))
    mix = [piece for documents in texts for piece in excerpts(documents, cfg.window - 1, pieces)]
    stage = Stage("base", rows("base", mix, cfg.window))

    def save(world: World, own: Own) -> tuple[World, Own]:
        """Before the run is finished, so that a finished run has its file."""
        temporary = file.with_suffix(".tmp")
        save_file({k: np.asarray(v) for k, v in world.params.items()}, temporary)
        os.replace(temporary, file)
        return world, own

    whole = Stream(0, np.arange(len(mix), dtype=np.int64))
    return Experiment(
        model=model, params=model.init(model.spec, jax.random.key(cfg.seed)), stages=[stage],
        methods=[finetune()], tx=optimizer(cfg.base_lr), batch_size=cfg.batch_size, seed=cfg.seed, save_every=0,
        phases=[Phase("train", cfg.base_steps, (whole,), after=save)],
    )  # fmt: skip

