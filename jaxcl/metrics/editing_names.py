"""The names of model editing's numbers: what `jaxcl list metrics` says of them."""

from __future__ import annotations

from jaxcl.metrics.info import Info

CARD = "metrics/editing-metrics"
READINGS = {
    "exact": "greedy tokens equal the wanted ones, as many as those are",
    "token": "share of the wanted tokens that are the likeliest, the true ones before them given",
}
_SIDES = (
    ("reliability", "edits' prompts after the last edit", "a stream of edits"),
    ("generality", "rephrasings after the last edit", "rephrasings"),
    ("locality", "unrelated prompts, where the model's answers before the edits are wanted", "unrelated prompts"),
)
_WHO = {"exact": "WISE", "token": "EasyEdit, WISE (tables)"}
_E = ("a stream of edits",)
_PAIRS = "probabilities of both objects"


def _row(name: str, convention: str, papers: str, *needs: str, worse: bool = False) -> Info:
    return Info(name=name, convention=convention, kind="editing", card=CARD, papers=papers, needs=needs or _E,
                lower_is_better=worse)  # fmt: skip


def _counterfact(side: str, prompts: str) -> tuple[Info, Info]:
    one, other = ("original", "new") if side == "n" else ("new", "original")
    share = f"share of {prompts} prompts where the {one} object is likelier than the {other} one"
    gap = f"mean over {prompts} prompts of the {one} object's probability minus the {other} one's"
    return (
        _row(f"counterfact_{side}s", share, "ROME, Larimar", _PAIRS),
        _row(f"counterfact_{side}m", gap, "ROME", _PAIRS),
    )


INFO = (
    *(_row(f"edit_{side}_{by}", f"{how}: mean over {where}", _WHO[by], need)
      for by, how in READINGS.items() for side, where, need in _SIDES),
    *(_row(f"edit_average_{by}", f"mean of reliability, generality and locality, all {by}", _WHO[by],
           *(need for *_, need in _SIDES)) for by in READINGS),
    _row("ood_generality", "share of edits whose answer in other text has a loss below -log 0.8", "WISE (Temporal)",
         "text that uses the edits"),
    _row("edit_success_mean", "mean over t of the task's metric on edit t right after it", "GRACE (ES)"),
    _row("edit_retention", "mean over edits s<=T of the task's metric after edit T", "GRACE (ERR)"),
    _row("edit_retention_by_age", "mean of the task's metric over edits that are a edits old, a value for each a", ""),
    _row("upstream_retention", "mean of the task's metric on upstream test data after the edits", "GRACE (TRR)",
         "upstream test data"),
    _row("upstream_drop", "upstream_retention minus the same mean before the edits", "GRACE", "upstream test data"),
    _row("accurate_retention", "upstream_retention on text that the model had right before (hallucination)",
         "GRACE (ARR)", "originally accurate text"),
    _row("upstream_and_edit_retention", "mean of upstream_retention and edit_retention", "GRACE (avg)",
         "upstream test data"),
    *_counterfact("e", "rewrite"), *_counterfact("p", "paraphrase"), *_counterfact("n", "neighbourhood"),
    _row("counterfact_s", "harmonic mean of counterfact_es, counterfact_ps and counterfact_ns", "ROME", _PAIRS),
    _row("recall_of_removed", "mean recall of facts that were to be removed; wanted 0", "Larimar (Forgotten)",
         "removed facts", worse=True),
    _row("recall_of_kept", "mean recall of the facts that were to stay", "Larimar (Retained)", "removed facts"),
)  # fmt: skip
