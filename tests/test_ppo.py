"""PPO and GRPO on rollouts: what a rollout holds, the gradient, the references, resuming inside a block."""

from __future__ import annotations

import dataclasses
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import MODEL, SPEC, Answers, digest, experiment, run, to_numpy, weights

from jaxcl.core import journal
from jaxcl.core.between import Between
from jaxcl.core.checkpoint import Store
from jaxcl.core.paths import merge, split
from jaxcl.core.progress import Reporter
from jaxcl.core.run import train
from jaxcl.core.types import Clock, Ctx, Method, Phase, State, World
from jaxcl.data.pipeline import masked, stack
from jaxcl.errors import Interrupted, RequestError
from jaxcl.methods.grpo import grpo
from jaxcl.methods.lora import lora
from jaxcl.methods.lwf import lwf
from jaxcl.methods.olora import olora
from jaxcl.methods.ppo import BIAS, KERNEL, ppo, values
from jaxcl.methods.rho1 import rho1
from jaxcl.methods.rollouts import averaging
from jaxcl.surgery.width import Sizes, widen

STOPS, NEW, COEF = (1, 2, 3, 4, 5, 6, 8, 9), 5, 0.3
SMALL = {"rank": 2, "alpha": 4.0, "dropout": 0.1}
STILL = SMALL | {"dropout": 0.0}


class Collected:
    """One rollout of five rows and a masked one, by a policy that is not its reference any more; ``inner``: with the
    same rows nested in the batch under that name."""

    def __init__(self, method: Method, inner: str = ""):
        b = Between(experiment([method]), lambda: None)
        b.begin(0)
        (self.phase,) = b.plan(0)
        self.method, self.reference = method, dict(b.world.params)
        train, frozen = split(b.world.params, b.world.trained)
        moved = {k: v + 0.05 * jax.random.normal(jax.random.key(i), v.shape) for i, (k, v) in enumerate(train.items())}
        self.params = merge(frozen, moved)
        rows = [Answers("s0", 8)[i] for i in range(5)]
        batch = stack([*rows, masked(rows[0])]) | dict.fromkeys(("source", "stage"), np.array([0] * 5 + [-1], np.int32))
        self.rows = {**batch, inner: batch} if inner else batch
        self.live = b.owns[method.name]["live"]
        state = State(Clock.at(), moved, {}, b.device("live"))
        state, self.rollout = b.collect(self.phase, frozen, state, self.rows)
        self.after = state.live.get(method.name, {})
        self.starts = [int(r["targets_at"][0]) for r in rows]

    def ctx(self, params, rollout) -> Ctx:
        out = MODEL.apply(SPEC, params, rollout)
        return Ctx(params, None, rollout, rollout["weight"], out, Clock.at(), jax.random.key(0), MODEL.apply, SPEC)

    def loss(self, params, rollout):
        ctx = self.ctx(params, rollout)
        terms = self.method.loss(ctx).values() if self.method.loss else ()
        return sum(terms, self.phase.objective(ctx))


@jax.jit
def scores(params, tokens):
    """(log softmax [T,V], hidden [T,D]) of one sequence without any padding."""
    t = len(tokens)
    row = {"tokens": tokens[None], "segments": jnp.ones((1, t), jnp.int32), "positions": jnp.arange(t)[None]}
    out = MODEL.apply(SPEC, params, row)
    return jax.nn.log_softmax(MODEL.head(SPEC, params, out.hidden, jnp.arange(t)[None])[0]), out.hidden[0]


