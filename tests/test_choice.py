"""Multiple choice: the encoding of the harness, its three normalisations, one pass; preference and its rewards."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
from test_ranking import Bytes

from jaxcl.core.types import Clock
from jaxcl.core.view import View
from jaxcl.errors import RequestError
from jaxcl.evaluate.choice import multiple_choice, pair
from jaxcl.evaluate.preference import mean_reward, preference
from jaxcl.models.decoder import decoder
from jaxcl.models.generate import generate
from jaxcl.models.spec import tiny

ROWS = [
    {"id": "a", "context": "Question: one?\nAnswer:", "choices": ["yes", "no", "perhaps so"], "answer": 1},
    {"id": "b", "context": "Question: another?\nAnswer:  ", "choices": ["zürich", "rom"], "answer": 0},
    {"id": "c", "context": "", "choices": ["x", "yy", "zzz", "w"], "answer": 3},
]
WORDS = [*(b.to_bytes() for b in range(256)), b"", b"r: ", b"sw", b" n"]


class Merging(Bytes):
    """Bytes and three merged tokens, so that encodings depend on what follows."""

    vocab_size = len(WORDS)

    def encode(self, text):
        data, found = text.encode(), []
        while data:
            best = next((i for i in (257, 258, 259) if data.startswith(WORDS[i])), data[0])
            found.append(best)
            data = data[len(WORDS[best]) :]
        return found


def quiet(done: int, total: int) -> None:
    pass


@pytest.fixture(scope="module")
def view() -> View:
    model = decoder(tiny(vocab=len(WORDS), layers=2))
    params = model.init(model.spec, jax.random.key(1))
    params = {k: v * 6 if "embed" in k else v * 5 if "attn/" in k else v for k, v in params.items()}
    return View(model).at(model.spec, params, {}, {}, Clock.at())


class Spy:
    """A view that keeps what the model was asked."""

    task, wrapped = None, False

    def __init__(self, view: View):
        self.view, self.stamp, self.asked = view, view.stamp, []

    def call(self, fn, *args):
        self.asked.append(args)
        return self.view.call(fn, *args)


def plain_logits(apply, head, spec, params, batch):
    return head(spec, params, apply(spec, params, batch).hidden, batch["positions"])


def log_p(view: View, before: list[int], after: list[int]) -> float:
    """Plain forward of both together, then numpy."""
    tokens, places = np.zeros((1, 192), np.int32), np.arange(192, dtype=np.int32)[None]
    tokens[0, : len(before) + len(after)] = before + after
    there = (places < len(before) + len(after)).astype(np.int32)
    batch = {"tokens": tokens, "segments": there, "positions": places}
    logits = np.asarray(view.call(plain_logits, batch)[0], np.float64)
    logits = logits - logits.max(-1, keepdims=True)
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    n = len(before)
    return float(logs[np.arange(n - 1, n - 1 + len(after)), after].sum())


def test_a_pair_is_cut_where_the_contexts_own_encoding_ends():
    words = Merging()
    before, whole = [65, 110, 258, 101, 114, 58], [65, 110, 258, 101, 257, 110, 111]
    assert (words.encode("Answer:"), words.encode("Answer: no")) == (before, whole)
    assert pair("Answer:", " no", words) == (before, [111])  # the boundary is inside "r: ": "n" is in neither part
    assert pair("Answer:", " yes", words) == (before, [*b"es"]) and pair("Name", " no", words)[1] == [259, 111]
    assert pair("a  ", "b", words) == ([97], [32, 32, 98])  # white space goes to the choice
    assert pair("", " x", words) == ([256], [32, 120])

    class Begins(Merging):
        start = (256,)

    assert pair("a", " x", Begins()) == ([256, 97], [32, 120])


def test_a_pair_is_encoded_as_the_harness_writes_it():
    """Its rule, written out: whole[len(context):], with the context's white space moved."""
    words = Merging()
    for context in ("Answer:", "Answer: ", "her", "a \n"):
        for choice in (" no", "r: n", " ner"):
            before = words.encode(context.rstrip())
            assert pair(context, choice, words) == (before, words.encode(context + choice)[len(before) :])


