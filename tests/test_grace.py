"""The card's invariants of GRACE on a three-layer decoder, edited in the middle."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import support
from support import TARGETS, WINDOW, Answers, experiment, same, to_numpy

from jaxcl.core import compose
from jaxcl.core.between import Between
from jaxcl.core.step import make_step
from jaxcl.core.types import Clock, Fixed, Method, Phase, State
from jaxcl.data.encode import encode, encode_text
from jaxcl.data.pipeline import batches, stack
from jaxcl.data.stage import Stage
from jaxcl.errors import RequestError, RunFailed
from jaxcl.evaluate.endings import block_arrays, ending_nll, prompt_arrays, stacked
from jaxcl.methods.grace import grace
from jaxcl.methods.inner import descend
from jaxcl.methods.lora import lora
from jaxcl.methods.router import REPLACED
from jaxcl.models.decoder import decoder
from jaxcl.models.generate import generate
from jaxcl.models.stacking import restack
from jaxcl.surgery.codebook import lookup

SPEC = dataclasses.replace(support.SPEC, layers=3, segments=())
MODEL = decoder(SPEC)
SITE = "layers/1/mlp/down"
ROWS = 8
SMALL = {"site": SITE, "eps_init": 0.02, "capacity": 32, "n_iter": 40}
IDLE = (("lr", 1e-6), ("n_iter", 2))  # trains nothing, so that a row stays wrong


class Words(Answers):
    """Answers of one token: so small a model can be made to say any one of them."""

    def __init__(self, name: str = "edits", n: int = ROWS, seed: int = 5):
        super().__init__(name, n, seed)
        self.answers = [a[:1] for a in self.answers]


EDITS = Words()


@functools.cache
def weights() -> dict[str, jax.Array]:
    return MODEL.init(SPEC, jax.random.key(0))


def run(*args: Any, **kw: Any) -> support.Done:
    return support.run(*args, **{"spec": SPEC, "params": weights(), **kw})


def fields(rows: Any) -> dict[str, Any]:
    return {k: v for k, v in rows.items() if k != "row"}


def all_rows(source: Answers = EDITS) -> dict[str, Any]:
    return fields(next(batches(source, None, len(source))))


def wrapped(live: Any, replace: str = "last"):
    live = {"grace": jax.tree.map(jnp.asarray, live)} if live else {}
    return compose.wrapped(MODEL.apply, [grace(SITE, replace=replace)], {}, live, Clock.at())


@functools.partial(jax.jit, static_argnames=("replace", "taps"))
def forward(live: Any, batch: dict[str, Any], replace: str = "last", taps: tuple[str, ...] = ()):
    out = wrapped(live, replace)(SPEC, weights(), batch, taps=taps)
    notes = {k.removeprefix("grace/"): v for k, v in out.aux.get(SITE, {}).items()}
    return out.hidden, out.nll, notes, out.taps


@jax.jit
def plain(batch: dict[str, Any], covered: Any = None, value: Any = None):
    """(hidden, nll) without a method, or with a value put by hand where ``covered`` [B,T] says."""
    put = {} if covered is None else {SITE: lambda x, y: (jnp.where(covered[..., None], value, y), {})}
    out = MODEL.apply(SPEC, weights(), batch, inject=put)
    return out.hidden, out.nll


def likely(hidden: Any, batch: dict[str, Any]) -> np.ndarray:
    at = np.maximum(batch["targets_at"] - 1, 0)
    return np.argmax(MODEL.head(SPEC, weights(), hidden, at), axis=-1)


def right(live: Any, batch: dict[str, Any]) -> np.ndarray:
    """bool[B]: whether the most likely tokens are the targets, through the whole model."""
    hidden, at = forward(live, batch)[0], batch["targets_at"]
    wanted = np.take_along_axis(batch["tokens"], at, axis=1)
    return np.all((likely(hidden, batch) == wanted) | (at == 0), axis=1)


@functools.cache
def stepper(options: tuple) -> tuple[Any, Method]:
    method = grace(**SMALL | dict(options))
    step = make_step(MODEL.apply, SPEC, [method], optax.identity(), Phase("edit", None, ()), head=MODEL.head)
    return jax.jit(step), method


def edits(groups: Sequence[Sequence[int]], options: tuple = (), live: Any = None, source: Answers = EDITS) -> list[Any]:
    """The memory after each step; a step edits the rows of a group, one after the other."""
    step, method = stepper(options)
    if live is None:
        now = Between(experiment([method], stages=[Stage("s", source)], spec=SPEC, params=weights()), lambda: None)
        now.begin(0)
        live = to_numpy(now.owns["grace"]["live"])  # as placed on a mesh it would be compiled for twice
    seen = []
    for rows in groups:
        batch = next(batches(source, rows, len(rows)))
        state = State(Clock.at(), {}, optax.EmptyState(), {"grace": live})
        live = step(state, Fixed(weights(), {}), batch, np.uint32(0))[0].live["grace"]
        seen.append(to_numpy(live))
    return seen


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """All edits in one stage, four a step."""
    out = tmp_path_factory.mktemp("grace") / "out"
    return run([grace(**SMALL)], out, stages=[Stage("edits", EDITS)], batch_size=4)


@pytest.fixture(scope="module")
def live(done):
    return to_numpy(done.loop.now.owns["grace"]["live"])


def test_every_edit_holds_and_nothing_else_changed(done, live):
    wrong = ~right(None, all_rows())
    assert wrong.sum() >= ROWS - 2, "a random model errs"
    assert right(live, all_rows()).all()
    assert same(done.params, to_numpy(weights())) and done.compilations == 1
    assert int(live["made"].sum()) == wrong.sum() >= int(live["book"]["n"])
    assert not np.any(live["book"]["values"][int(live["book"]["n"]) :])


@pytest.mark.parametrize("replace", REPLACED)
def test_outside_every_ball_and_without_a_key_outputs_are_the_same_bit_for_bit(live, replace):
    batch = joined(all_rows(Answers("others", 8, seed=77)), all_rows())
    hidden, nll, notes, _ = forward(live, batch, replace)
    hit = np.asarray(notes["slot"]) >= 0
    assert hit[ROWS:].sum() >= ROWS - 2 and not hit[:ROWS].any()
    want, want_nll = plain(batch)
    assert np.array_equal(hidden[~hit], want[~hit]) and np.array_equal(nll[~hit], want_nll[~hit])
    assert not any(np.array_equal(a, b) for a, b in zip(hidden[hit], want[hit]))
    none = {**live, "book": {**live["book"], "n": np.int32(0)}}
    assert np.array_equal(forward(none, batch, replace)[0], want)


def joined(*parts: dict[str, Any]) -> dict[str, Any]:
    return {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}


@pytest.mark.parametrize("replace", REPLACED)
def test_where_the_value_goes(live, replace):
    """Against an injection by hand at the tokens that the card names."""
    batch = joined(all_rows(Answers("others", 8, seed=77)), all_rows())
    _, nll, notes, _ = forward(live, batch, replace)
    slot = np.asarray(notes["slot"])
    query, index = batch["targets_at"][:, :1] - 1, np.arange(WINDOW)[None]
    covered = {"last": index == query, "prompt": index < query, "all": index >= 0}[replace] & (slot >= 0)[:, None]
    assert covered.any()
    np.testing.assert_allclose(nll, plain(batch, covered, live["book"]["values"][slot][:, None])[1], atol=1e-5)


@pytest.mark.parametrize("replace", REPLACED)
def test_decoding_and_ranking_obey_the_decision_in_the_cache(live, replace):
    prompts, labels = EDITS.prompts[:4], [[1, 2, 3], [4], [7, 5]]
    lengths = np.array([len(p) for p in prompts], np.int32)
    tokens = np.stack([np.pad(p, (0, WINDOW - len(p))) for p in prompts]).astype(np.int32)
    prompt = stacked([prompt_arrays(p, 0, WINDOW) for p in prompts], 4)
    block = stacked([block_arrays(len(p), [labels], 3, 1, 8) for p in prompts], 4)

    @jax.jit
    def decoded(live: Any) -> Any:
        apply = wrapped(live, replace)
        args = (apply, MODEL.head, SPEC, weights())
        return generate(*args, tokens, lengths, max_new=TARGETS, stop_ids=())[0], ending_nll(*args, prompt, block)

    written, ranked = (np.asarray(x) for x in decoded(live))

    def whole(answers: list[Any]) -> dict[str, Any]:
        both = zip(prompts, answers)
        return fields(stack([encode(p.tolist(), [int(t) for t in a], 2 * WINDOW, TARGETS) for p, a in both]))

    batch = whole(written)  # writing token by token, and reading what was written
    np.testing.assert_array_equal(written, likely(forward(live, batch, replace)[0], batch))
    if replace == "last":
        assert all(w[: len(a)].tolist() == a.tolist() for w, a in zip(written, EDITS.answers))
    for number, label in enumerate(labels):
        wanted = np.asarray(forward(live, whole([label] * 4), replace)[1]).sum(axis=1)
        np.testing.assert_allclose(ranked[:, 0, number], wanted, rtol=2e-4)


def test_hits_do_not_depend_on_the_shape_of_the_batch(live):
    """Each edit's own prompt again: in a longer window, and in a larger batch."""
    slots = forward(live, all_rows())[2]["slot"].tolist()
    assert sum(slot >= 0 for slot in slots) >= ROWS - 2
    pairs = zip(EDITS.prompts, EDITS.answers)
    longer = fields(stack([encode(p.tolist(), a.tolist(), 40, TARGETS) for p, a in pairs]))
    assert forward(live, longer)[2]["slot"].tolist() == slots
    assert forward(live, joined(*[all_rows()] * 5))[2]["slot"].tolist() == slots * 5
    assert [forward(live, {k: v[i : i + 1] for k, v in longer.items()})[2]["slot"][0] for i in range(ROWS)] == slots


