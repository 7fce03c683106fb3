"""Orders of stages: bijections, by seed or by nearness, against a plain greedy walk over exact cosines."""

import numpy as np
import pytest

from jaxcl.errors import RequestError
from jaxcl.scenarios import STREAMS
from jaxcl.scenarios.base import Settings
from jaxcl.scenarios.orders import chained, ordered, term_vectors


def test_random_orders_are_bijections_of_a_seed():
    info = STREAMS["olora/order_6"]
    drawn = [ordered(info, Settings(order="random", seed=s)) for s in (0, 0, 1)]
    assert all(sorted(o) == sorted(info.stages) for o in drawn)
    assert drawn[0] == drawn[1] != drawn[2] != info.stages


def test_a_chain_goes_to_the_nearest_that_is_left():
    angles = np.radians([0, 80, 10, 75, 30])
    vectors = np.stack([np.cos(angles), np.sin(angles)], 1) * np.array([[1], [5], [2], [1], [3]])
    assert chained(vectors) == [0, 2, 4, 3, 1]
    assert chained(np.zeros((3, 2))) == [0, 1, 2]


def test_texts_that_share_words_are_near():
    vectors = term_vectors([["the cat sat", "a cat"], ["the law of courts"], ["my cat and the cat"]])
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    assert unit[0] @ unit[2] > unit[0] @ unit[1] and chained(vectors) == [0, 2, 1]


def test_similarity_needs_texts_and_orders_are_named():
    info = STREAMS["text/domains"]._replace(texts=lambda info, stage, settings: [stage])
    assert sorted(ordered(info, Settings(order="similarity"))) == sorted(info.stages)
    with pytest.raises(RequestError, match="has no texts to order by similarity; accepted: given, random"):
        ordered(info._replace(texts=lambda info, stage, settings: ()), Settings(order="similarity"))
    with pytest.raises(RequestError, match="unknown order 'near'"):
        Settings(order="near")
