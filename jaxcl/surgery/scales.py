"""Factors on a dense site's units, multiplied into its kernel and bias. Source: (IA)^3 (Liu et al. 2022).

``in_scale`` [in], ``out_scale`` [out] are the factors themselves, ``in_delta``, ``out_delta`` what they are beyond 1. A
stacked site has the layers' axis in front. Arrays may be jax's or numpy's and stay so.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from jaxcl.models.layout import FACTORS


def factors(paths: Iterable[str]) -> list[str]:
    """Those of the paths that are factors of a site, sorted."""
    return sorted(path for path in paths if path.rpartition("/")[2] in FACTORS)


def folded(params: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    """``params`` in which the factors ``keys`` are in their kernels, and in the biases where they scale an output;
    their own keys are gone. The function is the same up to rounding, which float32 kernels keep small."""
    out = dict(params)
    for key in keys:
        site, _, name = key.rpartition("/")
        side, _, kind = name.partition("_")
        factor = out.pop(key) + (1 if kind == "delta" else 0)
        along = factor[..., :, None] if side == "in" else factor[..., None, :]
        out[site + "/kernel"] = out[site + "/kernel"] * along
        if side == "out" and site + "/bias" in out:
            out[site + "/bias"] = out[site + "/bias"] * factor
    return out
