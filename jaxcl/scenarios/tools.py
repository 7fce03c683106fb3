"""Tools in groups that arrive one after another: when to call, which tool, with what. Scenario 12.

A prompt describes no tools unless the option ``documented`` asks for it, and then those of its own dialogue: what
exists must be known from training, so that all tools so far are enabled at every test.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from jaxcl.scenarios.base import Scenario, Settings, StreamInfo
from jaxcl.scenarios.keeping import share_of

if TYPE_CHECKING:
    from jaxcl.evaluate.base import Eval
    from jaxcl.models.tokenizer import Tokenizer

ASK = 'Answer the user, or call a tool with one JSON object {"name": ..., "arguments": {...}}.\n'
APIS = (
    "Axolotl", "AniAPI", "AbuseIPDB", "Améthyste", "Auth0", "Abstract Public Holidays", "1Forge", "A Bíblia Digital",
    "Apache Superset", "Lob.com",
)  # fmt: skip
_GROUPS = ("calculate", "create", "look_up", "act")
_ENOUGH = 16
"""Tokens at least that are left of a dialogue."""
Rows = dict[str, list[dict[str, Any]]]


def _glaive(info: StreamInfo, stages: Sequence[str], tokenizer: Tokenizer, settings: Settings) -> Scenario:
    """Dialogues without tools are spread over the stages, and their test turns are a probe of over-triggering."""
    from jaxcl.data.tool_groups import PLAIN, glaive

    settings.known(info, "documented", "keep")
    train, test = glaive("train", settings.data_dir), glaive("test", settings.data_dir)
    plain = train.pop(PLAIN)
    shared = {name: plain[n :: len(info.stages)] for n, name in enumerate(info.stages)}
    learned = {name: _turns([*train[name], *shared[name]], name, settings) for name in stages}
    tests = {name: _turns(test[name], name, settings) for name in (*stages, PLAIN)}
    return _made(info, learned, tests, tokenizer, settings)


def _toolalpaca(info: StreamInfo, stages: Sequence[str], tokenizer: Tokenizer, settings: Settings) -> Scenario:
    from jaxcl.data.tool_groups import held_out, toolalpaca

    settings.known(info, "documented", "keep")
    rows = toolalpaca(settings.data_dir)
    learned, tests = ({name: _turns(held_out(rows[name], split), name, settings) for name in stages}
                      for split in ("train", "test"))  # fmt: skip
    return _made(info, learned, tests, tokenizer, settings)


def _made(info: StreamInfo, learned: Rows, tests: Rows, tokenizer: Tokenizer, settings: Settings) -> Scenario:
    from jaxcl.data.fitting import fitting
    from jaxcl.data.folder import instruct_stages
    from jaxcl.data.leaks import check, unrepeated

    asked = [row["input"] for rows in tests.values() for row in rows]
    new = {name: unrepeated(rows, asked, _said, allow=settings.allow) for name, rows in learned.items()}
    texts = [{name: {r["id"]: r["input"] for r in rows} for name, rows in part.items()} for part in (new, tests)]
    leaks = check(*texts, allow=settings.allow)
    fit, dropped = fitting(new, tokenizer, settings.template, settings.window, most=settings.rows, seed=settings.seed)
    rows = {name: _recent(of, tokenizer, settings) for name, of in fit.items()}
    made = instruct_stages(rows, tokenizer, window=settings.window, template=settings.template)
    evals: list[Eval] = []
    for n, (name, of) in enumerate(tests.items()):
        task, *beside = _evals(name, of, tokenizer, settings)
        if n < len(made):
            made[n] = dataclasses.replace(made[n], evals=(task.id,))
        evals.append(task if n < len(made) else dataclasses.replace(task, role="probe"))
        evals += [dataclasses.replace(e, role="probe") for e in beside]
    same = {name: count for name, of in new.items() if (count := len(learned[name]) - len(of))}
    notes = {"leaks": leaks, "left out: training turns that repeat a test turn": same,
             "left out: answers longer than the window": dropped}  # fmt: skip
    return Scenario(info, made, evals, share_of(made, settings, 0.1), {k: v for k, v in notes.items() if v})


def _evals(name: str, rows: list[dict[str, Any]], tokenizer: Tokenizer, settings: Settings) -> list[Eval]:
    """Call accuracy first, or what else the turns of the group are about."""
    from jaxcl.data.fitting import answer_room
    from jaxcl.evaluate.tools import tool_calls

    few = _few(rows, settings)
    room = answer_room(few, tokenizer, settings.template, settings.window)
    chosen = _recent(few, tokenizer, settings, room)
    return tool_calls(
        name, chosen, tokenizer, window=settings.window, template=settings.template, max_new=room,
        batch_size=settings.batch_size,
    )  # fmt: skip


def _few(rows: list[dict[str, Any]], settings: Settings) -> list[dict[str, Any]]:
    """At most ``test_rows`` turns by seed, half of them calls where there are as many."""
    from jaxcl.data.stage import subsample

    most = settings.test_rows
    if most is None or most >= len(rows):
        return rows
    parts = [[row for row in rows if bool(row["calls"]) == called] for called in (True, False)]
    half = min(len(parts[0]), max(most - most // 2, most - len(parts[1])))
    sizes = (half, most - half)
    return [row for part, n in zip(parts, sizes) if n for row in subsample(part, n, settings.seed)]


def _recent(
    rows: list[dict[str, Any]], tokenizer: Tokenizer, settings: Settings, room: int | None = None
) -> list[dict[str, Any]]:
    """The rows with as much of the dialogue's end as fits beside the answer (``room`` tokens; default: its own)."""
    from jaxcl.data.encode import target_ids
    from jaxcl.data.fitting import ending, frames

    out = []
    for row, frame in zip(rows, frames(rows, tokenizer, settings.template)):
        answer = len(target_ids(row, settings.template, tokenizer)) if room is None else room
        out.append(ending(row, tokenizer, max(settings.window - frame - answer, _ENOUGH)))
    return out


