"""Retrieval and tools as streams: which stage learns what, over which candidates it is asked, what is left out."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from jaxcl.core.types import NOTHING, Budget
from jaxcl.errors import RequestError
from jaxcl.models.tokenizer import ByteTokenizer
from jaxcl.scenarios import open_stream
from jaxcl.scenarios.tools import ASK

WORDS = ByteTokenizer()


def write(folder: Path, file: str, rows: list[dict[str, Any]]) -> None:
    path = folder / file
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Fifteen documents; query n wants document n, those of the last slices also earlier ones."""
    folder = tmp_path_factory.mktemp("corpus")
    docs = [{"id": str(n), "title": "", "text": f"document about {n}", "year": str(1975 - n)} for n in range(15)]
    queries = [{"id": f"q{n}", "query": f"who knows {n}", "relevant": [str(n), *(["0"] if n > 8 else [])]}
               for n in range(0, 15, 2)]  # fmt: skip
    write(folder, "retrieval/cranfield/docs.jsonl.gz", docs)
    write(folder, "retrieval/cranfield/queries.jsonl.gz", queries)
    return folder


def opened(folder: Path, name: str = "retrieval/cranfield", **kw: Any) -> Any:
    return open_stream(name, WORDS, **{"data_dir": folder, "window": 128} | kw)


def test_a_slice_is_a_stage_and_only_documents_are_learned(corpus):
    stream = opened(corpus)
    learned = [[s.train.id(i) for i in range(len(s.train))] for s in stream.stages]
    assert learned == [[str(3 * n + i) for i in range(3)] for n in range(5)]
    assert not any("who knows" in s.train.record(i)["input"] for s in stream.stages for i in range(3))
    assert [s.evals for s in stream.stages] == [(f"slice_{n}/hits_at_1",) for n in range(1, 6)]
    assert {e.role for e in stream.evals if not e.id.endswith("hits_at_1")} == {"probe"}
    assert stream.keeps == NOTHING and opened(corpus, options={"keep": 0.2}).keeps == Budget(examples=3)


def test_queries_are_asked_over_all_documents_learned_so_far(corpus, monkeypatch):
    """The candidates of every slice's queries, stage by stage: documents of the slices before and of this one."""
    from jaxcl.evaluate import retrieval

    asked: dict[str, list[list[str]]] = {}

    def noted(eval_id: str, rows: Any, tokenizer: Any, *, docs_at: Any, stage: int, **how: Any) -> list[Any]:
        asked[eval_id] = [sorted(map(int, docs_at(n))) for n in range(5)] + [[stage]]
        return []

    monkeypatch.setattr(retrieval, "docid_retrieval", noted)
    opened(corpus)
    assert list(asked) == [f"slice_{n}" for n in range(1, 6)]
    for own, stages in enumerate(asked.values()):
        assert stages == [list(range(3 * (n + 1))) for n in range(5)] + [[own]]


def test_years_and_orders_decide_which_slice_a_query_is_of(corpus):
    by_year = opened(corpus, options={"by": "year"})
    assert by_year.stages[0].train.id(0) == "14", "the oldest document"
    sizes = {e.id: e.n for e in by_year.evals if e.id.endswith("hits_at_1")}
    assert sizes == {f"slice_{n}/hits_at_1": k for n, k in ((3, 2), (4, 1), (5, 5))}, "document 0 is learned last"
    orders = {tuple(s.name for s in opened(corpus, order="random", seed=n).stages) for n in range(4)}
    assert len(orders) > 1 and all(sorted(o) == [f"slice_{n}" for n in range(1, 6)] for o in orders)
    assert opened(corpus, order="similarity").stages[0].name == "slice_1"


def test_few_documents_are_drawn_from_those_that_answer_a_query(corpus):
    stream = opened(corpus, rows=1)
    kept = [s.train.id(0) for s in stream.stages]
    assert all(int(i) % 2 == 0 for i in kept)
    missing = 3 + 3 * ("0" not in kept)  # 8 documents are asked for, document 0 by three more queries
    assert stream.notes == {"judgements of documents that are not in the corpus": missing}


