"""Every block of docs/protocol.md: each slot's example against numpy, and all of them in one list over two stages."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import MODEL, SPEC, Answers, experiment, run, to_numpy, weights
from test_methods_common import ROWS

from jaxcl.core.between import Between
from jaxcl.core.types import Method
from jaxcl.data.pipeline import batches
from jaxcl.errors import RequestError
from jaxcl.transforms.rewarm import rewarm_rate

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "protocol.md").read_text(encoding="utf-8")
rng = np.random.default_rng(0)


@pytest.fixture(scope="module")
def page() -> SimpleNamespace:
    """What the blocks define, in order."""
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(compile(block, "docs/protocol.md", "exec"), names)
    return SimpleNamespace(**names)


def methods(page: SimpleNamespace) -> list[Method]:
    return [m for m in vars(page).values() if isinstance(m, Method)]


def test_every_slot_has_an_example_and_a_law(page):
    laws = re.findall(r"^\| `(\w+)` \| `\(", PAGE, re.MULTILINE)
    every = Method(name="x", **dict.fromkeys(laws, lambda: None))
    assert laws == list(every.slots) and len(laws) == len(set(laws))
    functions = {f for f, kind in Method.__annotations__.items() if "Callable" in kind}
    assert functions == set(laws) == {slot for m in methods(page) for slot in m.slots}
    for slot in laws:
        assert f"**{slot}**" in PAGE


@pytest.fixture(scope="module")
def together(page, tmp_path_factory):
    """One run of all examples."""
    made = methods(page)
    assert len(made) == 15
    return run(made, tmp_path_factory.mktemp("all") / "out", n=2, tx=page.tx)


def test_all_examples_in_one_list(page, together):
    log, start, now = together.log, to_numpy(weights()), together.loop.now
    assert np.isfinite(together.losses()).all()
    assert together.compilations == 2, "one for each of the two phases, over two stages"
    # rows 16, then 16 and 4 twice, in batches of 8; each batch serves two steps; and two steps of cooling a stage
    assert [r["phase"] for r in log] == ["train"] * 4 + ["cool"] * 2 + ["train"] * 6 + ["cool"] * 2
    assert together.loop.measure.account["past_rows_read"] == 4
    assert now.owns["cooling"]["host"]["cooled"] == 2
    for key in ("embed/kernel", *(k for k in start if k not in now.world.trained)):
        assert np.array_equal(together.params[key], start[key])
    assert now.owner.keys() == {f"layers/{i}/attn/q/lora_{x}" for i in (0, 1) for x in ("a", "b", "scale")}
    assert set(now.owner.values()) == {"adapter"} and together.params["layers/0/attn/q/lora_b"].any()
    assert all(np.isclose(r["grad_norm"], 1, rtol=1e-4) for r in log), "the last decorator is outermost"
    moves = {k: np.abs(together.params[k] - start[k]).max() for k in start}
    assert 0 < max(moves.values()) <= len(log) * 1e-3 + 1e-6, "the last word is the projection's"
    assert np.array_equal(now.owns["anchored"]["fixed"]["start"]["final_norm/scale"], np.ones(SPEC.width))
    assert log[0]["anchored/distance"] == 0 < log[-1]["anchored/distance"]
    kept = [r["kept"] for r in log]
    assert all(0 < k < 1 for k in kept) and kept[0::2] == kept[1::2], "a rollout serves two steps"
    assert all(np.max(f) > 0 for f in now.owns["fisher"]["fixed"]["fisher"].values())


# each slot by itself


def test_init_and_loss_is_a_squared_distance(page):
    a, b = rng.normal(size=(2, 3, 4)).astype(np.float32)
    world = SimpleNamespace(params={"x": a, "y": b}, trained={"x"})
    ctx = SimpleNamespace(params={"x": b}, own=page.anchored.init(world))
    assert float(page.anchored.loss(ctx)["distance"]) == pytest.approx(0.01 * np.sum((a - b) ** 2), rel=1e-5)


def test_weigh_and_the_objective(page):
    nll = np.array([[0.5, 9.0], [7.9, 8.0]], np.float32)
    ctx = SimpleNamespace(out=SimpleNamespace(nll=nll), weight=np.array([[1.0, 1.0], [0.5, 0.0]], np.float32))
    assert page.capped.weigh(ctx).tolist() == [[1, 0], [1, 0]]
    want = sum(w * (1 - np.exp(-x)) ** 2 * x for w, x in ((1, 0.5), (1, 9.0), (0.5, 7.9))) / 2.5
    assert float(page.focal(ctx)) == pytest.approx(want, rel=1e-5)


def test_fold_is_for_the_step_alone(page):
    b = Between(experiment([page.frozen_words, page.rounded], n=1, rows=8), lambda: None)
    b.begin(0)
    frozen = {"embed/kernel": b.world.params["embed/kernel"]}
    found = np.asarray(b.fixed(frozen, {}).frozen["embed/kernel"])
    start = np.asarray(frozen["embed/kernel"])
    assert np.array_equal(found.view(np.int32) & 0xFFFF, np.zeros(found.shape)) and not np.array_equal(found, start)
    np.testing.assert_allclose(found, start, rtol=2**-8)
    assert np.array_equal(b.world.params["embed/kernel"], start)


def test_grad_project_and_observe(page):
    g = {k: rng.normal(size=5).astype(np.float32) for k in "xy"}
    fn = page.normed.grad(lambda *a, terms: (g, {"terms": terms}), None, None)
    got, aux = fn({}, {}, None, terms=False)
    norm = np.sqrt(sum(np.sum(v**2) for v in g.values()))
    assert aux == {"terms": False} and all(np.allclose(got[k], g[k] / norm, rtol=1e-5) for k in g)
    got = page.gentle.project(g, {}, None, None)
    assert all(np.allclose(got[k], np.sign(g[k]) * np.minimum(np.abs(g[k]), 1e-3)) for k in g)
    ctx = SimpleNamespace(own={"live": {"mean": {"x": 2 * g["x"], "z": g["y"]}}})
    mean = page.ema.observe(ctx, {}, {"x": g["y"]}, g)["mean"]
    np.testing.assert_allclose(mean["x"], 1.8 * g["x"] + 0.1 * (g["x"] + g["y"]), rtol=1e-4, atol=1e-6)
    assert mean["z"] is g["y"], "what a phase does not train stays"


def test_wrap_halves_a_site(page):
    batch, params = next(batches(Answers("s", 4), None, 4)), weights()
    got = page.half.wrap(MODEL.apply, None, None)(SPEC, params, batch).nll
    smaller = params | {"layers/0/mlp/down/kernel": params["layers/0/mlp/down/kernel"] / 2}
    np.testing.assert_allclose(got, MODEL.apply(SPEC, smaller, batch).nll, rtol=1e-5, atol=1e-5)
    assert not np.allclose(got, MODEL.apply(SPEC, params, batch).nll, atol=1e-3)


def test_end_is_the_mean_of_squared_gradients(page):
    b = Between(experiment([page.fisher], n=1, rows=8), lambda: None)
    b.begin(0)
    b.end()
    source = Answers("s0", 8, seed=0)

    @jax.jit
    def gradient(row):
        row = jax.tree.map(lambda x: x[None], row)
        return jax.grad(lambda p: jnp.sum(row["weight"] * MODEL.apply(SPEC, p, row).nll))(weights())

    each = [gradient(source[i]) for i in range(8)]
    for k, found in b.owns["fisher"]["fixed"]["fisher"].items():
        np.testing.assert_allclose(found, np.mean([np.square(e[k]) for e in each], 0), rtol=1e-3, atol=1e-6)


def test_the_optimizer_reads_the_clock(page):
    params = {"x": jnp.ones(3)}
    clock = SimpleNamespace(phase_step=5, phase_len=10)
    updates, _ = page.tx.update({"x": jnp.full(3, 0.1)}, page.tx.init(params), params, clock=clock)
    rate = rewarm_rate(5, 10, 3e-3, 3e-4, 0.01)  # of Adam's first step, which is a sign
    np.testing.assert_allclose(updates["x"], -rate, rtol=1e-3)


# what is refused


def refused(pair: tuple[str, str]) -> str:
    """The error of two rows of the shared tests in one list, '' where there is none in two stages."""
    b = Between(experiment([ROWS[name]() for name in pair], n=2), lambda: None)
    try:
        for stage in range(2):
            b.begin(stage)
            b.plan(0)
    except RequestError as e:
        return str(e)
    return ""


def test_the_table_of_refused_pairs_is_complete():
    """Of the methods that add to the model or set an objective; those that do neither have nothing to quarrel about."""
    rows = [re.findall(r"`(\w+)`", line) for line in re.findall(r"^\| any two of (.*?) \|", PAGE, re.MULTILINE)]
    pairs = re.findall(r"^\| `(\w+)` and `(\w+)` \|", PAGE, re.MULTILINE)
    listed = {frozenset(p) for p in [*pairs, *(c for row in rows for c in itertools.combinations(row, 2))]}
    makers = [name for name, make in ROWS.items() if {"begin", "collect"} & {*make().slots}]
    found = set()
    for pair in itertools.combinations([n for n in makers if n == ROWS[n]().name], 2):
        if why := refused(pair):
            found.add(frozenset(pair))
            assert all(repr(name) in why for name in pair)
    assert found == listed


def test_links_and_files_of_the_page_are_there():
    root = Path(__file__).resolve().parents[1]
    for file in re.findall(r"`((?:jaxcl|tests|experiments)/[\w/]+\.py)`", PAGE):
        assert (root / file).exists(), file
    for link in re.findall(r"\]\(([^)#:]+)\)", PAGE):
        assert (root / "docs" / link).exists(), link


