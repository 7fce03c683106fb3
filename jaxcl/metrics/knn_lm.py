"""The mixture of a language model with what its nearest neighbours said next. Card refine-align/retrieval-lifelong.

Khandelwal et al. 2020, arXiv 1911.00172.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxcl.errors import RequestError


def neighbour_probabilities(distances: Any, tokens: Any, vocab: int) -> np.ndarray:
    """f64[..., vocab]: softmax of minus the distances f[..., k] (squared L2), added up where neighbours have the same
    token i[..., k]. RequestError on a token outside the vocabulary."""
    exponents = -np.asarray(distances, np.float64)
    ids = np.asarray(tokens, np.int64)
    if ids.size and (ids.min() < 0 or ids.max() >= vocab):
        raise RequestError(f"neighbours' tokens are {ids.min()} to {ids.max()}; accepted: 0 to {vocab - 1}")
    weight = np.exp(exponents - exponents.max(-1, keepdims=True))
    weight /= weight.sum(-1, keepdims=True)
    out = np.zeros((*weight.shape[:-1], vocab))
    for j in range(weight.shape[-1]):
        at = ids[..., j, None]
        np.put_along_axis(out, at, np.take_along_axis(out, at, -1) + weight[..., j, None], -1)
    return out


def mixed(neighbours: Any, model: Any, lam: float) -> np.ndarray:
    """lam * p_kNN + (1 - lam) * p_LM over the last axis; the model's own probabilities, bit for bit, at lam = 0."""
    if not 0 <= lam <= 1:
        raise RequestError(f"lam={lam} of kNN-LM; accepted: 0 to 1")
    model = np.asarray(model)
    return model if lam == 0 else lam * np.asarray(neighbours) + (1 - lam) * model