def test_every_measure_equals_plain_forwards(view):
    names = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info")
    made = multiple_choice("m", ROWS, Merging(), window=64, by=names, batch_size=2)
    assert [e.id for e in made] == [f"m/{name}" for name in names]
    assert made[0].chance == pytest.approx((1 / 3 + 1 / 2 + 1 / 4) / 3)
    found = {e.metric: e.run(view, quiet) for e in made}
    best = {name: [] for name in names}
    for row in ROWS:
        logs = np.array([log_p(view, *pair(row["context"], " " + c, Merging())) for c in row["choices"]])
        alone = np.array([log_p(view, [256], Merging().encode(" " + c)) for c in row["choices"]])
        letters = np.array([len(c) for c in row["choices"]])
        units = np.array([len(c.encode()) for c in row["choices"]])
        for name, values in zip(names, (logs, logs / letters, logs / units, logs - alone)):
            best[name].append(int(np.argmax(values)))
    for name, items in found.items():
        assert [i["prediction"] for i in items] == [r["choices"][k] for r, k in zip(ROWS, best[name])]
        assert [i["score"] for i in items] == [float(k == r["answer"]) for r, k in zip(ROWS, best[name])]
    assert len({tuple(b) for b in best.values()}) > 1  # the measures differ on these rows


def test_a_long_context_loses_its_beginning_for_each_choice_by_itself(view):
    row = {"id": "a", "context": "x" * 40 + "Answer:", "choices": ["no", "perhaps so"], "answer": 0}
    made = multiple_choice("m", [row], Bytes(), window=16, by=("acc",), batch_size=1)[0]
    logs = []
    for choice in (b" no", b" perhaps so"):
        whole = (row["context"].encode() + choice)[-17:]  # the last token is not read
        logs.append(log_p(view, list(whole[: -len(choice)]), list(choice)))
    spy = Spy(view)
    assert made.run(spy, quiet)[0]["prediction"] == row["choices"][int(np.argmax(logs))]
    assert [prompt["length"].tolist() for prompt, _ in spy.asked] == [[6], [14]]


def test_one_pass_serves_all_measures(view):
    made = multiple_choice("m", ROWS, Merging(), window=64, batch_size=2)
    spy = Spy(view)
    for e in made:
        e.run(spy, quiet)
    assert len(spy.asked) == 2  # batches


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"choices": ["a"]}, "row 'a' has the choices"),
        ({"choices": ["a", ""]}, "none of them empty"),
        ({"answer": 3}, "the answer 3; accepted: 0 to 2"),
        ({"answer": True}, "the answer True"),
    ],
)
def test_rows_that_are_no_questions_are_refused(change, words):
    with pytest.raises(RequestError, match=words):
        multiple_choice("m", [ROWS[0] | change], Bytes(), window=64)


def test_unknown_measures_and_choices_beyond_the_window_are_refused(view):
    with pytest.raises(RequestError, match="unknown measure of multiple choice 'acc_nrom'; did you mean 'acc_norm'"):
        multiple_choice("m", ROWS, Bytes(), window=64, by=("acc_nrom",))
    with pytest.raises(RequestError, match="row 'a' has a choice of 11 tokens; accepted: 1 to 8"):
        multiple_choice("m", ROWS, Bytes(), window=8)[0].run(view, quiet)


PAIRS = [
    {"id": "0", "prompt": "Human: hi\n\nAssistant:", "chosen": "hello there", "rejected": "no"},
    {"id": "1", "prompt": "Human: what is it that you want?\n\nAssistant:", "chosen": "ok", "rejected": "go away now"},
    {"id": "2", "prompt": "Human: x\n\nAssistant:", "chosen": "c", "rejected": "r"},
]


