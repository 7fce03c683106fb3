"""How a row becomes a prompt and an answer: plainly, or in the tokenizer's chat template.

The plain form is the one of the O-LoRA benchmark: instruction, the options where the row has labels, the
input, and ``Answer:``; the answer follows after a space. The chat form puts the same prompt into a user turn.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from jaxcl.errors import unknown

if TYPE_CHECKING:
    from jaxcl.models.tokenizer import Tokenizer

STYLES = ("plain", "chat")


@dataclasses.dataclass(frozen=True)
class Template:
    """style: 'plain' or 'chat'. prefix: put the reference's ``Task:``/``Dataset:`` lines in front; they tell
    the model which data set a row is from, so they are off unless asked for. RequestError: another style."""

    style: str = "plain"
    prefix: bool = False

    def __post_init__(self) -> None:
        if self.style not in STYLES:
            raise unknown("template", self.style, STYLES)

    def prompt(self, row: dict[str, Any], tokenizer: Tokenizer, text: str | None = None) -> str:
        """The prompt of an ``instruct`` row; ``text`` replaces its input (a shortened one)."""
        head = f"Task:{row.get('category', row['task'])}\nDataset:{row['task']}\n" if self.prefix else ""
        # COPA has no instruction: its options are in the input already.
        named = row.get("labels") and row["instruction"]
        options = f"Option: {', '.join(row['labels'])} \n" if named else ""
        body = row["input"] if text is None else text
        plain = f"{head}{row['instruction']}{options}{body}\nAnswer:"
        if self.style == "plain":
            return plain
        return tokenizer.chat([{"role": "user", "content": plain}])

    def target(self, answer: str) -> str:
        """The answer as it follows the prompt (the end-of-sequence token is added when it is encoded)."""
        return " " + answer if self.style == "plain" else answer
