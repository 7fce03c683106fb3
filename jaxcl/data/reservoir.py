"""Which rows of a stream a memory of fixed capacity holds: Algorithm R, its class-balanced sibling, equal shares.

Every row number has its own random numbers, a pure function of (seed, number), so that writing a stream in two
calls equals writing it in one, and a restored memory goes on exactly. Sources: Vitter 1985 (Algorithm R);
Chrysakis and Moens 2020 (class-balanced reservoir sampling, CBRS); Chaudhry et al. 2019 (a ring for each class);
Rebuffi et al. 2017 (herding, iCaRL).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Memory:
    """items: int64[n] numbers of the stored rows, n <= capacity; seen: rows offered so far; counts: {class:
    [stored, seen]} and full: classes that were once the largest of a full memory (class-balanced only)."""

    items: np.ndarray
    labels: np.ndarray
    seen: int = 0
    class_seen: tuple[tuple[str, int], ...] = ()
    full: tuple[str, ...] = ()

    @classmethod
    def empty(cls) -> Memory:
        return cls(np.zeros(0, np.int64), np.zeros(0, np.str_))


def uniform(seed: int, start: int, n: int) -> np.ndarray:
    """f64[n,4] in [0, 1): four numbers for each of the rows ``start`` .. ``start + n - 1`` of the stream."""
    bits = np.random.Philox(key=seed)
    bits.advance(start)
    return (bits.random_raw(4 * n).reshape(n, 4) >> np.uint64(11)) * 2.0**-53


def reservoir(memory: Memory, labels: Sequence[str], capacity: int, seed: int) -> Memory:
    """The memory after the next ``len(labels)`` rows: row number n replaces slot j ~ U{0..n} if j < capacity.

    Afterwards every row of the stream is stored with probability capacity / seen.
    """
    items, kept = list(memory.items), list(memory.labels)
    draws = uniform(seed, memory.seen, len(labels))[:, 0]
    for n, (label, u) in enumerate(zip(labels, draws, strict=True), start=memory.seen):
        if len(items) < capacity:
            items.append(n)
            kept.append(label)
        elif (slot := int(u * (n + 1))) < capacity:
            items[slot], kept[slot] = n, label
    return Memory(np.array(items, np.int64), np.array(kept, np.str_), memory.seen + len(labels))


def class_balanced(memory: Memory, labels: Sequence[str], capacity: int, seed: int) -> Memory:
    """The memory after the next rows, CBRS: a class that never filled the memory evicts from the largest one.

    A class is full once it was the largest of a full memory; its rows then replace one another with probability
    stored / seen. A class with no more than capacity / classes rows stays whole.
    """
    items, kept = list(memory.items), [str(x) for x in memory.labels]
    seen, full = dict(memory.class_seen), set(memory.full)
    stored = {c: kept.count(c) for c in set(kept)}
    draws = uniform(seed, memory.seen, len(labels))
    for n, (label, u) in enumerate(zip(map(str, labels), draws, strict=True), start=memory.seen):
        seen[label] = seen.get(label, 0) + 1
        if capacity <= 0:
            continue
        if len(items) < capacity:
            items.append(n)
            kept.append(label)
            stored[label] = stored.get(label, 0) + 1
            continue
        largest = max(stored.values())
        full |= {c for c, k in stored.items() if k == largest}
        if label in full:
            if u[0] >= stored.get(label, 0) / seen[label]:
                continue
            victims = [i for i, c in enumerate(kept) if c == label]
        else:
            biggest = sorted(c for c, k in stored.items() if k == largest)
            victim = biggest[int(u[1] * len(biggest))]
            victims = [i for i, c in enumerate(kept) if c == victim]
        slot = victims[int(u[2] * len(victims))]
        stored[kept[slot]] -= 1
        stored[label] = stored.get(label, 0) + 1
        items[slot], kept[slot] = n, label
    return Memory(
        np.array(items, np.int64), np.array(kept, np.str_), memory.seen + len(labels),
        tuple(sorted(seen.items())), tuple(sorted(full)),
    )  # fmt: skip


def ring(memory: Memory, labels: Sequence[str], capacity: int, seed: int = 0) -> Memory:
    """The memory after the next rows: the last capacity // classes rows of every class, the newest first."""
    new = range(memory.seen + len(labels) - 1, memory.seen - 1, -1)
    classes = [*labels[::-1], *memory.labels.tolist()]
    return _equal_shares(memory, [*new, *memory.items.tolist()], classes, labels, capacity)


def herding(memory: Memory, labels: Sequence[str], capacity: int, features: np.ndarray) -> Memory:
    """The memory after the next rows, of ``features`` f[n, D]: the first capacity // classes rows of every class in the
    order of `herd`. As classes come, every class gives up its last ones."""
    order: list[int] = []
    for label in dict.fromkeys(labels):
        mine = np.flatnonzero(np.asarray(labels) == label)
        order += mine[herd(features[mine], min(len(mine), capacity))].tolist()
    items = [*memory.items.tolist(), *(memory.seen + i for i in order)]
    return _equal_shares(memory, items, [*memory.labels.tolist(), *(labels[i] for i in order)], labels, capacity)


def herd(features: np.ndarray, count: int) -> np.ndarray:
    """int64[count]: rows of f[n, D], each the one that brings the mean of those chosen so far closest to the mean of
    all, for features of length 1; of equal ones the first."""
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    mean, total, free = unit.mean(axis=0), np.zeros(unit.shape[1]), np.ones(len(unit), bool)
    chosen = np.zeros(count, np.int64)
    for k in range(count):
        away = np.linalg.norm(mean - (total + unit) / (k + 1), axis=1)
        chosen[k] = np.argmin(np.where(free, away, np.inf))
        free[chosen[k]] = False
        total = total + unit[chosen[k]]
    return chosen


def _equal_shares(
    memory: Memory, items: Sequence[int], kept: Sequence[str], labels: Sequence[str], capacity: int
) -> Memory:
    """Of ``items`` with classes ``kept``, in the order of their worth, the first capacity // classes of every class; of
    more classes than capacity one row each until it is full."""
    seen = dict(memory.class_seen)
    for label in labels:
        seen[label] = seen.get(label, 0) + 1
    most, count = max(capacity // max(len(seen), 1), 1), dict.fromkeys(seen, 0)
    chosen: list[int] = []
    for i, label in enumerate(kept):
        if count[label] < most and len(chosen) < capacity:
            count[label] += 1
            chosen.append(i)
    names = np.array([kept[i] for i in chosen], np.str_)
    numbers = np.array([items[i] for i in chosen], np.int64)
    return Memory(numbers, names, memory.seen + len(labels), tuple(sorted(seen.items())))
