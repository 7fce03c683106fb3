"""General ability beside the tasks: a fixed set of questions, the same before the first stage and after every one.

Contexts of multiple choice are those of lm-evaluation-harness's tasks, zero-shot but for MMLU's five examples. Of
Big-Bench Hard there are no examples here, so it is zero-shot too; BoolQ has no passages, so it is closed-book. These
rows are for evaluation: none of them is ever trained on.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxcl.data.jsonl import data_folder, read_rows
from jaxcl.data.stage import subsample
from jaxcl.errors import RequestError, unknown
from jaxcl.evaluate.base import Eval
from jaxcl.evaluate.choice import multiple_choice
from jaxcl.evaluate.generation import generation
from jaxcl.evaluate.nll import text_nll

if TYPE_CHECKING:
    from jaxcl.models.tokenizer import Tokenizer

Row = dict[str, Any]
SOURCES = {
    "commonsense": "github.com/AGI-Edgerunners/LLM-Adapters",
    "mmlu": "github.com/hendrycks/test",
    "bbh": "github.com/suzgunmirac/BIG-Bench-Hard",
    "math": "github.com/openai/grade-school-math",
    "text_domains": "github.com/hiyouga/LLaMA-Factory (wiki_demo)",
}
LISTED = re.compile(
    r"Please choose the correct (?:answer|solution) to the question: (.*?)\n\n(.*?)\n\nAnswer format: .*", re.S
)
OPTION = re.compile(r"\s*(?:Answer|Solution)(\d): ")
CLOSED = re.compile(
    r"Please answer the following question with true or false, question: (.*?)\n\nAnswer format: .*", re.S
)
LETTERS = "ABCDEFGHIJ"
WRITTEN = 128
"""Tokens that an answer to a grade-school problem may have."""


def general_suite(
    data_dir: str | Path | None,
    tokenizer: Tokenizer,
    *,
    window: int = 512,
    rows: int | None = 32,
    seed: int = 0,
    batch_size: int = 8,
    which: Sequence[str] | None = None,
    shots: int = 5,
) -> list[Eval]:
    """Evals of role 'general', ids ``general/<name>``: those of `SUITE` in ``which`` (None: all).

    rows: at most so many of each, drawn by ``seed``; of MMLU and BBH one a subject in turn. window: tokens of a
    question with its answer; of MMLU's examples the first are left out where they do not fit. shots: how many, 0 to 5.
    RequestError: an unknown name, a folder that is absent (with its public source), a row in another form.
    """
    found = []
    for name in SUITE if which is None else which:
        if name not in SUITE:
            raise unknown("set of general ability", name, SUITE)
        folder, make = SUITE[name]
        where = _folder(folder, data_dir)
        kw = {"window": window, "batch_size": batch_size, "role": "general"}
        found += make(f"general/{name}", name, where, tokenizer, Draw(rows, seed, shots), kw)
    return found


class Draw:
    """How rows are chosen: at most ``rows`` (None: all) by ``seed``; and MMLU's number of ``shots``."""

    def __init__(self, rows: int | None, seed: int, shots: int):
        if not 0 <= shots <= 5:
            raise RequestError(f"shots={shots}; accepted: 0 to 5, the examples that MMLU has for a subject")
        self.rows, self.seed, self.shots = rows, seed, shots

    def some(self, records: Sequence[Row]) -> list[Row]:
        return subsample(records, self.rows, self.seed)

    def spread(self, records: Sequence[Row]) -> list[Row]:
        """One of each task in turn, tasks and rows in an order drawn by seed, then in the order of the file."""
        order = list(range(len(records)))
        random.Random(self.seed).shuffle(order)
        by_task: dict[str, list[int]] = {}
        for i in order:
            by_task.setdefault(records[i]["task"], []).append(i)
        turns = sorted((turn, n, i) for n, own in enumerate(by_task.values()) for turn, i in enumerate(own))
        return [records[i] for i in sorted(i for _, _, i in turns[: self.rows])]


def listed(row: Row, where: str) -> tuple[str, list[str], int]:
    """(question, choices, index of the right one) of a row whose input lists its answers by number."""
    match = LISTED.fullmatch(row["input"])
    parts = OPTION.split("\n" + match[2]) if match else []
    choices = parts[2::2]
    if not match or parts[1::2] != [str(n) for n in range(1, len(row["labels"]) + 1)] or not all(choices):
        raise RequestError(f"{where}: row {row['id']!r} does not list its answers as 'Answer1: ... Answer2: ...'")
    return match[1], [choice.strip() for choice in choices], row["labels"].index(row["target"])


def closed(row: Row, where: str) -> tuple[str, list[str], int]:
    """(question, no and yes, index) of a row that asks for true or false."""
    match = CLOSED.fullmatch(row["input"])
    if not match:
        raise RequestError(f"{where}: row {row['id']!r} asks no question that is answered with true or false")
    return match[1].rstrip("?"), ["no", "yes"], int(row["target"] == "true")


