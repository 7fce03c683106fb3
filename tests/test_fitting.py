"""What fits a window is kept whole, what does not is left out and counted."""

from __future__ import annotations

import pytest

from jaxcl.data.fitting import answer_room, ending, fitting, frames
from jaxcl.data.template import Template
from jaxcl.errors import RequestError
from jaxcl.models.tokenizer import ByteTokenizer

TOKENIZER, PLAIN = ByteTokenizer(), Template()


def row(i: str, target: str, text: str = "x", instruction: str = "Do: ", **more: object) -> dict:
    return {"id": i, "task": "t", "instruction": instruction, "input": text, "target": target} | more


def needed(r: dict) -> int:
    """Bytes of the prompt without its input, of the answer after a space, and an end mark; a byte is a token."""
    start = len(getattr(TOKENIZER, "start", ()))
    return start + len(f"{r['instruction']}\nAnswer:".encode()) + len(f" {r['target']}".encode()) + 1


def test_rows_are_kept_exactly_as_long_as_question_and_answer_fit():
    rows = [row(str(n), "y" * n, "z" * 500) for n in range(1, 30)]
    window = needed(rows[14])
    kept, dropped = fitting({"s": rows}, TOKENIZER, PLAIN, window)
    assert kept["s"] == rows[:15] and dropped == {"s": 14}
    assert fitting({"s": rows[:3]}, TOKENIZER, PLAIN, window) == ({"s": rows[:3]}, {})


def test_rows_are_drawn_by_seed_from_those_that_fit():
    rows = [row(str(n), "y" * (1 + n % 2 * 99)) for n in range(40)]
    draws = [fitting({"s": rows}, TOKENIZER, PLAIN, 64, most=5, seed=seed)[0]["s"] for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2] and len(draws[0]) == 5
    assert all(len(r["target"]) == 1 for r in draws[0])


def test_a_stage_of_which_nothing_fits_is_refused():
    with pytest.raises(RequestError, match="stage 's': of no row do question and answer fit into 20 tokens"):
        fitting({"s": [row("a", "y" * 50)]}, TOKENIZER, PLAIN, 20)


def test_frames_count_the_prompt_without_its_input():
    rows = [row("a", "y", "long input"), row("b", "y", instruction="Do this: "), row("c", "y", labels=["p", "q"])]
    start = len(getattr(TOKENIZER, "start", ()))
    want = ["Do: \nAnswer:", "Do this: \nAnswer:", "Do: Option: p, q \n\nAnswer:"]
    assert frames(rows, TOKENIZER, PLAIN) == [start + len(text) for text in want]


def test_answers_have_room_for_the_longest_reference_up_to_half_the_window():
    assert answer_room([row("a", "y" * 9)], TOKENIZER, PLAIN, 256) == 16  # 11 tokens with space and end mark
    assert answer_room([row("a", "y", targets=["y", "y" * 20])], TOKENIZER, PLAIN, 256) == 32
    assert answer_room([row("a", "y" * 999)], TOKENIZER, PLAIN, 256) == 128
    tight = answer_room([row("a", "y" * 999, instruction="i" * 180)], TOKENIZER, PLAIN, 256)
    assert 0 < tight <= 256 - 180 - 256 // 8


def test_the_end_of_a_text_is_kept_in_whole_characters():
    assert ending(row("a", "y", "abcdef"), TOKENIZER, 4)["input"] == "cdef"
    assert ending(row("a", "y", "abc"), TOKENIZER, 4)["input"] == "abc"
    assert ending(row("a", "y", "aæøå"), TOKENIZER, 5)["input"] == "øå", "a half character is dropped"
