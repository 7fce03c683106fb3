"""A stream of edits in batches, without questions about them that are trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxcl.data.editing import Asked, asked
from jaxcl.data.leaks import check, repeated
from jaxcl.errors import RequestError

if TYPE_CHECKING:
    from jaxcl.models.tokenizer import Tokenizer

Records = Sequence[dict[str, Any]]
PROBED = ("rephrase", "locality")
LEAK = "edit-prompts"


def fitting_edits(records: Records, tokenizer: Tokenizer, window: int) -> list[dict[str, Any]]:
    """The edits whose prompt and answer fit ``window`` tokens; none is cut. RequestError where none fits."""
    kept = [r for r, a in zip(records, asked(records, "edit")) if sum(map(len, a.ids(tokenizer))) <= window]
    if records and not kept:
        raise RequestError(f"none of {len(records)} edits fits into {window} tokens; take a larger window")
    return kept


def leaked(records: Records) -> dict[str, set[str]]:
    """{'rephrase', 'locality': ids of the questions that are themselves an edit's prompt, and so are trained on}."""
    train = {"edits": {r["id"]: r["prompt"] for r in records}}
    return {
        about: {pair[1] for pair in repeated(train, {about: {a.id: a.prompt for a in asked(records, about)}})}
        for about in PROBED
    }


def questions_left(records: Records, allow: Sequence[str] = ()) -> tuple[dict[str, set[str]], dict[str, Any]]:
    """({'rephrase', 'locality': ids of questions to leave out}, notes). Where ``edit-prompts`` is allowed nothing is
    left out and the notes count the leak; else they count what was left out. RequestError: an unknown name in it."""
    found = leaked(records)
    out: dict[str, set[str]] = {about: set() for about in PROBED} if LEAK in allow else found
    train = {"edits": {r["id"]: r["prompt"] for r in records}}
    tests = {about: {a.id: a.prompt for a in asked(records, about) if a.id not in out[about]} for about in PROBED}
    notes = {"leaks": check(train, tests, kind=LEAK, allow=allow)}
    notes["left out: questions that are trained on"] = {about: len(ids) for about, ids in out.items() if ids}
    return out, {k: v for k, v in notes.items() if v}


def about_edits(records: Records, about: str, out: Mapping[str, set[str]] | None = None) -> list[Asked]:
    """`jaxcl.data.editing.asked` without the questions in ``out``."""
    return [a for a in asked(records, about) if a.id not in (out or {}).get(about, ())]


def old_answers(records: Records, about: str, out: Mapping[str, set[str]] | None = None) -> list[Asked]:
    """The questions of `about_edits` with the answer from before the edit; edits that have none give none."""
    had = [r for r in records if r.get("target_true")]
    return [a._replace(answer=r["target_true"]) for r in had for a in about_edits([r], about, out)]


def neighbours(records: Records, out: Mapping[str, set[str]]) -> tuple[list[Asked], list[Asked]]:
    """Locality prompts with their true answer, and with the new answer of the edit beside them."""
    true = about_edits(records, "locality", out)
    target = {r["id"]: r["target"] for r in records}
    return true, [a._replace(answer=target[a.id]) for a in true]


def batched(name: str, records: Records, size: int) -> dict[str, list[dict[str, Any]]]:
    """{stage: ``size`` edits, the last one fewer}; one stage, ``name``, where all fit into it."""
    if size >= len(records):
        return {name: list(records)}
    digits = len(str(-(-len(records) // size)))
    starts = range(0, len(records), size)
    return {f"{name}_{n:0{digits}}": list(records[at : at + size]) for n, at in enumerate(starts, 1)}
