"""From streams to batches: a grain iterator that stops and resumes exactly.

The whole phase is planned in numpy before its first batch (see `mixture`), so a batch is a pure function of
its number, the iterator's state is that number, and every process can read its own part of the same batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import grain
import numpy as np

from jaxcl.data.encode import Example
from jaxcl.data.mixture import draws, main_steps, order, scaled
from jaxcl.data.packing import first_fit, merge, tokens_of
from jaxcl.data.stage import Source
from jaxcl.errors import RequestError

if TYPE_CHECKING:
    from jaxcl.core.types import Batch, Phase, Stream


def phase_steps(
    phase: Phase,
    sources: Sequence[Source],
    batch_size: int,
    *,
    pack: int = 1,
    seed: Sequence[int] = (0, 0, 0),
    shuffle: bool = True,
) -> int:
    """Length of a phase in steps: ``phase.steps``, else what its main streams need for ``phase.epochs``.

    pack: rows that may share a sequence; above 1 the sequences are planned with ``seed`` = (run seed, stage,
    phase) and counted. RequestError where the length is left to streams without rows.
    """
    if phase.steps is not None:
        return phase.steps
    steps = main_steps(phase.streams, phase.epochs, batch_size)
    if pack == 1:
        return steps
    main = _Group("main", [(i, s) for i, s in enumerate(phase.streams) if s.into == "main"], sources)
    return -(-len(main.bins(draws(main.streams, phase.epochs), seed, shuffle, pack)) // batch_size)


def pipeline(
    sources: Sequence[Source],
    streams: Sequence[Stream],
    *,
    stage: int,
    batch_size: int,
    steps: int,
    seed: int,
    phase: int = 0,
    epochs: float = 1.0,
    shuffle: bool = True,
    pack: int = 1,
    local: Sequence[int] | np.ndarray | None = None,
    prefetch: int = 2,
) -> grain.DatasetIterator:
    """``steps`` batches of numpy arrays [B, ...]: of the ``batch_size`` rows of each those in ``local`` (all where
    None), which alone are read, so that several processes share a batch.

    sources: training rows of every stage, by number; a stream's index rows point into the one of its stage.
    Batches have the fields of the examples and source i32[B] (number of the stream in ``streams``, -1: none)
    and row i32[B] (index into its stage, -1: none); streams of another ``into`` come as a nested batch under
    that name. Where ``steps`` is what ``epochs`` need, every main row is drawn share * epochs times and the
    rest of the last batch is masked; with another ``steps`` the streams keep their proportions and repeat. A
    group without rows is a masked row: an example with weight 0. With ``pack`` > 1: see `packing.merge`.

    The iterator has get_state and set_state (its state is the number of the next batch). RequestError:
    streams whose examples differ in fields or shapes, indices outside a stage, rows outside the batch.
    """
    rows = np.arange(batch_size) if local is None else np.asarray(local, np.int64)
    if not len(rows) or rows.min() < 0 or rows.max() >= batch_size:
        raise RequestError(f"batch_size={batch_size}, rows {rows.tolist()} of it; accepted: 0..{batch_size - 1}")
    names = ["main", *sorted({s.into for s in streams} - {"main"})]
    groups = [_Group(n, [(i, s) for i, s in enumerate(streams) if s.into == n], sources) for n in names]
    blank = next((g.example(0, 0) for g in groups if g.streams), None)
    if blank is None:
        raise RequestError(f"stage {stage}: all streams are empty; a phase needs at least one row")
    for group in groups:
        group.check(blank)
        group.plan(batch_size, steps, epochs, (seed, stage, phase), shuffle, pack)
    data = grain.MapDataset.source(_Rows(groups, blank, batch_size, rows, steps)).batch(len(rows))
    # One thread reads ahead while the step runs; more would only compete with it.
    options = grain.ReadOptions(num_threads=min(prefetch, 1), prefetch_buffer_size=prefetch)
    return iter(data.to_iter_dataset(options))


def batches(source: Source, rows: Sequence[int] | None, batch_size: int) -> Iterator[Batch]:
    """Batches over ``rows`` (all where None) once, in order; the last one is filled with masked rows."""
    chosen = np.arange(len(source)) if rows is None else np.asarray(rows, np.int64)
    for at in range(0, len(chosen), batch_size):
        examples = [source[int(i)] | {"row": np.int32(i)} for i in chosen[at : at + batch_size]]
        examples += [masked(examples[0])] * (batch_size - len(examples))
        yield stack(examples)


def masked(example: Example) -> Example:
    """The same tokens without any weight or target: a row that no loss sees. ``row`` is -1."""
    blank = example | {"weight": np.zeros_like(example["weight"]), "row": np.int32(-1)}
    if "targets_at" in blank:
        blank["targets_at"] = np.zeros_like(blank["targets_at"])
    return blank


def stack(examples: Sequence[Example]) -> Batch:
    """Arrays [B, ...] from B examples of one shape."""
    return {name: np.stack([example[name] for example in examples]) for name in examples[0]}


class _Group:
    """The streams of one ``into`` that have rows, with their numbers among all streams."""

    def __init__(self, name: str, streams: Sequence[tuple[int, Stream]], sources: Sequence[Source]) -> None:
        self.name = name
        held = [(i, s) for i, s in streams if len(s.rows) and s.share > 0]
        self.numbers = [i for i, _ in held]
        self.streams = [s for _, s in held]
        self.rows: list[tuple[Any, Any]] = [
            (None, None) if isinstance(s.rows, tuple) else _rows(i, s, sources) for i, s in held
        ]
        self.sequences: Sequence[np.ndarray] = []

    def example(self, stream: int, position: int) -> Example:
        """Example at a position of a stream's rows, with its row number."""
        rows = self.streams[stream].rows
        if isinstance(rows, tuple):  # records
            return rows[position] | {"row": np.int32(rows[position].get("row", -1))}
        source, indices = self.rows[stream]
        return source[int(indices[position])] | {"row": np.int32(indices[position])}

    def check(self, like: Example) -> None:
        wanted = _shapes(like)
        for i, number in enumerate(self.numbers):
            found = _shapes(self.example(i, 0))
            if found != wanted:
                raise RequestError(
                    f"stream {number} ({self.name}) has examples of {found}, the first stream of {wanted}; "
                    "one window, one number of targets and one kind of row are needed in a phase"
                )

    def bins(self, counts: np.ndarray, seed: Sequence[int], shuffle: bool, pack: int) -> Sequence[np.ndarray]:
        """One array [rows of the sequence, 2] of (stream, position) per sequence."""
        drawn = order(self.streams, counts, (*seed, *self.name.encode()), shuffle)
        if pack == 1:
            return drawn[:, None]  # type: ignore[return-value]
        window = len(self.example(0, 0)["tokens"])
        lengths = [tokens_of(self.example(int(s), int(p))) for s, p in drawn]
        return [drawn[b] for b in first_fit(lengths, window, pack)]

    def plan(
        self, batch_size: int, steps: int, epochs: float, seed: Sequence[int], shuffle: bool, pack: int
    ) -> None:
        self.pack, total = pack, batch_size * steps
        if not self.streams:
            return
        counts = draws(self.streams, epochs)
        if self.name == "main":
            self.sequences = self.bins(counts, seed, shuffle, pack) if counts.sum() else []
            if -(-len(self.sequences) // batch_size) == steps:
                return
        weights = np.array([len(s.rows) * s.share for s in self.streams])
        # `pack` rows per sequence are the most that can be needed
        self.sequences = self.bins(scaled(weights, total * pack), seed, shuffle, pack)[:total]

    def sequence(self, number: int, blank: Example) -> Example:
        """Example of a sequence, with ``source`` and ``stage``; masked where the group has none left."""
        if number < len(self.sequences):
            chosen = self.sequences[number]
            examples = [self.example(int(s), int(p)) for s, p in chosen]
            source, stage = self.numbers[chosen[0, 0]], self.streams[chosen[0, 0]].stage
        else:
            examples, source, stage = [masked(blank)], -1, -1
        one = merge(examples, self.pack) if self.pack > 1 else examples[0]
        return one | {"source": np.int32(source), "stage": np.int32(stage)}


class _Rows:
    """The rows ``local`` of every batch, in order."""

    def __init__(
        self, groups: Sequence[_Group], blank: Example, batch_size: int, local: np.ndarray, steps: int
    ) -> None:
        self.groups, self.blank, self.batch_size, self.local, self.steps = groups, blank, batch_size, local, steps

    def __len__(self) -> int:
        return len(self.local) * self.steps

    def __getitem__(self, j: int) -> dict[str, Any]:
        step, inside = divmod(int(j), len(self.local))
        number = step * self.batch_size + int(self.local[inside])
        main, *others = self.groups
        nested = {group.name: group.sequence(number, self.blank) for group in others}
        return main.sequence(number, self.blank) | nested

    def __repr__(self) -> str:  # grain logs the repr of a source
        return f"Rows(batches={self.steps}, rows={len(self.local)} of {self.batch_size})"


def _rows(number: int, stream: Stream, sources: Sequence[Source]) -> tuple[Any, Any]:
    if not 0 <= stream.stage < len(sources):
        raise RequestError(f"stream {number}: no stage {stream.stage}; accepted: 0..{len(sources) - 1}")
    source, indices = sources[stream.stage], np.asarray(stream.rows, np.int64)
    if indices.min() < 0 or indices.max() >= len(source):
        bad = indices[(indices < 0) | (indices >= len(source))][0]
        raise RequestError(
            f"stream {number}: row {bad} is not in stage {source.name!r}; accepted: 0..{len(source) - 1}"
        )
    return source, indices


def _shapes(example: Example) -> str:
    return ", ".join(f"{n}{list(np.shape(example[n]))}" for n in sorted(example))
