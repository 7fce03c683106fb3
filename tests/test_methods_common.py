"""What holds for every method, alone and in pairs. A new method is one row of ROWS."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import numpy as np
import optax
import pytest
from support import SPEC, STACK, Done, experiment, relative, run, same, to_numpy, unstacked, weights
from user_methods import MEETS, theirs

from jaxcl.core.between import Between
from jaxcl.core.types import Method
from jaxcl.errors import RequestError
from jaxcl.methods.agem import agem
from jaxcl.methods.bottleneck import bottleneck
from jaxcl.methods.der import der
from jaxcl.methods.elle import elle
from jaxcl.methods.ewc import ewc
from jaxcl.methods.feature_reg import feature_reg
from jaxcl.methods.finetune import finetune
from jaxcl.methods.gem import gem
from jaxcl.methods.generative_replay import generative_replay
from jaxcl.methods.grace import grace
from jaxcl.methods.grpo import grpo
from jaxcl.methods.hat import hat
from jaxcl.methods.ia3 import ia3
from jaxcl.methods.idbr import idbr
from jaxcl.methods.inclora import inclora
from jaxcl.methods.inflora import inflora
from jaxcl.methods.joint import joint
from jaxcl.methods.l2_sp import l2_sp
from jaxcl.methods.lamol import lamol
from jaxcl.methods.llama_pro import llama_pro
from jaxcl.methods.lora import lora
from jaxcl.methods.lora_experts import lora_experts
from jaxcl.methods.lwf import lwf
from jaxcl.methods.mas import mas
from jaxcl.methods.mir import mir
from jaxcl.methods.ogd import ogd
from jaxcl.methods.olora import olora
from jaxcl.methods.ppo import ppo
from jaxcl.methods.prefix_tuning import prefix_tuning
from jaxcl.methods.progressive_prompts import progressive_prompts
from jaxcl.methods.prompt_tuning import prompt_tuning
from jaxcl.methods.replay import replay
from jaxcl.methods.rho1 import rho1
from jaxcl.methods.si import si
from jaxcl.models.layout import layout
from jaxcl.surgery.depth import without
from jaxcl.transforms.mofo import mofo

SMALL = {"rank": 2, "alpha": 4.0, "dropout": 0.1}
BANK = SMALL | {"max_stages": 3}
ROWS: dict[str, Callable[[], Method]] = {
    "finetune": lambda: finetune(),
    "joint": lambda: joint(),
    "replay": lambda: replay(ratio=0.5, capacity=12),
    "replay balanced": lambda: replay(count=4, capacity=8, policy="class_balanced"),
    "mir": lambda: mir(candidates=2, capacity=12, rows=4),
    "der": lambda: der(k=3, capacity=12),
    "mir s2": lambda: mir(candidates=2, capacity=12, score="s2"),
    "generative replay": lambda: generative_replay(gamma=0.5, condition="prefix", kept=4, oversample=16, eos=31),
    "lamol": lambda: lamol(gamma=0.5, eos=31, max_stages=3),
    "l2_sp": lambda: l2_sp(strength=0.1),
    "l2_sp decoupled": lambda: l2_sp(strength=1.0, anchor="previous", form="decoupled", rate=0.05),
    "ewc": lambda: ewc(strength=50.0, rows=8),
    "ewc separate": lambda: ewc(strength=50.0, rows=8, mode="separate", fisher="sampled", max_stages=3),
    "si": lambda: si(strength=1.0),
    "mas": lambda: mas(strength=0.1, rows=8),
    "lwf": lambda: lwf(),
    "lwf asked": lambda: lwf(teacher="topk", rows="new", k=4),
    "feature_reg": lambda: feature_reg(strength=2.0),
    "idbr": lambda: idbr(width=5, max_stages=3),
    "agem": lambda: agem(capacity=8),
    "gem": lambda: gem(capacity=8, max_stages=3),
    "ogd": lambda: ogd(rows=4, max_stages=3, exact=True),
    "hat": lambda: hat(s_max=40.0, max_stages=3),
    "rho1": lambda: rho1(share=0.5, reference=None),
    "rho1 phased": lambda: rho1(share=0.5, reference=0.5, epochs=1, scores="live"),
    "lora": lambda: lora(**SMALL),
    "lora merged": lambda: lora(merged=True, name="merging", **SMALL),
    "inclora": lambda: inclora(**BANK),
    "olora": lambda: olora(norm_strength=0.1, **BANK),
    "inflora": lambda: inflora(rank=2, max_stages=3, stages=3, rows=8),
    "ia3": lambda: ia3(),
    "ia3 by task": lambda: ia3(per_task=True, max_stages=3),
    "prompt_tuning": lambda: prompt_tuning(length=3),
    "prompt_tuning by task": lambda: prompt_tuning(length=3, hidden=5, per_task=True, max_stages=3),
    "prefix_tuning": lambda: prefix_tuning(length=3, hidden=0),
    "prefix_tuning by task": lambda: prefix_tuning(length=3, hidden=5, per_task=True, max_stages=3),
    "progressive_prompts": lambda: progressive_prompts(length=3, hidden=5, max_stages=3),
    "bottleneck": lambda: bottleneck(width=3),
    "bottleneck routed": lambda: bottleneck(width=3, norms=True, per_task=True, router="perplexity", max_stages=3),
    "lora_experts": lambda: lora_experts(rank=1, max_experts=3, balance=0.1, targets=["mlp/down"]),
    "llama_pro": lambda: llama_pro(groups=2),
    "grace": lambda: grace(eps_init=0.1, n_iter=3, capacity=64),
    "elle": lambda: elle(growth=({"heads": 2}, {"layers": 1}), capacity=12, recover=2, segments=2, noise=0.0),
    "ppo": lambda: ppo(reward="token:7", max_new=4),
    "grpo": lambda: grpo(reward="token:7", max_new=4, group=2, epochs=2),
}
GROWING = ("llama_pro", "elle")  # a surgery at the start of a stage is one more compilation
ADAPTERS = ("lora", "lora merged", "inclora", "olora", "inflora")
# adapters of other kinds, which go with those
BESIDE = ("ia3", "prompt_tuning", "prefix_tuning", "progressive_prompts", "bottleneck", "lora_experts")
REFUSED = [
    *itertools.combinations(ADAPTERS, 2),  # on the same sites
    *(("hat", name) for name in (*ADAPTERS, *BESIDE, "llama_pro", "ppo", "idbr")),  # HAT cannot protect what they train
    ("inflora", "llama_pro"),  # it knows the inputs of layers that these move
    ("prompt_tuning", "progressive_prompts"),  # a model has one soft prompt
    ("ppo", "grpo"),  # a phase has rollouts of one
    *((name, "grace") for name in ("hat", *ADAPTERS, *BESIDE, "llama_pro")),  # GRACE's edits hold in a frozen model
    *(("grace", name) for name in ("ppo", "idbr")),  # as above
]
# Refused when it comes to that: test_ppo, test_protocol_page.
ELSEWHERE = [("rho1", "ppo"), ("grace", "elle"), ("inflora", "elle")]
# What must be the same as training without any method: a strength of nothing is nothing, bit for bit.
NOTHING: dict[str, Callable[[], Method]] = {
    "joint": lambda: replay(ratio=0.0),
    "replay": lambda: replay(ratio=0.5, capacity=0),
    "replay balanced": lambda: replay(count=0, policy="class_balanced"),
    "mir": lambda: mir(capacity=0),
    "der": lambda: der(alpha=0.0, beta=0.0),
    "generative replay": lambda: generative_replay(gamma=0.0, strength=0.0),
    "lamol": lambda: lamol(gamma=0.0, strength=0.0),
    "l2_sp": lambda: l2_sp(strength=0.0),
    "ewc": lambda: ewc(strength=0.0, rows=8),
    "si": lambda: si(strength=0.0),
    "mas": lambda: mas(strength=0.0),
    "lwf": lambda: lwf(strength=0.0),
    "feature_reg": lambda: feature_reg(strength=0.0),
    "idbr": lambda: idbr(general=0.0, specific=0.0, order=0.0, task=0.0),
    "agem": lambda: agem(capacity=0),
    "gem": lambda: gem(capacity=0, max_stages=3),
    "ogd": lambda: ogd(rows=0),
    "rho1": lambda: rho1(share=1.0, reference=None),
    "ewc separate": lambda: ewc(strength=0.0, rows=8, mode="separate", max_stages=3),
    "elle": lambda: elle(growth=(), capacity=0),
}
ROWS |= (OUTSIDE := theirs("ROWS"))  # what is not of this package has to pass the same
NOTHING |= theirs("NOTHING")
DECAY = optax.chain(optax.add_decayed_weights(0.01), optax.sgd(0.05, momentum=0.9))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Callable[..., Done]:
    """Three stages under momentum and weight decay, run once per method and spec."""
    made: dict = {}

    def get(name: str, stacked: bool = False) -> Done:
        if (name, stacked) not in made:
            spec = dataclasses.replace(SPEC, segments=STACK) if stacked else SPEC
            out = tmp_path_factory.mktemp("run") / "out"
            made[name, stacked] = run([ROWS[name]()], out, tx=DECAY, spec=spec)
        return made[name, stacked]

    return get


@pytest.mark.parametrize("name", ROWS)
def test_three_stages_in_one_compilation_for_each_phase(trained, name):
    done = trained(name)
    assert done.compilations == (3 if name in GROWING else len({record["phase"] for record in done.log}))
    assert len(done.log) >= 6 and np.isfinite(done.losses()).all()
    for path, leaf in layout(done.loop.now.world.spec).items():
        assert done.params[path].shape == leaf.shape and done.params[path].dtype == np.float32


@pytest.mark.parametrize("name", ROWS)
def test_terms_add_up_to_the_loss(trained, name):
    for record in trained(name).log:
        terms = [v for k, v in record.items() if k == "objective" or "/" in k]
        assert np.isclose(record["loss"], np.sum(np.float64(terms)), rtol=1e-6)


@pytest.mark.parametrize("name", ROWS)
def test_frozen_is_bit_identical_also_under_weight_decay(trained, name):
    done, start = trained(name), to_numpy(weights())
    free = done.loop.now.world.trained
    frozen = {k: v for k, v in start.items() if k not in free}
    if name == "llama_pro":  # the given layers have other numbers now, and all of them are frozen
        added = done.loop.now.owns[name]["host"]["stage_added"]
        base, _ = without(done.params, done.loop.now.world.spec, [i for i, stage in enumerate(added) if stage >= 0])
        assert same(to_numpy(base), start)
    elif name != "lora merged":  # which adds to its frozen kernels between stages
        assert same({k: done.params[k] for k in frozen}, frozen)
    moved = [k for k in free if k in start and not np.array_equal(done.params[k], start[k])]
    assert len(moved) == len([k for k in free if k in start]), "what is trained moves"
    if name in ADAPTERS:
        assert not moved and all(k.endswith(("/lora_a", "/lora_b")) for k in free)
        assert all(np.abs(done.params[k]).max() > 0 for k in free if name != "lora merged")


@pytest.mark.parametrize("name", NOTHING)
def test_strength_zero_is_nothing_and_more_is_something(trained, name, tmp_path):
    plain = trained("finetune")
    nothing = run([NOTHING[name]()], tmp_path / "nothing", tx=DECAY)
    assert same(nothing.params, plain.params) and np.array_equal(nothing.losses(), plain.losses())
    assert not same(trained(name).params, plain.params)


def test_olora_without_strengths_is_inclora_and_with_them_is_not(trained, tmp_path):
    plain = trained("inclora")
    nothing = run([olora(strength=0.0, **BANK)], tmp_path / "nothing", tx=DECAY)
    assert same(nothing.params, plain.params)
    assert not same(trained("olora").params, plain.params)


def in_stacks() -> list:
    """Methods that change or read the layers themselves; the others see a stack as one more parameter (``-m slow``)."""
    own = {"ewc", "hat", "lwf asked", "grace", "lora merged", "olora", "inflora", "llama_pro", "elle"}
    own |= {"prefix_tuning by task"}  # which makes keys by layer
    return [name if name in own else pytest.param(name, marks=pytest.mark.slow) for name in ROWS]


@pytest.mark.parametrize("name", in_stacks())
def test_stacked_layers_train_as_unstacked_ones(trained, name):
    """Three whole stages: step, Fisher, surgery, banks and merging all map over the layers' axis."""
    one, stack = trained(name), trained(name, stacked=True)
    assert any(":" in k for k in stack.params) or name == "grace"  # which sets one of the two layers apart
    assert not any(":" in k for k in one.params)
    np.testing.assert_allclose(stack.losses(), one.losses(), rtol=2e-5)
    spec = stack.loop.now.world.spec
    assert relative(unstacked(stack.params, spec), one.params) < 1e-4


