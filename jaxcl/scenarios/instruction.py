"""Continual instruction tuning: a task or template after another, answered in free text. Scenario 8."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxcl.scenarios.base import Scenario, Settings, StreamInfo
from jaxcl.scenarios.keeping import share_of

if TYPE_CHECKING:
    from jaxcl.evaluate.base import Eval
    from jaxcl.models.tokenizer import Tokenizer

_SAPT = (
    "task002_quoref_answer_generation", "task073_commonsenseqa_answer_generation", "task1290_xsum_summarization",
    "task1510_evalution_relation_extraction", "task1572_samsum_summary", "task1590_diplomacy_text_generation",
    "task1687_sentiment140_classification", "task1729_personachat_generate_next", "task181_outcome_extraction",
    "task363_sst2_polarity_classification", "task511_reddit_tifu_long_text_summarization",
    "task591_sciq_answer_generation", "task639_multi_woz_user_utterance_generation",
    "task748_glucose_reverse_cause_event_detection", "task875_emotion_classification",
)  # fmt: skip
_ORDERS = {
    "order_1": "1572 363 1290 181 002 1510 639 1729 073 1590 748 511 591 1687 875",
    "order_2": "748 073 1590 639 1572 1687 591 363 1510 1729 181 511 002 1290 875",
}
UNSEEN = (
    "task024_cosmosqa_answer_generation", "task064_all_elements_except_first_i",
    "task074_squad1.1_question_generation", "task1219_ted_translation_en_es",
    "task1312_amazonreview_polarity_classification", "task192_hotpotqa_sentence_generation",
)  # fmt: skip
"""SuperNI tasks that no stage of SAPT's orders trains on."""
_EXACT, _ROUGE = "exact_match_strict", "rougeL_f1_stem"
TRACE = {
    "C-STANCE": _EXACT, "FOMC": _EXACT, "MeetingBank": "rougeL_trace", "Py150": "edit_similarity", "ScienceQA": _EXACT,
    "NumGLUE-cm": _EXACT, "NumGLUE-ds": _EXACT, "20Minuten": "sari",
}  # fmt: skip
"""Tasks in TRACE's order, each with its metric; all are shares (0 to 1)."""
_T0 = (
    "xsum_DOC_tldr", "samsum_Summarize_", "common_gen_Given_concepts_type_1", "ropes_prompt_beginning",
    "adversarial_qa_droberta_answer_the_following_q", "kilt_tasks_hotpotqa_straighforward_qa",
    "cosmos_qa_context_question_description_answer_text", "quoref_Find_Answer",
)  # fmt: skip
_T0_UNSEEN = (
    "app_reviews_convert_to_rating", "commonsense_qa_answer_to_question", "glue_mrpc_equivalent",
    "qasc_qa_with_separated_facts_1", "quartz_answer_question_below", "sciq_Multiple_Choice",
    "social_i_qa_Show_choices_and_generate_answer", "wiki_hop_original_choose_best_object_interrogative_1",
    "wiki_qa_Is_This_True_", "wiqa_effect_with_label_answer",
)  # fmt: skip
_SHORT = 16
"""Tokens at least that a continuation of code sees."""
Rows = dict[str, list[dict[str, Any]]]


def _superni(info: StreamInfo, stages: Sequence[str], tokenizer: Tokenizer, settings: Settings) -> Scenario:
    from jaxcl.data.instruction import superni

    def read(split: str, names: Sequence[str]) -> Rows:
        return {name: superni(name, split, settings.data_dir) for name in names}

    settings.known(info, "keep")
    probes = {f"unseen/{name}": rows for name, rows in read("test", UNSEEN).items()}
    metrics = (_ROUGE, "exact_match_lenient")
    asked = _Asked(read("train", stages), read("test", stages), lambda name: metrics, {"probe": probes})
    return _made(info, asked, tokenizer, settings, default=0.1)


def _trace(info: StreamInfo, stages: Sequence[str], tokenizer: Tokenizer, settings: Settings) -> Scenario:
    from jaxcl.data.instruction import general, trace

    settings.known(info, "keep", "repeat")
    repeat = settings.option("repeat", False, (True, False))
    train = {name: trace(name, "train", settings.data_dir, repeat=repeat) for name in stages}
    tests = {name: trace(name, "test", settings.data_dir) for name in stages}
    # accuracy is of the option's letter, which the reasons follow on a line of their own
    tests["ScienceQA"] = [row | {"target": row["target"][:1]} for row in tests["ScienceQA"]]
    following = {f"following/{name}": general(name, settings.data_dir) for name in ("self_instruct", "lima")}
    asked = _Asked(
        train, tests, lambda name: (TRACE.get(name, _ROUGE),), {"instruction": following}, {"ScienceQA": ("\n",)},
        continued=("Py150",),
    )  # fmt: skip
    return _made(info, asked, tokenizer, settings, default=0.1)


def _t0(info: StreamInfo, stages: Sequence[str], tokenizer: Tokenizer, settings: Settings) -> Scenario:
    from jaxcl.data.instruction import general, t0

    settings.known(info, "keep")

    def read(split: str, names: Sequence[str]) -> Rows:
        return {name: t0(name, split, settings.data_dir) for name in names}

    probes = {f"unseen/{name}": rows for name, rows in read("test", _T0_UNSEEN).items()}
    probes["general/alpaca"] = general("alpaca", settings.data_dir)
    asked = _Asked(read("train", stages), read("test", stages), lambda name: (_ROUGE,), {"probe": probes})
    return _made(info, asked, tokenizer, settings, default=0.01)