def test_an_expanded_ball_holds_the_query_it_was_expanded_to():
    """All prompts end in one token and ask for one answer: one wide ball, whose edge the last of them lies on."""

    class One(Answers):
        def __init__(self):
            super().__init__("one", 6, seed=3)
            self.prompts = [np.append(p[:-1], 9) for p in self.prompts]
            self.answers = [np.array([2, 4])] * self.n

    source = One()
    hidden = forward(None, all_rows(source), taps=(f"{SITE}:in",))[3][f"{SITE}:in"]
    query = np.stack([row[t[0] - 1] for row, t in zip(hidden, all_rows(source)["targets_at"])])
    distances = np.linalg.norm(query - query[0], axis=1)
    eps = float(np.max(distances) * 0.6)
    # every row stays wrong, so none is passed over
    *_, last = edits([[i] for i in range(6)], (("eps_init", eps), *IDLE), source=source)
    assert last["made"].tolist() == [1, 5, 0] and int(last["book"]["n"]) == 1
    assert float(last["book"]["eps"][0]) == pytest.approx(distances.max() * (1 + 1e-6), rel=6e-7)
    for batch in (all_rows(source), joined(*[all_rows(source)] * 3)):
        assert np.all(forward(last, batch)[2]["slot"] == 0)


def test_one_row_of_values_changes_per_edit_and_right_answers_are_no_edits():
    seen = edits([[i] for i in [*range(ROWS), *range(ROWS)]])
    before = {"values": np.zeros_like(seen[0]["book"]["values"])}
    made = 0
    for now in seen:
        changed = np.any(now["book"]["values"] != before["values"], axis=1).sum()
        assert changed == int(now["made"].sum()) - made <= 1
        made, before = int(now["made"].sum()), now["book"]
    first, second = seen[ROWS - 1], seen[-1]
    assert same_tree(first, second), "after the first pass the model is right and makes no edit"


