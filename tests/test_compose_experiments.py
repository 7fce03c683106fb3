"""The files of experiments/compose: what they print, against numpy and closed forms written here."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from support import experiment, run, same, to_numpy
from user_methods import load, theirs

from jaxcl.losses.fisher import empirical
from jaxcl.losses.penalties import quadratic
from jaxcl.methods.ewc import ewc
from jaxcl.methods.lora import lora
from jaxcl.methods.replay import replay
from jaxcl.models.tokenizer import ByteTokenizer
from jaxcl.transforms.mofo import scale_by_mofo

FOLDER = Path(__file__).resolve().parents[1] / "experiments" / "compose"
FILES = sorted({f.stem for f in FOLDER.glob("*.py")} - {"unicode_names"})
rng = np.random.default_rng(0)


def test_the_page_names_every_file_and_its_command():
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    for name in FILES:
        assert f"[{name}.py]({name}.py)" in page and f"python experiments/compose/{name}.py" in page


# a plain loop


@pytest.fixture(scope="module")
def plain():
    return load(FOLDER / "plain_loop.py")


def mse(params, task) -> float:
    """The net of plain_loop.py in numpy, float64."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    x, y = (np.asarray(v, np.float64) for v in task)
    out = x @ p["base"]["kernel"] + p["base"]["bias"]
    for adapter in ("first", "second"):
        out = out + x @ p[adapter]["a"].T @ p[adapter]["b"].T
    return float(np.mean((out - y) ** 2))


def test_mofo_and_the_penalty_in_a_plain_loop(plain):
    found, (old, new) = plain.main(), plain.tasks()
    start = found.pop("start")["params"]
    for name, row in found.items():
        params = to_numpy(row["params"])
        assert same_tree(params["base"], start["base"]) and same_tree(params["first"], start["first"])
        assert row["task 1"] == pytest.approx(mse(params, old), rel=1e-3, abs=1e-5)
        assert row["task 2"] == pytest.approx(mse(params, new), rel=1e-3, abs=1e-5) and row["task 2"] < 0.05
        overlap = np.abs(params["first"]["a"] @ params["second"]["a"].T).sum()
        assert row["overlap"] == pytest.approx(overlap, rel=1e-3, abs=1e-3)
        sizes = [params["second"][k].size for k in "ab"]
        assert row["moved"] == (sum(int(0.15 * n) for n in sizes) if name.startswith("MoFO") else sum(sizes))
    for kind in ("Adam", "MoFO"):
        with_it, without = found[f"{kind} + penalty"], found[kind]
        assert with_it["overlap"] < 0.05 * without["overlap"] and with_it["task 1"] < 0.3 * without["task 1"]


