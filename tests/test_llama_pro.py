"""LLaMA Pro's invariants: an expansion changes nothing, only copies learn, memories follow through the Edit."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import MODEL, SPEC, STACK, WINDOW, Answers, run, same, to_numpy, weights

from jaxcl.core.paths import merge, split
from jaxcl.core.types import Clock, World
from jaxcl.data.pipeline import batches
from jaxcl.errors import RequestError
from jaxcl.methods.ewc import ewc
from jaxcl.methods.llama_pro import llama_pro
from jaxcl.methods.lora import lora
from jaxcl.models.decoder import decoder
from jaxcl.models.generate import generate
from jaxcl.models.spec import tiny
from jaxcl.models.stacking import restack
from jaxcl.surgery.depth import Layer, deepen, grouped, without

FOUR = dataclasses.replace(SPEC, layers=4, segments=())
KINDS = {
    "llama": FOUR,
    "bf16": dataclasses.replace(FOUR, dtype="bfloat16", param_dtype="bfloat16"),
    "remat": dataclasses.replace(FOUR, remat="block"),
    "stacked": dataclasses.replace(FOUR, segments=((("block",), 4),)),
    "norms after, biases, local layers": dataclasses.replace(
        FOUR, norms="both", biases=("attn/o", "mlp/down"), window=4, segments=((("local", "block"), 2),)
    ),
}


def world_of(spec, params=None) -> World:
    params = decoder(spec).init(spec, jax.random.key(1)) if params is None else params
    noisy = {k: v + 0.01 if k.endswith(("scale", "bias")) else v for k, v in params.items()}
    return World(spec, noisy, frozenset(), 0, 0, jax.random.key(0), None, {}, ())


def batch_of(rows: int = 4) -> dict:
    batch = next(batches(Answers("a", rows), None, rows))
    return {k: batch[k] for k in ("tokens", "segments", "positions")}


def logits(spec, params):
    batch = batch_of()
    out = MODEL.apply(spec, params, batch)
    at = jnp.broadcast_to(jnp.arange(WINDOW), batch["tokens"].shape)
    return np.asarray(MODEL.head(spec, params, out.hidden, at))


@pytest.mark.parametrize("name", KINDS)
def test_logits_and_generation_are_bit_identical_at_expansion(name):
    old = world_of(KINDS[name])
    new = deepen(old, grouped(4, 2, 1), silent=True)
    assert new.spec.layers == 6 and new.edits[0].exact
    assert np.array_equal(logits(new.spec, new.params), logits(old.spec, old.params))
    prompts, lengths = batch_of()["tokens"][:, :4], np.array([4, 3, 4, 2])
    how = {"max_new": 6, "stop_ids": ()}
    made = [generate(MODEL.apply, MODEL.head, w.spec, w.params, prompts, lengths, **how)[0] for w in (old, new)]
    assert np.array_equal(*made)
    size = lambda params: sum(v.size for v in params.values())  # noqa: E731
    block = sum(v.size for k, v in restack(old.params, old.spec, old.spec.unstacked)[0].items() if "layers/1/" in k)
    assert size(new.params) == size(old.params) + 2 * block


def test_a_stack_of_old_layers_and_one_of_copies():
    new = deepen(world_of(KINDS["stacked"]), grouped(4, 2, 1), silent=True)
    assert new.spec.segments == ((("block",) * 3, 2),)
    assert new.edits[0].born == {k for k in new.params if k.startswith("layers/2:6:3/")}
    kinds = deepen(world_of(KINDS["norms after, biases, local layers"]), grouped(4, 2, 1), silent=True).spec.kinds
    assert kinds == ("local", "block", "block", "local", "block", "block"), "a copy has its layer's kind"


def test_the_order_of_the_paper():
    """32 layers in 8 groups: after layers 3, 7, ... comes a copy of each; two copies go on top of their group."""
    order = grouped(32, 8, 1)
    assert [i for i, layer in enumerate(order) if layer.copy] == [4, 9, 14, 19, 24, 29, 34, 39]
    assert [layer.source for layer in order if layer.copy] == [3, 7, 11, 15, 19, 23, 27, 31]
    sources = [layer.source for layer in order]
    assert sources == sorted(sources), "the index map is monotone"
    assert grouped(4, 2, 2) == [Layer(0), Layer(1), Layer(0, True), Layer(1, True), *grouped(4, 2, 2)[4:]]
    with pytest.raises(RequestError, match="1, 2, 4, 8, 16, 32"):
        grouped(32, 5, 1)


@pytest.mark.parametrize("name", KINDS)
def test_dropping_the_copies_returns_the_base(name):
    old = world_of(KINDS[name])
    new = deepen(old, grouped(4, 2, 1), silent=True)
    back, spec = without(new.params, new.spec, [2, 5])
    assert same(to_numpy(back), to_numpy(restack(old.params, old.spec, old.spec.unstacked)[0]))
    assert spec == dataclasses.replace(old.spec, segments=old.spec.unstacked)


def test_expanding_twice_is_expanding_once_with_the_merged_map():
    old = world_of(FOUR)
    twice = deepen(deepen(old, grouped(4, 2, 1), silent=True), grouped(6, 2, 1), silent=True)
    merged = [Layer(0), Layer(1), Layer(1, True), Layer(1, True), Layer(2), Layer(3), Layer(3, True), Layer(3, True)]
    once = deepen(old, merged, silent=True)
    assert twice.spec == once.spec and same(to_numpy(twice.params), to_numpy(once.params))


def test_at_first_only_the_output_projections_of_copies_have_a_gradient():
    new = deepen(world_of(FOUR), grouped(4, 2, 1), silent=True)
    train, frozen = split(new.params, new.edits[0].born)
    loss = lambda p: MODEL.apply(new.spec, merge(frozen, p), batch_of()).nll.sum()  # noqa: E731
    moving = {k for k, g in jax.grad(loss)(train).items() if np.any(g)}
    assert moving == {f"layers/{i}/{site}/kernel" for i in (2, 5) for site in ("attn/o", "mlp/down")}


def test_frozen_weight_gradients_are_not_computed():
    """Counted in the program: of a frozen layer's matmuls only those towards the input are left in the backward."""
    new = deepen(world_of(FOUR), [Layer(0), Layer(1), Layer(2), Layer(3), Layer(3, True)], silent=True)
    count = lambda train, rest: str(  # noqa: E731
        jax.make_jaxpr(jax.grad(lambda p: MODEL.apply(new.spec, merge(rest, p), batch_of()).nll.sum()))(train)
    ).count("dot_general")
    forward = str(jax.make_jaxpr(lambda p: MODEL.apply(new.spec, p, batch_of()).nll)(new.params)).count("dot_general")
    born, everything = split(new.params, new.edits[0].born), split(new.params, new.params)
    # Below the copy is no backward at all. Left: the head's, 7 kernels' own and their inputs' (the norms train), and
    # two for each of attention's two products.
    assert count(*born) - forward == 1 + 7 + 7 + 4 and count(*everything) > count(*born) + 4 * 7


