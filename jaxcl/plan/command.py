"""`jaxcl plan`: from an experiment's name to its plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from jaxcl.core.experiment import Experiment
from jaxcl.core.run import configured
from jaxcl.plan.advice import advice, least_chips, suggest
from jaxcl.plan.report import Plan, plan


def planned(
    name_or_path: str,
    overrides: Sequence[str],
    topology: str,
    data: str | None = None,
    stage: int | None = None,
    try_changes: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Plan:
    """The plan, with ``changes`` where it does not fit: what could be changed, or, where ``try_changes``, the plan of
    what was changed until it fit. Raises JaxclError with the exit status."""
    module, cfg, name, config = configured(name_or_path, overrides, data)

    def build() -> Experiment:
        return module.build(cfg)

    say(f"compiling the step of {name} for {topology}, which takes minutes for large models")
    found = plan(build, topology, stage) | {"experiment": name, "config": config}
    if found["fits"]:
        return found
    if try_changes:
        found = found | suggest(build, topology, found, stage, say)
    else:
        found = found | {"changes": advice(build, found)}
    return found if found["fits"] else found | {"least_chips": least_chips(found)}
