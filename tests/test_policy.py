"""Policy and preference losses against the cards' numbers, closed forms and numpy; rewards against counting by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.errors import RequestError
from jaxcl.losses import policy
from jaxcl.losses.rewards import each_stage, named

MASK = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]], np.float32)
RNG = np.random.default_rng(0)


def draw(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def close(found, wanted, **kw) -> None:
    np.testing.assert_allclose(np.asarray(found), wanted, **({"rtol": 1e-5, "atol": 1e-6} | kw))


# the oracle's numbers


def test_gae_of_the_oracle():
    rewards, values = jnp.array([[0.0, 0.0, 1.0]]), jnp.array([[0.2, 0.4, 0.6]])
    advantages, returns = policy.gae(rewards, values, jnp.ones((1, 3)), gamma=1.0, lam=0.95)
    close(advantages, [[0.751, 0.58, 0.4]])
    close(returns, [[0.951, 0.98, 1.0]])


def test_dpo_k3_group_and_preference_of_the_oracle():
    loss, margin = policy.dpo(jnp.float32(-12), jnp.float32(-15), jnp.float32(-13), jnp.float32(-14), beta=0.1)
    close(loss, 0.598138869)
    close(margin, 0.2)
    close(policy.k3(jnp.float32(-1.0), jnp.float32(-1.5)), 0.10653066)
    rewards = jnp.array([1.0, 0.0, 0.0, 1.0, 1.0])
    sample, population = [0.730296743, -1.095445115], [0.816496581, -1.224744871]
    close(policy.group_advantages(rewards, "sample", eps=0.0), np.take(sample, [0, 1, 1, 0, 0]))
    close(policy.group_advantages(rewards, "population", eps=0.0), np.take(population, [0, 1, 1, 0, 0]))
    close(policy.group_advantages(rewards, "none"), [0.4, -0.6, -0.6, 0.4, 0.4])
    close(policy.preference(jnp.float32(1.2), jnp.float32(0.4)), 0.371100666)


# rollouts


def test_gae_of_ragged_responses_is_the_sum_of_its_definition():
    rewards, values, gamma, lam = draw(4, 4), draw(4, 4), 0.9, 0.7
    advantages, returns = policy.gae(*map(jnp.asarray, (rewards, values, MASK)), gamma, lam)
    for b, n in enumerate(MASK.sum(1).astype(int)):
        v = [*values[b, :n], 0.0]
        delta = [rewards[b, k] + gamma * v[k + 1] - v[k] for k in range(n)]
        wanted = [sum((gamma * lam) ** (j - k) * delta[j] for j in range(k, n)) for k in range(n)]
        close(advantages[b], [*wanted, *[0.0] * (4 - n)], atol=1e-5)
        close(returns[b, :n], np.add(wanted, values[b, :n]), atol=1e-5)
        assert not np.any(returns[b, n:])
    plain, _ = policy.gae(*map(jnp.asarray, (rewards, 0 * values, MASK)), 1.0, 1.0)
    close(plain[0], np.cumsum(rewards[0][::-1])[::-1])  # gamma = lam = 1 without values: the reward to go


def test_the_score_comes_on_the_last_token_and_the_penalty_on_all():
    logp, ref, score = draw(4, 4), draw(4, 4), draw(4)
    found = policy.shaped_rewards(*map(jnp.asarray, (score, logp, ref, MASK)), jnp.float32(0.3))
    wanted = -0.3 * (logp - ref) * MASK
    for b, last in ((0, 3), (1, 1), (3, 0)):
        wanted[b, last] += score[b]
    close(found, wanted)


def test_whitening_over_the_mask():
    x = draw(4, 4)
    found = np.asarray(policy.whiten(jnp.asarray(x), jnp.asarray(MASK)))
    inside = x[MASK > 0]
    close(found[MASK > 0], (inside - inside.mean()) / np.sqrt(inside.var(ddof=1) + 1e-8))
    assert not found[MASK == 0].any()
    assert np.isfinite(policy.whiten(jnp.ones((2, 2)), jnp.zeros((2, 2)))).all()


def test_padding_never_contributes():
    """Whatever stands where the mask is 0, and however large, nothing changes, gradients included."""
    args = [draw(4, 4) for _ in range(5)]

    def all_of(garbage: float):
        logp, ref, values, old, returns = (jnp.asarray(np.where(MASK > 0, a, garbage)) for a in args)
        mask = jnp.asarray(MASK)
        shaped = policy.shaped_rewards(jnp.ones(4), logp, ref, mask, jnp.float32(0.1))
        advantages, _ = policy.gae(shaped, values, mask)
        white = policy.whiten(advantages, mask)

        def loss(logp, values):
            surrogate = policy.masked_mean(policy.clipped_surrogate(logp, ref, white), mask)
            value = policy.masked_mean(policy.clipped_value(values, old, returns), mask)
            return surrogate + value + policy.masked_mean(policy.k3(logp, ref), mask)

        return loss(logp, values), jax.grad(loss, argnums=(0, 1))(logp, values), white

    for a, b in zip(jax.tree.leaves(all_of(0.0)), jax.tree.leaves(all_of(30.0))):
        assert np.array_equal(a, b)


# losses


def test_at_ratio_one_the_gradient_is_the_policy_gradient():
    """A softmax policy over 5 tokens: d/d logits of -mean A log p = -A (onehot - p), by hand."""
    logits, tokens, advantages = draw(4, 4, 5), RNG.integers(0, 5, (4, 4)), draw(4, 4)

    def logp(logits):
        return jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(tokens)[..., None], -1)[..., 0]

    def loss(logits):
        each = policy.clipped_surrogate(logp(logits), old, jnp.asarray(advantages))
        return policy.masked_mean(each, jnp.asarray(MASK))

    old = logp(jnp.asarray(logits))
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    by_hand = -(advantages * MASK)[..., None] * (np.eye(5)[tokens] - p) / MASK.sum()
    close(jax.grad(loss)(jnp.asarray(logits)), by_hand)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.1, 2.0, -2.2, -2.2),  # inside: d loss / d logp = -A rho
        (1.5, 2.0, -2.4, 0.0),  # too far in the good direction: cut, no gradient
        (0.5, 2.0, -1.0, -1.0),  # back from the bad one: the gradient stays
        (0.5, -2.0, 1.6, 0.0),
        (1.5, -2.0, 3.0, 3.0),
    ],
)
def test_clipping_of_the_ratio(ratio, advantage, loss, slope):
    fn = lambda logp: policy.clipped_surrogate(logp, jnp.float32(-2.0), jnp.float32(advantage), 0.2)  # noqa: E731
    value, grad = jax.value_and_grad(fn)(jnp.float32(-2.0 + np.log(ratio)))
    close(value, loss)
    close(grad, slope)


def test_value_loss_takes_the_worse_of_clipped_and_unclipped():
    values, old, returns = draw(4, 4), draw(4, 4), draw(4, 4)
    near = old + np.clip(values - old, -0.2, 0.2)
    wanted = 0.5 * np.maximum((values - returns) ** 2, (near - returns) ** 2)
    close(policy.clipped_value(*map(jnp.asarray, (values, old, returns)), 0.2), wanted)


def test_weights_scale_out_of_a_mean():
    x, w = jnp.asarray(draw(4, 4)), jnp.asarray(MASK * np.abs(draw(4, 4)))
    close(policy.masked_mean(x, 3.0 * w), np.asarray(policy.masked_mean(x, w)))
    assert float(policy.masked_mean(x, 0 * w)) == 0


def test_k3_is_never_negative_and_zero_at_equality():
    logp, ref = jnp.asarray(draw(64)), jnp.asarray(draw(64))
    assert (np.asarray(policy.k3(logp, ref)) > 0).all() and not np.any(policy.k3(logp, logp))
    p, q = np.array([0.2, 0.3, 0.5]), np.array([0.5, 0.25, 0.25])
    close(np.sum(p * np.asarray(policy.k3(jnp.log(p), jnp.log(q)))), np.sum(p * np.log(p / q)))


@pytest.mark.parametrize("scale", policy.SCALES)
def test_equal_rewards_give_no_advantage(scale):
    found = np.asarray(policy.group_advantages(jnp.full((3, 4), 0.25), scale))
    assert found.shape == (3, 4) and not found.any()


# what follows the rollouts


@pytest.mark.parametrize(("kl", "err"), [(0.0, -0.2), (6.6, 0.1), (5.4, -0.1), (60.0, 0.2)])
def test_the_coefficient_adapts_by_at_most_a_fifth(kl, err):
    found = policy.adapted(jnp.float32(0.05), jnp.float32(kl), 64, 6.0, 10_000)
    close(found, 0.05 * (1 + err * 64 / 10_000))


def test_running_moments_are_those_of_all_so_far():
    moments, seen = policy.no_moments(), []
    assert float(policy.deviation(moments)) == 1.0
    for mask in (np.array([0, 0, 0]), np.array([1, 1, 0]), np.array([1, 0, 0]), np.array([1, 1, 1])):
        x = draw(3) + 5
        moments = policy.moments_with(moments, jnp.asarray(x), jnp.asarray(mask, jnp.float32))
        seen += x[mask > 0].tolist()
        if seen:
            close(moments["mean"], np.mean(seen))
            close(moments["var"], np.var(seen), atol=1e-5)
        assert float(moments["count"]) == len(seen)
    close(policy.deviation(moments), np.std(seen, ddof=1))
    same = policy.moments_with(policy.no_moments(), jnp.full(7, 0.1), jnp.ones(7))
    assert float(policy.deviation(same)) == 1.0, "rewards that do not differ are not blown up"


# preferences


def test_dpo_at_the_reference_is_log_2_and_swapping_flips_the_margin():
    better, worse = jnp.asarray(draw(5)), jnp.asarray(draw(5))
    loss, margin = policy.dpo(better, worse, better, worse)
    close(loss, np.full(5, np.log(2)))
    assert not np.any(margin)
    ref = jnp.asarray(draw(5)), jnp.asarray(draw(5))
    _, there = policy.dpo(better, worse, *ref)
    _, back = policy.dpo(worse, better, *ref[::-1])
    assert np.array_equal(there, -back) and np.any(there)


def test_dpo_sums_the_response_and_ignores_the_prompt():
    nll = np.abs(draw(2, 6)) + 0.1
    mask = jnp.asarray([[0, 0, 1, 1, 1, 0], [0, 0, 1, 1, 0, 0]], jnp.float32)
    found = policy.sequence_logp(jnp.asarray(nll), mask)
    close(found, [-nll[0, 2:5].sum(), -nll[1, 2:4].sum()])
    nll[:, :2] += 7.0
    assert np.array_equal(found, policy.sequence_logp(jnp.asarray(nll), mask))


def test_dpo_gradient_vanishes_with_beta():
    slope = jax.grad(lambda y, beta: policy.dpo(y, jnp.float32(-1), jnp.float32(-2), jnp.float32(-2), beta)[0])
    assert float(slope(jnp.float32(-1.5), 0.0)) == 0
    close([slope(jnp.float32(-1.5), b) / b for b in (1e-3, 1e-4)], [-0.5, -0.5], rtol=1e-3)


def test_reward_model_loss_knows_differences_only_and_options_change_that():
    better, worse = jnp.asarray(draw(5)), jnp.asarray(draw(5))
    loss = policy.preference(better, worse)
    close(policy.preference(better + 3, worse + 3), np.asarray(loss), rtol=1e-4)
    centred = policy.preference(better, worse, margin=0.5, centring=0.01)
    b, w = np.asarray(better), np.asarray(worse)
    close(centred, np.log1p(np.exp(-(b - w - 0.5))) + 0.01 * (b + w) ** 2)


# rewards

RESPONSE = jnp.array([[7, 7, 2, 0], [7, 1, 7, 7], [5, 2, 0, 0]])
GIVEN = jnp.array([[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 0, 0]], jnp.float32)
ROWS = {
    "tokens": jnp.array([[9, 7, 7, 2, 0, 0], [9, 9, 7, 1, 7, 0], [9, 9, 9, 5, 2, 0]]),
    "targets_at": jnp.array([[1, 2, 3], [2, 3, 4], [3, 4, 0]]),
    "weight": jnp.array([[1, 1, 1], [1, 1, 1], [1, 1, 0]], jnp.float32),
}


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("token:7", [2, 3, 0]), ("token:0", [0, 0, 0]), ("length:3", [0, -1, -1]), ("target_match", [1, 0, 1])],
)
def test_rewards_by_hand(name, wanted):
    said, reward = named(name, "here")
    assert said == name and np.asarray(reward(RESPONSE, GIVEN, ROWS)).tolist() == wanted


def test_target_match_of_rows_without_targets_at():
    """Plain text: the targets are the tokens with a weight."""
    at, weight = np.asarray(ROWS["targets_at"]), np.zeros((3, 6), np.float32)
    for b in range(3):
        weight[b, at[b][np.asarray(ROWS["weight"])[b] > 0]] = 1
    _, reward = named("target_match", "here")
    assert np.asarray(reward(RESPONSE, GIVEN, {"tokens": ROWS["tokens"], "weight": weight})).tolist() == [1, 0, 1]


def test_rewards_of_ones_own_and_what_is_refused():
    def mine(response, mask, rows):
        return mask.sum(1)

    assert each_stage(mine, "ppo") == (["mine"], [mine])
    assert each_stage(["token:1", mine], "ppo")[0] == ["token:1", "mine"]
    for bad, says in (
        ("tokens:7", "did you mean 'token'"),
        ("token", "'token:65'"),
        ("token:x", "'token:65'"),
        ("target_match:3", "accepted: 'target_match'"),
        (3, "accepted: token, length"),
        ([], "no reward"),
    ):
        with pytest.raises(RequestError, match=says):
            each_stage([bad] if bad == 3 else bad, "ppo")
