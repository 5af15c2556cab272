"""Where thinking opens and closes, in a prompt and in a response."""

import pytest

from jsft.data import thinking

START = "<|im_start|>assistant\n"


@pytest.mark.parametrize(
    "tail, state",
    [
        ("", "none"),
        ("<think>", "open"),
        ("<think>\n", "open"),
        ("<think>\n\n", "open"),
        ("<think> \r\n", "open"),
        ("<think></think>", "closed"),
        ("<think>\n\n</think>\n\n", "closed"),
        ("</think>", "closed"),  # DeepSeek-V3.1's without thinking
        ("<think>\nEnough thought.\n</think>\n", "closed"),
        ("thinking", "none"),
    ],
)
def test_how_a_prompt_ends(tail, state):
    asked = "<|im_start|>user\nWhat does <think> mean, and </think>?<|im_end|>\n"
    assert thinking.prompt_thinking(asked + START + tail) == state
    assert thinking.prompt_thinking(f"<|im_start|>user\n{tail}<|im_end|>\n{START}") == "none"


@pytest.mark.parametrize(
    "prompt, response, name",
    [
        ("open", "hm\n</think>\n\n4", None),
        ("open", "\nhm</think>4", None),
        ("open", "<think>\nhm\n</think>\n\n4", "opened_twice"),
        ("open", " \n\t<think>hm</think>4", "opened_twice"),
        ("open", "hm</think>\n<think>again</think>4", "opened_twice"),
        ("open", "The tag `<think>` opens.</think>4", None),
        ("open", "4", "never_closed"),
        ("closed", "4", None),
        ("closed", "The tag `<think>` opens.", None),
        ("closed", "<think>\nhm\n</think>\n\n4", "thinks_after_closed"),
        ("closed", "\n<think>hm", "thinks_after_closed"),
        ("closed", "hm\n</think>\n\n4", "thinks_after_closed"),
        ("closed", "<think>\n\n</think>\n\n4", "thinks_after_closed"),
        ("none", "4", None),
        ("none", "<think>hm</think>4", None),
        ("none", "<think>hm", None),
        ("none", "hm</think>4", "never_opened"),
    ],
)
def test_prompt_and_response_fit_or_not(prompt, response, name):
    assert thinking.mismatch(prompt, response) == name


def test_an_opening_of_the_prompt_counts_as_part_of_the_response():
    assert thinking.with_opening("hm", "open") == "<think>\nhm"
    assert thinking.with_opening(" <think>hm", "open") == " <think>hm"
    assert [thinking.with_opening("hm", state) for state in ("closed", "none", None)] == ["hm"] * 3
    assert thinking.final_answer(thinking.with_opening("is it 4?", "open")) == ""
    assert thinking.final_answer(thinking.with_opening("hm</think> 4", "open")) == "4"
    assert thinking.final_answer("<think>a</think>b<think>c") == ""  # cut in a second thinking


def test_responses_show_whether_their_prompts_opened_the_thinking():
    cut, whole, own = "is it 4, but", "hm</think>4", "<think>hm</think>4"
    assert thinking.prompt_opened([whole, cut, cut])
    assert not thinking.prompt_opened([own, whole, own])
    assert not thinking.prompt_opened([cut, "4"]) and not thinking.prompt_opened([])
    assert not thinking.prompt_opened([whole, *["4"] * 10])  # one stray tag among answers without thinking


def test_mismatches_are_said_by_kind_with_their_count_and_the_first():
    lines = thinking.thinking_lines([(4, "never_closed"), (5, "never_opened"), (7, "never_closed")], "row {}".format)
    assert len(lines) == 2
    assert lines[0].startswith("2 rows whose response never closes") and "the first: row 4; write" in lines[0]