def _turns(dialogues: Sequence[dict[str, Any]], name: str, settings: Settings) -> list[dict[str, Any]]:
    from jaxcl.data.tools import turns

    documented = settings.option("documented", False, (True, False))
    rows = [row for dialogue in dialogues for row in turns(dialogue, name)]
    return rows if documented else [row | {"instruction": ASK} for row in rows]


def _said(row: dict[str, Any]) -> str:
    return row["input"]


def _glaive_texts(info: StreamInfo, stage: str, settings: Settings) -> list[str]:
    from jaxcl.data.tool_groups import glaive

    return [m["content"] for row in glaive("train", settings.data_dir)[stage] for m in row["messages"]]


def _toolalpaca_texts(info: StreamInfo, stage: str, settings: Settings) -> list[str]:
    from jaxcl.data.tool_groups import toolalpaca

    return [row["instruction"] for row in toolalpaca(settings.data_dir)[stage]]


def _stream(
    name: str, stages: tuple[str, ...], build: Callable[..., Scenario], texts: Callable[..., list[str]], **facts: Any
) -> StreamInfo:
    return StreamInfo(
        name=f"tools/{name}", scenario="tools", stages=stages, regime="CIL", card="refine-align/tool-lifelong",
        metric="call accuracy; arguments, over-trigger rate beside", keeps="10% of all turns (option keep)",
        build=build, texts=texts, **facts,
    )  # fmt: skip


STREAMS = (
    _stream(
        "glaive", _GROUPS, _glaive, _glaive_texts,
        doc="dialogues with tools in four groups of our own, by the first word of a tool's name",
        unit="a group of tools, and a part of the dialogues without any; a turn of the model is a row",
        protocol="every group's test turns after each stage, all tools so far enabled, and dialogues without tools",
        public=("hf:glaiveai/glaive-function-calling-v2",), data=("tool_use/glaive_toolcall",),
    ),
    _stream(
        "toolalpaca", APIS, _toolalpaca, _toolalpaca_texts,
        doc="ten simulated interfaces; the evaluation file split by instruction, 60% to learn, a split of our own",
        unit="one interface; the first call that an instruction needs is a row",
        protocol="every interface's held-out instructions after each stage, all interfaces so far enabled",
        public=("github:tangqiaoyu/ToolAlpaca",), data=("tool_use/toolalpaca",),
    ),
)  # fmt: skip
