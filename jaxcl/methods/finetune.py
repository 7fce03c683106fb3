"""Sequential fine-tuning: every stage on its own rows, no protection. The baseline that forgets."""

from __future__ import annotations

from jaxcl.core.types import Method, method


@method
def finetune(name: str = "finetune") -> Method:
    """No slot at all: all parameters train on the stage's own rows."""
    return Method(name=name)