@pytest.mark.parametrize("expand", ["each", "first"])
def test_original_weights_do_not_move_and_copies_do(expand, tmp_path):
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(3e-3, weight_decay=0.1))
    done = run([llama_pro(groups=2, expand=expand)], tmp_path / "out", tx=tx)
    host, spec = done.loop.now.owns["llama_pro"]["host"], done.loop.now.world.spec
    assert done.compilations == (3 if expand == "each" else 1) and spec.layers == (8 if expand == "each" else 4)
    base, _ = without(done.params, spec, [i for i, stage in enumerate(host["stage_added"]) if stage >= 0])
    assert same(to_numpy(base), to_numpy(weights()))
    for i, (source, stage) in enumerate(zip(host["origin"], host["stage_added"], strict=True)):
        assert (source == -1) == (stage == -1)
        if stage == -1:
            continue
        outputs = [np.abs(done.params[f"layers/{i}/{site}/kernel"]).max() for site in ("attn/o", "mlp/down")]
        assert min(outputs) > 0 and source < i
    assert host["stage_added"] == ([-1, 0, 1, 2] * 2 if expand == "each" else [-1, 0] * 2)


def test_a_rate_of_zero_changes_nothing(tmp_path):
    done = run([llama_pro(groups=2)], tmp_path / "out", tx=optax.sgd(0.0), n=2)
    plain = run([], tmp_path / "plain", tx=optax.sgd(0.0), n=2)
    assert done.losses().tolist() == plain.losses().tolist()


def test_ewc_beside_it_protects_the_copies_of_before(tmp_path):
    """EWC's tables follow the layers' new numbers and get the new copies: importance zero, anchored where they are."""
    done = run([ewc(strength=50.0, rows=8), llama_pro(groups=2, expand="each")], tmp_path / "out", n=2)
    fixed = done.loop.now.owns["ewc"]["fixed"]
    layers = {int(k.split("/")[1]) for k in fixed["fisher"]}
    assert layers == {1, 2, 4, 5} and fixed["fisher"].keys() == fixed["anchor"].keys()
    assert [done.loop.now.owns["llama_pro"]["host"]["stage_added"][i] for i in sorted(layers)] == [0, 1, 0, 1]
    down = "layers/{}/mlp/down/kernel"
    assert all(np.any(fixed["fisher"][down.format(i)]) for i in layers)
    for i in (1, 4):  # frozen in the second stage: anchored to what they are
        assert np.array_equal(fixed["anchor"][down.format(i)], done.params[down.format(i)])
    assert max(r["ewc/penalty"] for r in done.log if r["stage"] == 1) > 0 or len(done.log) < 5


def test_with_lora_both_train_and_adapters_follow_their_layers(tmp_path):
    done = run([lora(rank=2, alpha=4.0, dropout=0.0), llama_pro(groups=2)], tmp_path / "out", n=2)
    free = done.loop.now.world.trained
    adapters = {k for k in done.params if k.endswith("/lora_a")}
    owner = done.loop.now.owner
    assert {k.split("/")[1] for k in adapters} == {"0", "3"}, "layers 0 and 1 of the given model are now 0 and 3"
    assert adapters < free and {owner[k] for k in adapters} == {"lora"}
    assert {owner.get(k) for k in free - adapters if "lora" not in k} == {"llama_pro"}
    assert done.loop.now.owns["lora"]["host"]["sites"] == sorted(k.removesuffix("/lora_a") for k in adapters)


def test_bad_values_and_models_are_refused(tmp_path):
    with pytest.raises(RequestError, match=r"2 layers in 8 groups: accepted: .*\[1, 2\]"):
        run([llama_pro()], tmp_path / "out", n=1)
    assert not (tmp_path / "out").exists()
    with pytest.raises(RequestError, match="expand"):
        llama_pro(expand="always")
    with pytest.raises(RequestError, match="groups 0"):
        llama_pro(groups=0)
    foreign = world_of(FOUR)._replace(spec=Clock.at())
    with pytest.raises(RequestError, match="accepted: a DecoderSpec"):
        deepen(foreign, grouped(4, 2, 1), silent=True)


def test_smollm_sizes_divide():
    """SmolLM2-135M has 30 layers; the paper's 8 groups do not divide them, 6 do."""
    assert len(grouped(30, 6, 1)) == 36 and tiny(layers=4).layers == 4 and STACK
