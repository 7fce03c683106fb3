"""CMR's query stream: its counts against the card's and the oracle's, and every invariant of the card."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest

from jaxcl.core.types import Clock
from jaxcl.core.view import View
from jaxcl.data.cmr import UPSTREAM, Counts, Mix, query_stream
from jaxcl.errors import RequestError
from jaxcl.evaluate.at_stages import changing, only, stages_done
from jaxcl.evaluate.base import Eval
from tests.oracle import oracle
from tests.support import MODEL, SPEC

CLUSTERS = dict.fromkeys("abcde", 200)


def drawn(mix: Mix, steps: int = 30, seed: int = 0, clusters: dict[str, int] | None = None) -> list:
    return query_stream(500, clusters or CLUSTERS, steps, mix, seed=seed)


def test_counts_are_those_of_the_oracle():
    for row in oracle("cmr")["stream_counts_b64_alpha0.9_gamma0.8_5ood"]:
        want = Counts(row["upstream"], row["major"], row["each_other"], row["leftover"])
        assert Mix(64, 0.9, 0.5, 0.8).counts(row["t"], 5) == want


def test_counts_worked_out_by_hand():
    """b 10, alpha 0.5, gamma 0.5, 3 clusters: upstream 10, 5, 2 (2.5 to even), 1; of the rest, 2.5 and 4.5 to even."""
    made = [Mix(10, 0.5, 0.5, 0.5).counts(t, 3) for t in (1, 2, 3, 4)]
    assert made == [(10, 0, 0, 0), (5, 2, 1, 1), (2, 4, 2, 0), (1, 4, 2, 1)]


def test_the_first_step_is_all_upstream_unless_alpha_is_zero():
    for alpha in (0.1, 0.9, 0.95, 1.0):
        assert {c for c, _ in drawn(Mix(16, alpha), 1)[0][1]} == {UPSTREAM}
    assert all(c != UPSTREAM for _, queries in drawn(Mix(16, 0.0)) for c, _ in queries)


def test_beta_one_never_switches_and_beta_zero_always_does():
    assert len({major for major, _ in drawn(Mix(16, beta=1.0))}) == 1
    majors = [major for major, _ in drawn(Mix(16, beta=0.0))]
    assert all(a != b for a, b in itertools.pairwise(majors))


def test_a_major_cluster_stays_with_probability_beta():
    majors = [major for major, _ in drawn(Mix(2, beta=0.7), 4000)]
    stays = np.mean([a == b for a, b in itertools.pairwise(majors)])
    assert stays == pytest.approx(0.7, abs=4 * np.sqrt(0.7 * 0.3 / 4000))
    assert min(Counter(majors).values()) > 4000 / 5 / 2, "the other clusters are drawn alike"


def test_gamma_one_gives_one_cluster_a_step():
    for major, queries in drawn(Mix(16, alpha=0.0, gamma=1.0)):
        assert {c for c, _ in queries} == {major}


@pytest.mark.parametrize("mix", [Mix(64, 0.9, 0.5, 0.8), Mix(7, 0.3, 0.1, 0.2), Mix(1, 0.0, 0.0, 0.0)])
def test_every_step_has_its_batch_and_its_counts(mix):
    for t, (major, queries) in enumerate(drawn(mix), 1):
        count, found = mix.counts(t, 5), Counter(c for c, _ in queries)
        assert len(queries) == mix.batch == len(set(queries)), "drawn without replacement inside a step"
        assert (found[UPSTREAM], found[major]) == (count.upstream, count.major)
        others = sorted(found[c] for c in CLUSTERS if c != major)
        filled = sorted([count.each_other] * 3 + [count.each_other + count.leftover])
        assert others == filled, "one other cluster takes what is left over"


def test_steps_draw_with_replacement():
    queries = [q for _, step in drawn(Mix(16, alpha=0.0), 40, clusters={"a": 20, "b": 20}) for q in step]
    assert max(Counter(queries).values()) > 1


def test_the_same_seed_gives_the_same_stream():
    assert drawn(Mix(16)) == drawn(Mix(16)) != drawn(Mix(16), seed=1)


@pytest.mark.parametrize(
    ("mix", "clusters", "says"),
    [
        (Mix(0), CLUSTERS, "batch=0 queries a step; accepted: a whole number"),
        (Mix(4, alpha=1.5), CLUSTERS, "alpha=1.5; accepted: a number from 0 to 1"),
        (Mix(4, gamma=float("nan")), CLUSTERS, "gamma=nan"),
        (Mix(4), {"a": 9}, "1 clusters out of distribution; accepted: at least 2"),
        (Mix(64, alpha=0.0), {"a": 9, "b": 9}, r"step 1 draws \d+ queries of '[ab]', which has 9"),
    ],
)
def test_what_cannot_be_drawn_is_refused(mix, clusters, says):
    with pytest.raises(RequestError, match=says):
        drawn(mix, clusters=clusters)


# evals that have their stages


def view_at(clock: Clock) -> View:
    return View(MODEL).at(SPEC, {}, {}, {}, clock)


def fixed(name: str, ids: str) -> Eval:
    return Eval(name, "m", len(ids), lambda view, progress: [{"id": i, "prediction": name, "score": 1.0} for i in ids])


def test_the_clock_says_how_many_stages_are_done():
    """Before the first stage it stands at (0, 0, 0), which is not the end of stage 0."""
    clocks = [Clock.at(), Clock.at(5, 0, 1), Clock.at(9, 1, 1), Clock.at(0, 0, 1)]
    assert [stages_done(view_at(clock)) for clock in clocks] == [0, 1, 2, 1]


def test_an_eval_is_asked_at_its_stages_only():
    test = only(fixed("t", "ab"), lambda done: done == 1)
    ran = [len(test.run(view_at(Clock.at(s, max(s - 1, 0), min(s, 1))), None)) for s in range(3)]
    assert ran == [0, 2, 0]


def test_an_eval_that_changes_has_items_of_one_name():
    test = changing("past", [None, fixed("x", "ab"), fixed("y", "cd")])
    assert (test.id, test.n) == ("past", 2) and test.run(view_at(Clock.at()), None) == []
    items = test.run(view_at(Clock.at(9, 1, 1)), None)
    assert [(i["id"], i["row"], i["prediction"]) for i in items] == [("past-0", "c", "y"), ("past-1", "d", "y")]