def same_tree(a: Any, b: Any) -> bool:
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: bool(np.array_equal(x, y)), a, b)))


def test_the_same_edit_twice_adds_no_key_and_another_answer_does():
    """lr so small that the row stays wrong: the error gate lets it through again."""
    one, two = edits([[0], [0]], IDLE)
    assert int(one["book"]["n"]) == int(two["book"]["n"]) == 1 and two["made"].tolist() == [1, 1, 0]
    assert np.array_equal(one["book"]["eps"], two["book"]["eps"])
    other = Words()
    other.answers[0] = (other.answers[0] + 1) % SPEC.vocab
    (three,) = edits([[0]], IDLE, live=one, source=other)
    assert three["made"].tolist() == [1, 0, 1] and int(three["book"]["n"]) == 2
    radii = three["book"]["eps"][:2]
    np.testing.assert_allclose(radii.sum(), -1e-5, atol=1e-8)  # d = 0


def test_scan_over_edits_equals_one_by_one():
    options = (("n_iter", 3), ("replace", "all"), ("value", "warm"), ("copies", 3))
    (one,), (*_, other) = edits([range(4)], options), edits([[i] for i in range(4)], options)
    assert int(one["book"]["n"]) > 1 and one["made"].tolist() == other["made"].tolist()
    for name in one["book"]:
        np.testing.assert_allclose(one["book"][name], other["book"][name], rtol=1e-4, atol=1e-4)


