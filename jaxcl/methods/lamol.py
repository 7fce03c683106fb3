"""LAMOL: one language model answers, and writes the rows of old tasks itself. Card cft/lamol.

Sun, Ho and Lee, ICLR 2020. `generative_replay` with the paper's two conditions and its names: L = L_QA + lambda * L_LM.
"""

from __future__ import annotations

from jaxcl.core.types import Method, method
from jaxcl.errors import unknown
from jaxcl.methods.generative_replay import generative_replay

VARIANTS = ("gen", "task")


@method
def lamol(
    gamma: float = 0.2,
    strength: float = 0.25,
    variant: str = "task",
    top_k: int = 20,
    special: float = 5.0,
    labels: bool = False,
    max_new: int | None = None,
    oracle: bool = False,
    capacity: int = 4096,
    max_stages: int = 16,
    eos: int | None = None,
    name: str = "lamol",
) -> Method:
    """L_QA, the objective on the row as it is, plus strength * L_LM on ``[GEN] prompt ANS answer EOS``; before every
    stage but the first, gamma times its rows are written in equal parts for the old ones and trained on with both.

    variant: the start token is one for all (``gen``, LAMOL_GEN) or the task's own (``task``, LAMOL_TASK). gamma 0.2,
    strength 0.25 and top_k 20 are those of the port; the reference code's default gamma is 0.05, the paper has both.
    special: weight of ANS, the one new token that is predicted. gamma 0: fine-tuning with L_LM; with strength 0 too:
    fine-tuning. The row's own answer mark stays where its template puts it; ANS is in L_LM alone. Rows that fill the
    window are written two tokens longer, so none loses its ANS. Other arguments and errors: `generative_replay`.
    """
    if variant not in VARIANTS:
        raise unknown("variant", variant, VARIANTS, where="lamol")
    return generative_replay(
        gamma=gamma, strength=strength, condition=variant, top_k=top_k, special=special, labels=labels, max_new=max_new,
        oracle=oracle, capacity=capacity, max_stages=max_stages, eos=eos, name=name,
    )  # fmt: skip