def test_a_document_that_comes_again_in_another_slice_is_refused(tmp_path):
    text = " ".join(f"word{n}" for n in range(40))
    docs = [{"id": str(n), "title": "", "text": f"{text} end {n}" if n in (0, 4) else f"paper {n}"} for n in range(5)]
    write(tmp_path, "retrieval/cranfield/docs.jsonl.gz", docs)
    write(tmp_path, "retrieval/cranfield/queries.jsonl.gz", [{"id": "q", "query": "what", "relevant": ["1"]}])
    with pytest.raises(RequestError, match="leak 'near-duplicates': 1 found: '4' of 'slice_5' is '0' of 'slice_1'"):
        opened(tmp_path)
    allowed = opened(tmp_path, allow=("near-duplicates",))
    assert allowed.notes["leaks"]["near-duplicates"]["count"] == 1
    assert [s.evals for s in allowed.stages] == [(), ("slice_2/hits_at_1",), (), (), ()]


def test_an_unknown_retriever_is_refused(corpus):
    with pytest.raises(RequestError, match="option retriever is 'bm25'; accepted: 'docid', 'dense'"):
        opened(corpus, options={"retriever": "bm25"})
    assert len(opened(corpus, options={"retriever": "dense"}).evals) == 20


def dialogue(i: str, tool: str | None, *said: tuple[str, str]) -> dict[str, Any]:
    tools = [{"name": tool, "description": "d", "parameters": {}}] if tool else []
    return {"id": i, "tools": tools, "messages": [{"role": r, "content": c} for r, c in said]}


def calling(i: str, tool: str, question: str) -> dict[str, Any]:
    call = json.dumps({"name": tool, "arguments": {"x": i}})
    turns = (("user", question), ("tool_call", call), ("tool_result", "{}"), ("assistant", f"done {i}"))
    return dialogue(i, tool, *turns)


@pytest.fixture(scope="module")
def glaive(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tools")
    tools = ("calculate_tip", "create_note", "get_news", "send_email")
    train = [calling(f"{tool}-{n}", tool, f"{tool} please {n}") for tool in tools for n in range(3)]
    train += [dialogue(f"talk-{n}", None, ("user", f"talk {n}"), ("assistant", f"yes {n}")) for n in range(8)]
    test = [calling(f"t-{tool}", tool, f"{tool} please {7 if n else 2}") for n, tool in enumerate(tools)]
    test.append(dialogue("t-talk", None, ("user", "chat"), ("assistant", "of course")))
    write(folder, "tool_use/glaive_toolcall/train.jsonl.gz", train)
    write(folder, "tool_use/glaive_toolcall/test.jsonl.gz", test)
    return folder


def test_every_group_learns_its_calls_and_a_part_of_the_talk(glaive):
    stream = opened(glaive, "tools/glaive", window=256)
    learned = {s.name: [s.train.id(i) for i in range(len(s.train))] for s in stream.stages}
    assert [sum(i.startswith("talk") for i in ids) for ids in learned.values()] == [2, 2, 2, 2]
    assert learned["create"][:2] == ["create_note-0/1", "create_note-0/3"] and len(learned["create"]) == 8
    assert len(learned["calculate"]) == 7 and "calculate_tip-2/1" not in learned["calculate"]
    assert stream.notes == {"left out: training turns that repeat a test turn": {"calculate": 1}}
    record = stream.stages[0].train.record(0)
    assert record["instruction"] == ASK and json.loads(record["target"])["name"] == "calculate_tip"


def test_a_repeated_turn_stays_where_the_leak_is_allowed(glaive):
    stream = opened(glaive, "tools/glaive", window=256, allow=("test-in-train",))
    assert len(stream.stages[0].train) == 8 and stream.notes["leaks"]["test-in-train"]["count"] == 1


def test_calls_are_the_tasks_and_talk_is_a_probe(glaive):
    stream = opened(glaive, "tools/glaive", window=256)
    tasks = [e.id for e in stream.evals if e.role == "task"]
    assert tasks == [f"{s.name}/tool_call_accuracy" for s in stream.stages] == [s.evals[0] for s in stream.stages]
    talk = {e.id: (e.role, e.n, e.higher_is_better) for e in stream.evals if e.id.startswith("no_tool/")}
    assert talk["no_tool/over_trigger_rate"] == ("probe", 1, False)


def test_tools_are_described_only_on_request(glaive):
    assert "calculate_tip" not in ASK
    stream = opened(glaive, "tools/glaive", window=512, options={"documented": True})
    assert '"name": "calculate_tip"' in stream.stages[0].train.record(0)["instruction"]


def test_few_test_turns_are_half_calls(glaive):
    sizes = {e.id: e.n for e in opened(glaive, "tools/glaive", window=256, test_rows=2).evals}
    assert sizes["create/tool_call_accuracy"] == sizes["create/over_trigger_rate"] == 1