def test_the_plain_loop_knows_no_method_and_no_core():
    tree = ast.parse((FOLDER / "plain_loop.py").read_text(encoding="utf-8"))
    named = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}
    named |= {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    assert {m for m in named if m.startswith("jaxcl")} == {"jaxcl.losses.penalties", "jaxcl.transforms.mofo"}
    code = f"import runpy, sys; runpy.run_path({str(FOLDER / 'plain_loop.py')!r}); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "jaxcl.transforms.mofo" in loaded
    assert not [m for m in loaded if m.startswith(("jaxcl.methods", "jaxcl.core.step", "jaxcl.core.compose"))]


def same_tree(a, b) -> bool:
    return jax.tree.all(jax.tree.map(lambda x, y: np.array_equal(x, y), a, b))


# EWC in an optax loop


def test_ewc_in_an_optax_loop():
    module = load(FOLDER / "ewc_loop.py")
    found, old, new = module.main(), to_numpy(module.task(0)), to_numpy(module.task(1))
    first = to_numpy(found["task 1"]["params"])
    fisher, (p, hidden) = to_numpy(found["task 1"]["fisher"]), probabilities(first, old["word"])
    error = p - np.eye(p.shape[1])[old["answer"]]  # d nll / d logits
    np.testing.assert_allclose(fisher["dense"][1]["bias"], (error**2).mean(0), rtol=1e-3)
    kernel = ((hidden[:, :, None] * error[:, None, :]) ** 2).mean(0)
    np.testing.assert_allclose(fisher["dense"][1]["kernel"], kernel, rtol=1e-3, atol=1e-7)
    for row in found.values():
        params = to_numpy(row["params"])
        for task, key in ((old, "old"), (new, "new")):
            hits = probabilities(params, task["word"])[0].argmax(-1) == task["truth"]
            assert row[key] == pytest.approx(hits.mean(), abs=0.01)
        pull = jax.tree.map(lambda f, a, b: 0.5 * np.sum(np.float64(f) * (a - b) ** 2), fisher, params, first)
        assert row["penalty"] == pytest.approx(sum(jax.tree.leaves(pull)), rel=1e-3, abs=1e-6)
    before, *after = found.values()
    assert before["old"] > 0.95 and after[0]["old"] < 0.5 and after[0]["new"] > 0.95, "without EWC it forgets"
    assert after[2]["old"] > after[0]["old"] + 0.25 and after[2]["new"] > 0.9
    kept, pulls = ([row[k] for row in after] for k in ("old", "penalty"))
    assert kept == sorted(kept) and pulls == sorted(pulls, reverse=True), "more strength, less forgetting"


def probabilities(params, word) -> tuple[np.ndarray, np.ndarray]:
    """(softmax of the logits, the hidden layer) of the net of ewc_loop.py, float64."""
    p = jax.tree.map(np.float64, params)
    letters = len(p["embed"]["first"])
    x = p["embed"]["first"][word // letters] + p["embed"]["second"][word % letters]
    hidden = np.tanh(x @ p["dense"][0]["kernel"] + p["dense"][0]["bias"])
    e = np.exp(hidden @ p["dense"][1]["kernel"] + p["dense"][1]["bias"])
    return e / e.sum(-1, keepdims=True), hidden


# a new method


@pytest.fixture(scope="module")
def names():
    return load(FOLDER / "unicode_names.py")


@pytest.fixture(scope="module")
def new_method():
    return load(FOLDER / "new_method.py")


@pytest.mark.parametrize("angle", [60, 90, 150])
def test_pcgrad_in_closed_form(new_method, angle):
    """Gradients of lengths 2 and 3 at an angle, spread over two leaves."""
    a = np.deg2rad(angle)
    g, r = 2 * np.array([1.0, 0, 0, 0]), 3 * np.array([np.cos(a), np.sin(a), 0, 0])
    tree = lambda v: {"x": jnp.float32(v[::2]), "y": jnp.float32(v[1::2])}  # noqa: E731
    given = {"new": tree(g), "old": tree(r)}

    def grad_fn(train, batch, key, *, terms=True):
        assert terms == (batch["rows"] == "new"), "old rows: the objective alone"
        return given[batch["rows"]], {"of": batch["rows"]}

    fn = new_method.pcgrad().grad(grad_fn, {}, None)
    got, aux = fn({}, {"rows": "new", "pcgrad": {"rows": "old"}}, jax.random.key(0))
    if angle <= 90:
        want = g + r
    else:
        want = (g - (g @ r) / (r @ r) * r) + (r - (g @ r) / (g @ g) * g)
    for k, v in tree(want).items():
        np.testing.assert_allclose(got[k], v, atol=1e-6)
    assert aux == {"of": "new"} and want @ g >= -1e-9 and want @ r >= -1e-9
    assert fn({}, {"rows": "new"}, jax.random.key(0))[0] is given["new"], "another method's own rows"


def test_the_new_method_is_short_and_forgets_less(new_method):
    tree = ast.parse((FOLDER / "new_method.py").read_text(encoding="utf-8"))
    (made,) = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "pcgrad"]
    imports = [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
    assert made.end_lineno - made.lineno + 1 + len(imports) < 60
    found = new_method.main()
    plain, kept = found["finetune"], found["pcgrad"]
    np.testing.assert_allclose(plain[0], kept[0], atol=0.01)  # the first stage has nothing to remember
    learned = np.diag(plain)
    assert (plain[2, :2] - learned[:2]).min() > 1, "fine-tuning forgets more than a nat a byte"
    assert (kept[2, :2] - learned[:2]).max() < 0.3 and (np.diag(kept) - learned).max() < 0.3


def test_methods_from_outside_join_the_shared_tests(tmp_path, monkeypatch):
    assert "pcgrad" in theirs("ROWS") and "pcgrad" in theirs("NOTHING")
    text = "from jaxcl import Method\nROWS = {'mine': lambda: Method(name='mine')}\n"
    (tmp_path / "mine.py").write_text(text)
    monkeypatch.setenv("JAXCL_METHODS", str(tmp_path / "mine.py"))
    assert theirs("ROWS")["mine"]().name == "mine" and "mine" not in theirs("NOTHING")


# a model of one's own


def test_a_model_of_ones_own(names):
    module = load(FOLDER / "own_model.py")
    found = module.main()
    for mixer, losses in found.values():
        assert losses.shape == (3, 3)
        for script, want in zip(names.SCRIPTS, losses[-1]):
            held_out = names.names(script, [0])
            each = [nats_a_byte(mixer, name, names.WINDOW) for name in held_out]
            sizes = [len(name.encode()) for name in held_out]
            assert np.average(each, weights=sizes) == pytest.approx(want, rel=1e-4)
        tokens = rng.integers(0, 256, (1, 20))
        changed = np.where(np.arange(20) < 12, tokens, 7)
        np.testing.assert_allclose(mixer(tokens)[0, :12], mixer(changed)[0, :12], atol=1e-5)  # it sees no future
    (_, plain), (_, kept) = found.values()
    learned = np.diag(plain)[:2]
    assert (plain[2, :2] - learned).min() > 2 and (kept[2, :2] - learned).max() < 1
    assert kept[2].mean() < 0.5 * plain[2].mean()


def nats_a_byte(scores, text: str, window: int) -> float:
    """Of one name, in numpy, from logits [1,T,V]: every byte once, from those before it in its window."""
    ids, total = [ByteTokenizer().eos_id, *text.encode()], 0.0
    for at in range(0, len(ids) - 1, window - 1):
        part = np.array(ids[at : at + window])
        padded = np.pad(part, (0, window - len(part)))
        z = np.float64(scores(padded[None])[0, : len(part) - 1])
        total += np.sum(np.log(np.exp(z).sum(-1)) - z[np.arange(len(z)), part[1:]])
    return total / (len(ids) - 1)


# a loop of one's own


@pytest.fixture(scope="module")
def own_loop():
    return load(FOLDER / "own_loop.py")


def test_the_copied_loop_stops_early_with_its_best_weights(own_loop, names):
    done = own_loop.main()
    plain, early = done["all steps"], done["early stop"]
    assert any(n < most for n, most in early.steps) and plain.steps == [(most, most) for _, most in early.steps]
    for curve, (n, most) in zip(early.curves, early.steps):
        since = len(curve) - 1 - int(np.argmin(curve))
        assert len(curve) == -(-n // 10) and (since == 3 if n < most else since <= 3)
    exp, world = early.exp, early.now.world
    at = np.arange(names.WINDOW)[None]

    @jax.jit
    def scores(tokens):
        batch = {"tokens": tokens, "segments": jnp.ones_like(tokens), "positions": at}
        hidden = exp.model.apply(world.spec, world.params, batch).hidden
        return exp.model.head(world.spec, world.params, hidden, at)

    held_out = names.names("braille", [4])
    each = [nats_a_byte(scores, name, names.WINDOW) for name in held_out]
    sizes = [len(name.encode()) for name in held_out]
    found = np.average(each, weights=sizes)
    assert found == pytest.approx(min(early.curves[2]), rel=1e-4), "the best weights, not the last"
    assert np.mean(early.rows[2]) < np.mean(plain.rows[2]) + 0.05, "fewer steps, no worse on rows that decided nothing"


def test_without_its_change_the_copied_loop_is_the_loop(own_loop, tmp_path):  # from here on compiled fast
    """Adapters, memories on device and on host, mixed streams: the same weights, bit for bit."""
    methods = lambda: [lora(rank=2, dropout=0.1), ewc(strength=20.0, rows=8), replay(ratio=0.5, capacity=12)]  # noqa: E731
    theirs = run(methods(), tmp_path / "out", n=2)
    ours = own_loop.Run(experiment(methods(), n=2)).run()
    assert same(to_numpy(ours.now.world.params), theirs.params) and ours.now.world.trained < theirs.params.keys()
    assert same_tree(ours.now.owns["ewc"]["fixed"], theirs.loop.now.owns["ewc"]["fixed"])
    assert ours.steps == [(n, n) for n in (2, 3)] and ours.curves == [[], []]


# any pytree


class Net(nnx.Module):
    def __init__(self):
        self.layers = nnx.List([nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.Linear(4, 2, rngs=nnx.Rngs(1))])


TREES = {
    "dicts": lambda: {"a": {"kernel": np.ones((3, 4))}, "b": {"kernel": np.ones((4, 2)), "bias": np.ones(2)}},
    "lists and tuples": lambda: [(np.ones((3, 4)), np.ones(4)), {"w": np.ones((4, 2))}],
    "nnx state": lambda: nnx.state(Net(), nnx.Param),
}


def drawn(tree):
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), tree)


@pytest.mark.parametrize("make", TREES.values(), ids=TREES.keys())
def test_penalty_fisher_and_mofo_take_any_pytree(make):
    theta, anchor, f, g = (drawn(make()) for _ in range(4))
    leaves = [[np.asarray(x, np.float64) for x in jax.tree.leaves(t)] for t in (theta, anchor, f, g)]
    want = 0.5 * sum(np.sum(w * (p - a) ** 2) for p, a, w, _ in zip(*leaves))
    assert float(quadratic(theta, anchor, f)) == pytest.approx(want, rel=1e-4, abs=1e-4)

    def forward(params, batch):  # linear in the parameters, so that the gradient is g
        products = jax.tree.map(lambda p, c: jnp.sum(p * c), params, g)
        return nnx.Dict(nll=jnp.full(1, sum(jax.tree.leaves(products))))

    squares = empirical(forward, theta, {"weight": jnp.ones(1)}, jax.random.key(0))
    assert jax.tree.structure(squares) == jax.tree.structure(theta)
    for got, c in zip(jax.tree.leaves(squares), leaves[3]):
        np.testing.assert_allclose(got, c**2, rtol=1e-5)

    tx = optax.chain(scale_by_mofo(fraction=0.25, full=lambda path: False), optax.scale(-1.0))
    moved, _ = tx.update(g, tx.init(theta), theta)
    for u, c in zip(jax.tree.leaves(moved), leaves[3]):
        k = max(1, int(0.25 * c.size))
        chosen = np.zeros(c.size, bool)
        chosen[np.argsort(-np.abs(c).ravel())[:k]] = True
        np.testing.assert_allclose(u, np.where(chosen.reshape(c.shape), -np.sign(c), 0), atol=1e-4)
