"""Knowledge editing: facts that the model has wrong, one after another or in batches. Scenario 9.

Everything is measured in two readings, each under its own name: ``token`` (teacher-forced) and ``exact`` (written);
the first of the option ``readings`` is the task's number, others stand beside it. A third one, ``free``, waits for an
end mark, which edits do not train.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxcl.errors import RequestError, unknown
from jaxcl.scenarios.base import Scenario, Settings, StreamInfo
from jaxcl.scenarios.keeping import whole

if TYPE_CHECKING:
    from jaxcl.core.types import Model, Params
    from jaxcl.data.editing import Asked
    from jaxcl.data.stage import Stage
    from jaxcl.evaluate.base import Eval
    from jaxcl.models.tokenizer import Tokenizer

UPSTREAM_ROWS = 200
STAGE = "edits"
DEFAULT = ("token", "exact")
_SUCCESS = {"edit_success": "edit", "paraphrase_success": "rephrase"}


class _Edits(NamedTuple):
    """folder: below ``editing/``. metric: what an edit's own score is. upstream: the split whose true answers must
    stay known; '': the locality texts. doc, public: as in `StreamInfo`."""

    folder: str
    metric: str
    upstream: str
    doc: str
    public: tuple[str, ...]


_EDITS = {
    "zsre": _Edits("zsre", "match", "train", "ZsRE's questions with new answers", ("github:zjunlp/EasyEdit",)),
    "counterfact": _Edits(
        "counterfact", "match", "dev", "CounterFact's facts with false answers", ("hf:NeelNanda/counterfact-tracing",)
    ),
    "hallucination": _Edits(
        "hallucination", "perplexity", "", "sentences that a model made up about people, replaced by true ones",
        ("hf:potsawee/wiki_bio_gpt3_hallucination",),
    ),
    "temporal": _Edits(
        "temporal_ood", "match", "", "descriptions of things that changed; asked again after a long natural text",
        ("github:zjunlp/EasyEdit",),
    ),
}  # fmt: skip


def _build(info: StreamInfo, stages: Sequence[str], tokenizer: Tokenizer, settings: Settings) -> Scenario:
    from jaxcl.core.types import Budget
    from jaxcl.data.edit_batches import batched, fitting_edits, questions_left
    from jaxcl.data.editing import edit_records
    from jaxcl.data.stage import subsample
    from jaxcl.evaluate.editing import READINGS, unchanged

    settings.known(info, "batch", "readings")
    kind = _EDITS[info.name.partition("/")[2]]
    readings = settings.option("readings", DEFAULT)
    for by in readings:
        if by not in READINGS:
            raise unknown("reading of an edit's score", by, READINGS)
    everything = edit_records(kind.folder, settings.data_dir)
    fit = fitting_edits(everything, tokenizer, settings.window)
    records = subsample(fit, settings.rows, settings.seed)
    out, notes = questions_left(records, settings.allow)
    parts = _ordered(batched(STAGE, records, whole(settings, "batch", len(records))), settings)
    asking = _Asking(kind, records, out, tokenizer, settings)
    made = [asking.stage(name, part, readings) for name, part in parts.items()]
    evals = [*(e for _, own in made for e in own), *asking.upstream(), *asking.neighbours()]

    def against(model: Model, params: Params) -> list[Eval]:
        near = asking.few(asking.about(records, "locality"))
        return [unchanged(f"locality_{by}", near, tokenizer, model, params, by=by, batch_size=settings.batch_size)
                for by in readings]  # fmt: skip

    if long := len(everything) - len(fit):
        notes["left out: longer than the window"] = long
    return Scenario(info, [s for s, _ in made], evals, Budget(examples=len(records)), notes, against)


class _Asking(NamedTuple):
    """What is asked about a stream of edits. out: questions that are left out, because they are trained on."""

    kind: _Edits
    records: Sequence[dict[str, Any]]
    out: dict[str, set[str]]
    tokenizer: Tokenizer
    settings: Settings

    def about(self, records: Sequence[dict[str, Any]], about: str) -> list[Asked]:
        from jaxcl.data.edit_batches import about_edits

        return about_edits(records, about, self.out)

    def few(self, asked: Sequence[Any]) -> list[Any]:
        from jaxcl.data.stage import subsample

        return subsample(asked, self.settings.test_rows, self.settings.seed)

    def stage(self, name: str, part: Sequence[dict[str, Any]], readings: Sequence[str]) -> tuple[Stage, list[Eval]]:
        """A batch of edits, and its evals: one set a batch, so that an edit's age can be read off the matrix."""
        from jaxcl.data.editing import edit_source
        from jaxcl.data.stage import Stage
        from jaxcl.evaluate.edit_loss import answer_likely, answer_perplexity
        from jaxcl.evaluate.editing import correct

        size, after = self.settings.batch_size, "" if name == STAGE else f"/{name}"
        edits, wordings = (self.few(self.about(part, about)) for about in ("edit", "rephrase"))
        if self.kind.metric == "perplexity":
            evals = [answer_perplexity(f"reliability_ppl{after}", edits, self.tokenizer, batch_size=size)]
        else:
            evals = [correct(f"reliability_{by}{after}", edits, self.tokenizer, by=by, batch_size=size,
                             role="probe" if n else "task") for n, by in enumerate(readings)]  # fmt: skip
        learned = (evals[0].id,)
        if wordings:
            evals += [correct(f"generality_{by}{after}", wordings, self.tokenizer, by=by, batch_size=size, role="probe")
                      for by in readings]  # fmt: skip
        if wordings and self.kind.folder == "temporal_ood":
            evals.append(answer_likely(f"generality_ood{after}", wordings, self.tokenizer, batch_size=size))
        if self.kind.folder == "counterfact":
            evals += [e for title, about in _SUCCESS.items() for e in self.success(f"{title}{after}", part, about)]
        longest = max(len(a.ids(self.tokenizer)[1]) for a in self.about(self.records, "edit"))
        source = edit_source(name, part, self.tokenizer, window=self.settings.window, targets=longest)
        return Stage(name, source, learned), evals

    def success(self, eval_id: str, part: Sequence[dict[str, Any]], about: str) -> list[Eval]:
        """The new answer against the one from before the edit."""
        from jaxcl.data.edit_batches import old_answers
        from jaxcl.evaluate.edit_loss import answer_preferred

        old = self.few(old_answers(part, about, self.out))
        new = self.few([a for r in part if r.get("target_true") for a in self.about([r], about)])
        size = self.settings.batch_size
        return [answer_preferred(eval_id, new, old, self.tokenizer, batch_size=size, role="probe")] if old else []

    def neighbours(self) -> list[Eval]:
        """CounterFact's neighbourhood success: the true answer stays likelier than the edit's new one."""
        from jaxcl.data.edit_batches import neighbours
        from jaxcl.evaluate.edit_loss import answer_preferred

        if self.kind.folder != "counterfact":
            return []
        true, new = map(self.few, neighbours(self.records, self.out))
        size = self.settings.batch_size
        return [answer_preferred("neighbourhood_success", true, new, self.tokenizer, batch_size=size, role="general")]

    def upstream(self) -> list[Eval]:
        """What was known before the edits and has nothing to do with them (GRACE's test retention)."""
        from jaxcl.data.editing import asked, edit_records
        from jaxcl.data.leaks import unrepeated
        from jaxcl.evaluate.editing import answer_nll, correct

        facts = self.about(self.records, "locality")
        if self.kind.upstream:
            others = edit_records(self.kind.folder, self.settings.data_dir, split=self.kind.upstream)
            trained = [r["prompt"] for r in self.records]
            facts = asked(unrepeated(others, trained, lambda r: r["prompt"]), "truth")[:UPSTREAM_ROWS]
        few, size = self.few(facts), self.settings.batch_size
        return [
            answer_nll("upstream_nll", few, self.tokenizer, batch_size=size),
            correct("upstream_token", few, self.tokenizer, by="token", batch_size=size, role="general"),
        ]


def _ordered(parts: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """The batches, permuted where the order is random: what is one stage has no order."""
    import numpy as np

    if settings.order == "given":
        return parts
    if len(parts) == 1:
        raise RequestError("the edits are one stage; accepted: order=given, or batches of them (option batch)")
    drawn = np.random.default_rng([settings.seed, 11]).permutation(len(parts))
    return {name: parts[name] for name in (list(parts)[i] for i in drawn)}


STREAMS = tuple(
    StreamInfo(
        name=f"edits/{name}",
        scenario="knowledge editing",
        stages=(STAGE,),
        metric="perplexity of the edits" if kind.metric == "perplexity" else "token and exact match of the edits",
        regime="boundary-free",
        card="refine-align/grace" if name in ("zsre", "hallucination") else
             "refine-align/rome-memit" if name == "counterfact" else "refine-align/wise",
        doc=kind.doc,
        unit="all edits in one stage, edited one by one, or batches of them (option batch)",
        keeps="past edits, as rows; a method's own memory",
        protocol="reliability, generality, locality and upstream knowledge after each stage",
        public=kind.public,
        data=(f"editing/{kind.folder}",),
        build=_build,
    )
    for name, kind in _EDITS.items()
)  # fmt: skip
