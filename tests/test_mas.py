"""MAS: Omega against closed forms and against the gradients of single rows; labels, padding and stages."""

from __future__ import annotations

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import MODEL, SPEC, Answers, experiment, run, to_numpy, weights

from jaxcl.core.between import Between
from jaxcl.core.types import Outputs
from jaxcl.data.encode import encode, encode_text
from jaxcl.errors import RequestError
from jaxcl.losses.positions import prompt_end
from jaxcl.losses.sensitivity import hidden, logits
from jaxcl.methods.mas import mas

rng = np.random.default_rng(0)


class Linear:
    """F(x) = x W as the state behind the only layer, and as logits."""

    spec = SimpleNamespace(layers=1)

    def __call__(self, train, batch, taps=()):
        y = batch["x"] @ train["w"]
        return Outputs(hidden=y, taps={"layers/0:out": y})

    def logits(self, train, out, at):
        return jnp.take_along_axis(out.hidden, at[..., None], 1)


def omega(xs: np.ndarray, w: np.ndarray, of=hidden) -> np.ndarray:
    """Mean over rows whose prompt's only token is x."""

    def one(x):
        row = {"x": x[None, None], "tokens": jnp.zeros((1, 1), int), "segments": jnp.ones((1, 1), int)}
        row |= {"targets_at": jnp.ones((1, 1), int), "weight": jnp.ones((1, 1))}
        return of(Linear(), {"w": jnp.asarray(w)}, row, jax.random.key(0))["w"]

    return np.asarray(jax.vmap(one)(jnp.asarray(xs)).mean(0))


X, W = rng.normal(size=(30, 4)).astype(np.float32), rng.normal(size=(4, 1)).astype(np.float32)


@pytest.mark.parametrize("of", [hidden, logits])
def test_omega_of_a_linear_model_is_its_closed_form(of):
    want = np.mean([np.abs(2 * (x @ W) * x[:, None]) for x in X], axis=0)
    np.testing.assert_allclose(omega(X, W, of), want, rtol=1e-4)
    np.testing.assert_allclose(omega(3 * X, W, of), 9 * want, rtol=1e-4)


def test_opposite_gradients_do_not_cancel():
    w = np.array([[1.0], [1.0]], np.float32)
    pair = np.array([[1.0, 2.0], [1.0, -2.0]], np.float32)  # (x w) x_2 is 6 and 2, of opposite sign in x_2
    np.testing.assert_allclose(omega(pair, w)[:, 0], [(6 + 2) / 2, (12 + 4) / 2], rtol=1e-6)


def test_where_a_prompt_ends():
    answer = encode([5, 6, 7], [1, 2], 8, 3)
    text = encode_text([3, 4, 5, 6], 8)
    for example, want in ((answer, 2), (text, 3), (answer | {"weight": np.zeros(3, np.float32)}, 0)):
        assert prompt_end({k: np.asarray(v)[None] for k, v in example.items()}).tolist() == [want]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two stages of ten rows in batches of eight, every row asked."""
    return run([mas(strength=0.1, rows=None)], tmp_path_factory.mktemp("mas") / "out", n=2, rows=10)


def by_rows(params: dict, source: Answers) -> dict[str, np.ndarray]:
    """Omega from one gradient a row, taken of the model itself."""

    @jax.jit
    def gradient(row, at):
        def size(p):
            out = MODEL.apply(SPEC, p, jax.tree.map(lambda x: x[None], row), taps=("layers/1:out",))
            return jnp.sum(out.taps["layers/1:out"][0, at] ** 2)

        return jax.grad(size)(params)

    each = [to_numpy(gradient(source[i], len(source.prompts[i]) - 1)) for i in range(len(source))]
    return {k: np.mean([np.abs(e[k]) for e in each], axis=0) for k in params}


def test_omega_is_the_mean_of_absolute_gradients_of_single_rows_over_the_stages(trained):
    """Of the last stage by the last weights; the first stage's share follows from the mean of both."""
    own = to_numpy(trained.loop.now.owns["mas"]["fixed"])
    last = by_rows({k: jnp.asarray(v) for k, v in trained.params.items()}, Answers("s1", 10, seed=1))
    for k, both in own["omega"].items():
        np.testing.assert_array_equal(own["anchor"][k], trained.params[k])
        first = 2 * both - last[k]
        assert np.min(first) >= -1e-4 * np.max(last[k]) - 1e-6, "two means of absolute values"
    assert any(v.max() > 0 for k, v in last.items()) and np.all(own["omega"]["final_norm/scale"] == 0)
    notes = json.loads((trained.out / "metrics.json").read_text())["accounting"]["notes"]["mas"]["mean_omega"]
    total = sum(v.sum(dtype=np.float64) for v in own["omega"].values()) / sum(v.size for v in own["omega"].values())
    assert len(notes) == 2 and notes[1] == pytest.approx(total, rel=1e-4)


def asked(method, source: Answers) -> dict:
    """Omega after one stage on ten rows of ``source``, without training."""
    exp = experiment([method], n=1, rows=10)
    exp.stages[0] = type(exp.stages[0])("s0", source)
    b = Between(exp, lambda: None)
    b.begin(0)
    b.end()
    return to_numpy(b.owns["mas"]["fixed"]["omega"])


def test_padding_does_not_count_and_answers_do_not_matter():
    source, other = Answers("s0", 10, seed=0), Answers("s0", 10, seed=0)
    other.answers = [a[::-1] + 1 for a in other.answers]
    got, again = (asked(mas(rows=None), s) for s in (source, other))
    want = by_rows(weights(), source)
    for k in want:
        np.testing.assert_allclose(got[k], want[k], rtol=1e-3, atol=1e-5)
        np.testing.assert_array_equal(got[k], again[k])


@pytest.mark.parametrize(("mode", "want"), [("mean", [4.0, 2.0]), ("sum", [12.0, 6.0])])
def test_stages_are_put_together_as_the_mode_says(mode, want):
    method, values = mas(mode=mode), [[2.0, 0.0], [1.0, 6.0], [9.0, 0.0]]
    world = SimpleNamespace(params={"w": jnp.zeros(2)}, trained=frozenset({"w"}), key=None, notes={})
    own = method.init(world)
    for t, value in enumerate(values):
        tools = SimpleNamespace(mean=lambda *_, v=value: {"w": jnp.asarray(v)})
        params = {"w": jnp.full(2, t + 1.0)}
        now = SimpleNamespace(params=params, key=None, tools=tools, notes={}, _replace=lambda **_: None)
        _, own = method.end(now, own)
    np.testing.assert_allclose(own["fixed"]["omega"]["w"], want)
    term = method.loss(SimpleNamespace(params={"w": jnp.array([5.0, 4.0])}, own=own))["penalty"]
    assert float(term) == pytest.approx(want[0] * 4 + want[1] * 1), "no factor 1/2"


@pytest.mark.parametrize(
    "arguments,words",
    [
        ({"strength": -1.0}, "strength is -1"),
        ({"rows": 0}, "rows is 0"),
        ({"mode": "online"}, "accepted: mean, sum"),
        ({"output": "logit"}, "did you mean 'logits'"),
    ],
)
def test_bad_values_are_refused(arguments, words):
    with pytest.raises(RequestError, match=words):
        mas(**arguments)