def compatible() -> list[tuple[str, str]]:
    """Every method with every other; the variants of one method share its step, and GRPO's rollouts are PPO's."""
    first = {make().name: row for row, make in reversed(ROWS.items())}.values()
    pairs = [p for p in itertools.combinations(reversed(first), 2) if p not in [*REFUSED, *ELSEWHERE]]
    return [p for p in pairs if not {*OUTSIDE, "grpo"} & {*p} or {*MEETS} & {*p}]


def sorted_by_time(pairs: list[tuple[str, str]]) -> list:
    """Every method meets one of the three shapes (streams, penalties, new keys) in turn, and methods from outside all
    of theirs; all other pairs by ``-m slow``."""
    shapes = ("replay", "ewc", "lora")
    quick = [p for p in pairs if {*p} <= {*shapes} or {*p} & {*OUTSIDE}]
    for n, name in enumerate(sorted({name for pair in pairs for name in pair} - {*shapes, *OUTSIDE})):
        turns = [{name, shapes[(n + i) % 3]} for i in range(3)]
        quick += [p for turn in turns for p in pairs if {*p} == turn][:1]
    return [p if p in quick else pytest.param(p, marks=pytest.mark.slow) for p in pairs]


@pytest.mark.parametrize("pair", sorted_by_time(compatible()), ids="+".join)
def test_pairs_of_compatible_methods(trained, pair, tmp_path):
    done = run([ROWS[name]() for name in pair], tmp_path / "out", tx=DECAY, n=2)
    assert done.compilations == (2 if {*pair} & {*GROWING} else 1) and np.isfinite(done.losses()).all()
    for name in pair:
        alone, key = trained(name), ROWS[name]().name
        mine, theirs = done.loop.now.owns[key], alone.loop.now.owns[key]
        assert mine.keys() == theirs.keys() and sorted(mine["fixed"]) == sorted(theirs["fixed"])
        terms = {k for k in alone.log[0] if k.startswith(key + "/")}
        assert terms <= done.log[0].keys(), "every term of each is there"
    assert done.loop.now.owns.keys() == {ROWS[name]().name for name in pair}