FORMS: dict[str, tuple[str, str, Callable[[Row, str], tuple[str, list[str], int]]]] = {
    # folder and name of the measure: what stands around the question, and which number is reported
    "ARC-Challenge": ("Question: {}\nAnswer:", "acc_norm", listed),
    "ARC-Easy": ("Question: {}\nAnswer:", "acc_norm", listed),
    "boolq": ("Question: {}?\nAnswer:", "acc", closed),
    "openbookqa": ("{}", "acc_norm", listed),
    "piqa": ("Question: {}\nAnswer:", "acc_norm", listed),
    "social_i_qa": ("Q: {}\nA:", "acc", listed),
}


def choice_rows(name: str, records: Sequence[Row], where: str) -> list[Row]:
    """Rows for `multiple_choice` from the rows of one commonsense set."""
    frame, _, read = FORMS[name]
    found = []
    for row in records:
        question, choices, answer = read(row, where)
        found.append({"id": row["id"], "context": frame.format(question), "choices": choices, "answer": answer})
    return found


def mmlu_rows(
    records: Sequence[Row], examples: Sequence[Row], tokenizer: Tokenizer, window: int, shots: int
) -> list[Row]:
    """Rows for `multiple_choice` from ``mcq`` rows: the subject's examples, as many as fit, then the question."""
    by_subject: dict[str, list[Row]] = {}
    for row in examples:
        by_subject.setdefault(row["task"], []).append(row)
    found = []
    for row in records:
        about = row["task"].replace("_", " ")
        head = f"The following are multiple choice questions (with answers) about {about}.\n\n"
        asked = [f"{lettered(e)} {LETTERS[e['answer']]}\n\n" for e in by_subject.get(row["task"], [])[:shots]]
        while asked and len(tokenizer.encode(head + "".join(asked) + lettered(row))) >= window:
            asked = asked[1:]
        letters = list(LETTERS[: len(row["choices"])])
        context = head + "".join(asked) + lettered(row)
        found.append({"id": row["id"], "context": context, "choices": letters, "answer": row["answer"]})
    return found


def lettered(row: Row) -> str:
    lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, row["choices"])]
    return "\n".join([row["question"].strip(), *lines, "Answer:"])


def _commonsense(eval_id: str, name: str, folder: Path, tokenizer: Tokenizer, draw: Draw, kw: dict) -> list[Eval]:
    path = folder / name / "test.jsonl.gz"
    rows = choice_rows(name, draw.some(read_rows(path)), str(path))
    return multiple_choice(eval_id, rows, tokenizer, by=(FORMS[name][1],), **kw)


def _mmlu(eval_id: str, name: str, folder: Path, tokenizer: Tokenizer, draw: Draw, kw: dict) -> list[Eval]:
    test, dev = (read_rows(folder / f"{split}.jsonl.gz", "mcq") for split in ("test", "dev"))
    rows = mmlu_rows(draw.spread(test), dev, tokenizer, kw["window"], draw.shots)
    return multiple_choice(eval_id, rows, tokenizer, by=("acc",), **kw)


def _bbh(eval_id: str, name: str, folder: Path, tokenizer: Tokenizer, draw: Draw, kw: dict) -> list[Eval]:
    rows = draw.spread([row for path in sorted(folder.glob("*.jsonl.gz")) for row in read_rows(path)])
    return generation(eval_id, list(_asked(rows, "Q: ", "target")), tokenizer, stop=("\n",), **kw)


def _gsm8k(eval_id: str, name: str, folder: Path, tokenizer: Tokenizer, draw: Draw, kw: dict) -> list[Eval]:
    rows = _asked(draw.some(read_rows(folder / "gsm8k/test.jsonl.gz")), "Question: ", "answer")
    return generation(
        eval_id, list(rows), tokenizer, metrics=("number_match",), max_new=WRITTEN, stop=("Question:",), **kw
    )


def _asked(rows: Sequence[Row], before: str, answer: str) -> Iterator[Row]:
    """``instruct`` rows with the answer that counts; the template adds ``Answer:``."""
    for row in rows:
        yield {**row, "instruction": before, "target": str(row[answer])}


def _wikipedia(eval_id: str, name: str, folder: Path, tokenizer: Tokenizer, draw: Draw, kw: dict) -> list[Eval]:
    rows = draw.some(read_rows(folder / "wikipedia/test.jsonl.gz", "text"))
    return [text_nll(eval_id, rows, tokenizer, metric="perplexity", **kw)]


Make = Callable[[str, str, Path, Any, Draw, dict], list[Eval]]
SUITE: dict[str, tuple[str, Make]] = {
    **dict.fromkeys(FORMS, ("commonsense", _commonsense)),
    "mmlu": ("mmlu", _mmlu),
    "bbh": ("bbh", _bbh),
    "gsm8k": ("math", _gsm8k),
    "wikipedia": ("text_domains", _wikipedia),
}
"""{name: (folder, what makes its evals)}."""


def _folder(name: str, data_dir: str | Path | None) -> Path:
    try:
        return data_folder(name, data_dir)
    except RequestError as error:
        raise RequestError(f"{error} (general ability; public source: {SOURCES[name]})") from error