def by_row(c: Collected, params, b: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """(log-probabilities, values) of the response of row b, token by token. Tokens behind it are seen by none of it."""
    start, tokens = c.starts[b], np.asarray(c.rollout["tokens"][b])
    logp, hidden = map(np.asarray, scores(params, jnp.asarray(tokens)))
    at = np.arange(start, start + n)
    guess = hidden[at - 1] @ np.asarray(params[KERNEL])[:, 0] + np.asarray(params[BIAS])[0] if KERNEL in params else at
    return logp[at - 1, tokens[at]], guess


@pytest.fixture(scope="module")
def one() -> Collected:
    how = {"max_new": NEW, "stop_ids": STOPS, "kl_coef": COEF, "ptx": 0.5, "gamma": 0.9, "lam": 0.8}
    return Collected(ppo(reward="token:7", **how), inner="old")


@pytest.fixture(scope="module")
def group() -> Collected:
    return Collected(grpo(reward="token:7", group=3, max_new=NEW, stop_ids=STOPS, beta=0.1))


# what a rollout holds


def test_a_rollout_is_the_prompt_and_a_response_up_to_the_end_mark(one):
    made, rows = to_numpy(one.rollout), one.rows
    mask = made["weight"]
    assert mask.shape == (6, NEW) and not mask[5].any() and not made["segments"][5].any()
    ended = 0
    for b, start in enumerate(one.starts):
        n = int(mask[b].sum())
        assert n >= 1 and mask[b].tolist() == [1.0] * n + [0.0] * (NEW - n)
        assert made["tokens"][b, :start].tolist() == rows["tokens"][b, :start].tolist()
        response = made["tokens"][b, start : start + n].tolist()
        assert not set(response[:-1]) & set(STOPS) and (n == NEW or response[-1] in STOPS)
        ended += n < NEW
        length = start + n
        assert made["segments"][b].tolist() == [1] * length + [0] * (12 + NEW - length)
        assert made["positions"][b, :length].tolist() == list(range(length))
        assert made["targets_at"][b].tolist() == [*range(start, length), *[0] * (NEW - n)]
    assert ended, "some response ends before max_new"
    assert made["source"].tolist() == rows["source"].tolist() and made["row"].tolist() == rows["row"].tolist()


def test_log_probabilities_rewards_and_advantages_of_a_rollout(one):
    """All from the rows one by one, in numpy."""
    made = to_numpy(one.rollout)
    raw, kls, advantages = [], [], []
    for b, start in enumerate(one.starts):
        n = int(made["weight"][b].sum())
        logp, guess = by_row(one, one.params, b, n)
        ref, _ = by_row(one, one.reference, b, n)
        np.testing.assert_allclose(made["old_logp"][b, :n], logp, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(made["old_values"][b, :n], guess, rtol=1e-4, atol=1e-5)
        raw.append(int((made["tokens"][b, start : start + n] == 7).sum()))
        kls.append(np.sum(np.exp(ref - logp) - (ref - logp) - 1))
        advantages.append((logp, ref, guess))
    deviation = np.std(raw, ddof=1)
    assert deviation > 0
    flat = []
    for b, (logp, ref, guess) in enumerate(advantages):
        n = len(logp)
        rewards = -COEF * (logp - ref)
        rewards[-1] += raw[b] / deviation
        np.testing.assert_allclose(made["rewards"][b, :n], rewards, rtol=1e-4, atol=1e-4)
        delta = rewards + 0.9 * np.append(guess[1:], 0) - guess
        a = np.array([sum((0.9 * 0.8) ** (j - k) * delta[j] for j in range(k, n)) for k in range(n)])
        np.testing.assert_allclose(made["returns"][b, :n], a + guess, rtol=1e-3, atol=1e-4)
        flat.append(a)
    every = np.concatenate(flat)
    wanted = (every - every.mean()) / every.std(ddof=1)
    np.testing.assert_allclose(made["advantages"][made["weight"] > 0], wanted, rtol=1e-3, atol=1e-3)
    log = {k: set(v.tolist()) for k, v in made["log"].items()}
    assert all(len(v) == 1 for v in log.values()), "means over the real rows, the same in every row"
    found = {k: v.pop() for k, v in log.items()}
    tokens = made["weight"].sum() / 5
    kl = np.mean(kls)
    assert kl > 0.01
    expected = {"reward": np.mean(raw), "kl": kl, "kl_coef": COEF, "response_tokens": tokens}
    assert found == pytest.approx(expected, rel=1e-3)
    factor = 1 + np.clip(kl / 6 - 1, -0.2, 0.2) * 5 / 10_000
    assert float(one.after["kl_coef"]) == pytest.approx(COEF * factor, rel=1e-6)
    assert float(one.after["rewards"]["count"]) == 5 and float(one.live["rewards"]["count"]) == 0


def test_nested_rows_become_rollouts_and_the_rows_stay_for_the_ptx_term(one):
    nested = one.rollout["old"]
    assert nested["old_logp"].shape == (6, NEW) and "log" not in nested
    assert not np.array_equal(nested["tokens"], one.rollout["tokens"]), "drawn with a key of their own"
    assert all(np.array_equal(one.rollout["ptx"][k], one.rows[k]) for k in one.rows if k != "old")
    nll = jax.jit(lambda params, rows: MODEL.apply(SPEC, params, rows).nll)(one.params, one.rows)
    plain = float(jnp.sum(nll * one.rows["weight"]) / np.sum(one.rows["weight"]))
    term = jax.jit(lambda params, made: one.method.loss(one.ctx(params, made))["ptx"])(one.params, one.rollout)
    assert float(term) == pytest.approx(0.5 * plain, rel=1e-5)


def test_padding_and_masked_rows_never_contribute(one):
    """Whatever stands in them, loss and gradient are the same bit for bit."""
    made = {k: v for k, v in to_numpy(one.rollout).items() if k not in ("old", "log")}
    off, outside = made["weight"] == 0, made["segments"] == 0
    spoilt = dict(made)
    spoilt["tokens"] = np.where(outside, 11, made["tokens"])
    for field in ("old_logp", "advantages", "returns", "old_values"):
        spoilt[field] = np.where(off, 9.0, made[field])
    assert off.any() and outside.any()
    step = jax.jit(jax.value_and_grad(one.loss))
    for a, b in zip(jax.tree.leaves(step(one.params, made)), jax.tree.leaves(step(one.params, spoilt))):
        assert np.array_equal(a, b)


def test_the_first_gradient_is_the_plain_policy_gradient(one):
    made = one.rollout

    starts = np.array([*one.starts, 1])  # the masked row has no weight anywhere
    at = starts[:, None] + np.arange(NEW)
    rows = np.arange(6)[:, None]

    def plain(params):
        logp, _ = jax.vmap(lambda tokens: scores(params, tokens))(made["tokens"])
        picked = logp[rows, at - 1, made["tokens"][rows, at]]
        return -jnp.sum(made["weight"] * made["advantages"] * picked) / jnp.sum(made["weight"])

    wanted = jax.jit(jax.grad(plain))(one.params)
    found = jax.jit(jax.grad(lambda p: one.phase.objective(one.ctx(p, made))))(one.params)
    for k in weights():
        np.testing.assert_allclose(found[k], wanted[k], rtol=2e-3, atol=2e-5, err_msg=k)
    assert not np.any(found[KERNEL]), "the value head learns from the value term only"


def test_a_group_of_responses_is_judged_against_itself(group):
    made = to_numpy(group.rollout)
    mask = made["weight"]
    assert mask.shape == (18, NEW) and not mask[15:].any()
    raw = np.zeros(18)
    for i in range(15):
        start, n = group.starts[i // 3], int(mask[i].sum())
        raw[i] = (made["tokens"][i, start : start + n] == 7).sum()
    groups = raw.reshape(6, 3)
    wanted = (groups - groups.mean(1, keepdims=True)) / (groups.std(1, ddof=1, keepdims=True) + 1e-4)
    np.testing.assert_allclose(made["advantages"], wanted.reshape(-1, 1) * mask, rtol=1e-4, atol=1e-6)
    assert (groups.std(1) == 0).any() and (groups.std(1) > 0).any(), "both kinds of groups are there"
    loss = jax.jit(group.loss)(group.params, group.rollout)
    k3 = np.exp(made["ref_logp"] - made["old_logp"]) - (made["ref_logp"] - made["old_logp"]) - 1
    each = ((-made["advantages"] + 0.1 * k3) * mask).sum(1) / np.maximum(mask.sum(1), 1)
    assert float(loss) == pytest.approx(each[:15].mean(), rel=1e-3, abs=1e-5)


# learning


def test_a_rule_reward_rises_and_the_divergence_is_logged(tmp_path):
    """Thirty blocks of four steps: the token that is rewarded becomes what the model says."""
    method = ppo(reward="token:7", max_new=6, kl_coef=0.01, kl_target=4.0, kl_horizon=100.0)
    log = run([method], tmp_path / "out", n=1, epochs=15).log
    assert len(log) == 120
    reward, kl, coef = (np.array([r[k] for r in log])[::4] for k in ("reward", "kl", "kl_coef"))
    assert reward[:4].mean() < 1.5 and reward[-4:].mean() > 4, "of at most 6"
    assert kl[0] == 0 and (kl[1:] > 0).all()
    assert np.isclose(coef[0], 0.01, rtol=1e-6)
    wanted = coef[:-1] * (1 + np.clip(kl[:-1] / 4 - 1, -0.2, 0.2) * 8 / 100)
    np.testing.assert_allclose(coef[1:], wanted, rtol=1e-5)
    value = [r["ppo/value"] for r in log]
    assert all(np.isclose(r["loss"], r["objective"] + r["ppo/value"], rtol=1e-5) for r in log) and min(value) > 0


# the reference policy


def one_more(response, mask, rows):
    return jnp.ones(len(mask))


def two_more(response, mask, rows):
    return jnp.full(len(mask), 2.0)


def nll_of(params, spec=SPEC):
    source = Answers("held out", 6, seed=9)
    return np.asarray(jax.jit(lambda p, b: MODEL.apply(spec, p, b).nll)(params, stack([source[i] for i in range(6)])))


def second_stage(adapter: Method, method: Method) -> Between:
    """As the second stage begins; the first one trained the adapter, whatever with."""
    b = Between(experiment([adapter, method]), lambda: None)
    b.begin(0)
    b.plan(0)
    moved = {k: v + 0.3 for k, v in b.world.params.items() if k in b.world.trained}
    b.world = b.world._replace(params={**b.world.params, **moved})
    b.end()
    b.begin(1)
    b.plan(0)
    return b


ADAPTERS = {
    "plain": lambda: lora(**STILL),
    "merged": lambda: lora(merged=True, **STILL),
    "bank": lambda: olora(max_stages=3, **STILL),
}


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_the_initial_reference_is_the_base_through_merges_and_banks(adapter, order):
    """With the adapter off it equals the base bit for bit, and costs no copy of what does not change."""
    methods = [ADAPTERS[adapter](), ppo(reference="initial")]
    b = second_stage(*methods[::order])
    reference, params = b.owns["ppo"]["fixed"]["reference"], b.world.params
    assert np.array_equal(nll_of({**params, **reference}), nll_of(weights()))
    assert not np.allclose(nll_of(params), nll_of(weights()))
    assert reference["embed/kernel"] is params["embed/kernel"]
    assert {KERNEL, BIAS} <= b.world.trained, "trained beside the adapter"


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_the_previous_reference_is_the_policy_at_the_start_of_the_stage(adapter, order):
    b = second_stage(*[ADAPTERS[adapter](), ppo()][::order])
    reference, params = b.owns["ppo"]["fixed"]["reference"], b.world.params
    assert all(k.endswith(("/lora_a", "/lora_b")) for k in reference), "of adapters that is the adapter alone"
    assert np.array_equal(nll_of({**params, **reference}), nll_of(params))
    assert not np.allclose(nll_of(params), nll_of(weights()))


def test_every_stage_has_its_reference_and_its_reward(tmp_path):
    method = ppo(reward=[one_more, two_more], max_new=4)
    done = run([olora(max_stages=3, **SMALL), method], tmp_path / "out", n=2, rows=8)
    rewards, kl = ([r[k] for r in done.log] for k in ("reward", "kl"))
    assert rewards == [1.0] * 4 + [2.0] * 4
    assert kl[0] == kl[4] == 0, "also where the adapter moved into the bank"
    assert done.loop.config["methods"]["ppo"]["reward"] == ["one_more", "two_more"]
    assert np.any(done.params[KERNEL]) and done.compilations == 1


def test_the_averaged_reference_follows_the_policy():
    observe = averaging(0.9)
    live = {"reference": {"a": jnp.ones(2), "b": jnp.zeros(1)}, "kl_coef": jnp.float32(1)}
    ctx = Ctx({"b": jnp.full(1, 2.0)}, {"live": live}, {}, None, None, Clock.at(), None, None)
    found = observe(ctx, {}, {"a": jnp.full(2, 0.5)}, {"a": jnp.full(2, 3.0)})
    np.testing.assert_allclose(found["reference"]["a"], 0.9 * 1 + 0.1 * 3.5)
    np.testing.assert_allclose(found["reference"]["b"], 0.2, rtol=1e-6)  # frozen in this phase
    assert found["kl_coef"] == 1


def test_the_value_head_does_not_touch_the_model(one):
    bare = {k: v for k, v in one.params.items() if not k.startswith("value_head/")}
    assert np.array_equal(nll_of(one.params), nll_of(bare))


@pytest.mark.parametrize("tied", [True, False])
def test_the_value_head_grows_with_the_model(tied):
    """Twice the width, every unit copied once: the same values, within rounding."""
    spec = dataclasses.replace(SPEC, tied=tied)
    head = {KERNEL: jax.random.normal(jax.random.key(1), (16, 1)), BIAS: jnp.ones(1)}
    old = World(spec, {**weights(spec), **head}, frozenset(), 0, 0, jax.random.key(0), None, {}, ())
    new = widen(old, Sizes(32, 2, 64), even=True)
    rows = stack([Answers("held out", 6, seed=9)[i] for i in range(6)])
    hidden = [MODEL.apply(w.spec, w.params, rows).hidden for w in (old, new)]
    before, after = (values(w.params, h, rows["targets_at"]) for w, h in zip((old, new), hidden))
    assert new.params[KERNEL].shape == (32, 1)
    np.testing.assert_allclose(after, before, atol=1e-5)


def test_dropout_is_off_and_a_run_can_be_exported():
    """An adapter behind the rollouts would turn it on again; a `wrap` would be part of the model."""
    for method in (ppo(), grpo()):
        b = Between(experiment([lora(**SMALL), method]), lambda: None)
        b.begin(0)
        b.plan(0)
        assert b.world.spec == SPEC and "wrap" not in method.slots
        with pytest.raises(RequestError, match=r"adapter dropout is 0\.1; list"):
            planned(method, lora(**SMALL))


def test_the_value_head_outlives_stages():
    b = Between(experiment([ppo(reward="token:7")]), lambda: None)
    b.begin(0)
    assert not np.any(b.world.params[KERNEL]) and b.owner == {KERNEL: "ppo", BIAS: "ppo"}
    b.world = b.world._replace(params={**b.world.params, KERNEL: jnp.ones((16, 1))})
    b.end()
    b.begin(1)
    assert np.all(np.asarray(b.world.params[KERNEL]) == 1)


# refusals


def planned(*methods: Method, **kw) -> list[Phase]:
    b = Between(experiment(list(methods), **kw), lambda: None)
    b.begin(0)
    return b.plan(0)


def test_one_method_at_a_time_makes_rollouts():
    with pytest.raises(RequestError, match="'ppo' and 'grpo' both set the objective"):
        planned(ppo(), grpo())
    with pytest.raises(RequestError, match=r"'ppo' and 'second' do not go together: .*value_head"):
        planned(ppo(), ppo(name="second"))
    other = Method(name="other", collect=lambda world, own, batch, key: (batch, own))
    with pytest.raises(RequestError, match="'ppo' and 'other' both collect"):
        planned(ppo(), other)
    with pytest.raises(RequestError, match="'ppo' works on whole sequences"):
        experiment([ppo()], pack=2).check()


def test_what_the_rollouts_would_stumble_over_is_refused_before_training(tmp_path):
    with pytest.raises(RequestError, match=r"window of 12 .* up to 53 .* context of 64; .* max_new up to 52"):
        run([ppo(max_new=53)], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert planned(ppo(max_new=52))[0].collect_every == 4
    with pytest.raises(RequestError, match="did you mean 'train'"):
        planned(ppo(phase="trains"))
    b = Between(experiment([ppo(reward=["token:1", "token:2"])], n=3), lambda: None)
    for stage in range(2):
        b.begin(stage)
        b.plan(0)
    b.begin(2)
    with pytest.raises(RequestError, match="stage 2 has no reward"):
        b.plan(0)
    half = Method(name="half", mask=lambda world, own: {k: world.stage > 0 or "mlp" in k for k in world.params})
    b = Between(experiment([half, ppo()]), lambda: None)
    b.begin(0)
    b.plan(0)
    b.begin(1)
    with pytest.raises(RequestError, match="'embed/kernel' is trained in stage 1, but the reference"):
        b.plan(0)


def test_what_was_noted_of_rows_is_not_used_on_rollouts(one):
    ctx = one.ctx(one.params, one.rollout)._replace(head=MODEL.head)
    with pytest.raises(RequestError, match="'topk' knows the rows' own answers"):
        lwf(teacher="topk").loss(ctx)
    with pytest.raises(RequestError, match="precomputed scores are of the rows' own answers"):
        rho1().weigh(ctx._replace(own={"fixed": {"nll": jnp.zeros((8, NEW))}}))


def test_a_phase_of_its_own_leaves_the_others_alone(tmp_path):
    """Fine-tuning first, then rollouts."""
    phases = [Phase("tune", 2, ()), Phase("roll", 4, ())]
    made = planned(ppo(phase="roll"), phases=phases)
    assert [p.collect_every for p in made] == [0, 4] and made[0].objective is not made[1].objective


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: ppo(max_new=0), "max_new is 0"),
        (lambda: ppo(epochs=1.5), "epochs is 1.5"),
        (lambda: ppo(prompt=0), "prompt is 0"),
        (lambda: ppo(lam=1.1), "lam is 1.1; accepted: 0 to 1"),
        (lambda: ppo(kl_target=0.0), "kl_target is 0.0; accepted: a number above 0"),
        (lambda: ppo(kl_coef=-1.0), "kl_coef is -1.0; accepted: 0 or more"),
        (lambda: ppo(clip=float("nan")), "clip is nan"),
        (lambda: ppo(reference="inital"), "did you mean 'initial'"),
        (lambda: ppo(reward="tokn:3"), "did you mean 'token'"),
        (lambda: grpo(group=1), "group is 1; accepted: a whole number of at least 2"),
        (lambda: grpo(scale="std"), "unknown scale 'std'"),
        (lambda: grpo(length="token"), "unknown length 'token'"),
        (lambda: grpo(decay=2.0), "decay is 2.0"),
    ],
)
def test_bad_arguments(make, says):
    with pytest.raises(RequestError, match=says):
        make()


# resuming


class Stops(Reporter):
    """Asks the process, once, to stop after so many steps."""

    def __init__(self, after: int):
        super().__init__(quiet=True)
        self.after: int | None = after

    def update(self, done: int, note: str = "") -> None:
        if self.after is not None and done >= self.after:
            self.after = None
            os.kill(os.getpid(), signal.SIGTERM)


def test_stopped_at_every_offset_inside_a_block_it_goes_on_bit_for_bit(tmp_path):
    """Blocks of four steps on one rollout: after 0, 1, 2, 3 of them, and again at the start of a block."""
    methods = lambda: [ppo(reward="token:7", max_new=4, kl_horizon=50.0, reference="ema", decay=0.5)]  # noqa: E731
    settings = {"n": 1, "epochs": 3, "rows": 16, "seed": 5}
    whole, start = run(methods(), tmp_path / "whole", **settings), to_numpy(weights())
    out, offsets = tmp_path / "broken", []
    for after in (2, 4, 9, 15):  # a step later it is noticed
        with pytest.raises(Interrupted):
            train(experiment(methods(), **settings), out, reporter=Stops(after))
        store = Store(out / "checkpoints")
        newest = journal.newest(store, lambda _: None)
        at, meta = journal.position(newest), store.read(newest)["meta"]
        offsets.append((at.step % 4, at.step - meta["rollout"]))
    assert {o for o, _ in offsets} == {0, 1, 2, 3}, offsets
    assert all(since == o or (o == 0 and since == 4) for o, since in offsets), offsets
    done = train(experiment(methods(), **settings), out, reporter=Reporter(quiet=True))
    assert digest(to_numpy(done.now.world.params)) == digest(whole.params)
    for part in ("fixed", "live"):
        mine, its = (journal.flatten(to_numpy(loop.now.owns["ppo"][part]), part) for loop in (done, whole.loop))
        assert digest(mine) == digest(its)
    assert (out / "log.jsonl").read_bytes() == (whole.out / "log.jsonl").read_bytes()
    assert len(whole.log) == 24
    reference, kl = whole.loop.now.owns["ppo"]["live"]["reference"], [r["kl"] for r in whole.log]
    assert kl[0] == 0 and 0 < kl[-1] < 1 and KERNEL not in reference
    far, near = ({k: np.abs(to_numpy(reference[k]) - p[k]).max() for k in reference} for p in (start, whole.params))
    assert all(near[k] < far[k] for k in reference), "an average over two steps stays with the policy"
