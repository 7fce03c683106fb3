"""An Edit takes every memory that mirrors the parameters along, each by its kind."""

from __future__ import annotations

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.core.journal import flatten
from jaxcl.surgery.edit import Edit, carry, restart, restarted

A, B = "layers/0/attn/q/lora_a", "layers/0/attn/q/lora_b"
EDIT = Edit({A: jnp.full((2, 3), 7.0)}, removed=frozenset({"gone/kernel"}))


@pytest.mark.parametrize("kind,want", [("value", 7.0), ("gradient", 0.0), ("square", 0.0)])
def test_an_edited_path_becomes_what_its_kind_says(kind, want):
    tree = {A: jnp.ones((2, 3)), B: jnp.ones(4), "gone/kernel": jnp.ones(2)}
    out = EDIT.apply(tree, kind)
    assert out.keys() == {A, B} and out[B] is tree[B]
    assert np.array_equal(out[A], np.full((2, 3), want))


def test_a_mask_becomes_false():
    assert not EDIT.apply({A: jnp.ones((2, 3), bool)}, "mask")[A].any()


def test_memories_with_an_axis_of_their_own_are_filled_along_it_and_keep_their_type():
    out = EDIT.apply({A: jnp.ones((5, 2, 3), jnp.bfloat16)}, "value")[A]
    assert out.shape == (5, 2, 3) and out.dtype == jnp.bfloat16 and np.all(np.asarray(out, np.float32) == 7)


def test_dicts_inside_dicts():
    out = EDIT.apply({"teacher": {"deep": {A: jnp.ones((2, 3))}}, "count": 3}, "value")
    assert out["count"] == 3 and np.all(np.asarray(out["teacher"]["deep"][A]) == 7)


def test_carrying_goes_by_the_declared_kinds_and_in_order():
    own = {
        "fixed": {"anchor": {A: jnp.ones((2, 3))}, "fisher": {A: jnp.ones((2, 3))}, "other": {A: jnp.ones((2, 3))}},
        "live": {"ema": {A: jnp.ones((2, 3))}},
        "host": {"n": 1},
    }
    later = Edit({A: jnp.full((2, 3), 9.0)})
    out = carry(own, {"anchor": "value", "fisher": "square", "ema": "value"}, (EDIT, later))
    assert np.all(np.asarray(out["fixed"]["anchor"][A]) == 9) and not out["fixed"]["fisher"][A].any()
    assert np.all(np.asarray(out["live"]["ema"][A]) == 9)
    assert out["fixed"]["other"] is own["fixed"]["other"] and out["host"] == {"n": 1}
    assert np.all(np.asarray(own["fixed"]["anchor"][A]) == 1), "the old memory is as it was"


def test_restart_notes_what_it_did():
    world = SimpleNamespace(params={A: jnp.ones((2, 3)), B: jnp.ones(4)}, edits=())
    world._replace = lambda **new: SimpleNamespace(**(vars(world) | new))
    new = restart(world, {A: jnp.zeros((2, 3))})
    assert not new.params[A].any() and new.params[B] is world.params[B]
    assert len(new.edits) == 1 and new.edits[0].fills.keys() == {A}


def test_moments_of_what_starts_afresh_start_afresh():
    moments = flatten({"mu": {A: jnp.ones((2, 3)), B: jnp.ones(4)}, "count": jnp.int32(5)}, "opt")
    out = {k.split("%2F")[-1]: v for k, v in restarted(moments, (EDIT,)).items()}
    assert not out["lora_a"].any() and out["lora_b"].all() and out["opt/count"] == 5