@pytest.mark.parametrize("turn", [1, -1])
@pytest.mark.parametrize("pair", REFUSED, ids="+".join)
def test_pairs_that_do_not_go_together_are_refused(pair, turn):
    methods = [ROWS[name]() for name in pair[::turn]]
    between = Between(experiment(methods), lambda: None)
    with pytest.raises(RequestError) as error:
        between.begin(0)
        between.plan(0)
    assert all(repr(m.name) in str(error.value) for m in methods)


def test_two_methods_of_one_name_are_refused(tmp_path):
    with pytest.raises(RequestError, match="two methods are named 'ewc'"):
        run([ewc(), ewc(mode="mean")], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["finetune", "ewc", "lora", "olora"])
def test_mofo_with_every_kind_of_step(name, tmp_path):
    """The pair of a method and the transform: what is trained moves, at least as much of it as is chosen."""
    done = run([ROWS[name]()], tmp_path / "out", tx=mofo(1e-2, fraction=0.05), n=2)
    assert done.compilations == 1 and np.isfinite(done.losses()).all()
    start, free = to_numpy(weights()), done.loop.now.world.trained
    for path in start.keys() - free:
        assert np.array_equal(done.params[path], start[path])
    if name in ("finetune", "ewc"):
        steps = len(done.log)
        for path in free:
            changed = int(np.sum(done.params[path] != start[path]))
            if "norm" not in path:
                k = max(1, int(start[path].size * 0.05))
                assert k <= changed <= k * steps


def test_the_random_numbers_of_a_step_depend_on_the_seed(tmp_path):
    """Dropout is on in `lora`: another seed, another run; the same seed, the same."""
    runs = [run([ROWS["lora"]()], tmp_path / str(i), n=1, seed=s, tx=DECAY) for i, s in enumerate((1, 1, 2))]
    assert same(runs[0].params, runs[1].params) and not same(runs[0].params, runs[2].params)
