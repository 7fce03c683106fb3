"""Parameter paths: patterns speak of layers, however these are stored."""

from __future__ import annotations

import numpy as np
import pytest
from support import SPEC, STACK, weights

from jaxcl.core.paths import concrete, is_stacked, layer_shape, matches, merge, per_tensor, sites, split
from jaxcl.errors import RequestError
from jaxcl.models.stacking import restack

STACKED = "layers/0:6:2/attn/q/kernel"


def test_the_layers_behind_a_key():
    assert concrete(STACKED) == [f"layers/{i}/attn/q/kernel" for i in (0, 2, 4)]
    assert concrete("layers/7/attn/q/kernel") == ["layers/7/attn/q/kernel"]
    assert is_stacked(STACKED) and not is_stacked("layers/10/attn/q/kernel") and not is_stacked("a1:2:3b/kernel")


@pytest.mark.parametrize(
    "path,patterns,hit",
    [
        ("layers/3/attn/q/kernel", ("attn/q/kernel",), True),
        ("layers/3/attn/q/kernel", ("layers/*/attn/[qv]/kernel",), True),
        ("layers/3/attn/k/kernel", ("layers/*/attn/[qv]/kernel",), False),
        ("layers/3/attn/q/kernel", ("layers/4/*", "layers/3/*"), True),
        ("layers/13/attn/q/kernel", ("layers/3/*",), False),
        ("layers/3/attn/q/kernel", ("tn/q/kernel",), False),
        (STACKED, ("attn/q/*",), True),
        (STACKED, ("layers/[024]/*",), True),
        (STACKED, ("layers/1/*",), False),
        ("embed/kernel", (), False),
    ],
)
def test_patterns(path, patterns, hit):
    assert matches(path, patterns) is hit


def test_a_stack_is_named_as_a_whole_or_not_at_all():
    with pytest.raises(RequestError, match=r"names 1 of the 3 layers stacked in 'layers/0:6:2/attn/q/kernel'"):
        matches(STACKED, ("layers/2/*",))


def test_sites_are_what_has_a_kernel_inside_a_layer():
    params = weights()
    assert sites(params, ("attn/q", "attn/v")) == [f"layers/{i}/attn/{s}" for i in (0, 1) for s in "qv"]
    assert sites(params, ("layers/1/mlp/*",)) == [f"layers/1/mlp/{s}" for s in ("down", "gate", "up")]
    assert sites(restack(params, SPEC, STACK)[0], ("attn/q",)) == ["layers/0:2:1/attn/q"]
    for target in ("attn/w", "embed", "mlp_norm"):
        with pytest.raises(RequestError, match=f"target '{target}' names no dense site"):
            sites(params, (target,))
    with pytest.raises(RequestError, match="did you mean 'attn/q'"):
        sites(params, ("attn/qq",))


def test_split_and_merge_are_inverse_and_ordered():
    params = {"b": 1, "a": 2, "c": 3}
    one, other = split(params, {"c", "a", "absent"})
    assert one == {"a": 2, "c": 3} and other == {"b": 1}
    assert list(merge(one, other)) == ["a", "b", "c"] and merge(one, other) == params


def test_per_tensor_maps_over_the_layers():
    x = np.arange(24.0, dtype=np.float32).reshape(3, 2, 4)
    top = lambda v: v.max()  # noqa: E731
    assert per_tensor(top, STACKED, x).tolist() == [7, 15, 23]
    assert per_tensor(top, "layers/0/attn/q/kernel", x) == 23
    assert layer_shape(STACKED, x) == (2, 4) and layer_shape("embed/kernel", x) == (3, 2, 4)
