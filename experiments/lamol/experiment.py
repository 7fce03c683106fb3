"""A byte model learns three questions about text that every Python carries, and writes rows of the old ones itself.

LAMOL at gamma 0, 0.05, 0.2 and with real rows in place of written ones:

    jaxcl run lamol --set gamma=0.2
    jaxcl run lamol --set gamma=0.2 --set oracle=true
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import unicodedata
import zlib
from pathlib import Path
from typing import Any

import jax
import optax

from jaxcl.core.experiment import Experiment
from jaxcl.data.stage import Stage, instruct_source, subsample
from jaxcl.errors import RequestError
from jaxcl.evaluate.ranking import label_ranking
from jaxcl.methods.lamol import lamol
from jaxcl.models.decoder import decoder
from jaxcl.models.spec import tiny
from jaxcl.models.tokenizer import ByteTokenizer

LONGEST = 24  # bytes of an input
Pairs = list[tuple[str, str]]


@dataclasses.dataclass(frozen=True)
class Config:
    """Defaults: about half a minute a run on two free cores."""

    gamma: float = 0.2
    strength: float = 0.25  # of L_LM; 0 with gamma 0 is plain fine-tuning
    variant: str = "task"
    labels: bool = False  # whether a written answer has to be a label of its task
    oracle: bool = False
    rows: int = 320
    test_rows: int = 64
    epochs: float = 8.0
    width: int = 64
    layers: int = 2
    window: int = 48
    batch_size: int = 16
    learning_rate: float = 3e-3
    seed: int = 0


def letters() -> Pairs:
    """Names of letters without their script's: whose letter is it?"""
    scripts = ("greek", "cyrillic", "hebrew", "arabic", "armenian")
    pairs = []
    for name in (unicodedata.name(chr(c), "") for c in range(0x370, 0x700)):
        script, _, rest = name.lower().partition(" ")
        if script in scripts and "letter " in rest:
            pairs.append((rest.replace("letter ", "")[:LONGEST], script))
    return pairs


def sources() -> Pairs:
    """Lines of the standard library and of the language reference: code or prose?"""
    files = sorted(Path(os.__file__).parent.glob("[a-z]*.py"))
    code = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    topics = importlib.import_module("pydoc_data.topics").topics
    prose = [line for topic in topics.values() for line in topic.splitlines()]
    both = ((code[:: len(code) // len(prose)], "code"), (prose, "prose"))
    return [(line.strip()[:LONGEST], label) for lines, label in both for line in lines if len(line.strip()) >= 12]


def symbols() -> Pairs:
    """Names of symbols: which block are they from?"""
    starts = {"maths": 0x2200, "devices": 0x2300, "shapes": 0x2500, "signs": 0x2600}
    named = ((unicodedata.name(chr(a + i), "").lower(), block) for block, a in starts.items() for i in range(256))
    return [(name[:LONGEST], block) for name, block in named if name]


TASKS = {"letters": letters, "sources": sources, "symbols": symbols}


def rows(task: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(training, test) rows; one input in five is a test, by a hash of it, and none is in both or has two answers."""
    answers: dict[str, set[str]] = {}
    for text, label in TASKS[task]():
        answers.setdefault(text, set()).add(label)
    labels = sorted({label for found in answers.values() for label in found})
    every = [
        {"id": text, "task": task, "instruction": "", "input": text, "target": found.pop(), "labels": labels}
        for text, found in sorted(answers.items())
        if len(found) == 1 and text.isascii()
    ]
    held = [zlib.crc32(row["id"].encode()) % 5 == 0 for row in every]
    return [r for r, h in zip(every, held) if not h], [r for r, h in zip(every, held) if h]


def build(cfg: Config) -> Experiment:
    tokenizer = ByteTokenizer()
    if cfg.window < LONGEST + 20:
        raise RequestError(f"window is {cfg.window}; accepted: at least {LONGEST + 20}")
    sizes = (cfg.rows, cfg.test_rows)
    drawn = {task: [subsample(part, n, cfg.seed) for part, n in zip(rows(task), sizes)] for task in TASKS}
    spec = tiny(width=cfg.width, layers=cfg.layers, context=2 * cfg.window, nll_chunk=cfg.batch_size * (cfg.window + 2))
    model = decoder(spec)
    method = lamol(gamma=cfg.gamma, strength=cfg.strength, variant=cfg.variant, labels=cfg.labels, oracle=cfg.oracle)
    return Experiment(
        model=model,
        params=model.init(spec, jax.random.key(cfg.seed)),
        stages=[
            Stage(task, instruct_source(task, train, tokenizer, window=cfg.window, k=12), (task,))
            for task, (train, _) in drawn.items()
        ],
        evals=[label_ranking(task, test, tokenizer, window=cfg.window) for task, (_, test) in drawn.items()],
        methods=[method],
        tx=optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.linear_schedule(0.0, cfg.learning_rate, 16))),
        batch_size=cfg.batch_size,
        epochs=cfg.epochs,
        seed=cfg.seed,
        save_every=0,
        tokenizer=tokenizer,
    )
