"""What a stream is: facts that can be listed without reading data, settings to read it with, and what comes of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxcl.data.template import Template
from jaxcl.errors import RequestError, unknown

if TYPE_CHECKING:
    from jaxcl.core.experiment import Experiment
    from jaxcl.core.types import Budget, Model, Params
    from jaxcl.data.stage import Stage
    from jaxcl.evaluate.base import Eval
    from jaxcl.models.tokenizer import Tokenizer

SCENARIOS = (
    "vertical domain",
    "language domain",
    "temporal domain",
    "text classification",
    "named entity recognition",
    "relation extraction",
    "machine translation",
    "instruction tuning",
    "knowledge editing",
    "alignment",
    "retrieval",
    "tools",
)
"""The twelve of the second taxonomy: three of pre-training, seven of fine-tuning, two of external knowledge."""
REGIMES = ("TIL", "DIL", "CIL", "boundary-free")
ORDERS = ("given", "random", "similarity")


class StreamInfo(NamedTuple):
    """Facts of a stream. scenario: one of `SCENARIOS`. stages: names in the given order. metric: of its task evals.

    regime: what a model is told at test: the task (TIL), nothing while all tasks share their labels (DIL) or labels
    grow (CIL), nothing and no boundaries either. card: the specification's name. unit: what a stage is. keeps: what may
    be held of past stages. protocol: what is measured when. public: names by which a user with a network finds the data
    (tfds:, hf:, a repository). data: the folders below $JAXCL_DATA, or the stages' data by name (`jaxcl.data.named`).
    build(info, stage names in order, tokenizer, settings) -> `Scenario`. texts(info, stage, settings) -> training texts
    of a stage, for an order by similarity; () where there are none.
    """

    name: str
    scenario: str
    stages: tuple[str, ...]
    metric: str
    regime: str
    card: str
    doc: str
    unit: str
    keeps: str
    protocol: str
    public: tuple[str, ...]
    data: tuple[str, ...]
    build: Callable[[StreamInfo, Sequence[str], Tokenizer, Settings], Scenario]
    texts: Callable[[StreamInfo, str, Settings], Sequence[str]] = lambda info, stage, settings: ()


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a stream is read. data_dir: default $JAXCL_DATA. window: tokens of a row; longer inputs are cut, never the
    question or the answer. rows, test_rows: at most so many of a stage and of an eval, drawn by ``seed``. order:
    'given', 'random' (by seed) or 'similarity' (each stage followed by the nearest one left). allow: names of leaks
    that are known and accepted. options: what one stream alone knows, such as ``{'shots': 10}``. RequestError:
    another order.
    """

    data_dir: str | Path | None = None
    window: int = 256
    rows: int | None = None
    test_rows: int | None = None
    seed: int = 0
    order: str = "given"
    template: Template = dataclasses.field(default_factory=Template)
    batch_size: int = 16
    allow: tuple[str, ...] = ()
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise unknown("order", self.order, ORDERS)

    def option(self, name: str, default: Any, accepted: Sequence[Any] = ()) -> Any:
        """An option's value. RequestError where it is none of those accepted."""
        value = self.options.get(name, default)
        if accepted and value not in accepted:
            raise RequestError(f"option {name} is {value!r}; accepted: {', '.join(map(repr, accepted))}")
        return value

    def known(self, info: StreamInfo, *names: str) -> None:
        """RequestError for options that the stream does not have."""
        for name in self.options:
            if name not in names:
                raise unknown("option", name, names, where=f"stream {info.name!r}")


@dataclasses.dataclass(frozen=True)
class Scenario:
    """A stream that was read. keeps: the most that a method may hold of past stages. notes: what a reader of the
    results should know (leaks that were allowed, how data was cut), JSON. against: where evals compare with the model
    before training, they are made by against(model, params)."""

    info: StreamInfo
    stages: Sequence[Stage]
    evals: Sequence[Eval]
    keeps: Budget
    notes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    against: Callable[[Model, Params], Sequence[Eval]] = lambda model, params: ()

    def experiment(self, **fields: Any) -> Experiment:
        """An `Experiment` on this stream; ``fields`` are its other ones. What a method may hold is limited by ``keeps``
        unless that is given; where the regime is TIL, rows come with their task (`jaxcl.til`)."""
        from jaxcl.core.experiment import Experiment
        from jaxcl.core.til import til

        source = {**fields.pop("source", {}), "stream": self.info.name, "notes": dict(self.notes)}
        before = self.against(fields["model"], fields["params"])
        evals = [*self.evals, *before, *fields.pop("evals", ())]
        made = Experiment(**{"keeps": self.keeps, **fields}, stages=self.stages, evals=evals, source=source)
        return til(made) if self.info.regime == "TIL" else made
