"""Overrides act on a Config by its types; what does not fit is refused with the place and the nearest name."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import pytest

from jaxcl.cli import main
from jaxcl.core.config import as_json, override, short_hash
from jaxcl.errors import RequestError

EXPERIMENT = str(Path(__file__).with_name("resume_experiment.py"))


@dataclasses.dataclass(frozen=True)
class Model:
    width: int = 8
    tied: bool = True

    def __post_init__(self):
        if self.width < 1:
            raise ValueError(f"width is {self.width}; accepted: at least 1")


@dataclasses.dataclass(frozen=True)
class Config:
    seed: int = 0
    rate: float = 1e-3
    name: str = "x"
    rows: int | None = None
    norm: Literal["l1", "l2sq"] = "l1"
    targets: tuple[str, ...] = ("q", "v")
    sizes: list[int] = dataclasses.field(default_factory=list)
    mesh: dict[str, int] = dataclasses.field(default_factory=dict)
    model: Model = Model()


@pytest.mark.parametrize(
    "text,key,value",
    [
        ("seed=3", "seed", 3),
        ("seed=-3", "seed", -3),
        ("rate=2e-4", "rate", 2e-4),
        ("rate=1", "rate", 1.0),
        ("name=a=b", "name", "a=b"),
        ("name=", "name", ""),
        ("rows=none", "rows", None),
        ("rows=64", "rows", 64),
        ("norm=l2sq", "norm", "l2sq"),
        ("targets=q", "targets", ("q",)),
        ("targets=q,k,v", "targets", ("q", "k", "v")),
        ('targets=["q", "o"]', "targets", ("q", "o")),
        ("sizes=[1, 2]", "sizes", [1, 2]),
        ("sizes=5", "sizes", [5]),
        ('mesh={"data": 4}', "mesh", {"data": 4}),
    ],
)
def test_values_take_the_fields_type(text, key, value):
    found = getattr(override(Config(), [text]), key)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("word,value", [("true", True), ("False", False), ("1", True), ("0", False)])
def test_nested_fields_and_booleans(word, value):
    found = override(Config(), [f"model.tied={word}", "model.width=5"])
    assert found.model == Model(5, value) and found.seed == 0


def test_later_overrides_win_and_the_config_itself_is_left_alone():
    start = Config()
    assert override(start, ["seed=1", "seed=2"]).seed == 2 and start.seed == 0


@pytest.mark.parametrize(
    "text,words",
    [
        ("sed=1", "unknown key 'sed' in --set sed=1; did you mean 'seed'"),
        ("model.wdth=1", "unknown key 'wdth'.*did you mean 'width'"),
        ("seed.x=1", "'seed' is a plain value, it has no 'x'"),
        ("seed", "--set 'seed': expected KEY=VALUE"),
        ("seed=1.5", "--set seed=1.5: '1.5' is no int"),
        ("rate=fast", "'fast' is no float"),
        ("model.tied=yes", "'yes' is no bool; accepted: true, false"),
        ("norm=l3", "'l3' is none of l1, l2sq"),
        ("rows=many", "'many' is none of int"),
        ("sizes=1,x", "'x' is no int"),
        ("mesh=4", "is no dict"),
        ("model=5", "cannot be set from the command line"),
        ("model.width=0", "--set model.width=0: width is 0; accepted: at least 1"),
    ],
)
def test_what_does_not_fit_is_refused(text, words):
    with pytest.raises(RequestError, match=words) as error:
        override(Config(), [text])
    assert error.value.exit_code == 2 and "\n" not in str(error.value)


def test_the_hash_names_the_values():
    plain = as_json(Config())
    assert plain["targets"] == ["q", "v"] and plain["model"] == {"width": 8, "tied": True}
    assert short_hash(plain) == short_hash(as_json(Config())) and len(short_hash(plain)) == 10
    assert short_hash(as_json(override(Config(), ["model.width=9"]))) != short_hash(plain)


@pytest.mark.parametrize(
    "settings,words",
    [(("sed=1",), "did you mean 'seed'"), (("rows=many",), "'many' is no int"), (("methods=ewcc",), "ewcc")],
)
def test_the_command_line_refuses_and_writes_nothing(settings, words, tmp_path, capfd):
    out = tmp_path / "out"
    flags = [part for s in settings for part in ("--set", s)]
    assert main(["run", EXPERIMENT, "--out", str(out), *flags]) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and words in error and "Traceback" not in error
    assert not out.exists()
