"""Reading answers: tables of hand-made hard cases."""

import time

import pytest

from jsft.evaluation import answers, thinking
from jsft.evaluation.tasks.gpqa_diamond import _last_box, _phrase_then_box
from jsft.evaluation.tasks.livecodebench_v2 import same_output, same_value


@pytest.mark.parametrize(
    "text, last",
    [
        ("\\boxed{5}", "5"),
        ("first \\boxed{1}, then \\boxed{2}", "2"),
        ("\\boxed{\\boxed{7}}", "7"),
        ("\\boxed {a{b}c}", "a{b}c"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{\\text{a \\} b}}", "\\text{a \\} b}"),
        ("\\boxed{a\\\\}", "a\\\\"),
        ("\\boxed5", "5"),
        ("\\fbox{3}", "3"),
        ("{{ \\boxed{3}", "3"),
        ("}} \\boxed{3}", "3"),
        ("\\boxed{1} and \\boxed{2", "1"),  # the last one never closes
        ("\\boxed{}", ""),
        ("\\boxed{3", None),
        ("boxed{3}", None),
        ("\\boxedtext", None),
        ("", None),
    ],
)
def test_last_boxed(text, last):
    assert answers.last_boxed(text) == last


def test_boxes_without_end_cost_no_time():
    started = time.monotonic()
    assert answers.boxed("\\boxed{" * 100_000 + "7") == []
    assert len(answers.boxed("\\boxed{" * 100_000 + "7" + "}" * 100_000)) == 1
    assert time.monotonic() - started < 3


@pytest.mark.parametrize(
    "text, letter",
    [
        ("C", "C"), ("(C)", "C"), ("\\text{C}", "C"), ("\\textbf{(C)}", "C"), ("C. 42 m", "C"),
        ("C: photon", "C"),
        (" C ", "C"), ("C) x", "C"), ("E", None), ("Carbon", None), ("c", None), ("the photon", None), ("",
        None),
        (None, None),
    ],
)  # fmt: skip
def test_choice(text, letter):
    assert answers.choice(text, "ABCD") == letter


@pytest.mark.parametrize(
    "text, reference, strict",
    [
        ("So the answer is (B).", "B", ""),
        ("The answer is: **C**", "C", ""),
        ("The answer is A? No: \\boxed{D}", "A", "D"),  # the phrase goes first, as in the reference
        ("\\boxed{A} or rather \\boxed{\\text{B}}", "B", "B"),
        ("Boron", "", ""),
    ],
)
def test_gpqa_filters(text, reference, strict):
    assert _phrase_then_box([[text]], [{}]) == [reference]
    assert _last_box([[text]], [{}]) == [strict]


@pytest.mark.parametrize(
    "text, word",
    [
        ("Yes", "yes"),
        ("No... Yes.", "yes"),
        ("nobody knows", None),
        ("It is not. NO!", "no"),
        ("", None),
        ("yes/no", "no"),
    ],
)
def test_last_yes_no(text, word):
    assert answers.last_yes_no(text) == word


@pytest.mark.parametrize(
    "text, code",
    [
        ("```python\na\n```", "a\n"),
        ("```python\na\n```\nthen\n```python\nb\n```", "b\n"),
        ("```python\na\n```\noutput:\n```\n6\n```", "a\n"),  # a block without a language is no program here
        ("```\na\n```", "a\n"),
        ("```py\na\n```", "a\n"),
        ("``` python \na\n```", "a\n"),
        ("```python\na", None),
        ("a", None),
    ],
)
def test_last_code_block(text, code):
    assert answers.last_code_block(text) == code


@pytest.mark.parametrize(
    "response, after, final",
    [
        ("<think>a</think> b", "b", "b"),
        ("a</think>b</think>c", "c", "c"),
        ("<think>never closed", "<think>never closed", ""),
        ("no thinking at all", "no thinking at all", "no thinking at all"),
        ("<think>a</think>", "", ""),
    ],
)
def test_thinking(response, after, final):
    assert thinking.after_thinking(response) == after
    assert thinking.final_answer(response) == final


@pytest.mark.parametrize(
    "shown, expected, same",
    [
        ("1 2\n3", "1 2\n3\n", True),
        ("1 2 \n 3\n\n", "1 2\n3", True),
        ("0.50", "0.5", True),
        ("1 2.0", "1 2", True),
        ("YES", "yes", False),
        ("1\n2", "1 2", False),
        ("", "1", False),
        ("nan", "1", False),
    ],
)
def test_outputs(shown, expected, same):
    assert same_output(shown, expected) is same


@pytest.mark.parametrize(
    "shown, expected, same",
    [
        ("[1, 2]", "[1,2]", True),
        ("2.0", "2", True),
        ("true", "1", True),
        ("[1]", "[2]", False),
        ("", "[]", False),
    ],
)
def test_values(shown, expected, same):
    assert same_value(shown, expected) is same
