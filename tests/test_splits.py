"""Splits beside TFDS's own arithmetic, rows in common by brute force, and what is refused."""

from __future__ import annotations

import pytest

from jaxcl.data.splits import shared, spans
from jaxcl.errors import RequestError

tfds = pytest.importorskip("tensorflow_datasets")

SLICES = ("[:7]", "[3:7]", "[-4:]", "[:-4]", "[:50%]", "[33%:67%]", "[-9%:]")
SPLITS = ("train", *(f"train{s}" for s in SLICES))
SIZE = 61  # a prime: no percentage of it is whole


def numbers(split: str, size: int = SIZE) -> list[tuple[str, int]]:
    found = spans(split, lambda base: size, "here")
    return [(s.base, i) for s in found for i in range(s.start, size if s.stop is None else s.stop)]


@pytest.mark.parametrize("split", [*SPLITS, "test+train[:1_0]", "train[:3] + test[5%:9%]", "train[60:]"])
@pytest.mark.parametrize("size", [SIZE, 250])
def test_splits_mean_what_tfds_means(split, size):
    infos = {
        name: tfds.core.SplitInfo(name=name, shard_lengths=[size], num_bytes=0, filename_template=None)
        for name in ("train", "test")
    }
    theirs = tfds.core.ReadInstruction.from_spec(split).to_absolute(infos)
    wanted = [(t.splitname, i) for t in theirs for i in range(t.from_ or 0, size if t.to is None else t.to)]
    assert wanted and numbers(split, size) == wanted


@pytest.mark.parametrize("one", SPLITS)
@pytest.mark.parametrize("other", [*SPLITS, "test", "train[7:10]+test"])
def test_rows_in_common_are_found(one, other):
    some, others = (spans(s, lambda base: SIZE, "here") for s in (one, other))
    both = set(numbers(one)) & set(numbers(other))
    assert (shared(some, others) is not None) == bool(both)


@pytest.mark.parametrize(
    ("split", "words"),
    [
        ("train[", "split 'train[' has another form than 'train', 'train[:1000]'"),
        ("train[3]", "another form"),
        ("", "another form"),
        ("train[a:b]", "another form"),
        ("train[5:5]", "'train[5:5]' holds no rows; the split has 61"),
        ("train[2:1]", "holds no rows"),
        ("train[:0]", "holds no rows"),
        ("train[:99]", "'train[:99]' reaches beyond the split, which has 61 rows"),
        ("train[-62:]", "reaches beyond"),
        ("train[:101%]", "reaches beyond"),
        ("train[10:50%]", "one bound is in percent, the other in rows"),
        ("train+train[3:]", "names rows of 'train' twice"),
    ],
)
def test_bad_splits_are_refused(split, words):
    with pytest.raises(RequestError) as caught:
        spans(split, lambda base: SIZE, "here")
    assert str(caught.value).startswith("here: ") and words in str(caught.value)
