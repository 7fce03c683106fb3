"""What a scenario allows to be kept between stages is a limit that no method passes."""

import pytest
from support import experiment

from jaxcl.core.types import ALL, NOTHING, Budget
from jaxcl.errors import RequestError
from jaxcl.methods.ewc import ewc
from jaxcl.methods.joint import joint
from jaxcl.methods.replay import replay

SOME = Budget(examples=10)


@pytest.mark.parametrize(
    ("held", "limit", "fits"),
    [
        (NOTHING, NOTHING, True),
        (SOME, ALL, True),
        (SOME, NOTHING, False),
        (SOME, SOME, True),
        (Budget(examples=11), SOME, False),
        (Budget(bytes=10), SOME, False),
        (Budget(examples=5, bytes=5), Budget(examples=5, bytes=6), True),
        (SOME, Budget(examples=10, inputs=True), False),
        (Budget(examples=10, inputs=True), Budget(examples=10, inputs=True), True),
        (Budget(examples=10, inputs=True), SOME, True),
        (NOTHING, Budget(examples=10, inputs=True), True),
        (ALL, SOME, False),
        (ALL, ALL, True),
    ],
)
def test_one_budget_within_another(held, limit, fits):
    assert held.within(limit) is fits


def test_an_experiment_refuses_what_keeps_more_than_its_scenario_allows():
    experiment([replay(capacity=10), ewc()], keeps=SOME).check()
    told = "'replay' keeps 11 examples of past stages; this scenario allows 10 examples"
    with pytest.raises(RequestError, match=told):
        experiment([replay(capacity=11)], keeps=SOME).check()
    with pytest.raises(RequestError, match="'joint' keeps all of past stages; this scenario allows nothing"):
        experiment([joint()], keeps=NOTHING).check()
    experiment([joint()]).check()