def test_what_is_minimised_is_the_loss_of_the_whole_model():
    """One step of Adam moves by lr times the sign of the gradient, here by differences through a plain injection."""
    source = Answers("long", ROWS, seed=5)
    number = max(range(ROWS), key=lambda i: len(source.answers[i]))
    (live,) = edits([[number]], (("n_iter", 1), ("value", "warm"), ("lr", 1e-3)), source=source)
    row = fields(next(batches(source, [number], 1)))
    assert row["weight"].sum() == TARGETS
    query = int(row["targets_at"][0, 0]) - 1

    def nll(value: np.ndarray) -> float:
        found = plain(row, np.arange(WINDOW)[None] == query, value)[1]
        return float(found.sum() / row["weight"].sum())

    kernel, inputs = weights()[f"{SITE}/kernel"], forward(None, row, taps=(f"{SITE}:in",))[3][f"{SITE}:in"]
    start, step = np.asarray(inputs[0, query] @ kernel), np.eye(SPEC.width, dtype=np.float32) * 1e-2
    slope = np.array([nll(start + s) - nll(start - s) for s in step]) / 2e-2
    moved = (live["book"]["values"][0] - start) / 1e-3
    clear = np.abs(slope) > 1e-3
    assert clear.sum() > SPEC.width // 2
    np.testing.assert_allclose(moved[clear], -np.sign(slope[clear]), atol=2e-2)


def test_descend_is_adam_with_an_early_stop():
    def by_hand(n: int) -> np.ndarray:
        x, m, v = np.array([3.0, -1.0]), 0.0, 0.0
        for t in range(1, n + 1):
            g = 2 * x
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            x = x - 0.1 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        return x

    square = lambda x: jnp.sum(x * x)  # noqa: E731
    start = jnp.array([3.0, -1.0])
    np.testing.assert_allclose(descend(square, start, 25, 0.1, None), by_hand(25), atol=1e-4)
    stopped = np.asarray(descend(square, start, 1000, 0.1, 4.0))
    first = next(n for n in range(100) if np.sum(by_hand(n) ** 2) < 4.0)
    np.testing.assert_allclose(stopped, by_hand(first), atol=1e-4)


def test_the_codebook_doubles_between_stages_and_loses_nothing(tmp_path):
    short = {**SMALL, "n_iter": 3}
    stages = [Stage(f"s{i}", Words(f"s{i}", seed=i)) for i in range(2)]
    small, large = (
        run([grace(**{**short, "capacity": c})], tmp_path / str(c), stages=stages, batch_size=4) for c in (2, 64)
    )
    one, other = (to_numpy(d.loop.now.owns["grace"]["live"]["book"]) for d in (small, large))
    n = int(other["n"])
    assert len(one["eps"]) == 16 and len(other["eps"]) == 64 and int(one["n"]) == n > 8
    for name in ("keys", "values", "eps", "label", "label_len"):
        np.testing.assert_array_equal(one[name][:n], other[name][:n])
    assert large.compilations == 1 and small.compilations == 2


def test_a_stacked_layer_is_set_apart_and_gives_the_same_edits(live, tmp_path):
    params, spec = restack(weights(), SPEC, ((("block",), 3),))
    done = run([grace(**SMALL)], tmp_path / "out", stages=[Stage("e", EDITS)], batch_size=4, spec=spec, params=params)
    world, found = done.loop.now.world, to_numpy(done.loop.now.owns["grace"]["live"])
    assert world.spec.segments == ((("block",), 1),) * 3 and f"{SITE}/kernel" in world.params
    assert found["made"].tolist() == live["made"].tolist()
    np.testing.assert_allclose(found["book"]["keys"], live["book"]["keys"], atol=1e-5)


def test_the_first_layer_can_be_edited_too():
    options = (("site", "layers/0/mlp/down"), ("eps_init", 1e-3))
    *_, last = edits([range(4)], options)
    method = grace(site="layers/0/mlp/down")
    apply = compose.wrapped(MODEL.apply, [method], {}, {"grace": jax.tree.map(jnp.asarray, last)}, Clock.at())
    batch = {k: v[:4] for k, v in all_rows().items()}
    hidden = jax.jit(lambda batch: apply(SPEC, weights(), batch).hidden)(batch)
    wanted = np.take_along_axis(batch["tokens"], batch["targets_at"], axis=1)
    assert np.all((likely(hidden, batch) == wanted) | (batch["targets_at"] == 0))