@dataclasses.dataclass(frozen=True)
class _Asked:
    """Rows to learn and to answer. metrics(eval) -> names, the first is the task's number. probes: {role: {eval:
    rows}}. stop: {eval: strings that end its answers}. continued: stages whose input's end counts most."""

    train: Rows
    tests: Rows
    metrics: Callable[[str], Sequence[str]]
    probes: Mapping[str, Rows]
    stop: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    continued: Sequence[str] = ()


def _made(info: StreamInfo, asked: _Asked, tokenizer: Tokenizer, settings: Settings, *, default: float) -> Scenario:
    from jaxcl.data.fitting import fitting
    from jaxcl.data.folder import instruct_stages
    from jaxcl.data.instruction import question
    from jaxcl.data.leaks import check

    window, template = settings.window, settings.template
    texts = [{name: {r["id"]: question(r) for r in rows} for name, rows in part.items()}
             for part in (asked.train, asked.tests, *asked.probes.values())]  # fmt: skip
    leaks = check(texts[0], {name: rows for part in texts[1:] for name, rows in part.items()}, allow=settings.allow)
    rows, dropped = fitting(asked.train, tokenizer, template, window, most=settings.rows, seed=settings.seed)
    rows = {name: _continued(name, of, asked, tokenizer, settings) for name, of in rows.items()}
    stages = instruct_stages(rows, tokenizer, window=window, template=template)
    evals: list[Eval] = []
    for n, (name, of) in enumerate(asked.tests.items()):
        made = _evals(name, of, asked, tokenizer, settings)
        stages[n] = dataclasses.replace(stages[n], evals=(made[0].id,))
        evals += [made[0], *(dataclasses.replace(e, role="probe") for e in made[1:])]
    for role, part in asked.probes.items():
        for name, of in part.items():
            evals.append(dataclasses.replace(_evals(name, of, asked, tokenizer, settings)[0], role=role))
    notes = {"leaks": leaks, "left out: answers longer than the window": dropped}
    return Scenario(info, stages, evals, share_of(stages, settings, default), {k: v for k, v in notes.items() if v})


def _evals(
    name: str, rows: list[dict[str, Any]], asked: _Asked, tokenizer: Tokenizer, settings: Settings
) -> list[Eval]:
    from jaxcl.data.fitting import answer_room
    from jaxcl.data.stage import subsample
    from jaxcl.evaluate.generation import generation

    chosen = _continued(name, subsample(rows, settings.test_rows, settings.seed), asked, tokenizer, settings)
    return generation(
        name,
        chosen,
        tokenizer,
        window=settings.window,
        metrics=tuple(asked.metrics(name)),
        template=settings.template,
        max_new=answer_room(chosen, tokenizer, settings.template, settings.window),
        stop=tuple(asked.stop.get(name, ())),
        batch_size=settings.batch_size,
    )


def _continued(
    name: str, rows: list[dict[str, Any]], asked: _Asked, tokenizer: Tokenizer, settings: Settings
) -> list[dict[str, Any]]:
    """The rows; of those that are continued only as much of the input's end as fits beside any answer."""
    if name not in asked.continued:
        return rows
    from jaxcl.data.encode import target_ids
    from jaxcl.data.fitting import ending, frames

    longest = max(len(target_ids(row, settings.template, tokenizer)) for row in rows)
    room = settings.window - max(frames(rows, tokenizer, settings.template)) - min(longest, settings.window // 2)
    return [ending(row, tokenizer, max(room, _SHORT)) for row in rows]


def _info(name: str, stages: Sequence[str], metric: str, card: str, doc: str, build: Any, **more: Any) -> StreamInfo:
    return StreamInfo(
        name=name, scenario="instruction tuning", stages=tuple(stages), metric=metric, regime="DIL", card=card, doc=doc,
        build=build, texts=_texts, **more,
    )  # fmt: skip


def _texts(info: StreamInfo, stage: str, settings: Settings) -> list[str]:
    from jaxcl.data import instruction

    read = {"superni": instruction.superni, "trace": instruction.trace, "t0": instruction.t0}
    return [instruction.question(row) for row in read[info.name.partition("/")[0]](stage, "train", settings.data_dir)]


_SUPERNI = "every task's test set after each stage, and six unseen tasks as probes; at least three orders or seeds"
STREAMS = (
    *(
        _info(
            f"superni/{order}", [name for n in numbers.split() for name in _SAPT if name.startswith(f"task{n}_")],
            "ROUGE-L F1 (stemmed); exact match beside", "cft/sapt",
            f"15 Super-NaturalInstructions tasks in SAPT's {order.replace('_', ' ')}", _superni,
            unit="one task: definition and input", keeps="10% of all rows (option keep)", protocol=_SUPERNI,
            public=("hf:Muennighoff/natural-instructions", "github:circle-hit/SAPT"), data=("superni",),
        )
        for order, numbers in _ORDERS.items()
    ),
    _info(
        "trace", list(TRACE), "each task's own, 0 to 1: accuracy, ROUGE-L, edit similarity, SARI", "cft/trace-rcl",
        "TRACE: eight tasks for aligned models; option repeat trains on a row as often as the published files do",
        _trace, unit="one task", keeps="10% of all rows (option keep)",
        protocol="every task after each stage; instruction following (Self-Instruct, LIMA) beside, general ability by "
        "the suite",
        public=("github:BeyonderXX/TRACE", "hf:GAIR/lima"), data=("trace", "self_instruct"),
    ),
    _info(
        "t0", _T0, "ROUGE-L F1 (stemmed)", "cft/ct0",
        "T0 templates one after another: eight that generate, in an order of our own, ten unseen ones",
        _t0, unit="one template; a quarter of its rows is held out, a split of our own",
        keeps="1% of all rows (option keep)",
        protocol="every template after each stage; ten unseen templates and Alpaca as zero-shot probes",
        public=("hf:bigscience/P3",), data=("t0_templates", "general_instruction"),
    ),
)  # fmt: skip
