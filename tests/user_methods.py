"""Methods from outside the package take part in the tests that every method has to pass.

Theirs are experiments/compose/new_method.py and the files that $JAXCL_METHODS names, separated as in $PATH:

    JAXCL_METHODS=mine.py pytest tests/test_methods_common.py -k mine

Such a file has `ROWS`, {name: constructor of a small instance}, and may have `NOTHING`, the same at a strength of 0,
which must equal training without any method bit for bit. In pairs they meet `MEETS`, one for each kind of slot.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from jaxcl.core.types import Method

SHOWN = Path(__file__).resolve().parents[1] / "experiments" / "compose" / "new_method.py"
MEETS = ("ewc", "agem", "olora")


def load(file: Path) -> ModuleType:
    """The file as a module of its own, as if it was run: what lies beside it can be imported."""
    spec = importlib.util.spec_from_file_location(f"user_{file.stem}", file)
    assert spec is not None and spec.loader is not None, file
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(file.resolve().parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    return module


def theirs(table: str) -> dict[str, Callable[[], Method]]:
    """The rows of ``ROWS`` or ``NOTHING`` of all these files."""
    named = [Path(f) for f in os.environ.get("JAXCL_METHODS", "").split(os.pathsep) if f]
    found: dict[str, Callable[[], Method]] = {}
    for file in (SHOWN, *named):
        found |= getattr(load(file), table, {})
    return found
