"""From a random key to numpy's generator, for what is drawn on the host: rows, layers, heads."""

from __future__ import annotations

import jax
import numpy as np


def host_rng(key: jax.Array) -> np.random.Generator:
    """The generator seeded with the key's words; the same inside a trace, where the key is a number all the same."""
    with jax.ensure_compile_time_eval():
        return np.random.default_rng([int(x) for x in np.ravel(jax.random.key_data(key))])
