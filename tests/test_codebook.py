"""GRACE's rule against numpy written by hand from the card."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.surgery.codebook import ADD, EXPAND, SPLIT, Rules, edited, empty, grown, lookup, nearest

LABELS = {"a": [3, 5, 0], "b": [4, 4, 0], "c": [3, 5, 5]}  # a and b have the same mean of ids, yet differ
EDITED = jax.jit(edited, static_argnames="rules")


class ByHand:
    """The codebook as lists, the rule as the card tells it."""

    def __init__(self, eps_init: float, moving_average: bool = False, shrink: bool = False):
        self.eps_init, self.moving_average, self.shrink = eps_init, moving_average, shrink
        self.keys, self.eps, self.labels = [], [], []

    def edit(self, q: np.ndarray, label: str) -> int:
        distances = [np.sqrt(np.sum((q - k) ** 2, dtype=np.float32)) for k in self.keys]
        j = max(range(len(distances)), key=lambda i: (-distances[i], i), default=None)
        d = None if j is None else distances[j]
        if j is None or d > self.eps_init + self.eps[j]:
            self.keys.append(q), self.eps.append(self.eps_init), self.labels.append(label)
            return ADD
        if label == self.labels[j]:
            if d > self.eps[j]:
                self.eps[j] = d * (1 + 1e-6)
                if self.moving_average:
                    self.keys[j] = (self.keys[j] + q) / 2
            return EXPAND
        self.eps[j] = min(d / 2 - 1e-5, self.eps[j]) if self.shrink else d / 2 - 1e-5
        self.keys.append(q), self.eps.append(d / 2), self.labels.append(label)
        return SPLIT


def put(book, q, label: str, value: float = 0.0, rules: Rules | None = None):
    ids = jnp.array(LABELS[label], jnp.int32)
    length = jnp.int32(np.count_nonzero(LABELS[label]))
    first = jnp.full(book["values"].shape[1], value, jnp.float32)
    return EDITED(book, jnp.asarray(q, jnp.float32), first, ids, length, rules=rules or Rules())


@pytest.mark.parametrize("options", [{}, {"moving_average": True}, {"shrink": True}], ids=str)
def test_a_stream_of_edits_by_hand(options):
    rng = np.random.default_rng(0)
    hand, rules = ByHand(0.4, **options), Rules(0.4, **options)
    book, seen = empty(64, 2, 1, 3), []
    for step in range(60):
        q, label = rng.uniform(-1, 1, 2).astype(np.float32), "abc"[rng.integers(3)]
        book, row, rule = put(book, q, label, step, rules)
        assert int(rule) == hand.edit(q, label)
        n = len(hand.keys)
        assert int(book["n"]) == n and (int(row) == n - 1 or rule == EXPAND)
        np.testing.assert_allclose(book["keys"][:n], hand.keys, rtol=1e-6)
        np.testing.assert_allclose(book["eps"][:n], hand.eps, rtol=1e-5, atol=1e-7)
        assert [LABELS[x] for x in hand.labels] == book["label"][:n].tolist()
        seen.append(int(rule))
    assert {ADD, EXPAND, SPLIT} == set(seen) and n <= len(seen)
    assert not np.any(book["eps"][n:]) and not np.any(book["keys"][n:])


def test_lookup_is_the_nearest_ball_or_none():
    rng = np.random.default_rng(1)
    book = empty(16, 3, 1, 3)
    for i in range(9):
        book, _, _ = put(book, rng.normal(size=3), "abc"[i % 3], rules=Rules(0.8))
    queries = rng.normal(size=(200, 3)).astype(np.float32)
    n, keys, eps = int(book["n"]), np.asarray(book["keys"]), np.asarray(book["eps"])
    distances = np.linalg.norm(queries[:, None] - keys[None, :n], axis=-1)
    near = distances.argmin(axis=1)
    wanted = np.where(distances[np.arange(200), near] <= eps[near], near, -1)
    assert lookup(book, jnp.asarray(queries)).tolist() == wanted.tolist() and {-1} < set(wanted)


def test_padding_rows_never_win():
    book = empty(8, 2, 1, 3)  # every row of it is at 0, with a radius of 0
    row, distance = nearest(book, jnp.zeros((1, 2)))
    assert np.isinf(distance[0]) and lookup(book, jnp.zeros((1, 2))).tolist() == [-1]
    book, _, _ = put(book, [5.0, 0.0], "a")
    row, distance = nearest(book, jnp.zeros((1, 2)))
    assert (int(row[0]), float(distance[0])) == (0, 5.0)


def test_a_split_parts_two_balls_and_may_enlarge_the_old_one():
    book, _, _ = put(empty(8, 1, 1, 3), [0.0], "a")
    book, _, rule = put(book, [1.9], "b")
    assert int(rule) == SPLIT
    np.testing.assert_allclose(book["eps"][:2], [0.95 - 1e-5, 0.95], rtol=1e-6)
    np.testing.assert_allclose(book["eps"][:2].sum(), 1.9 - 1e-5, rtol=1e-6)
    line = jnp.linspace(0, 1.9, 1001)[:, None]
    inside = np.abs(np.asarray(line) - [0.0, 1.9]) <= np.asarray(book["eps"][:2])
    assert not np.any(inside.all(axis=1)), "no query lies in both"
    small, _, _ = put(empty(8, 1, 1, 3), [0.0], "a", rules=Rules(0.5))
    small, _, rule = put(small, [0.9], "b", rules=Rules(0.6))  # d / 2 = 0.45 < 0.5
    small, _, _ = put(small, [-1.0], "b", rules=Rules(0.6))
    assert float(small["eps"][0]) == pytest.approx(0.5 - 1e-5), "as published: from 0.45 the old ball grew"
    shrunk, _, _ = put(empty(8, 1, 1, 3), [0.0], "a", rules=Rules(0.2))
    shrunk, _, _ = put(shrunk, [0.9], "b", rules=Rules(0.8, shrink=True))
    assert float(shrunk["eps"][0]) == pytest.approx(0.2)


def test_the_same_edit_adds_no_key_and_a_newer_answer_to_one_prompt_is_found():
    book, _, _ = put(empty(8, 2, 1, 3), [1.0, 2.0], "a")
    again, row, rule = put(book, [1.0, 2.0], "a", value=7.0)
    assert int(again["n"]) == 1 and int(rule) == EXPAND and int(row) == 0
    assert np.array_equal(again["eps"], book["eps"]) and np.array_equal(again["values"], book["values"])
    other, row, rule = put(book, [1.0, 2.0], "b")
    assert int(rule) == SPLIT and lookup(other, jnp.array([[1.0, 2.0]])).tolist() == [1]
    np.testing.assert_allclose(other["eps"][:2], [-1e-5, 0.0])
    same, _, rule = put(other, [1.0, 2.0], "b")
    assert int(same["n"]) == 2 and int(rule) == EXPAND, "of equally near keys the newest counts"


def test_labels_of_another_length_are_other_labels():
    book, _, _ = put(empty(8, 1, 1, 3), [0.0], "a")
    ids = jnp.array(LABELS["a"], jnp.int32)
    _, _, rule = edited(book, jnp.array([0.1]), jnp.zeros(1), ids, jnp.int32(3), Rules())  # its third id is 0
    assert int(rule) == SPLIT


def test_growing_doubles_until_all_fit_and_changes_nothing_in_use():
    book, _, _ = put(empty(2, 2, 3, 3), [1.0, 2.0], "a", value=4.0)
    same = grown(book, 1, 3)
    assert {k: v.shape for k, v in same.items()} == {k: v.shape for k, v in book.items()}
    wide = grown(book, 6, 5)
    assert wide["keys"].shape == (8, 2) and wide["label"].shape == (8, 5)
    for name in ("keys", "values", "eps", "label_len"):
        assert np.array_equal(wide[name][:2], book[name])
    assert np.array_equal(wide["label"][:2, :3], book["label"]) and not np.any(wide["label"][:, 3:])
    assert lookup(wide, jnp.array([[1.0, 2.0], [0.0, 0.0]])).tolist() == [0, -1]
