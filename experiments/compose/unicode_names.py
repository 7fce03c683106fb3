"""Three stages that every Python carries: the names of the characters of three scripts."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

from jaxcl import Stage
from jaxcl.data.stage import text_source
from jaxcl.evaluate.base import Eval
from jaxcl.evaluate.nll import text_nll
from jaxcl.models.tokenizer import ByteTokenizer

SCRIPTS = {"cyrillic": range(0x400, 0x500), "ethiopic": range(0x1200, 0x1380), "braille": range(0x2800, 0x2900)}
WINDOW = 48  # bytes


def names(script: str, places: Iterable[int]) -> list[str]:
    """Of every eight names of a script those at ``places`` (0 to 7)."""
    named = [name for code in SCRIPTS[script] if (name := unicodedata.name(chr(code), ""))]
    return [name for i, name in enumerate(named) if i % 8 in places]


def stages(places: Iterable[int]) -> list[Stage]:
    """A stage for each script, on the names at ``places``."""
    return [Stage(s, text_source(s, names(s, places), ByteTokenizer(), window=WINDOW), (s,)) for s in SCRIPTS]


def held_out(places: Iterable[int]) -> list[Eval]:
    """An eval for each script: nats a byte of the names at ``places``, lower is better."""
    rows = {s: [{"id": name, "text": name} for name in names(s, places)] for s in SCRIPTS}
    return [text_nll(s, rows[s], ByteTokenizer(), window=WINDOW) for s in SCRIPTS]


def show(run: str, losses: Iterable[Iterable[float]], notes: Iterable[str] = ("", "", "")) -> None:
    """Prints losses [stages][evals], a stage a line."""
    print(f"{run:16}" + "".join(f"{script:>10}" for script in SCRIPTS))
    for script, row, note in zip(SCRIPTS, losses, notes):
        print(f"after {script:10}" + "".join(f"{x:10.2f}" for x in row) + note)