def test_the_default_site_is_where_the_authors_put_it():
    from jaxcl.methods.grace import located
    from jaxcl.models.spec import tiny

    assert located(tiny(layers=32), None) == "layers/27/mlp/down"
    assert located(tiny(layers=30), None) == "layers/25/mlp/down"


BAD = [
    ({"eps_init": 0.0}, "eps_init 0.0"), ({"n_iter": 0}, "n_iter 0"), ({"lr": -1.0}, "lr -1.0"),
    ({"replace": "lst"}, "did you mean 'last'"), ({"value": "hot"}, "accepted: cold, warm"),
    ({"expand": "no"}, "coverage"),
]  # fmt: skip


@pytest.mark.parametrize(("bad", "said"), BAD, ids=str)
def test_bad_values_are_refused(bad, said):
    with pytest.raises(RequestError, match=said):
        grace(**bad)


def test_what_cannot_be_edited_is_refused(tmp_path):
    with pytest.raises(RequestError, match=f"did you mean '{SITE}'"):
        run([grace(SITE + "n")], tmp_path / "site")
    class Text(Answers):
        def __getitem__(self, i: int):
            return encode_text(self.prompts[i], WINDOW, row=i)

    with pytest.raises(RequestError, match="not plain text"):
        run([grace(**SMALL)], tmp_path / "text", stages=[Stage("t", Text("t"))])
    assert not list(tmp_path.iterdir()), "before anything is written"
    with pytest.raises(RequestError, match="set accumulate to 1"):
        run([grace(**SMALL)], tmp_path / "micro", n=1, accumulate=2)


def test_an_edit_that_found_no_room_is_not_passed_over(live):
    method = grace(**SMALL)
    full = {"live": {**live, "refused": np.int32(2)}}
    with pytest.raises(RunFailed, match="2 edits found all 32 keys in use"):
        method.end(None, full)
    book = {**live["book"], "n": np.int32(32), "keys": live["book"]["keys"] + 100}
    (now,) = edits([[0]], live={**live, "book": book})
    assert int(now["refused"]) == 1 and same_tree(now["book"], book)


def test_the_query_is_the_sites_input_at_the_prompts_last_token(live):
    batch = all_rows()
    _, _, notes, taps = forward(live, batch, taps=(f"{SITE}:in",))
    query = np.asarray(taps[f"{SITE}:in"])[np.arange(ROWS), batch["targets_at"][:, 0] - 1]
    np.testing.assert_array_equal(query, notes["query"])
    assert lookup(live["book"], query).tolist() == notes["slot"].tolist()
    prompts = {k: batch[k] for k in ("tokens", "positions")}
    prompts["segments"] = np.where(np.arange(WINDOW) < batch["targets_at"][:, :1], batch["segments"], 0)
    np.testing.assert_allclose(forward(live, prompts)[2]["query"], query, atol=1e-5)  # prompts alone


def test_an_adapter_beside_it_is_refused_whether_layers_are_stacked_or_not():
    params, spec = restack(weights(), SPEC, ((("block",), 3),))
    for given in ({"spec": SPEC, "params": weights()}, {"spec": spec, "params": params}):
        between = Between(experiment([lora(rank=2), grace(**SMALL)], **given), lambda: None)
        between.begin(0)
        with pytest.raises(RequestError, match=r"methods 'grace' and 'lora' do not go together"):
            between.plan(0)


def test_a_model_that_grows_is_refused(live):
    own = {"live": live, "host": {"site": SITE, "layers": SPEC.layers}}
    now = Between(experiment([grace(**SMALL)], spec=SPEC, params=weights()), lambda: None)
    now.begin(0)
    grace(**SMALL).plan(now.world, own, [])
    deeper = now.world._replace(spec=dataclasses.replace(SPEC, layers=4, segments=()))
    wider = now.world._replace(params={**now.world.params, f"{SITE}/kernel": jnp.zeros((40, SPEC.width))})
    for world in (deeper, wider):
        with pytest.raises(RequestError, match="the model grows"):
            grace(**SMALL).plan(world, own, [])