def test_preference_equals_plain_forwards(view):
    reference = {k: v * 0.5 if "mlp" in k else v for k, v in view.params.items()}
    names = ("accuracy", "accuracy_per_token", "reward_accuracy", "reward_margin")
    made = preference("p", PAIRS, Bytes(), window=128, metrics=names, reference=reference, beta=0.3, batch_size=2)
    found = {e.metric: [i["score"] for i in e.run(view, quiet)] for e in made}
    before = View(view.model).at(view.spec, reference, {}, {}, Clock.at())
    for n, row in enumerate(PAIRS):
        ids = {side: [*f" {row[side]}".encode(), 256] for side in ("chosen", "rejected")}
        ours, theirs = ({s: log_p(v, list(row["prompt"].encode()), i) for s, i in ids.items()} for v in (view, before))
        margin = (ours["chosen"] - theirs["chosen"]) - (ours["rejected"] - theirs["rejected"])
        per = {s: ours[s] / len(ids[s]) for s in ids}
        assert found["accuracy"][n] == float(ours["chosen"] > ours["rejected"])
        assert found["accuracy_per_token"][n] == float(per["chosen"] > per["rejected"])
        assert found["reward_accuracy"][n] == float(margin > 0)
        assert found["reward_margin"][n] == pytest.approx(0.3 * margin, abs=1e-3)
    assert view.params is not reference
    assert found["accuracy"] != found["accuracy_per_token"]  # or the two would test one thing
    assert made[3].range[0] == -np.inf and made[3].chance is None and made[0].chance == 0.5


def test_the_reference_itself_has_no_margin_and_is_asked_once(view, monkeypatch):
    kw = {"metrics": ("reward_margin",), "reference": view.params, "batch_size": 4}
    made = preference("p", PAIRS, Bytes(), window=128, **kw)[0]
    calls, call = [], View.call
    monkeypatch.setattr(View, "call", lambda self, fn, *args: calls.append(fn) or call(self, fn, *args))
    for _ in range(2):
        assert all(abs(i["score"]) < 1e-5 for i in made.run(view, quiet))
        view.at(view.spec, view.params, {}, {}, Clock.at())  # other weights, as far as an eval knows
    assert len(calls) == 3


def test_long_answers_keep_their_beginning_and_prompts_their_end(view):
    row = {"id": "0", "prompt": "p" * 60 + "Assistant:", "chosen": "c" * 50, "rejected": "r"}
    made = preference("p", [row], Bytes(), window=32, metrics=("accuracy",))[0]
    spy = Spy(view)
    made.run(spy, quiet)
    ((prompt, block),) = spy.asked
    assert prompt["tokens"][0].tolist() == list(row["prompt"][-16:].encode())
    assert [block["targets"][0, 0][block["segments"][0, 0] == n].tolist() for n in (1, 2)] == [[99] * 15, [114, 256]]


def test_the_mean_reward_of_what_is_written(view):
    asked = []

    def reward(prompts, answers):
        asked.extend(zip(prompts, answers))
        return [float(len(a)) for a in answers]

    made = mean_reward("r", PAIRS, Bytes(), reward, window=64, max_new=6, batch_size=2)
    items = made.run(view, quiet)
    prompts = [list(row["prompt"].encode()) for row in PAIRS]
    ids = np.stack([np.pad(np.int32(p), (0, 48 - len(p))) for p in prompts])
    write = functools.partial(generate, max_new=6, stop_ids=(256,))
    written = view.call(write, ids, np.array([len(p) for p in prompts], np.int32))
    for row, item, tokens, n in zip(PAIRS, items, *map(np.asarray, written)):
        text = Bytes().decode(tokens[:n].tolist())
        assert item == {"id": row["id"], "prediction": text, "score": float(len(text))}
    assert sorted(asked) == sorted((r["prompt"], i["prediction"]) for r, i in zip(PAIRS, items))
    with pytest.raises(RequestError, match="accepted: 2 finite numbers"):
        nan = lambda prompts, answers: [float("nan")] * len(answers)  # noqa: E731
        mean_reward("r", PAIRS, Bytes(), nan, window=64, max_new=6, batch_size=2).run(view, quiet)


def test_what_preference_refuses():
    for words, row, kw in (
        ("reward_margin needs a reference", {}, {"metrics": ("reward_margin",)}),
        ("unknown metric of preference 'acc'", {}, {"metrics": ("acc",)}),
        ("row '0' has one answer twice", {"rejected": "hello there"}, {}),
    ):
        with pytest.raises(RequestError, match=words):
            preference("p", [PAIRS[0] | row], Bytes(), window=64, **kw)
    with pytest.raises(RequestError, match="answers of 64 tokens; accepted: 1 to 63"):
        mean_reward("r", PAIRS, Bytes(), lambda p, a: [], window=64, max_new=64)
