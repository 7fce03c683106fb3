"""Intervals against the normal approximation on made-up items, and damaged prediction files."""

from __future__ import annotations

import gzip
import math

import numpy as np
import pytest
from samples import write_run

from jaxcl.errors import RequestError
from jaxcl.metrics.bootstrap import differences, intervals, resampled_sums
from jaxcl.metrics.matrix_file import read_matrix
from jaxcl.metrics.score import score_matrix

ONE = b'{"id": "item0", "score": 1}\n'


def test_interval_of_aa_equals_the_normal_approximation(tmp_path):
    rng = np.random.default_rng(0)
    hits = (rng.random((4, 3, 400)) < 0.6).astype(float)
    write_run(tmp_path, hits)
    found, reason = intervals(read_matrix(tmp_path), tmp_path)
    assert reason is None
    p = hits[-1].mean(-1)
    deviation = math.sqrt((p * (1 - p) / 400).sum()) / 3
    lo_aa, hi_aa = found["aa"]
    assert lo_aa == pytest.approx(p.mean() - 1.96 * deviation, abs=0.1 * deviation * 1.96)
    assert hi_aa == pytest.approx(p.mean() + 1.96 * deviation, abs=0.1 * deviation * 1.96)
    gap = hits[3, :2] - hits[[1, 2], [0, 1]]  # paired: the deviation of the differences, not of two sums
    expected = math.sqrt((gap.var(-1) / 400).sum()) / 2
    lo, hi = found["bwt_over_T_minus_1"]
    assert (hi - lo) / (2 * 1.96) == pytest.approx(expected, rel=0.1)
    entry = score_matrix(read_matrix(tmp_path), tmp_path)["metrics"]["aa"]
    assert entry["interval"] == [lo_aa, hi_aa] and lo_aa < entry["value"] < hi_aa
    assert intervals(read_matrix(tmp_path), tmp_path) == (found, None)  # seeded


def test_rows_share_their_draw():
    same = np.tile((np.arange(50) % 3 == 0).astype(float), (2, 1))
    means = resampled_sums(same[..., None], 100, np.random.default_rng(0))[..., 0] / 50
    assert means.shape == (100, 2) and np.array_equal(means[:, 0], means[:, 1]) and means[:, 0].std() > 0
    many = resampled_sums(np.arange(12.0).reshape(3, 4, 1), 3000, np.random.default_rng(1))[..., 0] / 4
    assert many.mean(0) == pytest.approx([1.5, 5.5, 9.5], abs=0.1)


def test_difference_of_two_runs_is_paired(tmp_path):
    """Run b repairs the same 20 items of each eval: the difference is 0.1, far tighter than unpaired."""
    rng = np.random.default_rng(2)
    a = (rng.random((3, 2, 200)) < 0.5).astype(float)
    b = a.copy()
    for i in range(2):
        wrong = np.flatnonzero(a[-1, i] == 0)[:20]
        b[-1, i, wrong] = 1.0
    write_run(tmp_path / "a", a)
    order = rng.permutation(200)  # the same items, written in another order
    write_run(tmp_path / "b", b[:, :, order], ids=[f"item{j}" for j in order])
    runs = [(read_matrix(tmp_path / r), tmp_path / r) for r in ("a", "b")]
    found, reason = differences(*runs)
    assert reason is None
    deviation = math.sqrt(2 * 0.1 * 0.9 / 200) / 2
    lo, hi = found["aa"]
    assert lo == pytest.approx(0.1 - 1.96 * deviation, abs=0.3 * deviation)
    assert hi == pytest.approx(0.1 + 1.96 * deviation, abs=0.3 * deviation)
    zero, _ = differences(runs[0], runs[0])
    assert all(v == (0.0, 0.0) for v in zero.values())


def test_no_interval_without_honest_predictions(tmp_path):
    hits = (np.random.default_rng(3).random((3, 2, 30)) < 0.5).astype(float)
    write_run(tmp_path / "a", hits)
    matrix = read_matrix(tmp_path / "a")
    assert intervals(matrix, tmp_path)[1] == "no predictions of e0"
    other = matrix._replace(rows=np.clip(matrix.rows + 0.25, 0, 1))
    assert "do not add up" in intervals(other, tmp_path / "a")[1]
    (tmp_path / "a/predictions/e1.row1.jsonl.gz").unlink()
    found, _ = intervals(matrix, tmp_path / "a")
    assert "aa" in found and "fwt_no_baseline" not in found  # it averages over the row that is gone


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: p.write_bytes(p.read_bytes()[:-12]), "cannot be decompressed"),
        (lambda p: p.write_bytes(b"not gzip"), "cannot be decompressed"),
        (lambda p: p.write_bytes(gzip.compress(b'{"id": 1}\n')), "line 1: no prediction"),
        (lambda p: p.write_bytes(gzip.compress(ONE * 2)), "occurs twice"),
        (lambda p: p.write_bytes(gzip.compress(b'{"id": "item0", "score": NaN}\n')), "finite"),
        (lambda p: p.write_bytes(gzip.compress(ONE)), "has 1 records; accepted: 30"),
        (lambda p: p.write_bytes(gzip.compress(b" " * (3 << 20))), "too much"),
    ],
)
def test_damaged_predictions_are_refused(tmp_path, damage, message):
    write_run(tmp_path, np.ones((3, 2, 30)))
    damage(tmp_path / "predictions/e1.row2.jsonl.gz")
    with pytest.raises(RequestError, match=message):
        intervals(read_matrix(tmp_path), tmp_path)
